"""MPS against its formula written out head by head over the original's own keys."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPModel

from reward_models import RewardModelError, load_reward_model

from . import checkpoints
from .checkpoints import PROMPTS, pictures


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    state = checkpoints.mps_file(folder)
    return state, CLIPModel.from_pretrained(folder).eval()


def attend(query, key, value, heads, allowed):
    """One key and value for all query heads: (n, heads * w), (m, w), (m, w)."""
    parts = []
    for one in query.chunk(heads, -1):
        logits = one @ key.T / math.sqrt(key.shape[-1])
        parts.append(logits.masked_fill(~allowed, -math.inf).softmax(-1) @ value)
    return torch.cat(parts, -1)


def rotated(x):
    """Rotary positions as a complex product: (n, w), value j paired with value j + w / 2."""
    n, width = x.shape
    rates = torch.tensor([10000.0 ** (-2 * j / width) for j in range(width // 2)])
    turn = torch.polar(torch.ones(n, width // 2), torch.arange(n)[:, None] * rates)
    pairs = torch.complex(x[:, : width // 2], x[:, width // 2 :]) * turn
    return torch.cat([pairs.real, pairs.imag], -1)


def gated(x):
    value, gate = x.chunk(2, -1)
    return value * gate * torch.sigmoid(gate)


def fused(state, picture, words, allowed):
    x = picture
    everything = torch.ones(1, len(picture), dtype=torch.bool)
    for n in range(2):
        w = {k.split(".fn.")[1]: v for k, v in state.items() if k.startswith(f"cross_model.layers.{n}.0.")}
        h = F.layer_norm(x, x.shape[-1:], w["norm.weight"], w["norm.bias"])
        key, value = (words @ w["to_kv.weight"].T).chunk(2, -1)
        heads = w["to_q.weight"].shape[0] // key.shape[-1]
        looked = attend(h @ w["to_q.weight"].T, key, value, heads, allowed) @ w["to_out.weight"].T
        x = x + looked + gated(h @ w["ff.0.weight"].T) @ w["ff.2.weight"].T
        w = {k.split(".fn.")[1]: v for k, v in state.items() if k.startswith(f"cross_model.layers.{n}.1.")}
        h = F.layer_norm(x, x.shape[-1:], w["norm.weight"], w["norm.bias"])
        width, inner = key.shape[-1], w["ff_out.1.weight"].shape[1]
        query, key, value, ff = (h @ w["fused_attn_ff_proj.weight"].T).split(
            [heads * width, width, width, 2 * inner], -1
        )
        query = torch.cat([rotated(one) for one in query.chunk(heads, -1)], -1)
        looked = attend(query, rotated(key), value, heads, everything) @ w["attn_out.weight"].T
        x = x + looked + gated(ff) @ w["ff_out.1.weight"].T
    return x[0]


@torch.no_grad()
def test_scores_are_those_of_the_original_written_out(load_scorer, original):
    scorer, images, (state, clip) = load_scorer("mps"), pictures(), original
    scores, hidden = scorer.score(images, PROMPTS), 0

    def read(text):
        ids = scorer.tokenizer(
            text, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
        ).input_ids
        out = clip.text_model(input_ids=ids)
        return clip.text_projection(out.last_hidden_state)[0], clip.text_projection(out.pooler_output)[0]

    condition = read(
        "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
        "texture, quantity, attributes, position, number, location, word, things."
    )[0]
    for score, image, prompt in zip(scores, images, PROMPTS, strict=True):
        words, told = read(prompt)
        likeness = (words @ condition.T).max(-1).values
        allowed = (likeness / likeness.max() > 0.3)[None]
        hidden += int((~allowed).sum())
        pixels = scorer.preprocess([image], return_tensors="pt")["pixel_values"]
        picture = clip.visual_projection(clip.vision_model(pixels).last_hidden_state)[0]
        seen = fused(state, picture, words, allowed)
        expected = 100 * float(F.cosine_similarity(seen, told, dim=0))
        assert float(score) == pytest.approx(expected, abs=5e-3)
    assert hidden > 0, "the threshold must matter somewhere"


def test_the_condition_and_the_threshold_matter_and_are_recorded(load_scorer):
    scorer, images = load_scorer("mps"), pictures()
    scores = scorer.score(images, PROMPTS)
    for change in ({"condition": "face"}, {"threshold": 0.9}):
        other = load_scorer("mps", **change)
        assert not torch.allclose(other.score(images, PROMPTS), scores, atol=1e-2)
        assert other.identity["settings"] != scorer.identity["settings"]


def test_the_pickled_module_is_never_loaded(tmp_path, scorer_options):
    class Harmful:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    (tmp_path / "mps.pt").write_bytes(pickle.dumps(Harmful()))
    torch.save({"module": Harmful()}, tmp_path / "module.pt")
    for file in ("mps.pt", "module.pt"):
        with pytest.raises(RewardModelError):
            load_reward_model("mps", **scorer_options("mps") | {"checkpoint": tmp_path / file})
    assert not (tmp_path / "harm").exists()
    with pytest.raises(RewardModelError, match="convert them once"):
        load_reward_model("mps", device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("cross_model.layers.1.0.fn.to_out.weight"), "missing keys layers.1.0.to_out.weight"),
        (
            lambda state: state.update({"cross_model.layers.0.0.fn.gate": torch.zeros(1)}),
            "unexpected keys layers.0.0.gate",
        ),
        (lambda state: state.pop("cross_model.layers.0.0.fn.to_q.weight"), "lacks cross_model"),
        (lambda state: state.update({"head.weight": torch.zeros(1)}), "unexpected keys head.weight"),
        (lambda state: state.pop("model.logit_scale"), "missing keys logit_scale"),
    ],
)
def test_other_keys_are_refused(change, message, original, scorer_options, tmp_path):
    state = dict(original[0])
    change(state)
    torch.save(state, tmp_path / "mps_overall.pt")
    with pytest.raises(RewardModelError, match=message):
        load_reward_model("mps", **scorer_options("mps") | {"checkpoint": tmp_path})
