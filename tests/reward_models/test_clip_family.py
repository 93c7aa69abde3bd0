"""PickScore, HPSv2, LAION's aesthetic heads and CLIPScore against their formulas, restated one picture at a time."""

from __future__ import annotations

import json
import math

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel

from reward_models import RewardModelError, load_reward_model
from reward_models.preprocessing import CLIP_MEAN, CLIP_STD, letterbox, shortest_side_crop

from . import checkpoints
from .checkpoints import ODD_SIZES, PROMPTS, SIZE, pictures

MEAN, STD = np.array(CLIP_MEAN), np.array(CLIP_STD)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a.double() @ b.double() / a.double().norm() / b.double().norm())


def squeezed(image: Image.Image, offset) -> torch.Tensor:
    """Shortest side to SIZE by PIL's bicubic, a crop that starts at ``offset(excess)``, CLIP's mean and std."""
    short, long = sorted(image.size)
    long = int(SIZE * long / short)
    size = (SIZE, long) if image.width <= image.height else (long, SIZE)
    pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC)) / 255.0
    top, left = (offset(n - SIZE) for n in pixels.shape[:2])
    pixels = (pixels[top : top + SIZE, left : left + SIZE] - MEAN) / STD
    return torch.from_numpy(pixels).float().permute(2, 0, 1)


