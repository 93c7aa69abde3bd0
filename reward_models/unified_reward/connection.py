"""JSON over HTTP that cannot hang: attempts have deadlines, their number and the waits between are bounded."""

from __future__ import annotations

import asyncio
import email.utils
import ipaddress
import math
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from ..errors import RewardModelError

_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}
_HOPELESS = {401, 403, 404, 405}  # the address, the key or the model's name is wrong
_LARGEST_REPLY = 16 * 2**20  # bytes; no answer of a judge comes near

Call = Callable[[], tuple[str, str, dict[str, Any] | None]]
"""Makes a request when its turn comes: method, path, JSON body. Runs in a worker thread."""


@dataclass
class Refused(Exception):
    """Why a call has no reply."""

    problem: str
    again: bool = False
    """Whether another attempt may help."""
    hopeless: bool = False
    """Whether no call like it can ever have a reply."""
    wait: float | None = None
    """Seconds that the server asks for before another attempt."""

    def __str__(self) -> str:
        return self.problem


class Connection:
    """A server's connections, shared by all threads of a process.

    Args:
        base_url: such as ``http://localhost:8000/v1``; ``/v1`` is added where there is no path.
        headers: sent with every request.
        timeout: seconds for one attempt, from connecting to the last byte.
        retries: further attempts after a failure that may pass: no connection, a timeout, 429, 5xx, a broken reply.
        backoff: seconds before the first retry; doubled each time. The server's ``Retry-After`` goes before.
        longest_wait: seconds; a server that asks for a longer wait gets no further attempt, and one that is silent
            is left alone for so long.
        concurrency: requests under way at once, over all threads.
    """

    def __init__(
        self,
        base_url: str,
        *,
        headers: dict[str, str],
        timeout: float,
        retries: int,
        backoff: float,
        longest_wait: float,
        concurrency: int,
    ) -> None:
        try:
            url = httpx.URL(base_url)
        except (httpx.InvalidURL, TypeError):
            url = httpx.URL("")
        if url.scheme not in ("http", "https") or not url.host:
            raise RewardModelError(f"base_url must look like http://localhost:8000/v1, got {base_url!r}.")
        if timeout <= 0 or retries < 0 or concurrency < 1 or backoff < 0 or longest_wait < 0:
            raise RewardModelError("timeout must be positive, concurrency at least 1, retries and waits not negative.")
        self.url = str(url.copy_with(path="/v1") if url.path in ("", "/") else url).rstrip("/")
        self.timeout, self.retries, self.backoff, self.longest_wait = timeout, retries, backoff, longest_wait
        self.concurrency = concurrency
        self.attempts = 0
        """Requests sent so far, retries among them."""
        self._silent_until = -math.inf
        self._headers = headers
        self._trust_env = not _is_loopback(url.host)  # no proxy stands between a machine and itself
        self._jitter = random.Random(0)  # its own stream: waiting must not move anyone's random numbers
        self._loop: _Loop | None = None
        self._lock = threading.Lock()

    def exchange(self, calls: Sequence[Call]) -> list[Any]:
        """The JSON of each call's reply, or the :class:`Refused` that says why there is none.

        After ``2 * concurrency + 2`` calls in a row without a reply the rest of ``calls`` is not tried, and neither is
        any other for ``longest_wait`` seconds: a dead server costs a bounded time however much is asked of it, in
        whatever portions. An interrupted caller takes his requests with him.
        """
        loop = self._running()
        future = asyncio.run_coroutine_threadsafe(self._all(loop, calls), loop.events)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Closes all connections; the next exchange opens new ones."""
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is not None and loop.process == os.getpid():
            loop.close()

    def _running(self) -> _Loop:
        with self._lock:
            if self._loop is None or self._loop.process != os.getpid():  # a forked child has no threads
                self._loop = _Loop(self._client, self.concurrency)
            return self._loop

    def _client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=self.concurrency)
        return httpx.AsyncClient(
            headers=self._headers,
            timeout=self.timeout,
            limits=limits,
            trust_env=self._trust_env,
            verify=self.url.startswith("https"),  # loading the certificates takes longer than a small judge's answer
        )

    async def _all(self, loop: _Loop, calls: Sequence[Call]) -> list[Any]:
        in_a_row = 0

        async def one(call: Call) -> Any:
            nonlocal in_a_row
            async with loop.slots:
                if in_a_row > 2 * self.concurrency + 1 or time.monotonic() < self._silent_until:
                    return Refused(f"not asked: {2 * self.concurrency + 2} questions in a row had no reply")
                try:
                    method, path, body = await asyncio.to_thread(call)
                    reply = await self._patiently(loop.client, method, path, body)
                except Refused as refused:
                    in_a_row += refused.again or refused.hopeless
                    if in_a_row == 2 * self.concurrency + 2:
                        self._silent_until = time.monotonic() + self.longest_wait
                    return refused
                except ValueError as error:  # a text that is no Unicode, a number that is no JSON
                    return Refused(f"cannot be sent: {error}")
                in_a_row = 0
                return reply

        return list(await asyncio.gather(*(one(call) for call in calls)))

    async def _patiently(self, client: httpx.AsyncClient, method: str, path: str, body: Any) -> Any:
        refused = Refused("not tried")
        for attempt in range(self.retries + 1):
            try:
                return await asyncio.wait_for(self._attempt(client, method, path, body), self.timeout)
            except (httpx.HTTPError, asyncio.TimeoutError) as error:
                refused = Refused(f"no reply: {str(error) or f'nothing within {self.timeout:g} s'}", again=True)
            except Refused as error:
                refused = error
            pause = refused.wait if refused.wait is not None else self._pause(attempt)
            if not refused.again or attempt == self.retries or pause > self.longest_wait:
                break
            await asyncio.sleep(pause)
        raise refused

    async def _attempt(self, client: httpx.AsyncClient, method: str, path: str, body: Any) -> Any:
        self.attempts += 1
        async with client.stream(method, self.url + path, json=body) as response:
            data = bytearray()
            async for chunk in response.aiter_bytes():
                data += chunk
                if len(data) > _LARGEST_REPLY:
                    raise Refused("the reply is larger than any answer can be")
        code = response.status_code
        if code != 200:
            said = " ".join(data[:400].decode("utf-8", "replace").split())[:200]
            wait = _retry_after(response.headers.get("Retry-After"))
            raise Refused(f"status {code} {said}".strip(), again=code in _AGAIN, hopeless=code in _HOPELESS, wait=wait)
        try:
            return httpx.Response(200, content=bytes(data)).json()
        except (ValueError, RecursionError) as error:
            raise Refused("the reply is not JSON", again=True) from error

    def _pause(self, attempt: int) -> float:
        """Seconds before the next attempt, spread so that clients do not all come back at once."""
        return min(self.backoff * 2.0**attempt, self.longest_wait) * self._jitter.uniform(0.5, 1.0)


class _Loop:
    """An event loop in a daemon thread, with the connections that live on it."""

    def __init__(self, client: Callable[[], httpx.AsyncClient], concurrency: int) -> None:
        self.process = os.getpid()
        self.events = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.events.run_forever, name="reward-model-server", daemon=True)
        self.thread.start()
        asyncio.run_coroutine_threadsafe(self._open(client, concurrency), self.events).result()

    async def _open(self, client: Callable[[], httpx.AsyncClient], concurrency: int) -> None:
        self.client, self.slots = client(), asyncio.Semaphore(concurrency)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self.client.aclose(), self.events).result()
        self.events.call_soon_threadsafe(self.events.stop)
        self.thread.join()
        self.events.close()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _retry_after(header: str | None) -> float | None:
    """Seconds of a ``Retry-After`` header, which gives seconds or a date; None where it cannot be read."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return max(seconds, 0.0) if seconds == seconds else None
