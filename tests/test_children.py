"""Children that tests may kill: what they inherit, and what becomes of them."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from tests import children

LOCK = threading.Lock()


def take_the_lock() -> None:
    assert LOCK.acquire(timeout=1)


def end_with(status: int) -> None:
    os._exit(status)


def stop_and_go_on() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def never_end() -> None:
    signal.pause()


def test_a_lock_of_another_thread_is_free_in_a_child():
    """A fork of this process would wait for it for ever."""
    with LOCK:
        assert children.wait(children.start(take_the_lock)) == 0


def test_how_a_child_ended_is_told():
    assert children.wait(children.start(end_with, 3)) == 3
    child = children.start(never_end)
    child.kill()
    assert children.wait(child) == -signal.SIGKILL


def test_a_stopped_child_is_seen_and_continues():
    child = children.start(stop_and_go_on)
    children.wait_until_stopped(child)
    os.kill(child.pid, signal.SIGCONT)
    assert children.wait(child) == 0


def test_a_child_that_does_not_end_is_ended(monkeypatch):
    monkeypatch.setattr(children, "_PATIENCE", 0.2)
    child = children.start(never_end)
    with pytest.raises(AssertionError, match="did not end"):
        children.wait(child)
    child.join(30)
    assert child.exitcode == -signal.SIGKILL
