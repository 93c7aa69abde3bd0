"""Sampling: one picture per (prompt, seed), whatever the batch, on real tiny pipelines."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from diffusers.utils import logging as diffusers_logging

from diffalign.errors import ConfigError
from diffalign.synthesis.sampling import generate_images, iterate_images, picture_seed
from tests.tiny import tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl

PROMPTS = ["a cat", "a dog", "a cat", "a bird", "a cat"]
SEEDS = [0, 0, 1, 0, 0]
SETTINGS = {"steps": 3, "guidance": 3.0, "height": 32, "width": 32}


def pixels(images):
    return np.stack([np.asarray(image, dtype=np.int16) for image in images])


def difference(first, second):
    return int(np.abs(pixels(first) - pixels(second)).max())


FAMILIES = {
    "sdxl": tiny_sdxl,
    "sd": tiny_sd,
    "sd_v": lambda: tiny_sd(prediction_type="v_prediction"),
    "sd3": tiny_sd3,
    "flux": tiny_flux,
}


@pytest.fixture(params=FAMILIES)
def pipeline(request):
    return FAMILIES[request.param]()


@pytest.mark.parametrize("ancestral", [False, True])
def test_the_batch_size_never_changes_a_picture(pipeline, ancestral):
    if ancestral and hasattr(pipeline, "transformer"):
        pytest.skip("flow models have no ancestral sampler")
    if ancestral:
        pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
    together = generate_images(pipeline, PROMPTS, SEEDS, batch_size=5, **SETTINGS)
    assert difference(together, generate_images(pipeline, PROMPTS, SEEDS, batch_size=2, **SETTINGS)) <= 1
    assert difference(together[3:4], generate_images(pipeline, ["a bird"], [0], **SETTINGS)) <= 1
    assert difference(together[:1], together[4:]) <= 1  # the same prompt and seed
    assert difference(together[:1], together[2:3]) > 5  # another seed


@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_plain_diffusers_draws_the_same_picture(pipeline, guidance):
    ours = generate_images(pipeline, ["a cat"], [7], **(SETTINGS | {"guidance": guidance}))
    generator = torch.Generator("cpu").manual_seed(picture_seed("a cat", 7))
    size = {"height": 32, "width": 32}
    plain = pipeline("a cat", generator=generator, num_inference_steps=3, guidance_scale=guidance, **size).images
    assert difference(ours, plain) <= 1


def test_two_prompts_share_no_noise_under_one_seed():
    assert picture_seed("a cat", 0) != picture_seed("a dog", 0)
    assert picture_seed("a cat", 0) != picture_seed("a cat", 1)


def test_each_prompt_is_encoded_once(monkeypatch):
    pipeline = tiny_sdxl()
    encoded = []
    original = pipeline.encode_prompt

    def spy(*args, **kwargs):
        if args:  # the pipeline's own call passes embeddings by keyword
            encoded.extend(args[0])
        return original(*args, **kwargs)

    monkeypatch.setattr(pipeline, "encode_prompt", spy)
    generate_images(pipeline, PROMPTS, SEEDS, batch_size=2, **SETTINGS)
    assert sorted(encoded) == ["", "a bird", "a cat", "a dog"]  # "" is the negative branch


def test_prompts_that_are_cut_are_counted_not_printed(caplog, capfd):
    level = diffusers_logging.get_verbosity()
    prompts = ["a cat", "word " * 2000, "word " * 2000, "long " * 2000]
    generate_images(tiny_sd(), prompts, [0, 0, 1, 0], steps=1, guidance=1.0, batch_size=2)
    assert [record.getMessage()[:40] for record in caplog.records if record.name.startswith("diffalign")] == [
        "2 prompts are longer than the 77 tokens "
    ]
    captured = capfd.readouterr()
    assert "word word" not in captured.out + captured.err
    assert diffusers_logging.get_verbosity() == level


def test_the_pipeline_is_left_as_it_was():
    pipeline = tiny_sdxl()
    pipeline.unet.train()
    pipeline.vae.to(torch.bfloat16)
    pipeline.set_progress_bar_config(desc="mine")
    assert generate_images(pipeline, ["a cat"], [0], **(SETTINGS | {"width": 16}))[0].size == (16, 32)
    assert pipeline.unet.training and not pipeline.vae.training
    assert pipeline.vae.dtype == torch.bfloat16
    assert pipeline._progress_bar_config == {"desc": "mine"}


def test_pictures_come_batch_by_batch():
    sizes = []
    for batch in iterate_images(tiny_sd(), PROMPTS, SEEDS, batch_size=2, **SETTINGS):
        assert not torch.is_inference_mode_enabled()  # the caller may train between two batches
        sizes.append(len(batch))
    assert sizes == [2, 2, 1]


def test_bad_input_is_refused():
    pipeline = tiny_sd()
    with pytest.raises(ConfigError, match="one seed for each prompt"):
        generate_images(pipeline, ["a"], [0, 1], **SETTINGS)
    with pytest.raises(ConfigError, match="list of prompts"):
        generate_images(pipeline, "a", [0], **SETTINGS)
    with pytest.raises(ConfigError, match="at least 1"):
        generate_images(pipeline, ["a"], [0], steps=0, guidance=1.0)
    with pytest.raises(ConfigError, match="StableDiffusionPipeline"):
        generate_images(object(), ["a"], [0], **SETTINGS)
    pipeline.text_encoder = None
    with pytest.raises(ConfigError, match="text encoder"):
        generate_images(pipeline, ["a"], [0], **SETTINGS)


def test_families_without_an_adapter_draw_through_their_own_call(tmp_path):
    """PixArt-Sigma stands for every text-to-image class that diffusers knows."""
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    from diffalign.synthesis.artists import Artist
    from diffalign.synthesis.config import PipelineSpec
    from tests.tiny import T5_WIDTH, tiny_t5, tiny_t5_tokenizer, tiny_vae

    torch.manual_seed(0)
    tokenizer = tiny_t5_tokenizer()
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=32,
        cross_attention_dim=16, caption_channels=T5_WIDTH, patch_size=2, norm_type="ada_norm_single",
        use_additional_conditions=False,
    )  # fmt: skip
    PixArtSigmaPipeline(
        tokenizer, tiny_t5(tokenizer), tiny_vae(), transformer, DPMSolverMultistepScheduler()
    ).save_pretrained(tmp_path / "pixart")
    spec = {"model": str(tmp_path / "pixart"), "images": 2, "steps": 2, "guidance": 3.0, "height": 32, "width": 32}
    artist = Artist("p", PipelineSpec(**spec, batch_size=4), "cpu")
    together = list(artist.draw(["a cat", "a dog"], seed=0))
    assert len(together) == 4 and together[0].size == (32, 32)
    alone = Artist("p", PipelineSpec(**spec, batch_size=1), "cpu")
    assert difference(together, list(alone.draw(["a cat", "a dog"], seed=0))) <= 1
    assert difference(together[:1], together[1:2]) > 5
