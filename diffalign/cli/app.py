"""The application: its commands, its logging, and one clear line for what is the input's fault."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from .. import __version__
from .claims import claims
from .data import data_app
from .evaluate import evaluate
from .failures import one_line
from .generate import GenerateCommand, generate
from .info import info
from .quickstart import quickstart
from .score import score
from .train import TrainCommand, train

app = typer.Typer(
    name="diffalign",
    help="Preference alignment of diffusion models. Wherever a model is named, `shapes` is the embedded micro SDXL.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(quickstart)
app.command(cls=GenerateCommand)(generate)
app.command(cls=TrainCommand)(train)
app.command()(evaluate)
app.command()(claims)
app.command()(score)
app.add_typer(data_app)
app.command()(info)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def _common(
    debug: Annotated[bool, typer.Option("--debug", help="Show full tracebacks and debug messages.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    main_process = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if main_process else logging.WARNING, format="%(message)s")
    logging.getLogger("diffalign").setLevel(logging.DEBUG if debug else logging.NOTSET)
    for chatty in ("accelerate", "httpx", "matplotlib", "PIL"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status.

    Args:
        arguments: without the program's name; None takes ``sys.argv``. ``--debug`` may stand anywhere. Modules of the
            working folder can be named, as in ``--reward-model my_scorer:score``.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "" not in sys.path:  # a program has its own folder there, not yours; last, so that it hides nothing installed
        sys.path.append("")
    debug = "--debug" in given
    try:
        app(args=["--debug"] * debug + [a for a in given if a != "--debug"], prog_name="diffalign")
    except Exception as error:
        line = one_line(error)
        if debug or line is None:
            raise
        rank = os.environ.get("RANK")
        typer.echo(f"error{f' (process {rank})' if rank else ''}: {line}", err=True)
        sys.exit(1)
