"""The folder of a run: claimed by its settings, locked, filled shard by shard, each file whole or not at all.

```
train-00000.parquet ...     the table
set_aside/00000.parquet     what is not in it, with the reasons
shards/00000.json           what a finished shard holds; a shard with such a record is final
heldout.jsonl  dropped.jsonl  score_ranges.json  manifest.json  generation_report.json  README.md  grid.png
.work/                      drawn pictures and scores of shards that are not finished yet, and locks
```
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import pyarrow.parquet as pq
from datasets import Features, List, Value
from datasets import Image as ImageFeature

from ..data.files import atomic_file, remove_stale
from ..data.schema import FEATURES, SOURCE, PreferenceRow, write_parquet
from ..errors import ConfigError, DataError
from .candidates import Candidate

log = logging.getLogger(__name__)
FORMAT = 1
COMPARISONS = List({"name": Value("string"), "values": List(Value("float64"))})
SET_ASIDE = Features(
    {
        "prompt": Value("string"),
        "images": List(ImageFeature()),
        "sources": List(SOURCE),
        "scores": FEATURES["scores"],
        "comparisons": COMPARISONS,
        "problems": List(Value("string")),
        "reason": Value("string"),
        "row_id": Value("string"),
    }
)
_DRAWN = Features(
    {
        "row": Value("int32"),
        "data": Value("binary"),
        "problem": Value("string"),
        "thumbnail": Value("binary"),
        "source": SOURCE,
        "seconds": Value("float64"),
    }
)
_ATTEMPTS = 10
_PATIENCE = 600.0  # seconds that a process waits for the first one to claim the folder


class Store:
    """The folder of one run, seen by one of its processes.

    Args:
        folder: made when missing.
        process: number of this process.
        processes: how many there are.
    """

    def __init__(self, folder: str | Path, process: int = 0, processes: int = 1) -> None:
        self.folder, self.process, self.processes = Path(folder), process, processes
        self.work = self.folder / ".work"

    # --- who may write here ----------------------------------------------------------------------------------------

    @contextmanager
    def claimed(self, settings: dict[str, Any]) -> Iterator[None]:
        """Lock the folder and make sure that it belongs to a run with these settings.

        Raises:
            ConfigError: another run is at work here, or one that shares the work among another number of processes, or
                the folder holds a run with other settings.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        with (self.work / f"lock-{self.process}").open("a+") as lock:
            self._lock(lock)
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}, {self.process} of {self.processes}\n")
            lock.flush()
            if self._stranger() is not None:
                time.sleep(0.5)  # one that has only just begun may not have written its number yet
            if (stranger := self._stranger()) is not None:
                raise ConfigError(
                    f"another run is writing into {self.folder} ({stranger}), and this is {self.process} of "
                    f"{self.processes}: with another number of processes both would draw the same pictures. Wait for "
                    "it, or choose another output_dir."
                )
            self._claim(settings)
            yield

    def _lock(self, lock: TextIO) -> None:
        for attempt in range(_ATTEMPTS):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                if attempt < _ATTEMPTS - 1:
                    time.sleep(0.05)  # it may be :meth:`is_running` of another process, which lets go at once
                    continue
                lock.seek(0)
                raise ConfigError(
                    f"another run is writing into {self.folder} ({lock.read().strip() or 'unknown process'}). "
                    "Wait for it, or choose another output_dir."
                ) from error
            except OSError as error:
                log.warning("%s: no locks on this file system (%s); let no other run write there", self.folder, error)
                return

    def _stranger(self) -> str | None:
        """A process at work here that shares the work among another number of processes."""
        for lock in sorted(self.work.glob("lock-*")):
            number = int(lock.name.removeprefix("lock-"))
            if number != self.process and self.is_running(number, unknown=False):
                said = lock.read_text().strip()
                if not said.endswith(f" of {self.processes}"):
                    return said
        return None

    def _claim(self, settings: dict[str, Any]) -> None:
        file = self.folder / "settings.json"
        wanted = json.loads(json.dumps(settings))
        if self.process == 0:
            for place in (self.folder, self.folder / "set_aside", self.folder / "shards"):
                remove_stale(place)
            if not file.is_file():
                if any(self.folder.glob("*.parquet")):
                    raise ConfigError(f"{self.folder} already holds a table that is no run's. Choose another folder.")
                write_json(file, wanted)
        began = time.monotonic()
        while not file.is_file():
            if time.monotonic() - began > _PATIENCE:
                raise ConfigError(f"process {self.process}: process 0 has not begun in {self.folder}; start it too.")
            time.sleep(0.2)
        present = read_json(file)
        if present != wanted:
            raise ConfigError(
                f"{self.folder} holds a run with other settings ({_difference(present, wanted)}). "
                "Choose another output_dir, or remove the folder."
            )

    def is_running(self, process: int, *, unknown: bool = True) -> bool:
        """Whether the process of this run with that number holds its lock; ``unknown`` where there are no locks."""
        try:
            with (self.work / f"lock-{process}").open("a+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return unknown
        return False

    # --- finished shards -------------------------------------------------------------------------------------------

    def record(self, shard: int) -> dict[str, Any] | None:
        """What a finished shard holds; None when it is not finished, or when one of its files is damaged."""
        file = self.folder / "shards" / f"{shard:05d}.json"
        if not file.is_file():
            return None
        record = read_json(file)
        for name, known in record["files"].items():
            path = self.folder / name
            size = path.stat().st_size if path.is_file() else None
            if size != known["bytes"]:
                log.warning("%s is damaged (%s bytes, not %d): put aside, made again", path, size, known["bytes"])
                if path.is_file():
                    aside = self.work / "damaged" / path.name
                    aside.parent.mkdir(parents=True, exist_ok=True)
                    path.replace(aside)
                file.unlink(missing_ok=True)
                return None
        return record

    def finish(
        self,
        shard: int,
        rows: Sequence[tuple[PreferenceRow, dict[str, list[float]]]],
        aside: Sequence[dict[str, Any]],
        facts: dict[str, Any],
        *,
        judges: bool,
    ) -> None:
        """Write a shard's files and then its record; its intermediate files go.

        Args:
            shard: number.
            rows: ranked rows with the comparisons of judges.
            aside: cells of the rows set aside.
            facts: for the report.
            judges: whether the table has a column `comparisons`.
        """
        files: dict[str, dict[str, Any]] = {}
        features = FEATURES if not judges else Features({**FEATURES, "comparisons": COMPARISONS})
        records: list[dict[str, Any]] = [
            row.to_record() | ({"comparisons": stored_comparisons(compared)} if judges else {})
            for row, compared in rows
        ]
        for name, content, columns in (
            (f"set_aside/{shard:05d}.parquet", list(aside), SET_ASIDE),
            (f"train-{shard:05d}.parquet", records, features),
        ):
            path = self.folder / name
            if content:
                write_parquet(content, path, columns)
                files[name] = {"bytes": path.stat().st_size, "blake2b": file_hash(path), "rows": len(content)}
            else:
                path.unlink(missing_ok=True)
        write_json(self.folder / "shards" / f"{shard:05d}.json", {"files": files, **facts})
        with suppress(FileNotFoundError):  # process 0 may be clearing up already
            for pattern in (f"drawn/*/{shard:05d}.parquet", f"scores/*/{shard:05d}.json"):
                for file in self.work.glob(pattern):
                    file.unlink()

    # --- intermediate results --------------------------------------------------------------------------------------

    def has_drawn(self, shard: int, pipeline: str) -> bool:
        """Whether the pictures of a pipeline for a shard lie on the disk."""
        return self._drawn(shard, pipeline).is_file()

    def put_drawn(self, shard: int, pipeline: str, rows: Sequence[Sequence[Candidate]], seconds: float) -> None:
        """Keep the pictures of a pipeline for the rows of a shard."""
        cells = [
            {
                "row": number,
                "data": candidate.data,
                "problem": candidate.problem,
                "thumbnail": candidate.thumbnail,
                "source": candidate.source,
                "seconds": seconds / max(sum(map(len, rows)), 1),
            }
            for number, row in enumerate(rows)
            for candidate in row
        ]
        write_parquet(cells, self._drawn(shard, pipeline), _DRAWN)

    def drawn(self, shard: int, pipeline: str, rows: int) -> tuple[list[list[Candidate]], float]:
        """The pictures of a pipeline for the rows of a shard, and the seconds they took.

        Raises:
            DataError: the file is damaged; it is gone then, and the next run draws again.
        """
        path = self._drawn(shard, pipeline)
        result: list[list[Candidate]] = [[] for _ in range(rows)]
        seconds = 0.0
        try:
            for cells in pq.read_table(path).to_pylist():
                result[cells["row"]].append(
                    Candidate(pipeline, cells["source"], cells["data"], cells["problem"], cells["thumbnail"])
                )
                seconds += cells["seconds"]
        except (OSError, ValueError, IndexError) as error:
            path.unlink(missing_ok=True)
            raise DataError(f"{path} was damaged ({error}) and is removed; run again to draw it anew.") from error
        return result, seconds

    def _drawn(self, shard: int, pipeline: str) -> Path:
        return self.work / "drawn" / pipeline / f"{shard:05d}.parquet"

    def has_scores(self, shard: int, name: str) -> bool:
        """Whether a reward model has judged a shard."""
        return self._scores(shard, name).is_file()

    def put_scores(self, shard: int, name: str, values: dict[str, Any]) -> None:
        """Keep a reward model's judgement of a shard."""
        write_json(self._scores(shard, name), values)

    def scores(self, shard: int, name: str) -> dict[str, Any]:
        """What :meth:`put_scores` kept."""
        return read_json(self._scores(shard, name))

    def _scores(self, shard: int, name: str) -> Path:
        safe = hashlib.blake2b(name.encode(), digest_size=8).hexdigest()  # names of reward models may hold anything
        return self.work / "scores" / safe / f"{shard:05d}.json"

    def clear_work(self) -> None:
        """Remove intermediate files; locks stay."""
        for name in ("drawn", "scores"):
            shutil.rmtree(self.work / name, ignore_errors=True)


def stored_comparisons(comparisons: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Comparisons as cells: null where missing."""
    return [
        {"name": name, "values": [None if value != value else value for value in values]}
        for name, values in comparisons.items()
    ]


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all. NaN is written as the bare word that Python reads back."""
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """The content of a file of ours.

    Raises:
        DataError: it was changed or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}). Remove it and run again.") from error


def file_hash(path: Path) -> str:
    """BLAKE2b of a file's bytes."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def weights_digest(path: Path) -> str:
    """Tells one model's weights from another's: names, sizes and samples of its files, a few MB read in all.

    Args:
        path: a file, or the folder of a pipeline.
    """
    digest = hashlib.blake2b(digest_size=16)
    found = [file for kind in ("*.safetensors", "*.bin") for file in sorted(path.rglob(kind))]
    for file in [path] if path.is_file() else found:
        size = file.stat().st_size
        digest.update(f"{file.name if file == path else file.relative_to(path)} {size}\n".encode())
        with file.open("rb") as opened:
            for place in range(0, size, max(size // 64, 4096)):  # training changes every tensor
                opened.seek(place)
                digest.update(opened.read(4096))
    return digest.hexdigest()


def _difference(there: Any, here: Any, place: str = "") -> str:
    """The first setting that differs, with both values."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in {**there, **here}:
            if there.get(key) != here.get(key):
                return _difference(there.get(key), here.get(key), f"{place}.{key}" if place else key)
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for number, (a, b) in enumerate(zip(there, here, strict=True)):
            if a != b:
                return _difference(a, b, f"{place}.{number}")
    return f"{place}: {there!r} there, {here!r} here"
