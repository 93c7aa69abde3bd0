"""Another ranking of pictures that exist: other weights, other reward models, or the order of their pipelines."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from ..data.images import image_bytes_of
from ..data.judgement import read_scores
from ..data.preferences import to_own_columns
from ..data.schema import read_image_cells, read_prompt, read_sources
from ..data.sources import open_table
from ..errors import ConfigError
from .artists import local_device
from .assembly import assemble
from .candidates import Candidate, Row
from .config import RerankConfig
from .report import MANIFEST, summarise
from .scoring import Scorer
from .store import FORMAT, Store, read_json


class StoredRows:
    """The rows of a table, and those that its run set aside whole, as candidates.

    Args:
        source: as for :func:`~diffalign.data.preferences.load_preferences`.
        split: split to read.
        revision: hub revision.
    """

    def __init__(self, source: str, split: str = "train", revision: str | None = None) -> None:
        self.table = open_table(Path(source) if Path(source).exists() else source, split=split, revision=revision)
        self.aside: list[tuple[Path, int]] = []
        for file in sorted(Path(source).glob("set_aside/*.parquet")) if split == "train" else []:
            reasons = pq.read_table(file, columns=["reason"]).column(0).to_pylist()
            self.aside += [(file, place) for place, reason in enumerate(reasons) if reason]
        manifest = Path(source) / MANIFEST
        self.identities: dict[str, Any] = read_json(manifest)["reward_models"] if manifest.is_file() else {}

    def __len__(self) -> int:
        return len(self.table) + len(self.aside)

    def __getitem__(self, number: int) -> Row:
        where = f"row {number}"
        if number < len(self.table):
            return _row(to_own_columns(self.table.record(number), where), where)
        file, place = self.aside[number - len(self.table)]
        return _row(_table(file).slice(place, 1).to_pylist()[0], f"{file}, row {place}")

    def score_names(self) -> list[str]:
        """Names of the scores of the first row."""
        return list(self[0].scores)


@lru_cache(maxsize=1)  # rows of one file are read one after the other
def _table(file: Path) -> Any:
    return pq.read_table(file)


def _row(cells: dict[str, Any], where: str) -> Row:
    images = read_image_cells(cells, where)
    count = len(images)
    sources = read_sources(cells.get("sources"), count, where) or [{} for _ in images]
    problems = cells.get("problems") or [""] * count
    candidates = [
        Candidate(
            pipeline=source.get("pipeline") or source.get("model") or "unknown",
            source=source,
            data=b"" if problem.startswith("drawing failed") else image_bytes_of(cell, f"{where}, images[{place}]"),
            problem=problem,
        )
        for place, (cell, source, problem) in enumerate(zip(images, sources, problems, strict=True))
    ]
    comparisons = {
        entry["name"]: [math.nan if value is None else value for value in entry["values"]]
        for entry in cells.get("comparisons") or []
    }
    return Row(read_prompt(cells, where), candidates, read_scores(cells.get("scores"), count, where), comparisons)


def rerank(config: RerankConfig) -> dict[str, Any]:
    """Judge the pictures of a table again and write a new table; nothing is drawn.

    Scores that the table has are taken as they are, except those named in ``rescore``; models that it has no scores of
    are loaded and asked.

    Returns:
        The report, as of a run.

    Raises:
        ConfigError: a pipeline has no weight, a reward model does not exist, or the folder holds other settings.
        DataError: the table cannot be read, or nothing can be ranked.
    """
    rows = StoredRows(config.table, config.split, config.revision)
    stored = set(rows.score_names()) - {*config.rescore, config.diversity}  # embeddings are not stored
    device = local_device()
    scorers = [
        Scorer(name, spec, device, embeds=name == config.diversity)
        for name, spec in config.scorers.items()
        if name not in stored
    ]
    identities = {s.name: s.identity for s in scorers}
    for name in config.scorers:
        identities.setdefault(name, rows.identities.get(name, {"id": name, "revision": None, "code_version": None}))
    size = config.prompts_per_shard
    shards = math.ceil(len(rows) / size)
    settings = {"format": FORMAT, **config.content(), "rows": len(rows)}
    store = Store(config.output_dir)
    with store.claimed(settings):
        for shard in range(shards):
            if store.record(shard) is None:
                chosen = [rows[number] for number in range(shard * size, min((shard + 1) * size, len(rows)))]
                _finish(store, shard, chosen, config, scorers, identities)
        extra: dict[str, Any] = {"reranked_from": Path(config.table).name, "rank_by": config.rank_by}
        extra |= {"diversity_of": config.diversity or "thumbnails"}
        extra |= {"hold_outs": [name for name, spec in config.scorers.items() if not spec.votes]}
        return summarise(store.folder, shards, config, extra)


def _finish(
    store: Store,
    shard: int,
    rows: Sequence[Row],
    config: RerankConfig,
    scorers: Sequence[Scorer],
    identities: dict[str, Any],
) -> None:
    seconds = {}
    for scorer in scorers:
        began = time.perf_counter()
        scores, comparisons = scorer.judge(rows)
        distances = scorer.distances(rows) if scorer.name == config.diversity else None
        seconds[f"score {scorer.name}"] = time.perf_counter() - began
        for number, row in enumerate(rows):
            row.distances = distances[number] if distances is not None else row.distances
            row.scores[scorer.name] = scores[number]
            row.comparisons.pop(scorer.name, None)
            if comparisons is not None:
                row.comparisons[scorer.name] = comparisons[number]
    for row in rows:
        for name in config.scorers:
            row.scores.setdefault(name, [math.nan] * len(row.candidates))
        if config.rank_by == "pipelines":
            for candidate in row.candidates:
                if candidate.pipeline not in config.pipeline_weights:
                    raise ConfigError(
                        f"pipeline_weights: {row.prompt!r} has a picture of {candidate.pipeline!r}, which has no "
                        f"weight; known: {', '.join(config.pipeline_weights)}."
                    )
    made = assemble(rows, config, config.pipeline_weights)
    judges = any(row.comparisons for row in rows)
    facts = made.facts | {"identities": identities, "seconds": seconds}
    store.finish(shard, made.rows, made.aside, facts, judges=judges)
