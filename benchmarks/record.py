"""What a measurement says of itself: when, of which commit, on which machine."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("--output-dir", "--results-dir", "--output", "--results")  # where a result goes is no part of what it is


def run_record() -> dict[str, Any]:
    """Date, commit, machine, load, versions and command of this run, as plain values."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "-uno", "diffalign", "reward_models"],
        capture_output=True,
        text=True,
        check=False,
    )
    device = f"{os.cpu_count()} {platform.machine()} CPU cores"
    return {
        "date": str(date.today()),
        "commit": (commit.stdout.strip() or "unknown") + (" and changes" if changed.stdout.strip() else ""),
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else device,
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": command(sys.argv),
    }


def command(arguments: list[str]) -> str:
    """How the program was called, without the folders of whoever called it."""
    kept, rest = [], iter(arguments[1:])
    for word in rest:
        if word in PLACES:
            next(rest, None)
        elif word.partition("=")[0] not in PLACES:
            kept.append(word)
    return " ".join(["python", f"benchmarks/{Path(arguments[0]).name}", *kept])
