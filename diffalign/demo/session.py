"""What the server remembers of one open page, and no more than that."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..errors import DiffalignError
from .tally import Tally

if TYPE_CHECKING:
    from .votes import Ballot

MAX_SESSIONS = 200
MAX_OPEN_BALLOTS = 8


class StoppedError(DiffalignError):
    """The person cancelled, or closed the page."""


@dataclass
class Session:
    """One open page (or one API client).

    Args:
        key: Gradio's session hash.
        tally: scores seen on this page.
        ballots: pairs that wait for this page's vote, by id; the oldest go when there are too many.
    """

    key: str
    tally: Tally = field(default_factory=Tally)
    ballots: OrderedDict[str, Ballot] = field(default_factory=OrderedDict)
    closed: bool = False
    _stop: threading.Event = field(default_factory=threading.Event)

    def begin(self) -> Callable[[], None]:
        """A new job of this page. It ends the one before, which may not have noticed yet that it was cancelled.

        Returns:
            What the job calls often; it raises :class:`StoppedError` when the job is no longer wanted.
        """
        self._stop.set()
        self._stop = stop = threading.Event()
        if self.closed:
            stop.set()

        def check() -> None:
            if stop.is_set():
                raise StoppedError("Stopped.")

        return check

    def stop(self) -> None:
        """End this page's job at its next denoising step."""
        self._stop.set()

    def keep(self, ballot: Ballot) -> None:
        """Remember a pair until its vote."""
        self.ballots[ballot.id] = ballot
        while len(self.ballots) > MAX_OPEN_BALLOTS:
            self.ballots.popitem(last=False)


class Sessions:
    """All open pages; the least recently used go when there are too many."""

    def __init__(self, limit: int = MAX_SESSIONS) -> None:
        self.limit = limit
        self._open: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._open)

    def __getitem__(self, key: str | None) -> Session:
        with self._lock:
            name = key or ""
            session = self._open.setdefault(name, Session(name))
            self._open.move_to_end(name)
            while len(self._open) > self.limit:
                self._end(self._open.popitem(last=False)[1])
            return session

    def close(self, key: str | None) -> None:
        """The page is gone: its job ends, and what it held is forgotten."""
        with self._lock, suppress(KeyError):
            self._end(self._open.pop(key or ""))

    def _end(self, session: Session) -> None:
        session.closed = True
        session.stop()


class Worker:
    """One job at a time; a job that waits and is no longer wanted leaves the line."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    @property
    def busy(self) -> bool:
        """Whether a job is running."""
        return self._lock.locked()

    @contextmanager
    def turn(self, check: Callable[[], None]) -> Iterator[None]:
        """Wait for the models and hold them inside the block.

        Args:
            check: raises when the job is no longer wanted (:meth:`Session.begin`); called while it waits.
        """
        while not self._lock.acquire(timeout=0.1):
            check()
        try:
            check()
            yield
        finally:
            self._lock.release()
