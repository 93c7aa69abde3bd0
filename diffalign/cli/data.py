"""`diffalign data ...`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

data_app = typer.Typer(name="data", help="Preference tables.", no_args_is_help=True, rich_markup_mode=None)


@data_app.callback()
def _data() -> None:
    """Keeps `check` a subcommand while it is the only one."""


@data_app.command()
def check(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Folder, Parquet file or hub id of a preference table.")],
    split: Annotated[str, typer.Option(help="Split to read.")] = "train",
    revision: Annotated[str | None, typer.Option(help="Revision of a hub dataset.", show_default="the newest")] = None,
    score: Annotated[
        str | None, typer.Option(help="Judge by this reward model's scores.", show_default="the table's preferences")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    output: Annotated[Path | None, typer.Option(help="Also write the report, as JSON, to this file.")] = None,
) -> None:
    """Say what is in a table, and what is wrong.

    Reports counts, ties, sizes, duplicates, prompt lengths, and every bad row by its number. Exits with 1
    when a row cannot be used.
    """
    from ..data import check_preferences

    report = check_preferences(path, split=split, revision=revision, score=score)
    text = json.dumps(report.to_dict(), indent=2, ensure_ascii=False)
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")
    typer.echo(text if as_json else str(report))
    if not report.ok:
        raise typer.Exit(1)
