"""What a finished run says of itself: manifest, score ranges, report and card, from the records of its shards."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from ..data.files import atomic_file
from ..data.sources import GENERATION_REPORT, SCORE_RANGES
from ..errors import DataError
from ..pipelines.hub import model_licence
from .artists import licence_of, model_name, resolved_revision
from .card import public_name, push_table, write_card
from .config import GenerationConfig, RankingConfig
from .prompts import PromptPlan
from .store import FORMAT, Store, read_json, write_json

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"


def finish_run(config: GenerationConfig, store: Store, plan: PromptPlan, shards: int, seconds: float) -> dict[str, Any]:
    """Write everything that stands beside the shards; upload when asked.

    Returns:
        The content of ``generation_report.json``.

    Raises:
        DataError: no prompt could be ranked; what was drawn is kept in ``set_aside``.
    """
    models = {
        name: {
            "model": model_name(spec),
            "revision": resolved_revision(spec),
            "license": licence_of(spec),
            "images": spec.images, "steps": spec.steps, "guidance": spec.guidance, "scheduler": spec.scheduler,
            "height": spec.height, "width": spec.width, "prompt": spec.prompt,
        }
        for name, spec in config.artists.items()
    }  # fmt: skip
    write_lines(store.folder / "heldout.jsonl", ({"prompt": prompt} for prompt in plan.held_out))
    write_lines(store.folder / "dropped.jsonl", ({"prompt": p, "reason": reason} for p, reason in plan.dropped))
    extra = {
        "seed": config.seed,
        "prompts": {"train": len(plan.train), "held_out": len(plan.held_out), "dropped": len(plan.dropped)},
        "rank_by": config.rank_by,
        "diversity_of": config.diversity or "thumbnails",
        "pipelines": models,
        "seconds_of_this_start": seconds,
        "hold_outs": [name for name, spec in config.scorers.items() if not spec.votes],
    }
    report = summarise(store.folder, shards, config, extra)
    if config.push_to_hub is not None:
        report["hub"] = push_table(store.folder, config.push_to_hub, private=config.hub_private)
        write_json(store.folder / GENERATION_REPORT, report)
    return report


def summarise(folder: Path, shards: int, config: RankingConfig, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Add the records of all shards up and write manifest, score ranges, report and card.

    Raises:
        DataError: no row is in the table.
    """
    records = [read_json(folder / "shards" / f"{number:05d}.json") for number in range(shards)]
    files = {name: known for record in records for name, known in record["files"].items()}
    identities = records[0]["identities"]
    if any(record["identities"] != identities for record in records):
        log.warning("reward models changed between shards: their scores may not be comparable; see shards/*.json")
    facts = _sum([{key: r[key] for key in _SUMMED} for r in records])
    report = _report(facts, extra) | {"reward_models": _models(facts, identities, config)}
    write_json(
        folder / MANIFEST,
        {
            "format": FORMAT,
            "diffalign": version("diffalign"),
            "files": files,
            "rows": report["rows"],
            "images": report["images"],
            "reward_models": {name: record["identity"] for name, record in report["reward_models"].items()},
            **{key: extra[key] for key in ("seed", "rank_by", "pipelines") if key in extra},
        },
    )
    write_json(folder / GENERATION_REPORT, report)
    if not report["rows"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in report["set_aside"].items())
        raise DataError(f"{folder}: no prompt could be ranked ({reasons}). Its pictures are kept in set_aside.")
    write_json(folder / SCORE_RANGES, score_ranges(folder / name for name in files if "/" not in name))
    write_card(folder, report)
    return report


def score_ranges(shards: Iterable[Path]) -> dict[str, tuple[float, float]]:
    """(lowest, highest) score by reward model, of the rows in the table alone: what nobody trains on has no say.

    The column of scores alone is read. `load_preferences` would let `datasets` copy every picture into its cache first.
    """
    ranges: dict[str, tuple[float, float]] = {}
    for shard in shards:
        for cell in pq.read_table(shard, columns=["scores"]).column("scores").to_pylist():
            for entry in cell or []:
                if present := [value for value in entry["values"] if value is not None]:
                    low, high = ranges.get(entry["name"], (math.inf, -math.inf))
                    ranges[entry["name"]] = min(low, *present), max(high, *present)
    return ranges


_SUMMED = ("counts", "reasons", "problems", "pipelines", "scores", "agreement", "seconds")


