"""Another ranking of pictures that exist: other weights, other reward models, or the order of their pipelines."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from ..data.images import content_hash, image_bytes_of
from ..data.judgement import read_scores
from ..data.preferences import outline_scores, to_own_columns
from ..data.schema import read_image_cells, read_prompt, read_sources
from ..data.sources import open_table, pictures_within
from ..errors import ConfigError
from .artists import local_device
from .assembly import assemble
from .candidates import Candidate, Row
from .config import RerankConfig
from .report import MANIFEST, public_identity, summarise
from .scoring import Scorer
from .store import FORMAT, Store, file_hash, read_json

log = logging.getLogger(__name__)


class StoredRows:
    """The rows of a table, and those that its run set aside whole, as candidates.

    Args:
        source: as for :func:`~diffalign.data.preferences.load_preferences`.
        split: split to read.
        revision: hub revision.
    """

    def __init__(self, source: str, split: str = "train", revision: str | None = None) -> None:
        self.folder = Path(source)
        self.table = open_table(self.folder if self.folder.exists() else source, split=split, revision=revision)
        #: Names of the scores of each row; no picture is read for them.
        self.scored = [list(outline_scores(cells, f"row {n}")) for n, cells in enumerate(self.table.outlines())]
        self.aside: list[tuple[Path, int]] = []
        for file in sorted(self.folder.glob("set_aside/*.parquet")) if split == "train" else []:
            for place, cells in enumerate(pq.read_table(file, columns=["reason", "scores"]).to_pylist()):
                if cells["reason"]:
                    self.aside.append((file, place))
                    self.scored.append([entry["name"] for entry in cells["scores"] or []])
        manifest = self.folder / MANIFEST
        self.manifest: dict[str, Any] = read_json(manifest) if manifest.is_file() else {}
        self._split = split
        self._open: tuple[Path, Any] | None = None

    def __len__(self) -> int:
        return len(self.table) + len(self.aside)

    def __getitem__(self, number: int) -> Row:
        where = f"row {number}"
        if number < len(self.table):
            return _row(to_own_columns(self.table.record(number), where), where)
        file, place = self.aside[number - len(self.table)]
        if self._open is None or self._open[0] != file:  # rows of one file are read one after the other
            self._open = file, pq.read_table(file)
        where = f"{file}, row {place}"
        return _row(pictures_within([self.folder], self._open[1].slice(place, 1).to_pylist()[0], where), where)

    def digest(self) -> str:
        """Tells what is in this table from what is in another."""
        if self.manifest and self._split == "train":  # it holds the hashes of all files
            return file_hash(self.folder / MANIFEST)
        files = [file_hash(file) for file in dict.fromkeys(file for file, _ in self.aside)]
        return content_hash(repr([self.table.fingerprint, *files]).encode())

    def score_names(self) -> list[str]:
        """Names of the scores of all rows."""
        return list(dict.fromkeys(name for names in self.scored for name in names))


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

    Scores that the table has are taken as they are, except those named in ``rescore``; models whose scores some rows
    lack are loaded and asked about those rows.

    Returns:
        The report, as of a run.

    Raises:
        ConfigError: a pipeline has no weight, a reward model does not exist, or the folder holds other settings or what
            was made of another table.
        DataError: the table cannot be read, or nothing can be ranked.
    """
    rows = StoredRows(config.table, config.split, config.revision)
    scorers = _scorers(config, rows)
    identities = _identities(config, rows, scorers)
    size = config.prompts_per_shard
    shards = math.ceil(len(rows) / size)
    settings = {"format": FORMAT, **config.content(), "rows": len(rows), "table_digest": rows.digest()}
    store = Store(config.output_dir)
    with store.claimed(settings):
        for shard in range(shards):
            if store.record(shard) is None:
                chosen = [rows[number] for number in range(shard * size, min((shard + 1) * size, len(rows)))]
                judges = "comparisons" in rows.table.columns or any(scorer.pairs for scorer in scorers)
                _finish(store, shard, chosen, config, scorers, identities, judges=judges)
        voters = [name for name, spec in config.scorers.items() if spec.votes]
        extra: dict[str, Any] = {
            "reranked_from": Path(config.table).name,
            "rank_by": config.rank_by,
            "diversity_of": config.diversity,  # there are no thumbnails
            "hold_outs": [name for name in dict.fromkeys([*rows.score_names(), *config.scorers]) if name not in voters],
            **{key: rows.manifest[key] for key in ("seed", "pipelines") if key in rows.manifest},
        }
        return summarise(store.folder, shards, config, extra)


def _anew(config: RerankConfig) -> set[str | None]:
    """Scores that are made whether or not the table has them; embeddings are not stored."""
    return {*config.rescore, config.diversity}


def _scorers(config: RerankConfig, rows: StoredRows) -> list[Scorer]:
    """The models that have something to do."""
    device, anew = local_device(), _anew(config)
    return [
        Scorer(name, spec, device, embeds=name == config.diversity)
        for name, spec in config.scorers.items()
        if name in anew or any(name not in scored for scored in rows.scored)
    ]


def _identities(config: RerankConfig, rows: StoredRows, scorers: Sequence[Scorer]) -> dict[str, Any]:
    """Who made the scores of the new table: those that it keeps, and those that are asked now."""
    identities: dict[str, Any] = dict(rows.manifest.get("reward_models", {}))
    for scorer in scorers:
        known = identities.get(scorer.name)
        if scorer.name not in _anew(config) and known not in (None, public_identity(scorer.identity)):
            text = "%s: some rows keep scores of another model, %s; rescore=[%s] asks anew"
            log.warning(text, scorer.name, known, scorer.name)
        identities[scorer.name] = scorer.identity
    for name in config.scorers:
        identities.setdefault(name, {"id": name, "revision": None, "code_version": None})
    return identities


def _finish(
    store: Store,
    shard: int,
    rows: Sequence[Row],
    config: RerankConfig,
    scorers: Sequence[Scorer],
    identities: dict[str, Any],
    *,
    judges: bool,
) -> None:
    seconds = {}
    for scorer in scorers:
        began = time.perf_counter()
        asked = [row for row in rows if scorer.name in _anew(config) or scorer.name not in row.scores]
        scores, comparisons = scorer.judge(asked)
        distances = scorer.distances(asked) if scorer.name == config.diversity else None
        seconds[f"score {scorer.name}"] = time.perf_counter() - began
        for number, row in enumerate(asked):
            row.distances = distances[number] if distances is not None else row.distances
            row.scores[scorer.name] = scores[number]
            row.comparisons.pop(scorer.name, None)
            if comparisons is not None:
                row.comparisons[scorer.name] = comparisons[number]
    if config.rank_by == "pipelines":
        for row in rows:
            for candidate in row.candidates:
                if candidate.pipeline not in config.pipeline_weights:
                    raise ConfigError(
                        f"pipeline_weights: {row.prompt!r} has a picture of {candidate.pipeline!r}, which has no "
                        f"weight; known: {', '.join(config.pipeline_weights)}."
                    )
    made = assemble(rows, config, config.pipeline_weights)
    facts = made.facts | {"identities": identities, "seconds": seconds}
    store.finish(shard, made.rows, made.aside, facts, judges=judges)
