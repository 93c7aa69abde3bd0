"""`diffalign quickstart`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def quickstart(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Training settings in place of the recipe's.")
    ] = None,
    output_dir: Annotated[Path, typer.Option(help="Folder of everything it makes.")] = Path("out/quickstart"),
    seed: Annotated[int, typer.Option(help="Key of all randomness: prompts, pictures and training.")] = 0,
) -> None:
    """Generate, rank, train, evaluate: on a CPU.

    The embedded micro SDXL draws pictures for training prompts, the checker ranks them, DPO trains on them, and
    held-out prompts decide. Minutes on two cores.
    """
    from ..environment import check_torch_pair

    check_torch_pair()
    from ..quickstart import run
    from .tables import score_table

    report = run(output_dir, seed=seed, overrides=overrides)
    typer.echo(f"\nHeld-out prompts, {report['method']} against its base:\n{score_table(report)}\n")
    typer.echo(f"report: {output_dir / 'report.html'} (numbers in report.json, pictures in grid.png)\n\nNext, try:")
    for command in report["next_commands"]:
        typer.echo(f"  {command}")