def _sum(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Numbers of the same place added up, shard by shard; ``lowest`` and ``highest`` as what they say."""
    total: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            if isinstance(value, Mapping):
                total[key] = _sum([total.get(key, {}), value])
            elif key in ("lowest", "highest"):
                total[key] = (min if key == "lowest" else max)(total.get(key, value), value)
            else:
                total[key] = total.get(key, 0) + value
    return total


def _report(facts: dict[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    counts, seconds = facts.get("counts", {}), facts.get("seconds", {})
    drawing = sum(value for key, value in seconds.items() if key.startswith("draw "))
    drawn = sum(own["images"] for own in facts.get("pipelines", {}).values())
    ranked_pairs = {k: v for k, v in facts.get("agreement", {}).items() if k.startswith("(ranking) | ")}
    return {
        **extra,
        "rows": counts.get("rows", 0),
        "images": counts.get("images", 0),
        "drawn": drawn,
        "ties_for_first": counts.get("ties", 0),
        "all_tied": counts.get("all_tied", 0),
        "set_aside": facts.get("reasons", {}),
        "problems": facts.get("problems", {}),
        "diversity": _ratio(counts.get("diversity", 0.0), counts.get("diversity_pairs", 0)),
        "by_pipeline": {name: _of_pipeline(own) for name, own in facts.get("pipelines", {}).items()},
        "agreement": {
            name: _ratio(own["alike"], own["decided"])
            for name, own in facts.get("agreement", {}).items()
            if name not in ranked_pairs
        },
        "contradiction": {
            name.split(" | ", 1)[1]: _ratio(own["decided"] - own["alike"], own["decided"])
            for name, own in ranked_pairs.items()
        },
        "seconds": seconds,
        "device_seconds": sum(seconds.values()),
        "pictures_per_second": _ratio(drawn, drawing),
    }


def _of_pipeline(own: Mapping[str, float]) -> dict[str, Any]:
    """One pipeline's share: how often it came first, how far apart its own pictures of a prompt are, its scores."""
    ranked = own.get("ranked", 0)
    return {
        "images": own["images"],
        "not_ranked": own.get("problems", 0),
        "mean_preference": _ratio(own.get("preference", 0.0), ranked),
        "share_first": _ratio(own.get("first", 0), ranked),
        "diversity": _ratio(own.get("diversity", 0.0), own.get("diversity_pairs", 0)),
        "mean_scores": {
            name.removeprefix("scored "): own[f"score {name.removeprefix('scored ')}"] / count
            for name, count in own.items()
            if name.startswith("scored ")
        },
    }


def public_identity(identity: Mapping[str, str | None]) -> dict[str, str | None]:
    """A reward model's identity without folders of this machine."""
    return {**identity, "id": public_name(identity.get("id"))}


def _models(facts: dict[str, Any], identities: dict[str, Any], config: RankingConfig) -> dict[str, Any]:
    """Each reward model that the table has scores of; one that was not asked for has no say."""
    result = {}
    for name, identity in identities.items():
        own, spec = facts.get("scores", {}).get(name, {}), config.scorers.get(name)
        count = own.get("count", 0)
        mean = _ratio(own.get("sum", 0.0), count)
        variance = None if mean is None else max(own["squares"] / count - mean**2, 0.0)
        result[name] = {
            "identity": public_identity(identity),
            "license": (spec and spec.license) or _licence(str(identity.get("id"))),
            "votes": spec is not None and spec.votes,
            "scored": count,
            "missing": own.get("missing", 0),
            "mean": mean,
            "deviation": None if variance is None else math.sqrt(variance),
            "lowest": own["lowest"] if count else None,
            "highest": own["highest"] if count else None,
        }
    return result


def _licence(model: str) -> str | None:
    """Of a reward model, where its id is one of the hub; those of the shapes world are ours."""
    if model.startswith("shapes"):
        return model_licence("shapes")
    return model_licence(model) if model.count("/") == 1 and not model.startswith((".", "/")) else None


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def write_lines(path: Path, items: Iterable[Mapping[str, Any]]) -> None:
    """JSON lines, whole or not at all."""
    with atomic_file(path) as file:
        for item in items:
            # Half a surrogate pair cannot be written as UTF-8, but it can as an escape.
            file.write((json.dumps(item, ensure_ascii=True) + "\n").encode())
