"""`diffalign claims`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def claims(
    reports: Annotated[list[Path], typer.Argument(help="report.json of evaluations, or their folders.")],
    format: Annotated[str, typer.Option(help="markdown or latex.")] = "markdown",
    score: Annotated[
        list[str] | None, typer.Option(help="Only this score; may be given again.", show_default="all")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="File to write.", show_default="the terminal")] = None,
) -> None:
    """Make a table of methods and scores that a paper can paste.

    Each cell is the paired difference to the base with its 95 % interval; notes under the table name seeds, commits
    and settings. Runs of one method with different training seeds also get a row of their mean.
    """
    from ..evaluation.claims import claims_table

    text = claims_table(reports, format=format, scores=score)
    if output is None:
        typer.echo(text)
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n", encoding="utf-8")
        typer.echo(f"table: {output}")
