"""A real HTTP server on loopback that speaks OpenAI's chat completions, and misbehaves when told to."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image


@dataclass
class Asked:
    """One request as the server saw it."""

    body: dict[str, Any]
    images: list[Image.Image]
    text: str


@dataclass
class Reply:
    """What the server does: send a text as a completion, or something else."""

    text: str | None = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    """Sent in place of a completion."""
    cut: bool = False
    """Close the connection in the middle of the body."""
    wait: float = 0.0
    drip: float = 0.0
    """Seconds between single bytes."""
    finish: str = "stop"
    logprobs: list[dict[str, Any]] | None = None


class JudgeServer:
    """``with JudgeServer(behaviour) as server: server.url``; ``behaviour(asked) -> Reply`` runs in many threads."""

    def __init__(self, behaviour: Callable[[Asked], Reply], models: tuple[str, ...] = ("judge",)) -> None:
        self.asked: list[Asked] = []
        self.authorizations: set[str | None] = set()
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                self.send(Reply(raw=json.dumps({"data": [{"id": name} for name in models]}).encode()))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.asked.append(asked := _asked(body))
                    outer.authorizations.add(self.headers["Authorization"])
                    outer.under_way += 1
                    outer.most_under_way = max(outer.most_under_way, outer.under_way)
                try:
                    self.send(behaviour(asked))
                finally:
                    with outer.lock:
                        outer.under_way -= 1

            def send(self, reply: Reply) -> None:
                time.sleep(reply.wait)
                data = _completion(reply) if reply.raw is None else reply.raw
                self.send_response(reply.status)
                for key, value in reply.headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if reply.cut:
                    self.wfile.write(data[: len(data) // 2])
                    self.close_connection = True
                elif reply.drip:
                    for byte in data:
                        self.wfile.write(bytes([byte]))
                        self.wfile.flush()
                        time.sleep(reply.drip)
                else:
                    self.wfile.write(data)

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

            def handle_error(self, *_: Any) -> None:
                """A client that gave up is no news here."""

        self.http = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def __enter__(self) -> JudgeServer:
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()


def _asked(body: dict[str, Any]) -> Asked:
    parts = body["messages"][0]["content"]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    images = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]
    assert [part["type"] for part in parts] == ["image_url"] * len(urls) + ["text"]
    return Asked(body, images, parts[-1]["text"])


def _completion(reply: Reply) -> bytes:
    choice: dict[str, Any] = {
        "index": 0,
        "message": {"role": "assistant", "content": reply.text},
        "finish_reason": reply.finish,
    }
    if reply.logprobs is not None:
        choice["logprobs"] = {"content": reply.logprobs}
    return json.dumps({"object": "chat.completion", "choices": [choice]}).encode()
