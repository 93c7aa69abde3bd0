"""Vision-language models of transformers: Qwen2-VL, Qwen2.5-VL, Qwen3-VL, LLaVA-OneVision ... by their own config."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import RewardModelError
from ..weights import fingerprint
from .backend import Answer, Request

IMAGES = ("Image 1", "Image 2")


class LocalBackend:
    """A checkpoint in this process.

    Args:
        model: hub id or folder of a checkpoint that ``AutoModelForImageTextToText`` knows, with its chat template.
        revision: revision of a hub id.
        device: where it runs; the GPU when there is one. ``"auto"`` spreads the model over all GPUs.
        dtype: precision of the weights; bfloat16 on a GPU and float32 on the CPU when None. Probabilities are fp32.
        batch_size: questions answered at once.
        template_options: further variables of the chat template, such as ``{"enable_thinking": False}``.

    Raises:
        RewardModelError: the checkpoint cannot be loaded.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        revision: str | None = None,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        batch_size: int = 8,
        template_options: dict[str, Any] | None = None,
    ) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
        placement = {"device_map": "auto"} if device == "auto" else {}
        try:
            self.processor = AutoProcessor.from_pretrained(model, revision=revision)
            self.vlm = AutoModelForImageTextToText.from_pretrained(
                model, revision=revision, dtype=dtype, use_safetensors=True, **placement
            )
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise RewardModelError(
                f"transformers cannot load {str(model)!r} as a vision-language model: {error}. A checkpoint in another "
                "format, as the first LLaVA ones, can be served by SGLang: backend='server'."
            ) from error
        if getattr(self.processor, "chat_template", None) is None:
            raise RewardModelError(f"{str(model)!r} has no chat template; add chat_template.jinja to its folder.")
        if device != "auto":
            self.vlm.to(device)
        self.vlm.eval().requires_grad_(False)
        self.processor.tokenizer.padding_side = "left"  # answers have to begin where the question ends
        added = self.processor.tokenizer.added_tokens_decoder.values()
        shown = (getattr(self.processor, kind, None) for kind in ("image_token", "video_token"))
        self._control = {token.content for token in added if token.special} | {str(token) for token in shown if token}
        self.batch_size, self.template_options = batch_size, template_options or {}
        self.model = str(model)
        self.revision = revision or getattr(self.vlm.config, "_commit_hash", None) or _weights_hash(self.vlm)
        self.settings = {
            "dtype": str(dtype),
            "template_options": self.template_options,
            "transformers": version("transformers"),
        }
        self._lock = threading.Lock()

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Each question's answer: greedy at temperature 0, else sampled with the request's own seed."""
        return [answer for batch in self._batches(requests) for answer in self._generate(batch)]

    def weigh(self, requests: Sequence[Request], verdict: re.Pattern[str], direct: bool) -> list[Answer]:
        """See :class:`Backend`. Where the verdict need not come first, the model first writes down to it."""
        answers = [Answer() for _ in requests] if direct else self.answer(requests)
        weighed: dict[int, Request] = {}
        for index, (request, answer) in enumerate(zip(requests, answers, strict=True)):
            found = None if direct else list(verdict.finditer(answer.text))[-1:]
            if direct or (found and not answer.truncated):
                said = answer.text[: found[0].start(1)] if found else ""
                weighed[index] = Request(request.pictures, request.text, prefill=said)
        chosen = dict(zip(weighed, self.choose(list(weighed.values()), IMAGES), strict=True))
        return [
            Answer(answer.text, answer.error, answer.truncated, (float(chosen[i][0]), float(chosen[i][1])))
            if i in chosen
            else answer
            for i, answer in enumerate(answers)
        ]

    def choose(self, requests: Sequence[Request], words: Sequence[str]) -> Tensor:
        """(N, words) fp32: log-probability that the model goes on with each word, over all it could say.

        Raises:
            RewardModelError: the words do not differ in a single token.
        """
        common, tokens = self._tokens(words)
        parts = [torch.empty(0, len(words))]
        for batch in self._batches(requests):
            with self._lock, torch.inference_mode():
                inputs = _extended(self._inputs(batch), common)
                logits = self.vlm(**inputs, logits_to_keep=1).logits[:, -1].float()
                parts.append(logits.log_softmax(-1)[:, tokens].cpu())
        return torch.cat(parts)

    def close(self) -> None:
        """Nothing is held but the weights."""

    def _batches(self, requests: Sequence[Request]) -> Iterator[Sequence[Request]]:
        for start in range(0, len(requests), self.batch_size):
            yield requests[start : start + self.batch_size]

    def _inputs(self, requests: Sequence[Request]) -> dict[str, Tensor]:
        """Token ids and pixels of a batch, on the model's device."""
        texts = []
        for request in requests:
            content: list[dict[str, str]] = [{"type": "image"} for _ in request.pictures]
            content.append({"type": "text", "text": self._plain(request.text)})
            turn = [{"role": "user", "content": content}]
            texts.append(
                self.processor.apply_chat_template(turn, add_generation_prompt=True, **self.template_options)
                + request.prefill
            )
        images = [[picture.image for picture in request.pictures] for request in requests]
        inputs = self.processor(
            text=texts, images=images, padding=True, add_special_tokens=False, return_tensors="pt"
        ).to(self.vlm.device)
        return {key: value.to(self.vlm.dtype) if value.is_floating_point() else value for key, value in inputs.items()}

    def _plain(self, text: str) -> str:
        """A caption may contain ``<|im_end|>`` or an image's placeholder: as plain words they end or show nothing."""
        for token in self._control:
            text = text.replace(token, f"{token[:1]} {token[1:]}")
        return text

    def _generate(self, requests: Sequence[Request]) -> list[Answer]:
        from transformers import GenerationConfig, LogitsProcessorList

        ends = self.vlm.generation_config.eos_token_id
        ends = ends if ends is not None else self.processor.tokenizer.eos_token_id
        ends = [ends] if isinstance(ends, int) else list(ends or [])
        # A checkpoint's own settings (a temperature, a penalty for repetition) are left out: they change verdicts.
        config = GenerationConfig(
            max_new_tokens=max(request.max_tokens for request in requests),
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=self.processor.tokenizer.pad_token_id,
        )
        with self._lock, torch.inference_mode():
            inputs = self._inputs(requests)
            written = self.vlm.generate(
                **inputs, generation_config=config, logits_processor=LogitsProcessorList([_Sampling(requests)])
            )[:, inputs["input_ids"].shape[1] :]
        answers = []
        for request, ids in zip(requests, written.tolist(), strict=True):
            end = next((i for i, token in enumerate(ids) if token in ends), None)
            cut = end is None or end > request.max_tokens
            text = self.processor.tokenizer.decode(ids[: request.max_tokens if cut else end], skip_special_tokens=True)
            answers.append(Answer(text, truncated=cut))
        return answers

    def _tokens(self, words: Sequence[str]) -> tuple[list[int], list[int]]:
        """The tokens that all words begin with, and the one in which each differs."""
        ids = [self.processor.tokenizer.encode(word, add_special_tokens=False) for word in words]
        same = next((i for i, column in enumerate(zip(*ids, strict=False)) if len(set(column)) > 1), 0)
        if any(len(row) != same + 1 for row in ids):
            raise RewardModelError(f"the tokenizer of {self.model!r} splits {', '.join(words)} into several tokens.")
        return ids[0][:same], [row[same] for row in ids]


