"""`diffalign data ...`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

data_app = typer.Typer(name="data", help="Preference tables.", no_args_is_help=True, rich_markup_mode=None)


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


@data_app.command()
def rerank(
    table: Annotated[
        str, typer.Argument(metavar="TABLE", help="Folder, Parquet file or hub id of a preference table.")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder of the new table.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="rank_by, reward_models, missing, rescore, pipeline_weights, ..."),
    ] = None,
) -> None:
    """Judge the pictures of a table again; nothing is drawn.

    Scores that the table holds are used as they are; reward models that it has no scores of are asked. Without
    reward_models, all stored scores vote.
    """
    from ..synthesis.config import RerankConfig, apply_override, parse
    from ..synthesis.rerank import StoredRows
    from ..synthesis.rerank import rerank as run
    from .generate import summary

    values: dict[str, Any] = {"table": table, "output_dir": str(output)}
    for override in overrides or []:
        apply_override(values, override)
    if "reward_models" not in values:
        values["reward_models"] = StoredRows(table, values.get("split", "train"), values.get("revision")).score_names()
    config = parse(RerankConfig, values)
    typer.echo(summary(run(config), str(output)))


@data_app.command()
def export(
    table: Annotated[
        str, typer.Argument(metavar="TABLE", help="Folder, Parquet file or hub id of a preference table.")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder to write.")],
    form: Annotated[str, typer.Option("--format", help="pickapic, folder or webdataset.")] = "pickapic",
    pairs: Annotated[str, typer.Option(help="Of pickapic: best_worst, adjacent or all.")] = "best_worst",
    min_margin: Annotated[float, typer.Option(help="Of pickapic: drop pairs closer than this in preference.")] = 0.0,
    ties: Annotated[str, typer.Option(help="Of pickapic: drop, or soft to keep ties as label 0.5.")] = "drop",
    split: Annotated[str, typer.Option(help="Split to read.")] = "train",
) -> None:
    """Write a table as other programs read it: Pick-a-Pic v2's columns, pictures as files, or WebDataset."""
    from ..data import load_preferences, select_pairs, write_pickapic
    from ..errors import ConfigError
    from ..synthesis.export import export_folder, export_webdataset

    forms = ("pickapic", "folder", "webdataset")
    if form not in forms:
        raise ConfigError(f"--format: expected one of {', '.join(forms)}, got {form!r}.")
    if form != "pickapic" and (pairs, min_margin, ties) != ("best_worst", 0.0, "drop"):
        raise ConfigError(
            f"--pairs, --min-margin and --ties select pairs for pickapic; --format {form} writes whole rows."
        )
    dataset = load_preferences(table, split=split)
    if form == "pickapic":
        examples, counts = select_pairs(dataset, pairs=pairs, min_margin=min_margin, ties=ties)
        write_pickapic(dataset, examples, output)
        typer.echo(f"{counts['pairs']} pairs of {counts['rows']} rows: {output}")
        return
    if form == "folder":
        export_folder(dataset, output)
    else:
        export_webdataset(dataset, output)
    typer.echo(f"{len(dataset)} rows: {output}")


@data_app.command()
def push(
    table: Annotated[Path, typer.Argument(metavar="TABLE", help="Folder that `diffalign generate` finished.")],
    name: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Data set on the hub; made when missing.")],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
) -> None:
    """Upload a finished table with its card to the Hugging Face hub."""
    from ..synthesis.card import push_table

    typer.echo(push_table(table, name, private=not public))
