"""A report's numbers as text."""

from __future__ import annotations

from typing import Any


def score_table(report: dict[str, Any]) -> str:
    """The scores of a ``report.json`` (or of a model in it) as a table: means, paired difference and win rate.

    A score that had a part in training is marked.
    """
    rows = [("score", "base", "aligned", "difference [95 %]", "win rate [95 %]", "ties", "n")]
    for name, score in report["scores"].items():
        difference, wins = score["difference"], score["win_rate"]
        rows.append(
            (
                name + (f" ({score['role']})" if score.get("role") in ("trained-on", "related") else ""),
                _number(score["base"]),
                _number(score["aligned"]),
                _interval(difference["mean"], difference["ci95"], "+"),
                _interval(wins["value"], wins["ci95"], ""),
                _number(wins["ties"]),
                str(difference["n"]),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.3f}"


def _interval(value: float | None, bounds: list[float | None] | None, sign: str) -> str:
    low, high = bounds or (None, None)
    return f"{_number(value, sign)} [{_number(low, sign)}, {_number(high, sign)}]"
