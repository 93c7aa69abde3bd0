"""`diffalign generate`: prompts in, a ranked preference table out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand


class GenerateCommand(TyperCommand):
    """Its help ends with every key of the configuration."""

    def get_help(self, ctx: Any) -> str:
        """Usage and options, then all keys."""
        from ..synthesis.config import describe, examples

        parts = [super().get_help(ctx), f"Examples: {', '.join(examples())}"]
        return "\n\n".join([*parts, "Keys (in CONFIG as YAML, here as key=value or pipelines.0.steps=30):", describe()])


def generate(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or an example's name: shapes-synpic.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings in place of the file's, as in YAML.")
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="Training run whose model is added as the pipeline `policy`, for another round.")
    ] = None,
    process: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="This is process I (from 0) of N; a launcher says so by itself."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Check the settings, print them all as YAML, and stop.")
    ] = False,
) -> None:
    """Draw pictures for prompts, score and rank them, write a preference table.

    Started again after any interruption, it continues, and the table is the same. On many GPUs:
    accelerate launch --multi_gpu -m diffalign.cli generate CONFIG [KEY=VALUE]...
    """
    from ..errors import ConfigError
    from ..synthesis.config import dump, load_generation
    from ..synthesis.policy import with_policy

    settings = load_generation(config, overrides or [])
    if policy is not None:
        settings = with_policy(settings, policy)
    if check:
        typer.echo(dump(settings), nl=False)
        return
    from ..environment import check_torch_pair

    check_torch_pair()
    from ..synthesis.run import generate as run

    number, total = None, None
    if process is not None:
        first, slash, second = process.partition("/")
        if not (slash and first.isdigit() and second.isdigit()):
            raise ConfigError(f"--process: expected I/N, for example 0/4, got {process!r}.")
        number, total = int(first), int(second)
    report = run(settings, process=number, processes=total)
    if report is not None:
        typer.echo(summary(report, settings.output_dir))


def summary(report: dict[str, Any], folder: str) -> str:
    """A report in a few lines."""
    from ..synthesis.card import number

    lines = [
        f"{report['rows']} rows with {report['images']} ranked pictures of {report['drawn']} drawn; "
        f"{report['ties_for_first']} rows tie for first, {report['all_tied']} wholly."
    ]
    lines += [f"set aside: {count} rows, {reason}" for reason, count in report["set_aside"].items()]
    lines += [f"not ranked: {count} pictures, {problem}" for problem, count in report["problems"].items()]
    for name, own in report["by_pipeline"].items():
        scores = ", ".join(f"{score} {number(value)}" for score, value in own["mean_scores"].items())
        lines.append(
            f"pipeline {name}: mean preference {number(own['mean_preference'])}, diversity {number(own['diversity'])}"
            f"; {scores or 'no scores'}"
        )
    for name, value in report["contradiction"].items():
        lines.append(f"{name} contradicts the ranking on {number(value)} of the pairs it decides")
    lines.append(f"table: {folder}\nreport: {Path(folder) / 'generation_report.json'}")
    return "\n".join(lines)
