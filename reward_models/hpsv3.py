"""Human Preference Score v3 (Ma et al. 2025, https://arxiv.org/abs/2508.03789): Qwen2-VL with a regression head."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from .errors import RewardModelError
from .weights import (
    State,
    WeightsRewardModel,
    build_from_state,
    find_file,
    load_exactly,
    load_pretrained,
    read_state,
    refuse_rest,
    take,
)

CHECKPOINT, FILE = "MizzenAI/HPSv3", "HPSv3.safetensors"
BACKBONE = "Qwen/Qwen2-VL-7B-Instruct"
REWARD_TOKEN = "<|Reward|>"
PIXELS = 256 * 28 * 28  # every picture is resized to about this many, up or down


class HPSv3(WeightsRewardModel):
    """The mean of a predicted normal distribution of preference, read at one special token; unbounded, roughly 0 to 12.

    The model was trained with one long instruction around the prompt, and scores mean nothing with another. That text
    belongs to its makers' package and is taken from there (``pip install --no-deps hpsv3``; the package is read as
    text, never imported, so its pinned dependencies do not matter), or from ``instruction``.

    Positions are counted along the sequence, picture tokens too, because the original calls the language model so:
    Qwen2-VL's own positions in three dimensions give other scores.

    Args:
        checkpoint: hub id, folder or file of the weights, in the key layout of either generation of transformers.
        backbone: hub id or folder of the Qwen2-VL it was tuned from: its config and processor are used.
        instruction: the text, or the path of a file with it: with ``{text_prompt}`` where the prompt goes and one
            ``<|Reward|>``. None takes it from the installed package ``hpsv3``.
        pixels: pictures are resized to about this many pixels; the model was trained with the default.
        revision: revision of the checkpoint on the hub.
        device: where it runs; the GPU when there is one.
        dtype: precision of Qwen2-VL's weights; the head is fp32.
        batch_size: pictures scored at once.

    Raises:
        RewardModelError: no instruction, or weights with other keys.
    """

    name = "hpsv3"
    licence = "Apache-2.0"
    requires = ("transformers",)

    def __init__(
        self,
        checkpoint: str | Path = CHECKPOINT,
        backbone: str | Path = BACKBONE,
        instruction: str | Path | None = None,
        pixels: int = PIXELS,
        *,
        revision: str | None = None,
        device: str | None = None,
        dtype: torch.dtype = torch.bfloat16,
        batch_size: int = 4,
    ) -> None:
        from transformers import AutoProcessor, Qwen2VLConfig, Qwen2VLModel

        super().__init__(device, dtype, batch_size)
        self.instruction, self.pixels = _instruction(instruction), pixels
        self.processor = load_pretrained(AutoProcessor, backbone, self.name)
        self.processor.tokenizer.padding_side = "right"
        self.processor.tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
        self.reward_id = self.processor.tokenizer.convert_tokens_to_ids(REWARD_TOKEN)
        state = read_state(find_file(checkpoint, FILE, revision))
        refuse_rest(state, ("model.", "visual.", "lm_head.", "rm_head."), self.name)
        network = _network(state)
        config = load_pretrained(Qwen2VLConfig, backbone, self.name)
        config.text_config.vocab_size = _rows(network)  # cut to the tokenizer's size when the token was added
        if self.reward_id >= config.text_config.vocab_size:
            raise RewardModelError(f"{self.name}: {backbone} has more tokens than the checkpoint; is it the right one?")
        self.model = build_from_state(Qwen2VLModel, config, network, self.name, dtype).to(self.device)
        self.head = _head(take(state, "rm_head."), self.name).to(self.device)
        settings = {"backbone": str(backbone), "instruction": _hash(self.instruction), "pixels": pixels}
        self._identify(checkpoint, self.model, self.head, **settings)

    @torch.inference_mode()
    def score_batch(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        reserved = self.processor.tokenizer.get_added_vocab()
        usable = [i for i, prompt in enumerate(prompts) if not any(token in prompt for token in reserved)]
        scores = torch.full((len(prompts),), float("nan"))
        if usable:  # a prompt that spells special tokens would be read as something else: no judgement
            scores[usable] = self._score([images[i] for i in usable], [prompts[i] for i in usable]).cpu()
        return scores

    def _score(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        texts = [
            self.processor.apply_chat_template(
                _message(self.instruction, p), tokenize=False, add_generation_prompt=True
            )
            for p in prompts
        ]
        inputs = self.processor(
            text=texts,
            images=[self._resized(image) for image in images],
            padding=True,
            return_tensors="pt",
            images_kwargs={"do_resize": False},
        ).to(self.device)
        ids = inputs["input_ids"]
        read = self.model(
            input_ids=ids,
            attention_mask=inputs["attention_mask"],
            pixel_values=inputs["pixel_values"].to(self.dtype),
            image_grid_thw=inputs["image_grid_thw"],
            position_ids=torch.arange(ids.shape[1], device=ids.device).expand(ids.shape),
            use_cache=False,
        )
        at_token = read.last_hidden_state[ids == self.reward_id]  # one a row: the instruction has exactly one
        return self.head(at_token.float())[:, 0]  # the second number is about the spread

    def _resized(self, image: Image.Image) -> Image.Image:
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        shapes = self.processor.image_processor
        factor = shapes.patch_size * shapes.merge_size
        try:
            height, width = smart_resize(image.height, image.width, factor, self.pixels, self.pixels)
        except ValueError as error:
            raise RewardModelError(f"{self.name}: a picture of {image.width} x {image.height}: {error}") from error
        return image.resize((width, height), Image.Resampling.BICUBIC)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _message(instruction: str, prompt: str) -> list[dict[str, Any]]:
    text = instruction.replace("{text_prompt}", prompt)
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]


def _instruction(given: str | Path | None) -> str:
    text = _from_package() if given is None else str(given)
    if given is not None and "{text_prompt}" not in text:
        try:
            text = Path(given).read_text(encoding="utf-8")
        except OSError as error:
            raise RewardModelError(f"hpsv3: cannot read the instruction {given}: {error}") from error
    if "{text_prompt}" not in text or text.count(REWARD_TOKEN) != 1:
        raise RewardModelError(f"hpsv3: the instruction needs {{text_prompt}} and exactly one {REWARD_TOKEN}.")
    return text


def _from_package() -> str:
    """The two strings of the installed ``hpsv3`` that make its instruction, read without importing it."""
    spec = importlib.util.find_spec("hpsv3")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        source = Path(folder) / "dataset" / "data_collator_qwen.py"
        if not source.is_file():
            continue
        strings = {
            target.id: node.value.value
            for node in ast.parse(source.read_text(encoding="utf-8")).body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        if {"INSTRUCTION", "prompt_with_special_token"} <= set(strings):
            return str(strings["INSTRUCTION"]) + str(strings["prompt_with_special_token"])
    raise RewardModelError(
        "hpsv3: the instruction the model was trained with is part of its makers' package: "
        "pip install --no-deps hpsv3, or give instruction=PATH of a file with it."
    )


def _network(state: State) -> State:
    """Keys of ``Qwen2VLModel``: the language model sat directly in ``model.`` before transformers 4.52."""
    new = {key.removeprefix("model."): value for key, value in state.items() if key.startswith(("model.", "visual."))}
    return {
        key if key.startswith(("visual.", "language_model.")) else f"language_model.{key}": value
        for key, value in new.items()
    }


def _rows(network: State) -> int:
    try:
        return network["language_model.embed_tokens.weight"].shape[0]
    except KeyError as error:
        raise RewardModelError("hpsv3: the checkpoint lacks embed_tokens.weight.") from error


def _head(state: State, label: str) -> nn.Sequential:
    try:
        wide, width = state["0.weight"].shape
        narrow = state["3.weight"].shape[0]
    except KeyError as error:
        raise RewardModelError(f"{label}: the checkpoint lacks rm_head.{error}.") from error
    head = nn.Sequential(
        nn.Linear(width, wide), nn.ReLU(), nn.Dropout(0.05), nn.Linear(wide, narrow), nn.ReLU(), nn.Linear(narrow, 2)
    )
    load_exactly(head, {key: value.float() for key, value in state.items()}, label)
    return head.eval().requires_grad_(False)
