"""ImageReward against BLIP's forward pass written out over the original's own keys."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from reward_models import RewardModelError, load_reward_model

from . import checkpoints
from .checkpoints import BLIP_LAYERS, BLIP_WIDTH, PROMPTS, pictures

HEADS = BLIP_WIDTH // 64
TOKENS = 35


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> dict[str, torch.Tensor]:
    return checkpoints.imagereward_file(tmp_path_factory.mktemp("original"))


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(state, name, x, eps):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def attend(query, key, value, keep=None):
    """(n, d), (m, d), (m, d): one head at a time."""
    width, outputs = query.shape[-1] // HEADS, []
    for head in range(HEADS):
        part = slice(head * width, (head + 1) * width)
        logits = query[:, part] @ key[:, part].T / math.sqrt(width)
        if keep is not None:
            logits = logits.masked_fill(~keep, -10000.0)
        outputs.append(logits.softmax(-1) @ value[:, part])
    return torch.cat(outputs, -1)


def look(state, pixels):
    """The picture's tokens (1 + patches, d) by the original's ViT."""
    v = "blip.visual_encoder"
    patch = state[f"{v}.patch_embed.proj.weight"].shape[-1]
    patches = F.conv2d(
        pixels[None], state[f"{v}.patch_embed.proj.weight"], state[f"{v}.patch_embed.proj.bias"], stride=patch
    )
    x = torch.cat([state[f"{v}.cls_token"][0], patches[0].flatten(1).T]) + state[f"{v}.pos_embed"][0]
    for n in range(BLIP_LAYERS):
        block = f"{v}.blocks.{n}"
        query, key, value = linear(state, f"{block}.attn.qkv", norm(state, f"{block}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(state, f"{block}.attn.proj", attend(query, key, value))
        inner = F.gelu(linear(state, f"{block}.mlp.fc1", norm(state, f"{block}.norm2", x, 1e-6)))
        x = x + linear(state, f"{block}.mlp.fc2", inner)
    return norm(state, f"{v}.norm", x, 1e-6)


def read(state, ids, keep, picture):
    """The first token after reading ``ids`` while looking at ``picture``."""
    t = "blip.text_encoder"
    x = state[f"{t}.embeddings.word_embeddings.weight"][ids]
    x = x + state[f"{t}.embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(state, f"{t}.embeddings.LayerNorm", x, 1e-12)
    for n in range(BLIP_LAYERS):
        layer = f"{t}.encoder.layer.{n}"
        for attention, context, mask in (("attention", None, keep), ("crossattention", picture, None)):
            name = f"{layer}.{attention}"
            other = x if context is None else context
            parts = (
                linear(state, f"{name}.self.{part}", source)
                for part, source in (("query", x), ("key", other), ("value", other))
            )
            attended = linear(state, f"{name}.output.dense", attend(*parts, mask))
            x = norm(state, f"{name}.output.LayerNorm", attended + x, 1e-12)
        inner = F.gelu(linear(state, f"{layer}.intermediate.dense", x))
        x = norm(state, f"{layer}.output.LayerNorm", linear(state, f"{layer}.output.dense", inner) + x, 1e-12)
    return x[0]


def raw_score(state, first):
    for n in (0, 2, 4, 6, 7):
        first = linear(state, f"mlp.layers.{n}", first)
    return float(first)


def test_scores_are_those_of_the_original_written_out(load_scorer, original):
    scorer, images = load_scorer("imagereward"), pictures()
    scores = scorer.score(images, PROMPTS)
    for score, image, prompt in zip(scores, images, PROMPTS, strict=True):
        words = scorer.tokenizer(prompt, padding="max_length", truncation=True, max_length=TOKENS)
        ids, keep = torch.tensor(words["input_ids"]), torch.tensor(words["attention_mask"]).bool()
        first = read(original, ids, keep, look(original, scorer.preprocess(image)))
        expected = (raw_score(original, first) - 0.16717362830052426) / 1.0333394966054072
        assert float(score) == pytest.approx(expected, abs=2e-4)


def test_text_beyond_35_tokens_changes_nothing(load_scorer):
    scorer, image = load_scorer("imagereward"), pictures()[0]
    at_limit = "red " * (TOKENS - 2)  # [CLS] and [SEP] are the other two
    short, full, longer = scorer.score([image] * 3, [at_limit[:-4], at_limit, at_limit + "two blue stars"])
    assert float(full) == pytest.approx(float(longer), abs=1e-5)
    assert abs(float(full - short)) > 1e-2


def test_blips_own_tokens_have_the_numbers_of_its_training(load_scorer):
    tokenizer = load_scorer("imagereward").tokenizer
    plain = len(tokenizer) - 2
    assert tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [plain, plain + 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("blip.visual_encoder.blocks.1.attn.qkv.bias"), "missing keys .*qkv.bias"),
        (lambda state: state.pop("mlp.layers.4.weight"), "keys are not"),
        (lambda state: state.update({"blip.itm_head.weight": torch.zeros(2, 2)}), "unexpected keys blip.itm_head"),
        (lambda state: state.update({"blip.text_encoder.extra": torch.zeros(2)}), "unexpected keys extra"),
        (lambda state: state.pop("blip.visual_encoder.pos_embed"), "lacks the key"),
    ],
)
def test_other_keys_are_refused(change, message, original, scorer_options, tmp_path):
    state = dict(original)
    change(state)
    torch.save(state, tmp_path / "ImageReward.pt")
    with pytest.raises(RewardModelError, match=message):
        load_reward_model("imagereward", **scorer_options("imagereward") | {"checkpoint": tmp_path})
