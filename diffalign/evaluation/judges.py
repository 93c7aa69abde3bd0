"""Ready detectors and judges for :mod:`diffalign.evaluation.graders`.

Mask2Former of transformers finds COCO's 80 classes and open_clip names colours (GenEval); a judge behind an
OpenAI-compatible server answers test points (UniGenBench).
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from reward_models import RewardModelError, load_reward_model
from reward_models.base import source_hash
from reward_models.keys import API_KEY, authorization
from reward_models.unified_reward.connection import Connection, Refused

from ..errors import ConfigError
from .graders import GENEVAL_COLORS, Detection
from .prompt_sets import Point

# GenEval calls three of COCO's classes by clearer names.
_RENAMED = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
_TEMPLATES = ("a photo of a {color} {label}", "a photo of a {color}-colored {label}", "a photo of a {color} object")
_GRAY = "#999999"  # painted around a thing before its colour is named


class Mask2FormerDetector:
    """Instance segmentation by transformers' Mask2Former.

    GenEval's own numbers come from mmdetection's Swin-S checkpoint; this is the same network with the weights of its
    authors, so scores are near but not equal. Compare models under one detector only.

    Args:
        model: hub id or folder.
        device: where it runs; the GPU when there is one.
        confidence: things below it are not returned.
    """

    def __init__(
        self,
        model: str = "facebook/mask2former-swin-small-coco-instance",
        *,
        device: str | None = None,
        confidence: float = 0.3,
    ) -> None:
        from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self.processor = AutoImageProcessor.from_pretrained(model)
            self.model: Any = Mask2FormerForUniversalSegmentation.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot load the detector {model}: {str(error).splitlines()[0]}") from error
        self.model.eval().requires_grad_(False).to(self.device)
        self.name, self.confidence = model, confidence
        names = self.model.config.id2label
        self.names = {int(i): _RENAMED.get(label, label) for i, label in names.items()}
        self.labels = set(self.names.values())

    @property
    def identity(self) -> dict[str, Any]:
        code = f"transformers {version('transformers')} {source_hash(type(self))}"
        return {"id": self.name, "confidence": self.confidence, "code_version": code}

    @torch.inference_mode()
    def __call__(self, image: Image.Image) -> list[Detection]:
        inputs = self.processor(images=image, return_tensors="pt").to(self.device)
        found = self.processor.post_process_instance_segmentation(
            self.model(**inputs),
            threshold=self.confidence,
            target_sizes=[(image.height, image.width)],
            return_binary_maps=True,
        )[0]
        masks = found["segmentation"]
        result = []
        for number, info in enumerate(found["segments_info"]):
            mask = masks[number].cpu().numpy() > 0.5
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            if not len(rows):
                continue
            box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
            result.append(Detection(self.names[info["label_id"]], float(info["score"]), box, mask))
        return result


class ClipColors:
    """The colour of things by open_clip: three sentences a colour, on the thing cut out over gray.

    Args:
        model: architecture of open_clip.
        tag: pretrained tag, or the path of a checkpoint.
        device: where it runs.
    """

    def __init__(self, model: str = "ViT-L-14", tag: str | None = "openai", *, device: str | None = None) -> None:
        self.clip: Any = load_reward_model("clip", model=model, tag=tag, device=device)
        self._texts: dict[str, Tensor] = {}

    @property
    def identity(self) -> dict[str, Any]:
        own = self.clip.identity
        return own | {"code_version": f"{own['code_version']} {source_hash(type(self))}"}

    @torch.inference_mode()
    def __call__(self, image: Image.Image, things: Sequence[Detection], label: str) -> list[str]:
        cut = torch.stack([self.clip.preprocess(_cut_out(image, thing)) for thing in things])
        seen = F.normalize(self.clip.model.encode_image(cut.to(self.clip.device, self.clip.dtype)).float(), dim=-1)
        return [GENEVAL_COLORS[i] for i in (seen @ self._told(label).T).argmax(1).tolist()]

    def _told(self, label: str) -> Tensor:
        """(colours, d): the mean direction of each colour's sentences."""
        if label not in self._texts:
            texts = [t.format(color=color, label=label) for color in GENEVAL_COLORS for t in _TEMPLATES]
            told = self.clip.model.encode_text(self.clip.tokenizer(texts).to(self.clip.device)).float()
            groups = F.normalize(told, dim=-1).unflatten(0, (len(GENEVAL_COLORS), -1))
            self._texts[label] = F.normalize(groups.mean(1), dim=-1)
        return self._texts[label]


