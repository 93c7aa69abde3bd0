"""`python -m diffalign.cli`, where the console script is not installed."""

from .app import main

main()
