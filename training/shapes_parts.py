"""The micro SDXL before it is trained: tokenizer, VAE, text encoders, UNet and scheduler of the true classes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from diffalign.shapes.grammar import BACKGROUNDS, COLORS, COUNTS, POSITIONS, RELATIONS, SHAPES
from diffalign.shapes.renderer import SIZE

MAX_TOKENS = 24


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer in which each word of the world is one token and any other text still encodes."""
    words = {*COLORS, *SHAPES, *(s + "s" for s in SHAPES), "crosses", *BACKGROUNDS, *COUNTS.values()}
    words |= {w for text in [*POSITIONS.values(), *RELATIONS, "a an background on , . picture"] for w in text.split()}
    alphabet = list(bytes_to_unicode().values())
    merges: list[tuple[str, str]] = []
    for word in sorted(words):
        pieces = [*word[:-1], word[-1] + "</w>"]
        for pair in merges:  # what the merges so far already join
            i = 0
            while i < len(pieces) - 1:
                if (pieces[i], pieces[i + 1]) == pair:
                    pieces[i : i + 2] = ["".join(pair)]
                i += 1
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = [pieces[0] + pieces[1]]
    vocab = [*alphabet, *(a + "</w>" for a in alphabet), *("".join(m) for m in merges)]
    vocab = list(dict.fromkeys(vocab)) + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    tokenizer = CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=MAX_TOKENS
    )
    for word in words:
        if len(tokenizer(word)["input_ids"]) != 3:
            raise RuntimeError(f"{word!r} is not one token: {tokenizer.tokenize(word)}")
    return tokenizer


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def build_text_encoders(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoders = CLIPTextModel(config), CLIPTextModelWithProjection(config)
    for encoder in encoders:  # CLIP's own 0.02 leaves the words indistinguishable for thousands of steps
        for name, parameter in encoder.named_parameters():
            if "embedding" in name:
                torch.nn.init.normal_(parameter, std=0.5 if "token" in name else 0.1)
    return encoders


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 1),
        attention_head_dim=(2, 4, 8),
        cross_attention_dim=128,
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=64 + 6 * 16,
    )


def build_scheduler() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        timestep_spacing="leading",
        steps_offset=1,
    )