class ServerPointJudge:
    """A vision-language judge behind an OpenAI-compatible server (vLLM, SGLang, ...), asked without sampling.

    Args:
        base_url: for example ``http://localhost:8000/v1``.
        model: name under which the server offers it.
        api_key: sent as a bearer token; None takes ``REWARD_MODEL_API_KEY``.
        timeout: seconds for one attempt.
        retries: further attempts after a failure that may pass.
        concurrency: requests under way at once.
        template: the question, with ``{prompt}`` and ``{points}``; answers depend on its exact words.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        timeout: float = 120.0,
        retries: int = 3,
        concurrency: int = 8,
        template: str | None = None,
    ) -> None:
        self.connection = Connection(
            base_url,
            headers=authorization(api_key),
            timeout=timeout,
            retries=retries,
            backoff=1.0,
            longest_wait=60.0,
            concurrency=concurrency,
        )
        self.model, self.template = model, template or QUESTION
        self._ever_answered = False

    @property
    def identity(self) -> dict[str, Any]:
        return {"id": self.model, "template": self.template, "code_version": source_hash(type(self))}

    def __call__(
        self, images: Sequence[Image.Image], prompts: Sequence[str], points: Sequence[Sequence[Point]]
    ) -> list[str | None]:
        """Answers, None where there is none.

        Raises:
            RewardModelError: the server cannot be reached, or refuses address, key or name, and nothing was ever
                answered. A single question that it cannot take has no answer, and ends nothing.
        """
        calls = [partial(self._request, *three) for three in zip(images, prompts, points, strict=True)]
        replies = self.connection.exchange(calls)
        self._ever_answered |= any(not isinstance(reply, Refused) for reply in replies)
        shut = [reply for reply in replies if isinstance(reply, Refused) and (reply.again or reply.hopeless)]
        if shut and not self._ever_answered:
            raise RewardModelError(
                f"{self.connection.url} answers no question ({shut[0]}); check its address, the model's name and "
                f"{API_KEY}."
            )
        return [_content(reply) for reply in replies]

    def _request(self, image: Image.Image, prompt: str, points: Sequence[Point]) -> tuple[str, str, dict[str, Any]]:
        listed = "\n".join(f"{n}. {point.dimension}: {point.description}" for n, point in enumerate(points, 1))
        question = self.template.replace("{points}", listed).replace("{prompt}", prompt)
        content = [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": _data_url(image)}}]
        messages = [{"role": "user", "content": content}]
        body = {"model": self.model, "messages": messages, "temperature": 0, "seed": 0, "max_tokens": 4096}
        return "POST", "/chat/completions", body


QUESTION = """A picture was made from this prompt: {prompt}

Check each point below in the picture. Judge only what is visible. A point holds when the picture shows it fully.

{points}

First write one short analysis for each point in order, as a list in <analysis>[...]</analysis>.
Then write 1 for each point that holds and 0 for each that does not, in the same order, as a list in
<score>[...]</score>. Both lists have exactly one entry for each point."""


def _cut_out(image: Image.Image, thing: Detection) -> Image.Image:
    if thing.mask is not None:
        image = Image.composite(image, Image.new("RGB", image.size, _GRAY), Image.fromarray(thing.mask))
    left, top, right, bottom = thing.box
    return image.crop((int(left), int(top), max(int(left) + 1, round(right)), max(int(top) + 1, round(bottom))))


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _content(reply: Any) -> str | None:
    try:
        text = reply["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):  # refused, or no answer in it
        return None
    return text if isinstance(text, str) else None
