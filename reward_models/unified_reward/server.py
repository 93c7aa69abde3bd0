"""Any server that speaks OpenAI's chat completions: vLLM, SGLang, ``transformers serve``."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from ..errors import RewardModelError
from ..keys import API_KEY, authorization
from .backend import Answer, Request
from .connection import Connection, Refused

_ALTERNATIVES = 20  # as many as OpenAI's interface allows to ask for


class ServerBackend:
    """A remote model. A question that gets no reply comes back with its error.

    Args:
        base_url: what OpenAI's clients take, such as ``http://localhost:8000/v1``.
        model: the served name; may be left out when the server serves one model.
        revision: what the server was started with, as a note for the identity: the interface does not tell.
        api_key: sent as a bearer token, and kept nowhere else; None takes ``REWARD_MODEL_API_KEY``.
        template_options: sent as ``chat_template_kwargs``, such as ``{"enable_thinking": False}``.
        extra_body: further fields of every request, such as ``{"repetition_penalty": 1.0}``.
        connection: ``timeout``, ``retries``, ``backoff``, ``longest_wait``, ``concurrency`` of :class:`Connection`.

    Raises:
        RewardModelError: the name is left out and the server cannot be asked for it. Later, when asked: address, key or
            name are refused and nothing was ever answered.
    """

    def __init__(
        self,
        base_url: str,
        *,
        model: str | None = None,
        revision: str | None = None,
        api_key: str | None = None,
        template_options: dict[str, Any] | None = None,
        extra_body: dict[str, Any] | None = None,
        **connection: Any,
    ) -> None:
        self.connection = Connection(base_url, headers=authorization(api_key), **connection)
        self.extra_body = extra_body or {}
        if template_options:
            self.extra_body = {"chat_template_kwargs": template_options, **self.extra_body}
        self.settings = {"extra_body": self.extra_body}
        self.model, self.revision = model or self._only_model(), revision
        self._ever_answered = False

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        return self._ask(requests)

    def weigh(self, requests: Sequence[Request], verdict: re.Pattern[str], direct: bool) -> list[Answer]:
        """See :class:`Backend`. The server writes its whole answer; the verdict in it is weighed by its tokens."""
        return self._ask(requests, verdict)

    def close(self) -> None:
        self.connection.close()

    def _ask(self, requests: Sequence[Request], verdict: re.Pattern[str] | None = None) -> list[Answer]:
        replies = self.connection.exchange([partial(self._call, r, verdict is not None) for r in requests])
        hopeless = next((reply for reply in replies if isinstance(reply, Refused) and reply.hopeless), None)
        self._ever_answered |= any(not isinstance(reply, Refused) for reply in replies)
        if hopeless and not self._ever_answered:
            raise RewardModelError(
                f"{self.connection.url} refuses every question ({hopeless}); check base_url, model and api_key "
                f"({API_KEY})."
            )
        return [Answer(error=str(reply)) if isinstance(reply, Refused) else _read(reply, verdict) for reply in replies]

    def _call(self, request: Request, weighed: bool) -> tuple[str, str, dict[str, Any]]:
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": picture.data_url}} for picture in request.pictures
        ]
        content.append({"type": "text", "text": request.text})
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,  # stated with top_p and seed: a server's own defaults may sample
            "top_p": 1.0,
            "seed": request.seed,
            "stream": False,
        }
        if weighed:
            body |= {"logprobs": True, "top_logprobs": _ALTERNATIVES}
        return "POST", "/chat/completions", body | self.extra_body

    def _only_model(self) -> str:
        (reply,) = self.connection.exchange([lambda: ("GET", "/models", None)])
        try:
            names = [str(entry["id"]) for entry in reply["data"]]
        except (KeyError, TypeError) as error:
            why = f" ({reply})" if isinstance(reply, Refused) else ""
            raise RewardModelError(
                f"{self.connection.url} does not say which models it serves{why}; is it up? Or give model='its name'."
            ) from error
        if len(names) != 1:
            raise RewardModelError(f"{self.connection.url} serves {names}; give model='one of them'.")
        return names[0]


def _read(reply: Any, verdict: re.Pattern[str] | None) -> Answer:
    """The answer in a chat completion; whatever is not one comes back as an error."""
    try:
        choice = reply["choices"][0]
        text, finish = choice["message"]["content"], choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        return Answer(error="the reply is no chat completion")
    if not isinstance(text, str):
        return Answer(error="the reply has no text")
    if finish in ("content_filter", "abort", "error"):
        return Answer(error=f"the server did not finish the answer: {finish}")
    weights = _weights(choice, text, verdict) if verdict else None
    return Answer(text, truncated=finish == "length", weights=weights)


def _weights(choice: dict[str, Any], text: str, verdict: re.Pattern[str]) -> tuple[float, float] | None:
    """Log-probabilities of 1 and 2 at the last verdict; None where the reply does not have them.

    A number that is not among the alternatives is less likely than all of them; it counts with the smallest listed
    probability, which is never too small.
    """
    found = list(verdict.finditer(text))
    try:
        tokens = [(str(entry["token"]), entry["top_logprobs"]) for entry in choice["logprobs"]["content"]]
        if not found or not "".join(token for token, _ in tokens).startswith(text):
            return None
        place = re.compile(r"[12]").search(text, found[-1].start(1))
        start = 0
        for token, alternatives in tokens:
            start += len(token)
            if place and start > place.start():
                listed = [(str(other["token"]).strip(), float(other["logprob"])) for other in alternatives]
                break
        else:
            return None
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    numbers = {number: [weight for said, weight in listed if said == number] for number in "12"}
    if token.strip() not in numbers or not any(numbers.values()) or not all(weight <= 1e-6 for _, weight in listed):
        return None  # NaN is not below anything
    smallest = min(weight for _, weight in listed)
    first, second = (_log_sum(weights) if weights else smallest for weights in numbers.values())
    return (first, second) if math.isfinite(first) and math.isfinite(second) else None


def _log_sum(weights: list[float]) -> float:
    """Of several tokens for one number, such as "1" and " 1": their probability together."""
    largest = max(weights)
    return largest + math.log(sum(math.exp(weight - largest) for weight in weights)) if largest > -math.inf else largest
