"""`diffalign score`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..evaluation.score_table import EnsembleChoice, ModelChoice


def score(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Folder of pictures, preference table, hub id, .jsonl or .csv.")
    ],
    model: Annotated[
        list[str], typer.Option(help="Reward model, as MODEL or COLUMN=MODEL; may be given again. `diffalign info`.")
    ],
    output: Annotated[Path, typer.Option(help="A .parquet or .csv file; the summary is OUTPUT.json.")],
    set_option: Annotated[
        list[str] | None, typer.Option("--set", help="An option of a model, as COLUMN.OPTION=VALUE; may come again.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Prompt of all pictures, where they have none.")] = None,
    split: Annotated[str, typer.Option(help="Split of a table.")] = "train",
    revision: Annotated[str | None, typer.Option(help="Revision of a hub table.", show_default="the newest")] = None,
    ensemble: Annotated[
        str | None, typer.Option(help="Also combine the models: votes, zscore or mean.", show_default="no")
    ] = None,
    weight: Annotated[
        list[str] | None, typer.Option(help="COLUMN=NUMBER in the ensemble; may come again.", show_default="1 each")
    ] = None,
    missing: Annotated[
        str | None,
        typer.Option(
            help="Missing scores in the ensemble: skip_model, skip_row or skip_picture.", show_default="skip_model"
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...", show_default="the model's own")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Score pictures with one or more reward models.

    The models take turns in memory. A stopped command, given again, continues. The summary tells each model's identity
    and how the models correlate.
    """
    from ..evaluation.score_table import score_table

    summary = score_table(
        source,
        _models(model, set_option or []),
        output,
        prompt=prompt,
        split=split,
        revision=revision,
        ensemble=_ensemble(ensemble, weight or [], missing),
        device=device,
        overwrite=overwrite,
        progress=not as_json,
    )
    typer.echo(json.dumps(summary, indent=2, ensure_ascii=False) if as_json else _text(summary))
    if not as_json:
        typer.echo(f"scores: {output} (summary in {output}.json)")


def _models(given: list[str], settings: list[str]) -> list[ModelChoice]:
    from ..errors import ConfigError
    from ..evaluation.score_table import ModelChoice

    models = {}
    for text in given:
        written, question, options = text.partition("?")
        column, _, name = written.rpartition("=")
        column, name = column or name.rpartition(":")[2], name + question + options
        if column in models:
            raise ConfigError(f"two models are named {column}; give one another name, as NAME={name}.")
        models[column] = (name, dict[str, Any]())
    for text in settings:
        place, equals, value = text.partition("=")
        column, dot, option = place.rpartition(".")
        if not (equals and dot and option) or column not in models:
            raise ConfigError(
                f"--set {text}: expected COLUMN.OPTION=VALUE with a column of {', '.join(models)}, for example "
                f"{next(iter(models))}.batch_size=8."
            )
        models[column][1][option] = _value(option, value)
    return [ModelChoice(column, name, options) for column, (name, options) in models.items()]


def _value(option: str, text: str) -> Any:
    import yaml

    from reward_models.keys import KEY_ADVICE
    from reward_models.registry import DTYPES

    from ..errors import ConfigError
    from ..yaml_dialect import Loader

    if option == "api_key":
        raise ConfigError(f"--set {option}: {KEY_ADVICE}")
    if option == "dtype":
        if text not in DTYPES:
            raise ConfigError(f"dtype: expected {', '.join(DTYPES)}, got {text!r}.")
        return DTYPES[text]
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {option}: {text!r} is no YAML value ({error}).") from error


def _ensemble(rule: str | None, weights: list[str], missing: str | None) -> EnsembleChoice | None:
    from ..errors import ConfigError
    from ..evaluation.score_table import EnsembleChoice

    if rule is None:
        if weights or missing is not None:
            raise ConfigError("--weight and --missing belong to an ensemble; give --ensemble votes, zscore or mean.")
        return None
    parsed = {}
    for text in weights:
        column, _, number = text.rpartition("=")
        try:
            parsed[column] = float(number)
        except ValueError:
            raise ConfigError(f"--weight {text}: expected COLUMN=NUMBER.") from None
    return EnsembleChoice(rule, parsed, missing or "skip_model")


def _text(summary: dict[str, Any]) -> str:
    described = dict(summary["models"])
    if "ensemble" in summary:
        described["ensemble"] = summary["ensemble"]
    rows: list[tuple[str, ...]] = [("score", "mean", "std", "min", "max", "n", "missing")]
    for name, of in described.items():
        rows.append(
            (name, *(_number(of[key]) for key in ("mean", "std", "min", "max")), str(of["scored"]), str(of["missing"]))
        )
    lines = _aligned(rows)
    if summary["correlations"]:
        rows = [("correlation", "spearman", "pearson", "n")]
        for pair in summary["correlations"]:
            rows.append(
                (" ~ ".join(pair["between"]), _number(pair["spearman"]), _number(pair["pearson"]), str(pair["n"]))
            )
        lines += ["", *_aligned(rows)]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _aligned(rows: list[tuple[Any, ...]]) -> list[str]:
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
