"""What holds for every scorer: order, batches, picture modes, precision, identity."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from reward_models import RewardModel, to_pil

from .checkpoints import PROMPTS, pictures
from .conftest import SCORERS


@pytest.mark.parametrize("name", SCORERS)
def test_batches_and_order_never_change_a_score(name, load_scorer):
    scorer, images = load_scorer(name), pictures()
    scores = scorer.score(images, PROMPTS)
    assert isinstance(scorer, RewardModel)
    assert (scores.shape, scores.dtype, scores.device.type) == ((8,), torch.float32, "cpu")
    assert torch.equal(scores, scorer.score(images, PROMPTS)), "the same call gives the same bits"
    alone = torch.cat([scorer.score([image], [prompt]) for image, prompt in zip(images, PROMPTS, strict=True)])
    assert torch.allclose(scores, alone, rtol=0, atol=1e-4)
    assert torch.allclose(scores.flip(0), scorer.score(images[::-1], PROMPTS[::-1]), rtol=0, atol=1e-4)
    assert scores.std() > 0.02 * scores.abs().max(), "the pictures are told apart"


@pytest.mark.parametrize("name", SCORERS)
def test_the_prompt_matters_exactly_where_it_should(name, load_scorer):
    scorer, image = load_scorer(name), pictures()[0]
    one, other = scorer.score([image, image], ["a red circle", "two blue stars"])
    assert bool(one == other) == name.startswith("aesthetic")


@pytest.mark.parametrize("name", SCORERS)
def test_every_mode_of_a_picture_is_its_rgb_conversion(name, load_scorer):
    scorer, image = load_scorer(name), pictures()[1]
    clear = image.copy()
    clear.putalpha(Image.linear_gradient("L").resize(image.size))
    modes = [clear, image.convert("L"), image.convert("P"), image.convert("CMYK"), clear.convert("PA")]
    prompts = ["a red circle"] * len(modes)
    assert torch.allclose(scorer.score(modes, prompts), scorer.score(to_pil(modes), prompts), atol=1e-5)


@pytest.mark.parametrize("name", SCORERS)
def test_half_precision_stays_within_half_the_spread_of_scores(name, load_scorer):
    images = pictures()
    exact = load_scorer(name).score(images, PROMPTS)
    half = load_scorer(name, dtype=torch.bfloat16)
    rough = half.score(images, PROMPTS)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.5 * exact.std()
    assert half.identity["settings"] != load_scorer(name).identity["settings"]


@pytest.mark.parametrize("name", SCORERS)
def test_identity_names_weights_code_and_settings(name, load_scorer, capsys):
    scorer = load_scorer(name)
    assert set(scorer.identity) == {"id", "revision", "code_version", "settings"}
    assert len(scorer.identity["revision"]) == 16
    assert scorer.licence
    assert scorer.requires
    assert scorer.name.startswith(name)
    scorer.score(pictures()[:2], PROMPTS[:2], progress=True)
    assert f"{scorer.name}: 100%" in capsys.readouterr().err
