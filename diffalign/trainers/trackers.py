"""Where metrics go: always metrics.jsonl and the console, and the trackers that the user names."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker

    from .config import TrainingConfig

log = logging.getLogger(__name__)
TRACKERS = ("tensorboard", "wandb", "trackio")
_CONSOLE = {
    "loss": "loss",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
    "error/winner_change": "winner change",
    "error/loser_change": "loser change",
    "gradient_factor": "gradient factor",
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
}


class Trackers:
    """Sends each line of metrics to metrics.jsonl, the console, and the trackers of ``config.trackers``.

    Only the main process writes; the other processes may call every method and nothing happens.

    Args:
        accelerator: says which process is the main one.
        config: reads ``trackers``, ``project_name`` and ``log_every``; the whole of it is stored with the trackers.
        output_dir: the run's folder.
        resumed_step: optimizer steps already done. Lines of later steps, written after the checkpoint that is now
            continued, are cut from metrics.jsonl, so that a killed and resumed run leaves the file of one never killed.

    Raises:
        ConfigError: an unknown tracker, one that is not installed, or log_every below 1.
        CheckpointError: metrics.jsonl is damaged before its last line.
    """

    def __init__(
        self, accelerator: Accelerator, config: TrainingConfig, output_dir: str | Path, *, resumed_step: int = 0
    ) -> None:
        check_trackers(config.trackers)
        if config.log_every < 1:
            raise ConfigError(f"log_every must be 1 or more; got {config.log_every}.")
        self.config, self.active = config, accelerator.is_main_process
        self._file: MetricsFile | None = None
        self._trackers: list[GeneralTracker] = []
        if not self.active:
            return
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._file = MetricsFile(folder / "metrics.jsonl", resumed_step)
        run_id = _run_id(folder, new=resumed_step == 0) if config.trackers else ""
        try:
            for name in config.trackers:
                tracker = _START[name](config, folder, run_id, resumed_step)
                self._trackers.append(tracker)
                tracker.store_init_configuration(_flat(config))
        except Exception:
            self.close()
            raise

    def due(self, step: int) -> bool:
        """Whether optimizer step ``step`` (from 1) gets a line: the first, and every ``log_every``-th."""
        return step == 1 or step % self.config.log_every == 0

    def log(self, metrics: Mapping[str, float], step: int, *, timing: Mapping[str, float] | None = None) -> None:
        """Write one line.

        Args:
            metrics: what the run computed; a repeated run computes the same.
            step: optimizer steps done.
            timing: what depends on the clock or the machine (seconds, memory). It is kept out of metrics.jsonl, which
                two equal runs must share byte for byte.
        """
        if self._file is None:
            return
        self._file.write(step, metrics)
        everything = {**metrics, **(timing or {})}
        shown = [f"{label} {everything[name]:.4g}" for name, label in _CONSOLE.items() if name in everything]
        shown += [f"{name} {value:.4g}" for name, value in (timing or {}).items()]
        log.info("step %d: %s", step, ", ".join(shown))
        for tracker in self._trackers:
            tracker.log(everything, step=step)

    def log_images(self, images: Mapping[str, Sequence[Image.Image]], step: int) -> None:
        """Send pictures to the trackers.

        Args:
            images: lists of pictures by name; picture i of ``name`` is shown as ``name/i``.
            step: optimizer steps done.
        """
        named = {f"{name}/{i}": image for name, many in images.items() for i, image in enumerate(many)}
        for tracker in self._trackers:
            if tracker.name == "tensorboard":
                arrays = {name: np.asarray(image.convert("RGB"))[None] for name, image in named.items()}
                tracker.log_images(arrays, step=step, dataformats="NHWC")
            elif tracker.name == "trackio":
                import trackio

                tracker.log({name: trackio.Image(image) for name, image in named.items()}, step=step)
            else:
                tracker.log_images({name: [image] for name, image in named.items()}, step=step)

    def close(self) -> None:
        """Flush and end everything; may be called twice."""
        while self._trackers:
            self._trackers.pop().finish()
        if self._file is not None:
            self._file.close()
            self._file = None


class MetricsFile:
    """metrics.jsonl: one JSON object per line, ``step`` first; NaN and infinities are null.

    Args:
        path: the file; made, or continued after ``resumed_step``.
        resumed_step: lines of later steps are cut.

    Raises:
        CheckpointError: a line before the last is not JSON.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        if path.exists():
            _cut(path, resumed_step)
        self._path, self._stream = path, path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a line and hand it to the operating system, so that a killed process leaves it behind."""
        values = {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}
        try:
            self._stream.write(json.dumps({"step": step, **values}) + "\n")
            self._stream.flush()
        except OSError as error:
            raise CheckpointError(
                f"cannot write {self._path}: {error.strerror or error}. The checkpoints are untouched; free space, "
                "then continue with resume=latest."
            ) from error

    def close(self) -> None:
        with suppress(OSError):  # of a line that :meth:`write` has already said it could not write
            self._stream.close()


def check_trackers(names: Sequence[str]) -> None:
    """Refuse unknown or missing trackers; cheap, so that a run can fail before it loads a model.

    Raises:
        ConfigError: naming the tracker and what to do.
    """
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"unknown tracker {name!r}. Known: {', '.join(TRACKERS)}; leave trackers empty for none.")
        if find_spec(name) is None:
            raise ConfigError(
                f"trackers={name} needs the package {name}, which is not installed. Install it with "
                f"`pip install 'diffalign[{name}]'`, or remove it from trackers: metrics.jsonl is written anyway."
            )


def _cut(path: Path, last_step: int) -> None:
    """Rewrite ``path`` without the lines after ``last_step`` and without a torn last line; whole or not at all."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            step = json.loads(line)["step"] if line.endswith("\n") else None
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if number < len(lines):
                raise CheckpointError(
                    f"{path} line {number} is no line of metrics ({error}). Mend or move the file, then resume again."
                ) from error
            step = None
        if step is not None and step <= last_step:
            kept.append(line)
    if len(kept) < len(lines):
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(kept), encoding="utf-8")
        partial.replace(path)


