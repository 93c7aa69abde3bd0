"""A run: prompts to pictures to scores to rows, shard by shard, so that a killed run continues where it was."""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from reward_models import available_reward_models

from ..errors import ConfigError, DataError
from .artists import Artist, local_device
from .assembly import assemble
from .candidates import Candidate, Row, encode, mark_duplicates, problem_of, thumbnail
from .config import GenerationConfig
from .overlap import overlap
from .prompts import PromptPlan, plan_prompts
from .report import finish_run
from .scoring import Scorer
from .store import FORMAT, Store, weights_digest

log = logging.getLogger(__name__)
_ENCODERS = min(4, os.cpu_count() or 1)
_STALL = 900.0  # seconds without a finished shard after which the others are looked for


@dataclass
class _Shard:
    """A shard on its way.

    Args:
        number: of the shard.
        whole: whether the pictures of all pipelines are there, once those in ``drawing`` are.
        drawing: by pipeline what is being encoded, per prompt, and the seconds it took to draw.
        rows: filled when the pictures are together.
        seconds: by stage.
    """

    number: int
    whole: bool = True
    drawing: dict[str, tuple[list[list[Future[Candidate]]], float]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def generate(
    config: GenerationConfig, *, process: int | None = None, processes: int | None = None
) -> dict[str, Any] | None:
    """Draw, judge, rank and write; or continue what was stopped.

    Args:
        config: settings; see :class:`~.config.GenerationConfig`.
        process: number of this process among those that share the work; what a launcher says when None.
        processes: how many share it; what a launcher says when None. Processes meet in the output folder alone, so
            they may run on any machines that share it, and need not start together.

    Returns:
        The content of ``generation_report.json``; None on all processes but the first.

    Raises:
        ConfigError: a setting cannot be used, another run works in the folder, or it holds other settings.
        DataError: a prompt source or a file cannot be used, the disk is full, or nothing could be ranked. What was
            finished stays.
    """
    process = int(os.environ.get("RANK", "0")) if process is None else process
    processes = int(os.environ.get("WORLD_SIZE", "1")) if processes is None else processes
    if not 0 <= process < processes:
        raise ConfigError(f"expected a process from 0 to {processes - 1}, got {process}.")
    _check_models(config)
    plan = plan_prompts(config)
    size = config.prompts_per_shard
    shards = [plan.train[start : start + size] for start in range(0, len(plan.train), size)]
    store = Store(config.output_dir, process, processes)
    log.info("%s; %d shards", plan, len(shards))
    with store.claimed(claim(config, plan)):
        todo = [n for n in range(len(shards)) if n % processes == process and store.record(n) is None]
        began = time.perf_counter()
        if todo:
            run = _Run(config, store, shards)
            run.together(todo) if config.load_models == "together" else run.one_by_one(todo)
        if process != 0:
            return None
        _wait_for_others(store, len(shards))
        store.clear_work()
        return finish_run(config, store, plan, len(shards), time.perf_counter() - began)


def claim(config: GenerationConfig, plan: PromptPlan) -> dict[str, Any]:
    """What two runs must share to be one: settings, prompts, and the weights of local models and LoRAs.

    A round after another may well find other weights under the same name.
    """
    from ..evaluation.lora import find_weights  # late: evaluation draws with this package

    weights = {}
    for name, spec in config.artists.items():
        if Path(spec.model).exists():
            weights[name] = weights_digest(Path(spec.model))
        if spec.lora is not None and Path(spec.lora).exists():
            weights[f"{name}, lora"] = weights_digest(find_weights(spec.lora)[1])
    return {"format": FORMAT, **config.content(), "prompts_digest": plan.digest, "weights": weights}


def _check_models(config: GenerationConfig) -> None:
    """Misspelt reward models are found before anything is drawn."""
    import difflib

    known = available_reward_models()
    for spec in config.reward_models:
        if ":" not in spec.model and spec.model not in known:
            near = difflib.get_close_matches(spec.model, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"there is no reward model {spec.model!r}.{hint} Known: {', '.join(sorted(known))}.")


def _wait_for_others(store: Store, shards: int) -> None:
    """Until every shard is finished by whoever has it."""
    last, missing, told = time.monotonic(), list(range(shards)), False
    while pending := [n for n in missing if store.record(n) is None]:
        if len(pending) != len(missing):
            last, missing = time.monotonic(), pending
        if not told:
            log.info("waiting for %d shards of the other processes", len(missing))
            told = True
        owners = sorted({n % store.processes for n in missing})
        if time.monotonic() - last > _STALL and not any(store.is_running(owner) for owner in owners):
            raise DataError(
                f"shards {missing[:8]} are not finished, and processes {owners} are not running. What is finished is "
                "safe: start the same command again."
            )
        time.sleep(0.2)


class _Run:
    """The stages of one process."""

    def __init__(self, config: GenerationConfig, store: Store, shards: Sequence[Sequence[str]]) -> None:
        self.config, self.store, self.shards = config, store, shards
        self.device = local_device()
        self.bar = tqdm(desc="prompts", unit="prompt", disable=None if store.process == 0 else True)

    # --- in which order --------------------------------------------------------------------------------------------

    def together(self, todo: Sequence[int]) -> None:
        """All models in memory; drawing, encoding, scoring and writing go on at the same time."""
        config, store = self.config, self.store
        scorers = [self._scorer(name) for name in config.scorers]
        artists = [Artist(name, spec, self.device) for name, spec in config.artists.items()]

        def judge(shard: _Shard) -> None:
            if shard.whole:
                self._gather(shard)
                for scorer in scorers:
                    self._score(shard, scorer)
                self._take_scores(shard)

        def write(shard: _Shard) -> None:
            if shard.whole:
                self._write(shard)

        with ThreadPoolExecutor(_ENCODERS) as pool:

            def drawn() -> Iterator[_Shard]:
                for number in todo:
                    for artist in artists:  # each goes on by itself, so that a kill costs no more than one's pictures
                        shard = _Shard(number, whole=artist is artists[-1])
                        if not store.has_drawn(number, artist.name):
                            self._draw(shard, artist, pool)
                        yield shard

            overlap(drawn(), self._keep, judge, write)
        for artist in artists:
            artist.close()
        self.bar.close()

    def one_by_one(self, todo: Sequence[int]) -> None:
        """Each model alone in memory; pictures and scores wait on the disk."""
        store = self.store
        undrawn = {name: [n for n in todo if not store.has_drawn(n, name)] for name in self.config.artists}
        if any(undrawn.values()):  # what cannot be loaded is found now, not after days of drawing
            for name in self.config.scorers:
                self._scorer(name)
                _free()
        for name, spec in self.config.artists.items():
            if need := undrawn[name]:
                artist = Artist(name, spec, self.device)
                with ThreadPoolExecutor(_ENCODERS) as pool:
                    overlap((self._draw(_Shard(number), artist, pool) for number in need), self._keep)
                artist.close()
                del artist
                _free()
        for name in self.config.scorers:
            if need := [number for number in todo if not store.has_scores(number, name)]:
                scorer = self._scorer(name)
                overlap((self._gather(_Shard(number)) for number in need), partial(self._score, scorer=scorer))
                del scorer
                _free()
        overlap((self._take_scores(self._gather(_Shard(number))) for number in todo), self._write)
        self.bar.close()

    def _scorer(self, name: str) -> Scorer:
        return Scorer(name, self.config.scorers[name], self.device, embeds=name == self.config.diversity)

    # --- the stages ------------------------------------------------------------------------------------------------

    def _draw(self, shard: _Shard, artist: Artist, pool: ThreadPoolExecutor) -> _Shard:
        """Draw a pipeline's pictures; encoding goes on in the pool."""
        prompts, began = self.shards[shard.number], time.perf_counter()
        images = artist.draw(prompts, self.config.seed)
        drawing = [
            [
                pool.submit(self._candidate, artist.name, artist.source(prompt, i, self.config.seed), next(images))
                for i in range(artist.spec.images)
            ]
            for prompt in prompts
        ]
        shard.drawing[artist.name] = drawing, time.perf_counter() - began
        return shard

    def _candidate(self, pipeline: str, source: dict[str, Any], image: Image.Image | str) -> Candidate:
        if isinstance(image, str):
            return Candidate(pipeline, source, problem=image)
        data = encode(image, self.config.image_format, self.config.image_quality)
        return Candidate(pipeline, source, data, problem_of(image), thumbnail(image))

    def _keep(self, shard: _Shard) -> None:
        """Lay drawn pictures down, so that a kill does not cost them."""
        for name, (drawing, seconds) in shard.drawing.items():
            rows = [[future.result() for future in row] for row in drawing]
            self.store.put_drawn(shard.number, name, rows, seconds)
        shard.drawing.clear()

    def _gather(self, shard: _Shard) -> _Shard:
        """The candidates of all pipelines, repeats marked."""
        prompts = self.shards[shard.number]
        shard.rows = [Row(prompt, []) for prompt in prompts]
        for name in self.config.artists:
            drawn, seconds = self.store.drawn(shard.number, name, len(prompts))
            shard.seconds[f"draw {name}"] = seconds
            for row, candidates in zip(shard.rows, drawn, strict=True):
                row.candidates += candidates
        for row in shard.rows:
            row.candidates = mark_duplicates(row.candidates, self.config.duplicate_distance)
        return shard

    def _score(self, shard: _Shard, scorer: Scorer) -> None:
        if self.store.has_scores(shard.number, scorer.name):
            return
        began = time.perf_counter()
        scores, comparisons = scorer.judge(shard.rows)
        values: dict[str, Any] = {"scores": scores, "comparisons": comparisons, "identity": scorer.identity}
        if scorer.name == self.config.diversity:
            values["distances"] = scorer.distances(shard.rows)
        self.store.put_scores(shard.number, scorer.name, values | {"seconds": time.perf_counter() - began})

    def _take_scores(self, shard: _Shard) -> _Shard:
        for name in self.config.scorers:
            values = self.store.scores(shard.number, name)
            shard.seconds[f"score {name}"] = values["seconds"]
            for number, row in enumerate(shard.rows):
                row.scores[name] = values["scores"][number]
                if values["comparisons"] is not None:
                    row.comparisons[name] = values["comparisons"][number]
                if name == self.config.diversity:
                    row.distances = values["distances"][number]
        return shard

    def _write(self, shard: _Shard) -> None:
        began = time.perf_counter()
        given = {name: spec.weight for name, spec in self.config.artists.items()}
        made = assemble(shard.rows, self.config, given)
        identities = {n: self.store.scores(shard.number, n)["identity"] for n in self.config.scorers}
        judges = bool(shard.rows[0].comparisons)
        seconds = shard.seconds | {"rank and write": time.perf_counter() - began}
        facts = made.facts | {"identities": identities, "seconds": seconds}
        self.store.finish(shard.number, made.rows, made.aside, facts, judges=judges)
        self.bar.update(len(shard.rows))


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
