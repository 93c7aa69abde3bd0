"""What runs the model: questions in, texts out. Local and remote models look the same from here."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from PIL import Image


class Picture:
    """An RGB picture with its digest and its data URL, each made once however often the picture is shown."""

    def __init__(self, image: Image.Image) -> None:
        self.image = image

    @cached_property
    def digest(self) -> str:
        size = f"{self.image.width}x{self.image.height}:"
        return hashlib.blake2b(size.encode() + self.image.tobytes(), digest_size=16).hexdigest()

    @cached_property
    def data_url(self) -> str:
        """PNG: what the judge sees is what was generated, without a second compression."""
        file = io.BytesIO()
        self.image.save(file, "PNG", compress_level=1)
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


@dataclass(frozen=True)
class Request:
    """One user turn: pictures first, text last."""

    pictures: tuple[Picture, ...]
    text: str
    max_tokens: int = 1024
    temperature: float = 0.0
    seed: int = 0
    prefill: str = ""
    """What the model has already said (local models only)."""


@dataclass(frozen=True)
class Answer:
    """What came back: a text, or the reason why none did."""

    text: str = ""
    error: str = ""
    truncated: bool = False
    """Whether the text was cut off at ``max_tokens``."""
    weights: tuple[float, float] | None = None
    """Log-probabilities of "Image 1" and "Image 2" where the verdict stands; None where they were not to be had."""


class Backend(Protocol):
    """Answers questions. Calls may come from several threads."""

    model: str
    revision: str | None
    settings: dict[str, Any]
    """What else may change an answer and is not in the request."""

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """An answer for each request, in order. What fails is said in ``Answer.error``, not raised."""
        ...

    def weigh(self, requests: Sequence[Request], verdict: re.Pattern[str], direct: bool) -> list[Answer]:
        """Answers with ``weights``.

        Args:
            requests: the questions.
            verdict: finds the verdict in an answer; its group 1 is the word before the number.
            direct: whether the verdict may be asked for at once; a model that can be made to begin with it then
                gives no text.
        """
        ...

    def close(self) -> None: ...