def _run_id(folder: Path, *, new: bool) -> str:
    """Identity of the run at trackers that keep many; stored beside the results so that a resumed run continues it."""
    path = folder / "tracker_run.json"
    if not new and path.exists():
        return json.loads(path.read_text())["id"]
    run_id = uuid.uuid4().hex[:8]  # of the operating system's randomness: no generator of the run is touched
    path.write_text(json.dumps({"id": run_id}))
    return run_id


def _start_tensorboard(config: TrainingConfig, folder: Path, run_id: str, resumed_step: int) -> GeneralTracker:
    from accelerate.tracking import TensorBoardTracker

    purge = {"purge_step": resumed_step + 1} if resumed_step else {}
    return _started(TensorBoardTracker(config.project_name, folder / "tensorboard", **purge))


def _start_wandb(config: TrainingConfig, folder: Path, run_id: str, resumed_step: int) -> GeneralTracker:
    from accelerate.tracking import WandBTracker

    return _started(WandBTracker(config.project_name, name=folder.name, id=run_id, resume="allow", dir=str(folder)))


def _start_trackio(config: TrainingConfig, folder: Path, run_id: str, resumed_step: int) -> GeneralTracker:
    from accelerate.tracking import TrackioTracker

    return _started(TrackioTracker(config.project_name, name=f"{folder.name}-{run_id}", resume="allow"))


def _started(tracker: GeneralTracker) -> GeneralTracker:
    tracker.start()
    return tracker


_START: dict[str, Callable[[TrainingConfig, Path, str, int], GeneralTracker]] = {
    "tensorboard": _start_tensorboard,
    "wandb": _start_wandb,
    "trackio": _start_trackio,
}


def _flat(config: TrainingConfig) -> dict[str, Any]:
    """Settings as the scalars that every tracker accepts."""
    values = dataclasses.asdict(config)
    return {k: v if isinstance(v, bool | int | float | str) else json.dumps(v) for k, v in values.items()}
