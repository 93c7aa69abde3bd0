"""Stages that run at the same time."""

from __future__ import annotations

import threading
import time

import pytest

from diffalign.synthesis.overlap import overlap


def test_items_pass_all_stages_in_order():
    first, second = [], []
    overlap(range(20), first.append, second.append)
    assert first == second == list(range(20))


def test_stages_work_at_the_same_time():
    meeting = threading.Barrier(2, timeout=300)
    items = iter(range(2))

    def made():
        yield next(items)
        meeting.wait()  # while the stage is at work on the first item
        yield next(items)

    overlap(made(), lambda item: meeting.wait() if item == 0 else None)


def test_few_items_wait():
    made, gate = [], threading.Event()

    def items():
        for number in range(10):
            made.append(number)
            yield number

    def stage(item):
        if item == 0:
            time.sleep(0.3)
            gate.set()
            assert len(made) <= 4  # one at work, one waiting, one being made, one just made

    overlap(items(), stage)
    assert gate.is_set() and len(made) == 10


@pytest.mark.parametrize("place", ["items", "first", "second"])
def test_an_error_anywhere_stops_everything_and_is_raised(place):
    def items():
        for number in range(100):
            if place == "items" and number == 3:
                raise ZeroDivisionError
            yield number

    def stage(name):
        def work(item):
            if place == name and item == 3:
                raise ZeroDivisionError

        return work

    with pytest.raises(ZeroDivisionError):
        overlap(items(), stage("first"), stage("second"))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("diffalign stage")]
