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
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from reward_models import RewardModel, RewardModelError, can_score, load_reward_model

from ..data.files import atomic_file
from ..errors import ConfigError
from ..pipelines import adapter_for
from ..synthesis.sampling import NOT_FINITE, UNSAFE, generate_images
from .models import ModelPool, ModelSpec, unique_labels
from .session import Session, Sessions, Worker

MAX_PICTURES = 2000  # files kept; the oldest go first
MAX_AGE_SECONDS = 24 * 3600  # of pictures that an earlier server left
Progress = Callable[[float, str], None]
_PROBLEMS = {NOT_FINITE: "not finite; start the demo with another --dtype", UNSAFE: UNSAFE}


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for.

    Args:
        models, prompts, seeds: how many.
        all_models: to choose from.
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
    all_models: int = 16

    def __post_init__(self) -> None:
        for item in fields(self):
            if not getattr(self, item.name) > 0:
                raise ConfigError(f"the limit {item.name} must be above 0, got {getattr(self, item.name)}.")


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

    def check(self, limits: Limits, known: Sequence[str]) -> None:
        """Refuse what is impossible or too much.

        Raises:
            ConfigError: says in one sentence what was expected.
        """
        if not self.prompts:
            raise ConfigError("Expected a prompt, got none: type one, or pick an example.")
        self._check_kinds()
        for prompt in self.prompts:
            if len(prompt) > limits.prompt_chars:
                raise ConfigError(
                    f"A prompt may have {limits.prompt_chars} letters; this one has {len(prompt)}: {prompt[:30]}..."
                )
        counts = {"prompts": self.prompts, "seeds": self.seeds, "models": self.models}
        for name, items in counts.items():
            most = getattr(limits, name)
            if not 1 <= len(items) <= most:
                raise ConfigError(f"Expected 1 to {most} {name}, got {len(items)}.")
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

    def _check_kinds(self) -> None:
        """Programs may send anything."""
        for prompt in self.prompts:
            if not isinstance(prompt, str):
                raise ConfigError(f"Expected prompts as texts, got {prompt!r}.")
            try:
                prompt.encode()
            except UnicodeEncodeError:
                raise ConfigError(f"This prompt holds half a character (a lone surrogate): {prompt!r:.60}.") from None
        numbers = {"seeds": self.seeds, "steps": (self.steps,), "a size": () if self.side is None else (self.side,)}
        for name, values in numbers.items():
            for value in values:
                if type(value) is not int:
                    raise ConfigError(f"Expected {name} as whole numbers, got {value!r}.")
        if type(self.guidance) not in (int, float):
            raise ConfigError(f"Expected a guidance as a number, got {self.guidance!r}.")

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
        size: width and height in pixels.
        scores: by reward model; NaN where missing.
        scheduler: class of the sampler.
        problem: why it is no picture to judge; empty when it is one.
    """

    model: str
    prompt: str
    seed: int
    path: Path
    size: tuple[int, int] = (0, 0)
    scores: dict[str, float] = field(default_factory=dict)
    scheduler: str = ""
    problem: str = ""


class Engine:
    """Models, scorers and pictures of one server.

    Args:
        folder: the server's own folder; pictures go to ``pictures/`` in it.
        models: what can be compared; the first is the base of the tables.
        scorers: names of reward models (:func:`reward_models.load_reward_model`), or scoring functions.
        pool: loaded pipelines.
        limits: of one request.
        keep_pictures: files kept.
    """

    def __init__(
        self,
        folder: str | Path,
        models: Sequence[ModelSpec],
        *,
        scorers: Sequence[str | Callable[..., Any]] = ("shapes-strict", "shapes"),
        pool: ModelPool | None = None,
        limits: Limits | None = None,
        keep_pictures: int = MAX_PICTURES,
    ) -> None:
        unique_labels(list(models))
        self.specs = {spec.label: spec for spec in models}
        self.pictures = Path(folder).resolve() / "pictures"
        self.pictures.mkdir(parents=True, exist_ok=True)
        self.pool = pool or ModelPool()
        self.scorers = [_scorer(name, self.pool.device) for name in scorers]
        self.limits, self.keep_pictures = limits or Limits(), keep_pictures
        self.sessions, self.worker = Sessions(), Worker()
        self._known: OrderedDict[tuple[Any, ...], Picture] = OrderedDict()
        self._files: OrderedDict[Path, None] = OrderedDict()
        self._lock = threading.Lock()  # of models, known pictures and files
        _remove_old(self.pictures)

    @property
    def labels(self) -> list[str]:
        """Labels of all models."""
        return list(self.specs)

    def add(self, spec: ModelSpec) -> None:
        """One more model; its weights are loaded when they are first asked for."""
        with self._lock:  # two people may add at once
            if len(self.specs) >= self.limits.all_models:
                raise ConfigError(f"There are {len(self.specs)} models already; restart the demo with those you need.")
            unique_labels([*self.specs.values(), spec])
            self.specs = {**self.specs, spec.label: spec}

    def warm_up(self) -> None:
        """Load the first model and the scorers and use them once, so that the first person does not wait for it."""
        spec = next(iter(self.specs.values()))
        with self.worker.turn(lambda: None), self.pool.ready(spec) as pipeline:
            images = generate_images(pipeline, ["a red circle"], [0], steps=1, guidance=3.0)
            for scorer in self.scorers:
                scorer.score(images, ["a red circle"])

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
            ConfigError, CheckpointError: the request is refused, a model does not load, or draws another size.
            StoppedError: the session was stopped.
            RewardModelError: a score cannot be had.
        """
        specs = self.specs if specs is None else specs
        ask.check(self.limits, list(specs))
        check = session.begin()
        total, done, first = len(ask.cells) * len(ask.models), 0, None
        for start in range(0, len(ask.cells), self.limits.batch):
            cells = ask.cells[start : start + self.limits.batch]
            for label in ask.models:
                began = (done, len(cells))

                def step(share: float, label: str = label, began: tuple[int, int] = began) -> None:
                    progress((began[0] + share * began[1]) / total, f"{label}: picture {began[0] + 1} of {total}")

                pictures = self._draw(specs[label], cells, ask, check, step)
                first = first or pictures[0]
                _refuse_other_size(first, pictures[0])
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
        check: Callable[[], None],
        step: Callable[[float], None],
    ) -> list[Picture]:
        settings = (spec, ask.steps, ask.guidance, ask.side)
        found = {cell: self._at_hand((*settings, *cell)) for cell in cells}
        missing = [cell for cell, picture in found.items() if picture is None]
        if missing:
            step(0.0)
            with self.worker.turn(check):
                for picture in self._draw_new(spec, missing, ask, check, step):
                    found[picture.prompt, picture.seed] = picture
                    self._remember((*settings, picture.prompt, picture.seed), picture)
        return [picture for picture in found.values() if picture is not None]

    def _draw_new(
        self,
        spec: ModelSpec,
        cells: Sequence[tuple[str, int]],
        ask: Ask,
        check: Callable[[], None],
        step: Callable[[float], None],
    ) -> list[Picture]:
        prompts, seeds = [prompt for prompt, _ in cells], [seed for _, seed in cells]
        with self.pool.ready(spec) as pipeline:
            scheduler = type(pipeline.scheduler).__name__
            with watched(adapter_for(pipeline).denoiser, ask.steps, check, step):
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
        pictures = []
        for i, ((prompt, seed), image) in enumerate(zip(cells, images, strict=True)):
            problem = next((words for mark, words in _PROBLEMS.items() if image.info.get(mark)), "")
            scores = {name: math.nan if problem else found[i] for name, found in values.items()}
            path = self.save(_png(image))
            pictures.append(Picture(spec.label, prompt, seed, path, image.size, scores, scheduler, problem))
        return pictures

    def save(self, data: bytes) -> Path:
        """Put a PNG into the folder that is served; of all such files the newest are kept."""
        path = self.pictures / f"{hashlib.blake2b(data, digest_size=16).hexdigest()}.png"
        if not path.exists():
            with atomic_file(path) as file:
                file.write(data)
        with self._lock:
            self._files[path] = None
            self._files.move_to_end(path)
            while len(self._files) > self.keep_pictures:
                self._files.popitem(last=False)[0].unlink(missing_ok=True)
        return path

    def _at_hand(self, key: tuple[Any, ...]) -> Picture | None:
        picture = self._known.get(key)
        return picture if picture is not None and picture.path.exists() else None

    def _remember(self, key: tuple[Any, ...], picture: Picture) -> None:
        with self._lock:
            self._known[key] = picture
            while len(self._known) > self.keep_pictures:
                self._known.popitem(last=False)


def _scorer(name: str | Callable[..., Any], device: str) -> RewardModel:
    model = load_reward_model(name, device=device)
    if not can_score(model):
        raise RewardModelError(f"{name} compares pairs and cannot score single pictures; leave it out.")
    return model


def _refuse_other_size(first: Picture, other: Picture) -> None:
    """Noise of another size is other noise, so the two pictures would not be comparable."""
    if first.size != other.size:
        one, two = (f"{picture.model} draws {picture.size[0]} x {picture.size[1]}" for picture in (first, other))
        raise ConfigError(f"{one} pixels and {two}; give one size for all of them.")


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


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def limits_from(values: dict[str, Any]) -> Limits:
    """Limits with some of them replaced; None leaves the default."""
    names = {item.name for item in fields(Limits)}
    return Limits(**{name: value for name, value in values.items() if name in names and value is not None})


def _remove_old(folder: Path) -> None:
    oldest = time.time() - MAX_AGE_SECONDS
    for file in folder.glob("*.png"):
        if file.stat().st_mtime < oldest:
            file.unlink(missing_ok=True)
