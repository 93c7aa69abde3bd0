"""Draws and scores what a person asks for, within limits, for several pages at once and one at a time."""

from __future__ import annotations

import hashlib
import io
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from reward_models import RewardModel, load_reward_model

from ..data.files import atomic_file
from ..errors import ConfigError
from ..pipelines import adapter_for
from ..synthesis.sampling import generate_images
from .models import ModelPool, ModelSpec, unique_labels
from .session import Session, Sessions, Worker

MAX_PICTURES = 2000  # files kept; the oldest go first
MAX_AGE_SECONDS = 24 * 3600  # of pictures that an earlier server left
Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for.

    Args:
        models, prompts, seeds: how many.
        pictures: prompts x seeds x models.
        steps: sampling steps.
        guidance: guidance scale.
        side: pixels of height and width.
        prompt_chars: letters of one prompt.
        batch: pictures drawn at once.
        waiting: requests in line; later ones are sent away.
    """

    models: int = 4
    prompts: int = 16
    seeds: int = 8
    pictures: int = 128
    steps: int = 100
    guidance: float = 30.0
    side: int = 1024
    prompt_chars: int = 1000
    batch: int = 4
    waiting: int = 32


@dataclass(frozen=True)
class Ask:
    """What to draw: every prompt with every seed by every model.

    Args:
        prompts: texts.
        seeds: of the noise, the same for all models.
        models: labels; the first is what the others are compared with.
        steps: sampling steps.
        guidance: classifier-free guidance scale.
        side: pixels of height and width; None takes each model's own.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    models: tuple[str, ...]
    steps: int = 12
    guidance: float = 3.0
    side: int | None = None

    def check(self, limits: Limits, known: Sequence[str], *, fewest: int = 1) -> None:
        """Refuse what is impossible or too much.

        Raises:
            ConfigError: says in one sentence what was expected.
        """
        if not self.prompts:
            raise ConfigError("Expected a prompt, got none: type one, or pick an example.")
        for prompt in self.prompts:
            if len(prompt) > limits.prompt_chars:
                raise ConfigError(
                    f"A prompt may have {limits.prompt_chars} letters; this one has {len(prompt)}: {prompt[:30]}..."
                )
        counts = {"prompts": self.prompts, "seeds": self.seeds, "models": self.models}
        for name, items in counts.items():
            lowest, most = fewest if name == "models" else 1, getattr(limits, name)
            if not lowest <= len(items) <= most:
                raise ConfigError(f"Expected {lowest} to {most} {name}, got {len(items)}.")
            if len(set(items)) < len(items):
                raise ConfigError(f"Each of the {name} may come once; remove the repeated one.")
        for model in self.models:
            if model not in known:
                raise ConfigError(f"There is no model called {model!r} here; there are {', '.join(known)}.")
        total = len(self.prompts) * len(self.seeds) * len(self.models)
        if total > limits.pictures:
            raise ConfigError(
                f"This asks for {total} pictures, and {limits.pictures} are allowed at once; ask for fewer."
            )
        if any(not 0 <= seed < 2**53 for seed in self.seeds):
            raise ConfigError(f"Expected seeds from 0 to 2^53, got {', '.join(map(str, self.seeds[:4]))}.")
        if not 1 <= self.steps <= limits.steps:
            raise ConfigError(f"Expected 1 to {limits.steps} steps, got {self.steps}.")
        if not 0 <= self.guidance <= limits.guidance:  # also refuses NaN
            raise ConfigError(f"Expected a guidance from 0 to {limits.guidance:g}, got {self.guidance}.")
        if self.side is not None and (self.side % 8 or not 8 <= self.side <= limits.side):
            raise ConfigError(f"Expected a size of 8 to {limits.side} pixels in steps of 8, got {self.side}.")

    @property
    def cells(self) -> list[tuple[str, int]]:
        """(prompt, seed), seeds running fastest."""
        return [(prompt, seed) for prompt in self.prompts for seed in self.seeds]


