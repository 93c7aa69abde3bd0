"""ImageReward v1.0 (Xu et al. 2023, https://arxiv.org/abs/2304.05977) on transformers' own BLIP classes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from . import affine_head
from .errors import RewardModelError
from .preprocessing import shortest_side_crop, stack
from .weights import (
    State,
    WeightsRewardModel,
    build_from_state,
    find_file,
    load_pretrained,
    read_state,
    refuse_rest,
    take,
)

CHECKPOINT, FILE = "zai-org/ImageReward", "ImageReward.pt"
TOKENIZER = "google-bert/bert-base-uncased"
TOKENS = 35
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of raw scores over the makers' data
_HEAD_WIDTH = 64  # of every attention head, in both towers of every BLIP

# The original's names of the picture tower -> transformers'. The text tower has the same names in both.
_RENAME = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.(\d+)\.norm(\d)\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
)
_UNUSED = ("blip.vision_proj.", "blip.text_proj.")  # of BLIP's pretraining


class ImageReward(WeightsRewardModel):
    """A BLIP that reads the prompt while looking at the picture, and an affine head; about -2.5 to 2.

    Only the first 35 tokens of a prompt are read, [CLS] and [SEP] included: what follows changes nothing.

    Args:
        checkpoint: hub id, folder or file of the original checkpoint (``ImageReward.pt``, or the same keys in
            safetensors). Sizes are read off its shapes.
        tokenizer: hub id or folder of BERT's uncased tokenizer.
        revision: revision of the checkpoint on the hub.
        device: where it runs; the GPU when there is one.
        dtype: precision of BLIP's weights; the head is fp32.
        batch_size: pictures scored at once.

    Raises:
        RewardModelError: the checkpoint cannot be found, or its keys are not the original's.
    """

    name = "imagereward"
    licence = "Apache-2.0"
    requires = ("transformers",)

    def __init__(
        self,
        checkpoint: str | Path = CHECKPOINT,
        tokenizer: str | Path = TOKENIZER,
        *,
        revision: str | None = None,
        device: str | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 16,
    ) -> None:
        from transformers import BertTokenizer, BlipTextModel, BlipVisionModel

        super().__init__(device, dtype, batch_size)
        state = read_state(find_file(checkpoint, FILE, revision))
        refuse_rest(state, ("blip.visual_encoder.", "blip.text_encoder.", "mlp.", *_UNUSED), self.name)
        vision = {_renamed(key): value for key, value in take(state, "blip.visual_encoder.").items()}
        text = take(state, "blip.text_encoder.", drop=["embeddings.position_ids"])  # a buffer of older releases
        vision_config, text_config = _configs(vision, text)
        self.vision = build_from_state(BlipVisionModel, vision_config, vision, self.name, dtype).to(self.device)
        self.text = build_from_state(BlipTextModel, text_config, text, self.name, dtype, add_pooling_layer=False).to(
            self.device
        )
        self.head = affine_head.fold(take(state, "mlp."), self.name).to(self.device)
        self.tokenizer = load_pretrained(BertTokenizer, tokenizer, self.name)
        self.tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)  # BLIP's, in its order
        if len(self.tokenizer) > text_config.vocab_size:
            raise RewardModelError(
                f"{self.name}: {tokenizer} has {len(self.tokenizer)} tokens, the checkpoint {text_config.vocab_size}."
            )
        self.preprocess = shortest_side_crop(vision_config.image_size)
        self._identify(checkpoint, self.vision, self.text, self.head, tokenizer=str(tokenizer))

    @torch.inference_mode()
    def score_batch(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        pixels = stack(self.preprocess, images, self.device, self.dtype)
        words = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
        words = words.to(self.device)
        read = self.text(
            input_ids=words.input_ids,
            attention_mask=words.attention_mask,
            encoder_hidden_states=self.vision(pixels).last_hidden_state,
        )
        return (self.head(read.last_hidden_state[:, 0].float())[:, 0] - MEAN) / STD


def _renamed(key: str) -> str:
    for pattern, name in _RENAME:
        key = re.sub(pattern, name, key)
    return key


def _configs(vision: State, text: State) -> tuple[Any, Any]:
    """Configs of the two towers, read off the shapes of their weights."""
    from transformers import BlipTextConfig, BlipVisionConfig

    try:
        patches, positions = vision["embeddings.patch_embedding.weight"], vision["embeddings.position_embedding"]
        words, places = text["embeddings.word_embeddings.weight"], text["embeddings.position_embeddings.weight"]
        vision_inner = vision["encoder.layers.0.mlp.fc1.weight"].shape[0]
        text_inner = text["encoder.layer.0.intermediate.dense.weight"].shape[0]
    except KeyError as error:
        raise RewardModelError(f"imagereward: the checkpoint lacks the key that becomes {error}.") from error
    vision_config = BlipVisionConfig(
        hidden_size=patches.shape[0],
        intermediate_size=vision_inner,
        num_hidden_layers=_layers(vision),
        num_attention_heads=patches.shape[0] // _HEAD_WIDTH,
        patch_size=patches.shape[-1],
        image_size=patches.shape[-1] * round((positions.shape[1] - 1) ** 0.5),
        layer_norm_eps=1e-6,  # BLIP's ViT; transformers' default is 1e-5
    )
    text_config = BlipTextConfig(
        vocab_size=words.shape[0],
        hidden_size=words.shape[1],
        encoder_hidden_size=patches.shape[0],
        intermediate_size=text_inner,
        num_hidden_layers=_layers(text),
        num_attention_heads=words.shape[1] // _HEAD_WIDTH,  # 12 in a BERT base; transformers' default is 8
        max_position_embeddings=places.shape[0],
        layer_norm_eps=1e-12,
    )
    return vision_config, text_config


def _layers(state: State) -> int:
    return 1 + max((int(m[1]) for m in (re.match(r"encoder\.layers?\.(\d+)\.", key) for key in state) if m), default=-1)