class _Sampling:
    """Sampling as greedy search over noisy logits: each row has its own seed, so a batch never changes an answer.

    The largest of ``logits / temperature + Gumbel noise`` is a draw from the softmax; rows at temperature 0 stay as
    they are.
    """

    def __init__(self, requests: Sequence[Request]) -> None:
        self.temperatures = [request.temperature for request in requests]
        self.generators = [torch.Generator().manual_seed(request.seed) for request in requests]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        for row, (temperature, generator) in enumerate(zip(self.temperatures, self.generators, strict=True)):
            if temperature > 0:
                uniform = torch.rand(scores.shape[1], generator=generator, dtype=torch.float64)
                noise = -torch.log(-torch.log(uniform.clamp(1e-300, 1 - 1e-16)))
                scores[row] = scores[row] / temperature + noise.to(scores)
        return scores


def _weights_hash(model: torch.nn.Module) -> str | None:
    """What identifies a checkpoint without a revision; None where parts of it are on a disk."""
    return None if any(weight.is_meta for weight in model.parameters()) else fingerprint(model)


def _extended(inputs: dict[str, Tensor], tokens: list[int]) -> dict[str, Tensor]:
    """Inputs with the same text tokens after every row."""
    rows = len(inputs["input_ids"])
    more = {"input_ids": tokens, "attention_mask": [1] * len(tokens)}
    more |= {key: [0] * len(tokens) for key in ("mm_token_type_ids", "token_type_ids") if key in inputs}
    for key, row in more.items():
        tail = torch.tensor(row, dtype=inputs[key].dtype, device=inputs[key].device).expand(rows, -1)
        inputs[key] = torch.cat([inputs[key], tail], dim=1)
    return inputs
