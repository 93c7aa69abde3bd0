"""What a large run of the generator costs on 1, 8 and 64 devices, from the shards of a small one.

    python benchmarks/generate_cost.py out/try                         # Syn-Pic's 58,000 prompts, settings of that run
    python benchmarks/generate_cost.py out/try --prompts 10000 --devices 4 --load-seconds 90

Every finished shard of a run recorded the seconds that its pipelines and reward models took on one device. The large
run is played with these: a shard of it takes what a measured one took, drawn at random; process i of n works on shards
i, i + n, i + 2n, ... as the generator does; each process loads its models once; the run ends with the last process.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SYNPIC_PROMPTS = 58_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="a finished run of `diffalign generate`")
    parser.add_argument("--prompts", type=int, default=SYNPIC_PROMPTS)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--load-seconds", type=float, default=60.0, help="of all models, once a process")
    arguments = parser.parse_args()
    shards = read_shards(arguments.table)
    costs = project(shards, arguments.prompts, arguments.devices, arguments.load_seconds)
    print(f"{rates(shards)}\n\n{markdown(costs, arguments.prompts, arguments.load_seconds)}")


def read_shards(table: Path) -> list[dict[str, Any]]:
    """The records of a run's shards: prompts, pictures by pipeline, and seconds by stage."""
    found = []
    for file in sorted((table / "shards").glob("*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        images = {name: int(own["images"]) for name, own in record["pipelines"].items()}
        found.append({"prompts": record["counts"]["prompts"], "images": images, "seconds": record["seconds"]})
    if not found:
        raise SystemExit(f"{table} holds no finished shards of `diffalign generate`.")
    return found


def rates(shards: Sequence[dict[str, Any]]) -> str:
    """Device-seconds a picture, stage by stage, as a table."""
    total = {name: sum(shard["images"][name] for shard in shards) for name in shards[0]["images"]}
    lines = ["| stage | pictures | device-seconds a picture |", "|---|---|---|"]
    for stage in shards[0]["seconds"]:
        pictures = total.get(stage.removeprefix("draw "), sum(total.values()))
        lines.append(f"| {stage} | {pictures:,} | {sum(shard['seconds'][stage] for shard in shards) / pictures:.4f} |")
    return "\n".join(lines)


def project(
    shards: Sequence[dict[str, Any]], prompts: int, devices: Sequence[int], load_seconds: float, *, seed: int = 0
) -> list[dict[str, float]]:
    """Play a run of so many prompts.

    Args:
        shards: measured ones (:func:`read_shards`); the last, which may be short, is left out where there are others.
        prompts: of the run.
        devices: each one process.
        load_seconds: before a process's first shard.
        seed: of the shards' times.

    Returns:
        For each number of devices: ``devices``, ``hours`` until the end, ``device_hours`` paid until then, and
        ``busy``, the share of these that is work.
    """
    full = max(shard["prompts"] for shard in shards)
    measured = [sum(shard["seconds"].values()) for shard in shards if shard["prompts"] == full]
    rng = random.Random(seed)
    whole, rest = divmod(prompts, full)
    drawn = [rng.choice(measured) for _ in range(whole)] + ([rng.choice(measured) * rest / full] if rest else [])
    result = []
    for count in devices:
        ends = [load_seconds + sum(drawn[process::count]) for process in range(count) if drawn[process::count]]
        hours = max(ends) / 3600
        result.append(
            {
                "devices": count,
                "hours": hours,
                "device_hours": hours * count,
                "busy": sum(drawn) / 3600 / (hours * count),
            }
        )
    return result


def markdown(costs: Sequence[dict[str, float]], prompts: int, load_seconds: float) -> str:
    """The cost as a table."""
    lines = [
        f"{prompts:,} prompts; {load_seconds:g} s to load the models in each process.",
        "",
        "| devices | hours | device-hours | of these, work |",
        "|---|---|---|---|",
    ]
    for own in costs:
        lines.append(f"| {own['devices']} | {own['hours']:.3g} | {own['device_hours']:.3g} | {own['busy']:.1%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