def boxed(image: Image.Image, antialias: bool) -> torch.Tensor:
    """Longest side to SIZE on the tensor, black borders, CLIP's mean and std."""
    pixels = torch.from_numpy(np.asarray(image) / 255.0).float().permute(2, 0, 1)
    scale = SIZE / max(image.size)
    size = [round(image.height * scale), round(image.width * scale)]
    small = F.interpolate(pixels[None], size, mode="bicubic", align_corners=False, antialias=antialias)[0]
    box = torch.zeros(3, SIZE, SIZE)
    top, left = (SIZE - size[0]) // 2, (SIZE - size[1]) // 2
    box[:, top : top + size[0], left : left + size[1]] = small
    return (box - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


@pytest.mark.parametrize("index", range(len(ODD_SIZES)))
def test_preprocessing_is_the_documented_one_on_odd_sizes(index):
    image = pictures()[index]
    edges = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    theirs = CLIPImageProcessorPil(**edges)([image], return_tensors="pt")["pixel_values"][0]
    assert torch.allclose(theirs, squeezed(image, lambda excess: excess // 2), atol=1e-5)
    openai = shortest_side_crop(SIZE)(image)
    assert torch.allclose(openai, squeezed(image, lambda excess: round(excess / 2)), atol=1e-5)
    for antialias in (False, True):
        assert torch.allclose(letterbox(SIZE, antialias=antialias)(image), boxed(image, antialias), atol=1e-5)


def test_the_two_crops_differ_where_the_excess_is_odd():
    image = pictures()[1].resize((SIZE, SIZE + 3))
    theirs = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    apart = theirs([image], return_tensors="pt")["pixel_values"][0] - shortest_side_crop(SIZE)(image)
    assert apart.abs().max() > 0.1  # one starts at row 1, the other at row 2


def test_pickscore_is_the_scaled_cosine(load_scorer, scorer_options):
    scorer, images = load_scorer("pickscore"), pictures()
    model = CLIPModel.from_pretrained(scorer_options("pickscore")["checkpoint"]).eval()
    scores, cosines = scorer.score(images, PROMPTS), []
    for image, prompt in zip(images, PROMPTS, strict=True):
        ids = scorer.tokenizer(prompt, truncation=True, max_length=77)["input_ids"]
        with torch.no_grad():
            read = model.text_model(torch.tensor([ids])).last_hidden_state[0, -1]
            seen = model.vision_model(squeezed(image, lambda excess: excess // 2)[None]).last_hidden_state[0, 0]
            told = model.text_projection(read)
            cosines.append(cosine(model.visual_projection(model.vision_model.post_layernorm(seen)), told))
    assert torch.allclose(scores, 100 * torch.tensor(cosines), atol=1e-3)
    assert scorer.model.logit_scale.exp().item() == pytest.approx(100)
    seen = scorer.embed(images)
    assert torch.allclose(seen.norm(dim=-1), torch.ones(len(images)))
    scorer.model.logit_scale.data.sub_(math.log(2))  # the checkpoint's own scale is used, not the 100 it mostly is
    halved = scorer.score(images, PROMPTS)
    scorer.model.logit_scale.data.add_(math.log(2))
    assert torch.allclose(halved, scores / 2, atol=1e-3)


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    checkpoints.clip_folder(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    removed = state.pop("visual_projection.weight")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RewardModelError, match=r"pickscore: missing keys visual_projection.weight"):
        load_reward_model("pickscore", checkpoint=tmp_path, device="cpu")
    assert removed.shape == (16, 32)
    with pytest.raises(RewardModelError, match="Offline"):
        load_reward_model("pickscore", checkpoint="nobody/nothing", device="cpu")


def test_hps_is_the_bare_cosine_of_the_letterboxed_picture(load_scorer):
    scorer, images = load_scorer("hpsv2"), pictures()
    model, tokenizer = scorer.model, open_clip.get_tokenizer("tiny-scorer-test")
    scores = scorer.score(images, PROMPTS)
    for score, image, prompt in zip(scores, images, PROMPTS, strict=True):
        with torch.no_grad():
            seen, told = model.encode_image(boxed(image, False)[None])[0], model.encode_text(tokenizer([prompt]))[0]
        assert float(score) == pytest.approx(cosine(seen, told), abs=1e-5)
    assert scores.abs().max() <= 1
    smooth = load_scorer("hpsv2", antialias=True)
    assert not torch.allclose(smooth.score(images, PROMPTS), scores, atol=1e-3)
    assert smooth.identity != scorer.identity


def test_hps_versions_are_two_models_with_two_names(tmp_path):
    checkpoints.hps_file(tmp_path / "HPS_v2_compressed.pt", seed=8)
    checkpoints.hps_file(tmp_path / "HPS_v2.1_compressed.pt", seed=9)
    options = {"checkpoint": tmp_path, "architecture": "tiny-scorer-test", "device": "cpu"}
    new, old = load_reward_model("hpsv2", **options), load_reward_model("hpsv2", version="v2.0", **options)
    assert (new.name, old.name) == ("hpsv2.1", "hpsv2.0")
    assert new.identity["revision"] != old.identity["revision"]
    assert not torch.allclose(new.score(pictures(), PROMPTS), old.score(pictures(), PROMPTS), atol=0.01)
    with pytest.raises(RewardModelError, match=r"v2.0, v2.1, got 'v3'"):
        load_reward_model("hpsv2", version="v3", **options)
    with pytest.raises(RewardModelError, match="no architecture"):
        load_reward_model("hpsv2", **options | {"architecture": "ViT-H-41"})


@pytest.mark.parametrize("name", ["aesthetic", "aesthetic-v1"])
def test_aesthetic_heads_read_the_unit_embedding(name, load_scorer, tmp_path):
    scorer, images = load_scorer(name), pictures()
    write = checkpoints.aesthetic_v1_file if name.endswith("v1") else checkpoints.aesthetic_v2_file
    head = write(tmp_path / "head.pth")  # the original's module, with dropout, in eval mode
    scores, other = scorer.score(images, PROMPTS), scorer.score(images, [""] * 8)
    for score, image in zip(scores, images, strict=True):
        with torch.no_grad():
            pixels = squeezed(image, lambda excess: round(excess / 2))
            seen = scorer.model.get_image_features(pixels[None]).pooler_output[0]
            assert float(score) == pytest.approx(float(head(seen / seen.norm())), abs=1e-4)
            assert abs(float(score) - float(head(seen))) > 1e-3, "a head on the raw embedding is another score"
    assert torch.equal(scores, other), "blind to the prompt"


def test_heads_of_another_kind_are_refused(scorer_options, tmp_path):
    options = scorer_options("aesthetic")
    linear, relu = torch.nn.Linear, torch.nn.ReLU()
    bent = torch.nn.Sequential(linear(16, 8), relu, torch.nn.Dropout(), linear(8, 1))
    torch.save({f"layers.{key}": value for key, value in bent.state_dict().items()}, tmp_path / "relu.pth")
    torch.save(linear(16, 1).state_dict(), tmp_path / "v1.pth")
    for file in ("relu.pth", "v1.pth"):
        with pytest.raises(RewardModelError, match="keys are not"):
            load_reward_model("aesthetic", **options | {"head": tmp_path / file})
    checkpoints.aesthetic_v2_file(tmp_path / "wide.pth", width=24)
    with pytest.raises(RewardModelError, match="reads 24 numbers"):
        load_reward_model("aesthetic", **options | {"head": tmp_path / "wide.pth"})
    with pytest.raises(RewardModelError, match="no file"):
        load_reward_model("aesthetic", **options | {"head": tmp_path / "none.pth"})
    with pytest.raises(RewardModelError, match="v1, v2"):
        load_reward_model("aesthetic", **options | {"version": "v9"})


def test_clipscore_clamps_scales_and_puts_its_prefix_first(load_scorer):
    scorer, images = load_scorer("clip"), pictures()
    tokenizer = open_clip.get_tokenizer("tiny-clip-test")
    bare = load_scorer("clip", cosine=True)
    assert (scorer.name, bare.name) == ("clip", "clip-cosine")
    scores, cosines = scorer.score(images, PROMPTS), bare.score(images, PROMPTS)
    assert cosines.min() < 0 < scores.max()
    assert scores.min() == 0
    for n, (image, prompt) in enumerate(zip(images, PROMPTS, strict=True)):
        with torch.no_grad():
            seen = scorer.model.encode_image(squeezed(image, lambda excess: round(excess / 2))[None])[0]
            told = [scorer.model.encode_text(tokenizer([p]))[0] for p in ("A photo depicts " + prompt, prompt)]
        assert float(scores[n]) == pytest.approx(2.5 * max(cosine(seen, told[0]), 0.0), abs=1e-4)
        assert float(cosines[n]) == pytest.approx(cosine(seen, told[1]), abs=1e-4)
    assert json.loads(scorer.identity["settings"])["prefix"] == "A photo depicts "
    with pytest.raises(RewardModelError, match="no-such-model"):
        load_reward_model("clip", model="no-such-model", tag=None, device="cpu")
