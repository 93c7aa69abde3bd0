"""`diffalign train` under accelerate, for more than one process:

accelerate launch --config_file training/launch/multi_gpu.yaml training/train.py CONFIG [key=value ...]
"""

import sys

from diffalign.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
