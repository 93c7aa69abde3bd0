"""Validation images: reproducible, comparable, and without a trace in the training state."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from diffalign.errors import ConfigError
from diffalign.pipelines import adapter_for
from diffalign.trainers.validation import Validation, draw_validation, save_image, side_by_side
from tests.tiny import tiny_sd, tiny_sdxl

PROMPTS = ["a red circle", "two blue squares", "a cat"]


def _ready(make=tiny_sdxl):
    """An adapter whose text encoders are gone, as in training, with encoded prompts."""
    adapter = adapter_for(make())
    conditioning, unconditional = adapter.encode_prompts(PROMPTS), adapter.unconditional()
    for name in adapter.text_encoder_names:
        setattr(adapter.pipeline, name, None)
    return adapter, conditioning, unconditional


def _draw(adapter, conditioning, unconditional, prompts=PROMPTS, denoiser=None, **options) -> list[np.ndarray]:
    images = draw_validation(
        adapter, denoiser or adapter.denoiser, prompts, conditioning, unconditional, **{"steps": 2, **options}
    )
    return [np.asarray(image) for image in images]


def _rows(conditioning, *rows: int):
    return {name: value[list(rows)] for name, value in conditioning.items()}


@pytest.mark.parametrize("make", [tiny_sdxl, tiny_sd, lambda: tiny_sd(prediction_type="v_prediction")])
def test_it_draws_what_the_pipeline_itself_draws(make):
    pipeline = make()
    adapter = adapter_for(pipeline)
    conditioning, unconditional = adapter.encode_prompts(PROMPTS[:1]), adapter.unconditional()
    from diffalign.randomness import keyed_normal

    noise = keyed_normal((4, 8, 8), 7, PROMPTS[0], "validation")[None]
    expected = pipeline(
        PROMPTS[0], latents=noise, num_inference_steps=3, guidance_scale=5.0, height=32, width=32, output_type="np"
    ).images[0]
    [drawn] = _draw(adapter, conditioning, unconditional, PROMPTS[:1], seeds=[7], steps=3, guidance=5.0)
    assert np.abs(drawn / 255 - expected).max() <= 1.01 / 255
    assert drawn.std() > 0


def test_the_same_every_time_whatever_the_batch_and_the_company():
    adapter, conditioning, unconditional = _ready()
    first = _draw(adapter, conditioning, unconditional, seeds=[0, 1])
    torch.manual_seed(123)
    again = _draw(adapter, conditioning, unconditional, seeds=[0, 1], batch_size=4)
    single = _draw(adapter, conditioning, unconditional, seeds=[0, 1], batch_size=1)
    alone = _draw(adapter, _rows(conditioning, 1), unconditional, PROMPTS[1:2], seeds=[1])
    assert len(first) == 6 and all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert max(np.abs(a.astype(int) - b).max() for a, b in zip(first, single, strict=True)) <= 1
    assert np.abs(first[3].astype(int) - alone[0]).max() <= 1  # prompt 1, seed 1
    assert not np.array_equal(first[0], first[1]) and not np.array_equal(first[0], first[2])


def test_guidance_and_the_unconditional_branch_are_used():
    adapter, conditioning, unconditional = _ready()
    plain = _draw(adapter, conditioning, unconditional, guidance=1.0)
    guided = _draw(adapter, conditioning, unconditional, guidance=8.0)
    other = _draw(adapter, conditioning, {k: v + 1 for k, v in unconditional.items()}, guidance=8.0)
    assert not np.array_equal(plain[0], guided[0]) and not np.array_equal(guided[0], other[0])


def test_samplers_that_add_noise_are_keyed_too():
    from diffusers import EulerAncestralDiscreteScheduler

    adapter, conditioning, unconditional = _ready()
    adapter.pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(adapter.pipeline.scheduler.config)
    state = torch.get_rng_state()
    first = _draw(adapter, conditioning, unconditional)
    second = _draw(adapter, conditioning, unconditional)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_training_state_is_left_as_it_was():
    adapter, conditioning, unconditional = _ready()
    denoiser = adapter.denoiser
    denoiser.enable_gradient_checkpointing()
    denoiser.train().requires_grad_(True)
    denoiser.mid_block.eval()  # a module frozen on purpose stays frozen
    modes = [module.training for module in denoiser.modules()]
    scheduler = adapter.pipeline.scheduler
    before = copy.deepcopy((dict(scheduler.config), scheduler.timesteps, scheduler.num_inference_steps))
    config, vae, rng = dict(adapter.pipeline.config), adapter.pipeline.vae, torch.get_rng_state()
    _draw(adapter, conditioning, unconditional)
    assert [module.training for module in denoiser.modules()] == modes and not all(modes)
    assert torch.equal(rng, torch.get_rng_state())
    assert adapter.denoiser is denoiser and adapter.pipeline.vae is vae and adapter.pipeline.scheduler is scheduler
    assert dict(adapter.pipeline.config) == config
    assert before[0] == dict(scheduler.config) and torch.equal(before[1], scheduler.timesteps)
    assert scheduler.num_inference_steps == before[2]
    assert all(parameter.grad is None and parameter.requires_grad for parameter in denoiser.parameters())
    assert denoiser.is_gradient_checkpointing


def test_modes_come_back_when_drawing_fails():
    adapter, conditioning, unconditional = _ready()
    adapter.denoiser.train()
    with pytest.raises((RuntimeError, ValueError)):
        _draw(adapter, *({k: v[..., :3] for k, v in part.items()} for part in (conditioning, unconditional)))
    assert adapter.denoiser.training


def test_the_denoiser_that_is_given_is_drawn_and_dropout_is_off():
    adapter, conditioning, unconditional = _ready()
    other = copy.deepcopy(adapter.denoiser)
    with torch.no_grad():
        other.conv_out.bias += 0.5
    base = _draw(adapter, conditioning, unconditional)
    assert not np.array_equal(base[0], _draw(adapter, conditioning, unconditional, denoiser=other)[0])
    assert np.array_equal(base[0], _draw(adapter, conditioning, unconditional)[0])
    adapter.denoiser.train()
    assert np.array_equal(base[0], _draw(adapter, conditioning, unconditional)[0])


def test_other_sizes():
    adapter, conditioning, unconditional = _ready()
    assert _draw(adapter, conditioning, unconditional, size=(32, 48))[0].shape == (32, 48, 3)


def test_what_is_missing_is_named():
    adapter, conditioning, unconditional = _ready()
    with pytest.raises(ConfigError, match="validation_prompts"):
        _draw(adapter, conditioning, unconditional, prompts=[])
    with pytest.raises(ConfigError, match=r"one row per validation prompt \(2\); got 3"):
        _draw(adapter, conditioning, unconditional, prompts=PROMPTS[:2])
    adapter.drop_encoders()
    with pytest.raises(ConfigError, match="VAE"):
        _draw(adapter, conditioning, unconditional)


def test_side_by_side_puts_base_left_and_aligned_right_under_each_prompt():
    reds, blues = ([Image.new("RGB", (32, 32), colour)] * 2 for colour in ("red", "blue"))
    sheet = side_by_side(reds, blues, ["short", "a very long prompt " * 12 + "x" * 200])
    pixels = np.asarray(sheet)
    red = (pixels == [255, 0, 0]).all(-1)
    blue = (pixels == [0, 0, 255]).all(-1)
    assert red.sum() == blue.sum() == 2 * 256 * 256  # enlarged without blur, nothing covered
    assert np.where(red)[1].max() < np.where(blue)[1].min()
    dark = (pixels < 100).all(-1)
    assert dark[: np.where(red)[0].min()].any(), "labels above the first row"
    assert not dark[:, -4:].any(), "no text beyond the edge"
    with pytest.raises(ValueError, match="equally long"):
        side_by_side(reds, blues[:1], ["one", "two"])


def test_images_are_saved_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "sheet.png"
    save_image(Image.new("RGB", (4, 4), "red"), path)

    def full(self, target, **options):
        target.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space"):
        save_image(Image.new("RGB", (4, 4), "blue"), path)
    assert Image.open(path).getpixel((0, 0)) == (255, 0, 0)


def test_a_run_draws_the_base_once_and_a_resumed_one_reads_it_back(tmp_path):
    adapter, conditioning, unconditional = _ready()

    def validation(**options) -> Validation:
        return Validation(adapter, PROMPTS, conditioning, unconditional, tmp_path, **{"steps": 2, **options})

    first = validation()
    first.prepare(adapter.denoiser, resumed=False)
    with torch.no_grad():
        adapter.denoiser.conv_out.bias += 0.5  # training
    path, images = first.run(100, adapter.denoiser)
    assert path == tmp_path / "validation" / "step-000100.png"
    sheet = np.asarray(Image.open(path))
    second = validation()
    second.prepare(adapter.denoiser, resumed=True)
    again, _ = second.run(200, adapter.denoiser)
    assert np.array_equal(np.asarray(Image.open(again)), sheet)
    assert not np.array_equal(np.asarray(second.base_images[0]), np.asarray(images[0]))
    with pytest.raises(ConfigError, match="other prompts or sampling settings"):
        validation(guidance=2.0).prepare(adapter.denoiser, resumed=True)
    (tmp_path / "validation" / "base" / "001.png").unlink()
    with pytest.raises(ConfigError, match=r"001.png is missing"):
        validation().prepare(adapter.denoiser, resumed=True)


def test_a_model_of_oblong_pictures_is_drawn_as_its_pipeline_draws():
    """sample_size may be a pair, (height, width)."""
    parts = tiny_sd().components
    parts["unet"].register_to_config(sample_size=(8, 16))
    pipeline = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    adapter = adapter_for(pipeline)
    assert adapter.native_size == (32, 64)
    with torch.no_grad():
        own = pipeline(PROMPTS[0], num_inference_steps=1, generator=torch.Generator().manual_seed(0)).images[0]
    [drawn] = _draw(adapter, adapter.encode_prompts(PROMPTS[:1]), adapter.unconditional(), PROMPTS[:1], steps=1)
    assert drawn.shape == (32, 64, 3) and own.size == (64, 32)
