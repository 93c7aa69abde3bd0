"""`diffalign info`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer


def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, devices, what is installed.

    Exits with 1 when torch and torchvision do not match.
    """
    from ..environment import info as gather

    report = gather()
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        for key, value in report.items():
            if value is not None:
                typer.echo(f"{key}: {_words(value)}")
    if report["problem"]:
        typer.echo(f"error: {report['problem']}", err=True)
        raise typer.Exit(1)


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(item)}" for name, item in value.items())
    if isinstance(value, list):
        return "; ".join(_words(item) for item in value) or "none"
    if value is None or isinstance(value, bool):
        return {None: "-", True: "yes", False: "no"}[value]
    return str(value)
