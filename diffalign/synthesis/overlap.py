"""Stages that work at the same time: one item is drawn while the one before it is scored and an earlier one written."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")
_END = object()


def overlap(items: Iterable[T], *stages: Callable[[T], None], waiting: int = 1) -> None:
    """Pass each item through all stages in order; each stage is a thread, and takes the items in order.

    The items themselves are made in the caller's thread.

    Args:
        items: made one at a time.
        stages: called with each item.
        waiting: items that may wait before each stage, so that memory stays bounded.

    Raises:
        Exception: the first error of any stage or of the items, once all threads have stopped.
    """
    queues: list[queue.Queue[object]] = [queue.Queue(waiting) for _ in stages]
    errors: list[BaseException] = []
    stop = threading.Event()

    def put(place: int, item: object) -> None:
        while not stop.is_set():
            try:
                queues[place].put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def work(place: int, stage: Callable[[T], None]) -> None:
        while not stop.is_set():
            try:
                item = queues[place].get(timeout=0.1)
            except queue.Empty:
                continue
            try:
                if item is not _END:
                    stage(item)  # type: ignore[arg-type]
            except BaseException as error:  # noqa: BLE001  (raised again below, in the caller's thread)
                errors.append(error)
                stop.set()
                return
            if place + 1 < len(stages):
                put(place + 1, item)
            if item is _END:
                return

    threads = [
        threading.Thread(target=work, args=(place, stage), name=f"diffalign stage {place}", daemon=True)
        for place, stage in enumerate(stages)
    ]
    for thread in threads:
        thread.start()
    try:
        for item in items:
            if stop.is_set():
                break
            put(0, item)
        put(0, _END)
        while any(thread.is_alive() for thread in threads):
            for thread in threads:
                thread.join(timeout=0.1)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
