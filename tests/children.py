"""Children of a test, which may be killed or stopped, without the seconds that their imports would cost.

They are forked from a server that has imported everything and has run nothing. A fork of the test's own process could
stand still for ever: what another thread of it (a server's, a loader's) had locked would stay locked in the child.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any

import psutil

_PATIENCE = 300.0
_SERVER: ForkServerContext = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.conftest", "tests.tiny", "diffalign.synthesis.run", "diffalign.cli"])


def start(work: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """A started child that calls ``work``, a function of a module, with arguments that can be pickled."""
    process = _SERVER.Process(target=_call, args=(dict(os.environ), work, *arguments), daemon=True)
    process.start()
    return process


def wait(process: BaseProcess) -> int:
    """The exit status of a child that must end by itself; minus the signal's number if one killed it."""
    process.join(_PATIENCE)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"child {process.pid} did not end within {_PATIENCE:g} s")
    return process.exitcode


def wait_until_stopped(process: BaseProcess) -> None:
    """Returns when a child has stopped itself with SIGSTOP."""
    deadline = time.monotonic() + _PATIENCE
    while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
        assert process.is_alive() and time.monotonic() < deadline, f"child {process.pid} did not stop"
        time.sleep(0.01)


def _call(environment: dict[str, str], work: Callable[..., Any], *arguments: Any) -> None:
    import torch

    os.environ.update(environment)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "2")))
    torch.use_deterministic_algorithms(True, warn_only=True)
    work(*arguments)
