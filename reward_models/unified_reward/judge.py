"""UnifiedReward (Wang et al. 2025, https://arxiv.org/abs/2503.05236; Think 2505.03318; Flex 2602.02380) as a judge."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..base import BaseRewardModel, source_hash
from ..errors import RewardModelError
from ..images import to_pil
from . import parsers
from .backend import Answer, Backend, Picture, Request
from .local import LocalBackend
from .parsers import OVERALL, Parsed
from .prompts import FAMILIES, Form, choose_form
from .server import ServerBackend
from .statistics import JudgeStatistics

logger = logging.getLogger(__name__)

_SECOND_TEMPERATURE = 0.3
_ENOUGH_PAIRS = 16  # before a warning about the judge itself
_REMEMBERED = 2**16  # answers kept: callers who swap pairs themselves then cost nothing more


@dataclass(frozen=True)
class Question:
    """Something to ask about one or two pictures in this order."""

    pictures: tuple[Picture, ...]
    prompt: str

    @property
    def key(self) -> tuple[str, ...]:
        return (self.prompt, *(picture.digest for picture in self.pictures))


class UnifiedReward(BaseRewardModel):
    """A vision-language model that scores single pictures and judges pairs.

    Each pair is asked in both orders and the two answers are averaged: P(a better) = (P(a | a shown first) +
    P(a | a shown second)) / 2. Without ``mode="logits"`` that is 1, 1/2 or 0 (the form ``shares``: any value), where
    1/2 is a tie or a contradiction. So P(a, b) + P(b, a) = 1, and a judge that always names the picture shown first
    says 1/2 of every pair. An answer that cannot be read in either order makes the pair missing: NaN.

    Args:
        family: how the checkpoint was trained to answer: ``7b`` (1.0), ``2.0``, ``think`` or ``flex``. The last two
            judge pairs only.
        backend: ``local`` (transformers, in this process) or ``server`` (anything that speaks OpenAI's interface).
        model: hub id, folder or served name; the family's 7B model (Flex: 8B), or the only model of the server, when
            None.
        mode: ``text`` reads verdicts, ``logits`` the probabilities of "Image 1" and "Image 2" in their place. Scores
            of single pictures are always read from the text.
        pair_form, point_form: which kind of question is asked, of those the family knows (``prompts.FAMILIES``).
        pair_prompt, point_prompt: text files with the wording, ``{prompt}`` in place of the caption.
        dimension: the number used where an answer has several: ``mean`` of all three, ``alignment``, ``coherence`` or
            ``style``.
        second_try: whether an answer that cannot be read is asked for once more, at temperature 0.3.
        seed: enters the seed of each question.
        max_tokens: length of an answer; the form's own when None. An answer cut off there is missing.
        max_pixels: larger pictures are shown smaller, with their sides in proportion; None shows all as they are.
        record: JSONL file to which every answer is appended, with the raw text.
        batch_size: pictures or pairs worked on at once; 8 locally and 256 with a server when None.
        device, dtype, revision: see :class:`LocalBackend`; a server takes the revision as a note.
        template_options: variables of the chat template, such as ``{"enable_thinking": False}`` for Qwen3.5.
        base_url, api_key, extra_body, timeout, retries, backoff, longest_wait, concurrency: see
            :class:`ServerBackend`. Server only.

    Raises:
        RewardModelError: an option does not fit the others, or the model cannot be loaded.
    """

    name = "unified-reward"
    licence = "MIT"
    requires = ("transformers", "httpx")

    def __init__(
        self,
        family: Literal["7b", "2.0", "think", "flex"] = "2.0",
        *,
        backend: Literal["local", "server"] = "local",
        model: str | Path | None = None,
        mode: Literal["text", "logits"] = "text",
        pair_form: str | None = None,
        point_form: str | None = None,
        pair_prompt: str | Path | None = None,
        point_prompt: str | Path | None = None,
        dimension: Literal["mean", "alignment", "coherence", "style"] = "mean",
        second_try: bool = True,
        seed: int = 0,
        max_tokens: int | None = None,
        max_pixels: int | None = None,
        record: str | Path | None = None,
        batch_size: int | None = None,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        template_options: dict[str, Any] | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        extra_body: dict[str, Any] | None = None,
        timeout: float | None = None,
        retries: int | None = None,
        backoff: float | None = None,
        longest_wait: float | None = None,
        concurrency: int | None = None,
    ) -> None:
        if family.lower() not in FAMILIES:
            raise RewardModelError(f"unified-reward has the families {', '.join(FAMILIES)}, got {family!r}.")
        known = FAMILIES[family.lower()]
        self.family, self.mode, self.dimension = family.lower(), mode, dimension
        pair_form_found = choose_form(known.pair, pair_form, pair_prompt)
        assert pair_form_found is not None  # every family judges pairs
        self.pair_form, self.point_form = pair_form_found, choose_form(known.point, point_form, point_prompt)
        self.second_try, self.seed, self.max_tokens, self.max_pixels = second_try, seed, max_tokens, max_pixels
        self.pairs_only = self.point_form is None
        self._check_options()
        self.record = Path(record) if record else None
        self.batch_size = batch_size or (8 if backend == "local" else 256)
        server: dict[str, Any] = {
            "api_key": api_key,
            "extra_body": extra_body,
            "timeout": timeout,
            "retries": retries,
            "backoff": backoff,
            "longest_wait": longest_wait,
            "concurrency": concurrency,
        }
        server = {key: value for key, value in server.items() if value is not None}
        self.backend: Backend
        if backend == "local":
            if base_url is not None or server:
                given = ", ".join(sorted(server | ({"base_url": base_url} if base_url else {})))
                raise RewardModelError(f"the local backend has no {given}; add backend='server'.")
            self.backend = LocalBackend(
                model or known.model,
                revision=revision,
                device=device,
                dtype=dtype,
                batch_size=self.batch_size,
                template_options=template_options,
            )
        elif backend == "server":
            if base_url is None or dtype is not None:
                raise RewardModelError("a server backend needs base_url, and takes no dtype (the server has its own).")
            self.backend = ServerBackend(
                base_url,
                model=str(model) if model else None,
                revision=revision,
                template_options=template_options,
                **({"timeout": 120.0, "retries": 3, "backoff": 0.5, "longest_wait": 60.0, "concurrency": 16} | server),
            )
        else:
            raise RewardModelError(f"backend is 'local' or 'server', got {backend!r}.")
        self.statistics = JudgeStatistics()
        self._known: dict[tuple[str, tuple[str, ...]], Parsed] = {}
        self._warned = 0
        self._lock = threading.Lock()

    @property
    def identity(self) -> dict[str, str | None]:
        """Besides the model, all that may change an answer: forms, wording, mode, picture size, code."""
        forms = [form for form in (self.pair_form, self.point_form) if form]
        settings = [self.family, self.mode, self.dimension, self.seed, self.max_tokens, self.max_pixels]
        settings += [self.second_try, *(form.text for form in forms), self.backend.settings]
        wording = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=6).hexdigest()
        code = source_hash(parsers, type(self), type(self.backend))
        version = f"{'+'.join(form.name for form in forms)} {self.mode} {wording} {code}"
        return {"id": self.backend.model, "revision": self.backend.revision, "code_version": version}

    def score_batch(self, images: list[Image.Image], prompts: list[str]) -> list[float | None]:
        """The number asked for of each picture; see :meth:`score_dimensions` for all of them."""
        return [self._number(parsed) for parsed in self._ask_points(images, prompts)]

    def score_dimensions(self, images: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
        """All numbers that single pictures got: name -> (N,) fp32, NaN where missing.

        The names are ``overall``, or ``alignment``, ``coherence`` and ``style``, by ``point_form``. One dimension may
        be missing while the others are there.
        """
        images = to_pil(images)
        if len(images) != len(prompts):
            raise RewardModelError(f"expected a prompt for each picture, got {len(images)} and {len(prompts)} prompts.")
        answers = self._ask_points(images, list(prompts))
        form = self._needs_points()
        return {name: _tensor([parsed.values.get(name) for parsed in answers]) for name in form.dimensions}

    def compare(self, pairs: Sequence[tuple[Any, Any]], prompts: Sequence[str], *, progress: bool = False) -> Tensor:
        """(N,) fp32: the probability that the first of each pair is better; NaN where there is no judgement.

        Both orders are asked here: callers need not swap. Two equal pictures are a tie without asking. ``progress``
        shows a bar of pairs on the standard error output.

        Raises:
            RewardModelError: lists of different length, an unreadable picture, or a server that refuses all.
        """
        if isinstance(prompts, str) or len(pairs) != len(prompts):
            raise RewardModelError(f"expected a list with a prompt for each of {len(pairs)} pairs.")
        shares: list[float | None] = []
        with tqdm(total=len(prompts), desc=self.name, unit="pair", disable=not progress) as bar:
            for start in range(0, len(prompts), self.batch_size):
                chunk = pairs[start : start + self.batch_size]
                if any(len(pair) != 2 for pair in chunk):
                    raise RewardModelError("expected pairs of two pictures.")
                flat = self._pictures(to_pil([image for pair in chunk for image in pair], first=2 * start))
                asked = prompts[start : start + len(chunk)]
                shares += self._judge(list(zip(flat[::2], flat[1::2], strict=True)), asked)
                bar.update(len(chunk))
        return _tensor(shares)

    def close(self) -> None:
        """Closes the connections to a server."""
        self.backend.close()

    def _judge(self, pairs: list[tuple[Picture, Picture]], prompts: Sequence[str]) -> list[float | None]:
        """The share of each pair's first picture, asked in both orders."""
        asked = [(a, b, prompt) for (a, b), prompt in zip(pairs, prompts, strict=True) if a.digest != b.digest]
        questions = [Question(shown, prompt) for a, b, prompt in asked for shown in ((a, b), (b, a))]
        answers = iter([self._number(parsed) for parsed in self._ask(questions, self.pair_form)])
        shares: list[float | None] = []
        with self._lock:
            for a, b in pairs:
                self.statistics.pairs += 1
                if a.digest == b.digest:
                    self.statistics.identical += 1
                    shares.append(0.5)
                    continue
                first, second = next(answers), next(answers)
                if first is None or second is None:  # one order alone would bring the position bias back
                    self.statistics.pairs_missing += 1
                    shares.append(None)
                    continue
                self.statistics.add_pair(first, second)
                shares.append((first + 1 - second) / 2)
            self._warn()
        return shares

    def _ask_points(self, images: list[Image.Image], prompts: list[str]) -> list[Parsed]:
        form = self._needs_points()
        questions = [Question((p,), prompt) for p, prompt in zip(self._pictures(images), prompts, strict=True)]
        answers = self._ask(questions, form)
        with self._lock:
            self.statistics.scores += len(answers)
            self.statistics.scores_missing += sum(self._number(parsed) is None for parsed in answers)
        return answers

    def _ask(self, questions: Sequence[Question], form: Form) -> list[Parsed]:
        """What the model says to each question. What was answered before is not asked again."""
        with self._lock:
            known = {q.key: self._known[form.name, q.key] for q in questions if (form.name, q.key) in self._known}
        unique = list({q.key: q for q in questions if q.key not in known}.values())
        requests = [self._request(question, form) for question in unique]
        answers = self._answers(requests, form)
        parsed = [self._parse(answer, form) for answer in answers]
        again = [i for i, one in enumerate(parsed) if self.second_try and one.problem and not answers[i].error]
        second = [replace(requests[i], temperature=_SECOND_TEMPERATURE, seed=requests[i].seed + 1) for i in again]
        for i, answer in zip(again, self._answers(second, form), strict=True):
            one = self._parse(answer, form)
            if len(one.values) > len(parsed[i].values) or (answer.error and not parsed[i].values):
                answers[i], parsed[i] = answer, one  # else the first, at temperature 0, says as much
        with self._lock:
            self.statistics.answers += len(unique)
            self.statistics.asked_again += len(again)
            self.statistics.inconsistent += sum(one.consistent is False for one in parsed)
            self.statistics.failures.update(_reason(one.problem) for one in parsed if self._number(one) is None)
            self._write(unique, answers, parsed)
            for question, answer, one in zip(unique, answers, parsed, strict=True):
                known[question.key] = one
                if not answer.error:  # a server that failed may answer next time
                    self._known[form.name, question.key] = one
            while len(self._known) > _REMEMBERED:
                del self._known[next(iter(self._known))]
        return [known[question.key] for question in questions]

    def _answers(self, requests: Sequence[Request], form: Form) -> list[Answer]:
        if self.mode == "logits" and form.task == "pair":
            assert form.verdict is not None  # checked in _check_options
            return self.backend.weigh(requests, form.verdict, form.direct)
        return self.backend.answer(requests)

    def _parse(self, answer: Answer, form: Form) -> Parsed:
        if answer.error:
            return Parsed(problem=f"no answer: {answer.error}")
        if answer.truncated:
            return Parsed(problem="truncated: give more max_tokens")
        weighed = self.mode == "logits" and form.task == "pair"
        parsed = form.parse(answer.text) if answer.text or not weighed else Parsed()
        if parsed.problem or not weighed:
            return parsed
        if answer.weights is None:
            return Parsed(problem="no probabilities of Image 1 and Image 2")
        odds = answer.weights[1] - answer.weights[0]
        return replace(parsed, values={OVERALL: 1 / (1 + math.exp(min(odds, 700.0)))})

    def _number(self, parsed: Parsed) -> float | None:
        """The one number used of an answer, if it is there."""
        if OVERALL in parsed.values:
            return parsed.values[OVERALL]
        if self.dimension != "mean":
            return parsed.values.get(self.dimension)
        return None if parsed.problem else sum(parsed.values.values()) / len(parsed.values)

    def _request(self, question: Question, form: Form) -> Request:
        tokens = self.max_tokens or form.max_tokens
        key = hashlib.blake2b(json.dumps([self.seed, form.name, *question.key]).encode(), digest_size=8).digest()
        seed = int.from_bytes(key, "big") % 2**31  # of the question itself: order and batch never matter
        return Request(question.pictures, form.question(question.prompt), tokens, seed=seed)

    def _pictures(self, images: list[Image.Image]) -> list[Picture]:
        """Pictures as they are shown; equal ones share their encoding."""
        shown: dict[str, Picture] = {}
        pictures = [Picture(_at_most(image, self.max_pixels)) for image in images]
        return [shown.setdefault(picture.digest, picture) for picture in pictures]

    def _needs_points(self) -> Form:
        if self.point_form is None:
            raise RewardModelError(
                f"UnifiedReward {self.family} only compares pairs: use compare(), or the family 2.0 or 7b."
            )
        return self.point_form

    def _check_options(self) -> None:
        for name, value in (("max_tokens", self.max_tokens), ("max_pixels", self.max_pixels)):
            if value is not None and value < 1:
                raise RewardModelError(f"{name} must be at least 1, got {value}.")
        if self.mode not in ("text", "logits"):
            raise RewardModelError(f"mode is 'text' or 'logits', got {self.mode!r}.")
        if self.mode == "logits" and self.pair_form.verdict is None:
            raise RewardModelError(f"the form {self.pair_form.name!r} has no verdict to weigh; use mode='text'.")
        if self.dimension not in ("mean", *parsers.DIMENSIONS):
            raise RewardModelError(f"dimension is mean, {', '.join(parsers.DIMENSIONS)}; got {self.dimension!r}.")
        forms = [form for form in (self.pair_form, self.point_form) if form]
        if self.dimension != "mean" and not any(self.dimension in form.dimensions for form in forms):
            raise RewardModelError(f"the answers of {self.family!r} have no {self.dimension}; leave dimension out.")

    def _warn(self) -> None:
        """Say loudly, at doubling counts, when verdicts follow the order of the pictures."""
        judged = self.statistics.judged
        if self.statistics.follows_position and judged >= max(_ENOUGH_PAIRS, 2 * self._warned):
            self._warned = judged
            logger.warning(
                "%s follows the place of the pictures (position bias %.2f over %d pairs): its judgements say next to "
                "nothing. Check that the prompt is the checkpoint's own.",
                self.name,
                self.statistics.position_bias,
                judged,
            )

    def _write(self, questions: Sequence[Question], answers: Sequence[Answer], parsed: Sequence[Parsed]) -> None:
        """Append to the record; one write, so that lines of several processes do not mix."""
        if self.record is None or not questions:
            return
        lines = [
            {
                "prompt": question.prompt,
                "images": [picture.digest for picture in question.pictures],
                "answer": answer.text,
                "error": answer.error,
                "weights": answer.weights,
                "values": dict(one.values),
                "problem": one.problem,
            }
            for question, answer, one in zip(questions, answers, parsed, strict=True)
        ]
        self.record.parent.mkdir(parents=True, exist_ok=True)
        with self.record.open("ab", buffering=0) as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines).encode())


def _tensor(values: Sequence[float | None]) -> Tensor:
    return torch.tensor([float("nan") if value is None else value for value in values], dtype=torch.float32)


def _reason(problem: str) -> str:
    """A problem without its particulars, so that a count of reasons stays short."""
    return problem.partition(":")[0]


def _at_most(image: Image.Image, pixels: int | None) -> Image.Image:
    if pixels is None or image.width * image.height <= pixels:
        return image
    scale = math.sqrt(pixels / (image.width * image.height))
    size = (max(1, int(image.width * scale)), max(1, int(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)