@dataclass(frozen=True)
class Picture:
    """One drawn and scored picture.

    Args:
        model: label.
        prompt, seed: what it was drawn from.
        path: PNG file, named by its content.
        scores: by reward model; NaN where missing.
        scheduler: class of the sampler.
        seconds: drawing and scoring; 0 when it was known already.
    """

    model: str
    prompt: str
    seed: int
    path: Path
    scores: dict[str, float] = field(default_factory=dict)
    scheduler: str = ""
    seconds: float = 0.0


class Engine:
    """Models, scorers and pictures of one server.

    Args:
        folder: the server's own folder; pictures go to ``pictures/`` in it.
        models: what can be compared; the first is the base of the tables.
        scorers: names of reward models (:func:`reward_models.load_reward_model`).
        pool: loaded pipelines.
        limits: of one request.
        keep_pictures: files kept.
    """

    def __init__(
        self,
        folder: str | Path,
        models: Sequence[ModelSpec],
        *,
        scorers: Sequence[str] = ("shapes-strict", "shapes"),
        pool: ModelPool | None = None,
        limits: Limits | None = None,
        keep_pictures: int = MAX_PICTURES,
    ) -> None:
        unique_labels(list(models))
        self.specs = {spec.label: spec for spec in models}
        self.pictures = Path(folder).resolve() / "pictures"
        self.pictures.mkdir(parents=True, exist_ok=True)
        self.pool = pool or ModelPool()
        self.scorers: list[RewardModel] = [load_reward_model(name, device=self.pool.device) for name in scorers]
        self.limits, self.keep_pictures = limits or Limits(), keep_pictures
        self.sessions, self.worker = Sessions(), Worker()
        self._known: OrderedDict[tuple[Any, ...], Picture] = OrderedDict()
        self._files: OrderedDict[Path, None] = OrderedDict()
        self._files_lock = threading.Lock()
        _remove_old(self.pictures)

    @property
    def labels(self) -> list[str]:
        """Labels of all models."""
        return list(self.specs)

    def add(self, spec: ModelSpec) -> None:
        """One more model; its weights are loaded when they are first asked for."""
        unique_labels([*self.specs.values(), spec])
        self.specs = {**self.specs, spec.label: spec}

    def warm_up(self) -> None:
        """Load the first model and draw one step, so that the first person does not wait for it."""
        spec = next(iter(self.specs.values()))
        with self.worker.turn(Session("warm-up")), self.pool.ready(spec) as pipeline:
            generate_images(pipeline, ["a red circle"], [0], steps=1, guidance=3.0)

    def compare(
        self,
        ask: Ask,
        session: Session,
        progress: Progress = lambda share, text: None,
        *,
        specs: Mapping[str, ModelSpec] | None = None,
        tally: bool = True,
    ) -> Iterator[list[Picture]]:
        """Draw what is asked for; all models of a few cells, then the next cells.

        Nothing is held between two yields, so a caller that goes away leaves nothing behind.

        Args:
            ask: what to draw.
            session: whose page asks; stopping it ends the job within a denoising step.
            progress: told the share that is done and what is going on.
            specs: models by label; None means those of the engine.
            tally: count the scores in the session's win rates.

        Yields:
            The pictures that are new, in the order of ``ask.models`` within some cells.

        Raises:
            ConfigError, CheckpointError: the request is refused, or a model does not load.
            StoppedError: the session was stopped.
        """
        specs = self.specs if specs is None else specs
        ask.check(self.limits, list(specs))
        session.begin()
        total, done = len(ask.cells) * len(ask.models), 0
        for start in range(0, len(ask.cells), self.limits.batch):
            cells = ask.cells[start : start + self.limits.batch]
            for label in ask.models:
                began = (done, len(cells))

                def step(share: float, label: str = label, began: tuple[int, int] = began) -> None:
                    progress((began[0] + share * began[1]) / total, f"{label}: picture {began[0] + 1} of {total}")

                pictures = self._draw(specs[label], cells, ask, session, step)
                for picture in pictures if tally else ():
                    cell = (picture.prompt, picture.seed, ask.steps, ask.guidance, ask.side)
                    session.tally.add(cell, picture.prompt, label, picture.scores)
                done += len(pictures)
                yield pictures

    def _draw(
        self,
        spec: ModelSpec,
        cells: Sequence[tuple[str, int]],
        ask: Ask,
        session: Session,
        step: Callable[[float], None],
    ) -> list[Picture]:
        settings = (spec, ask.steps, ask.guidance, ask.side)
        found = {cell: self._at_hand((*settings, *cell)) for cell in cells}
        missing = [cell for cell, picture in found.items() if picture is None]
        if missing:
            step(0.0)
            with self.worker.turn(session):
                for picture in self._draw_new(spec, missing, ask, session, step):
                    found[picture.prompt, picture.seed] = picture
                    self._remember((*settings, picture.prompt, picture.seed), replace(picture, seconds=0.0))
        return [picture for picture in found.values() if picture is not None]

    def _draw_new(
        self,
        spec: ModelSpec,
        cells: Sequence[tuple[str, int]],
        ask: Ask,
        session: Session,
        step: Callable[[float], None],
    ) -> list[Picture]:
        began = time.perf_counter()
        prompts, seeds = [prompt for prompt, _ in cells], [seed for _, seed in cells]
        with self.pool.ready(spec) as pipeline:
            scheduler = type(pipeline.scheduler).__name__
            with watched(adapter_for(pipeline).denoiser, ask.steps, session.check, step):
                images = generate_images(
                    pipeline,
                    prompts,
                    seeds,
                    steps=ask.steps,
                    guidance=ask.guidance,
                    batch_size=self.limits.batch,
                    height=ask.side,
                    width=ask.side,
                )
        values = {scorer.name: scorer.score(images, prompts).tolist() for scorer in self.scorers}
        seconds = (time.perf_counter() - began) / len(cells)
        return [
            Picture(
                spec.label,
                prompt,
                seed,
                self._save(image),
                {name: scores[i] for name, scores in values.items()},
                scheduler,
                seconds,
            )
            for i, ((prompt, seed), image) in enumerate(zip(cells, images, strict=True))
        ]

    def _save(self, image: Any) -> Path:
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        data = buffer.getvalue()
        path = self.pictures / f"{hashlib.blake2b(data, digest_size=16).hexdigest()}.png"
        if not path.exists():
            with atomic_file(path) as file:
                file.write(data)
        return path

    def _at_hand(self, key: tuple[Any, ...]) -> Picture | None:
        picture = self._known.get(key)
        return picture if picture is not None and picture.path.exists() else None

    def _remember(self, key: tuple[Any, ...], picture: Picture) -> None:
        """Keep the newest pictures, in memory and on the disk."""
        with self._files_lock:
            self._known[key] = picture
            self._files[picture.path] = None
            self._files.move_to_end(picture.path)
            while len(self._known) > self.keep_pictures:
                self._known.popitem(last=False)
            while len(self._files) > self.keep_pictures:
                self._files.popitem(last=False)[0].unlink(missing_ok=True)


@contextmanager
def watched(
    denoiser: nn.Module, steps: int, check: Callable[[], None], step: Callable[[float], None]
) -> Iterator[None]:
    """Look up before every pass of a denoiser: whether the picture is still wanted, and how far it is.

    A hook on the network works for every family and scheduler, and leaves the pipeline's own call as it is.
    """
    seen: set[float] = set()

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        check()
        time_ = kwargs.get("timestep", args[1] if len(args) > 1 else math.nan)
        seen.add(float(time_.flatten()[0]) if hasattr(time_, "flatten") else float(time_))
        step(min(1.0, (len(seen) - 1) / steps))

    handle = denoiser.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def limits_from(values: dict[str, Any]) -> Limits:
    """Limits with some of them replaced; None leaves the default."""
    names = {item.name for item in fields(Limits)}
    return Limits(**{name: value for name, value in values.items() if name in names and value is not None})


def _remove_old(folder: Path) -> None:
    oldest = time.time() - MAX_AGE_SECONDS
    for file in folder.glob("*.png"):
        if file.stat().st_mtime < oldest:
            file.unlink(missing_ok=True)
