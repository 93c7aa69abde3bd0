"""Drawing and replaying, for every family: the pipeline's own path without noise, ratio 1 with it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from diffalign.diffusion import flow_grid, transitions
from diffalign.errors import ConfigError
from diffalign.trainers.grpo.rollouts import Plan
from tests.tiny import tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl

FAMILIES = {
    "sdxl": tiny_sdxl,
    "sd": tiny_sd,
    "sd-v": lambda: tiny_sd(prediction_type="v_prediction"),
    "sd3": tiny_sd3,
    "flux-dev": tiny_flux,
    "flux-schnell": lambda: tiny_flux(guidance=False),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_without_noise_a_rollout_is_the_pipelines_own_path(make, family):
    pipeline = FAMILIES[family]()
    guidance = 1.0 if family.startswith("flux") else 2.0
    trainer = make(pipeline, sampling_steps=5, guidance_scale=guidance, adapter="none")
    sampling = trainer.sampling
    samples = [trainer.sample_of(0, n) for n in range(2)]
    plan = Plan(transitions(sampling.grid, sampling.sampler, 0.0), [])
    chunk, latents = sampling.draw(trainer.denoiser, samples, plan)
    assert chunk.moments == {}
    if sampling.grid.kind != "flow":
        pipeline.scheduler = DDIMScheduler.from_config(
            pipeline.scheduler.config, clip_sample=False, set_alpha_to_one=False
        )
    zero = plan.steps[0]
    untouched = Plan([type(zero)(0, zero.time, 1.0, 0.0, 0.0, zero.width)], [])
    noise = sampling.draw(trainer.denoiser, samples, untouched)[1]
    told = trainer.encoded.batch([sample.prompt for sample in samples])
    empty = {name: value[None] for name, value in trainer.encoded.unconditional().items()}
    arguments = trainer.adapter.sampling_arguments(told, empty, noise, guidance)
    with torch.no_grad():
        output = pipeline(**arguments, num_inference_steps=5, height=32, width=32, output_type="latent").images
    assert torch.allclose(trainer.adapter.sampled_latents(output, (8, 8)), latents, atol=1e-4)


@pytest.mark.parametrize("latents", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_ratio_is_exactly_one_before_the_first_update(make, family, latents):
    metrics = make(FAMILIES[family](), latent_dtype=latents).train()["metrics"]
    assert metrics["log_ratio"] == 0.0
    assert metrics["ratio"] == 1.0
    assert metrics["grad_norm"] > 0


@pytest.mark.parametrize("family", ["sdxl", "sd", "sd3", "flux-dev"])
def test_the_ratio_is_exactly_one_in_half_precision_too(make, family):
    """What is kept is rounded before its density is found; see the test after the next for what happens otherwise."""
    metrics = make(FAMILIES[family](), mixed_precision="bf16", latent_dtype="bf16").train()["metrics"]
    assert metrics["log_ratio"] == 0.0 and metrics["ratio"] == 1.0 and metrics["grad_norm"] > 0


@pytest.mark.parametrize(("family", "sampler"), [("sdxl", "cps"), ("sd3", "dance_sde"), ("flux-dev", "cps")])
@pytest.mark.parametrize("ratio_norm", [False, True])
def test_every_sampler_trains(make, family, sampler, ratio_norm):
    settings = {"sampler": sampler, "ratio_norm": ratio_norm, "updates_per_rollout": 2, "max_steps": 2}
    trainer = make(FAMILIES[family](), learning_rate=1e-3, **settings)
    trainer.train()
    first, second = map(json.loads, (trainer.output_dir / "metrics.jsonl").read_text().splitlines())
    assert first["log_ratio"] == 0.0 and first["ratio"] == 1.0
    assert second["ratio"] != 1.0  # the second update of the rollout
    assert second["ratio"] == pytest.approx(1.0, abs=0.1)


def test_what_is_replayed_must_be_what_was_drawn(make):
    """Latents rounded after their density was found, or other sizes told to SDXL, are noticed."""
    trainer = make()
    trainer.rollout = trainer.roll_out(0)
    trainer._backward(trainer.rollout, trainer.rollout.chunks, 0)
    trainer.sampling.edge = 64
    with pytest.raises(ConfigError, match="log-ratio"):
        trainer._backward(trainer.rollout, trainer.rollout.chunks, 0)
    trainer.sampling.edge = 32
    for chunk in trainer.rollout.chunks:
        for moment in chunk.moments.values():
            moment.x_next = moment.x_next.bfloat16().float()
    with pytest.raises(ConfigError, match="log-ratio"):
        trainer._backward(trainer.rollout, trainer.rollout.chunks, 0)


@pytest.mark.parametrize("name", ["prompt_embeds", "pooled_prompt_embeds"])
def test_a_replay_without_a_part_of_the_prompt_is_noticed(make, name):
    trainer = make(clip_range=1e-5)
    trainer.rollout = trainer.roll_out(0)
    conditioning = trainer.sampling.conditioning

    def without(*arguments, **options):
        told, sizes = conditioning(*arguments, **options)
        return told | {name: torch.zeros_like(told[name])}, sizes

    trainer.sampling.conditioning = without
    with pytest.raises(ConfigError, match="log-ratio"):
        trainer._backward(trainer.rollout, trainer.rollout.chunks, 0)


def test_noise_levels_of_published_schedules(make):
    """diffusers' SD3 shifts its lowest level twice, so the last step of ten starts at 0.009."""
    grid = make(tiny_sd3(), sampling_steps=10).sampling.grid
    expected = torch.tensor([1.0, 0.96013, 0.91335, 0.27805, 0.0089286, 0.0], dtype=torch.float64)
    torch.testing.assert_close(grid.noise[[0, 1, 2, -3, -2, -1]], expected, rtol=0, atol=1e-5)
    for steps, last in ((25, 0.1111111), (16, 0.1666667)):  # evenly spaced and shifted by 3, as Pref-GRPO and DanceGRPO
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
        assert float(flow_grid(scheduler.sigmas).noise[-2]) == pytest.approx(last, abs=1e-6)


def test_randomness_belongs_to_the_picture(make):
    trainer = make()
    samples = [trainer.sample_of(0, n) for n in range(8)]
    plan = trainer.sampling.plan(0)
    together, latents = trainer.sampling.draw(trainer.denoiser, samples, plan)
    again = trainer.sampling.draw(trainer.denoiser, samples, plan)[1]
    assert torch.equal(latents, again)
    alone = trainer.sampling.draw(trainer.denoiser, samples[5:6], plan)[1]
    assert torch.allclose(alone[0], latents[5], atol=1e-4)
    starts = together.moments[0].x
    assert len({tuple(x.flatten().tolist()) for x in starts}) == 8


def test_shared_noise_is_shared_within_a_group_only(make):
    trainer = make(shared_noise=True)
    chunk, _ = trainer.sampling.draw(
        trainer.denoiser, [trainer.sample_of(0, n) for n in range(8)], trainer.sampling.plan(0)
    )
    x, after = chunk.moments[0].x, chunk.moments[0].x_next
    assert torch.equal(x[0], x[3])
    assert not torch.equal(x[3], x[4])
    assert not torch.equal(after[0], after[1])


def test_only_trained_steps_are_kept(make):
    trainer = make(sampling_steps=10, timestep_fraction=0.5)
    plan = trainer.sampling.plan(0)
    assert [step.std > 0 for step in plan.steps] == [True] * 8 + [False] * 2  # the last two of DDIM carry no noise
    assert len(plan.trained) == 4
    chunk, _ = trainer.sampling.draw(trainer.denoiser, [trainer.sample_of(0, 0)], plan)
    assert sorted(chunk.moments) == plan.trained
    assert all(moment.mean is None for moment in chunk.moments.values())


def test_of_a_flow_model_one_step_at_the_end_carries_no_noise(make):
    plan = make(tiny_sd3(), sampling_steps=5).sampling.plan(0)
    assert [step.std > 0 for step in plan.steps] == [True] * 4 + [False]
    assert plan.trained == [0, 1, 2, 3]


def test_windows(make):
    sliding = make(sampling_steps=10, sde_window=3, sde_window_moves="sliding", sde_window_stay=2).sampling
    assert [sliding.plan(i).trained[0] for i in range(12)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert sliding.plan(12).trained == [0, 1, 2]
    random = make(sampling_steps=10, sde_window=2).sampling
    places = [random.plan(i).trained for i in range(30)]
    assert {trained[0] for trained in places} == set(range(7))
    assert all(trained[1] == trained[0] + 1 for trained in places)
    for trained, i in zip(places, range(30), strict=True):
        assert [step.index for step in random.plan(i).steps if step.std > 0] == trained
    with pytest.raises(ConfigError, match="none is left"):
        make(sampling_steps=2)
    with pytest.raises(ConfigError, match=r"steps \[3\] of cps end without noise"):  # where the window gets later
        make(tiny_sd3(), sampler="cps", final_steps=0, sde_window=2, sde_window_moves="sliding")


def test_detached_guidance_has_the_conditional_gradient(make):
    """d(u + g (c - u)) is g dc when the empty branch is detached, and both have the same value."""
    values, gradients = [], []
    for gradient in ("both", "conditional"):
        trainer = make(guidance_gradient=gradient, adapter="none")
        sampling, step = trainer.sampling, trainer.sampling.plan(0).steps[0]
        samples = [trainer.sample_of(0, 0)]
        told = sampling.conditioning(samples, torch.device("cpu"))
        out = sampling.predict(trainer.denoiser, torch.ones(1, 4, 8, 8), step, told)
        out.sum().backward()
        values.append(out.detach())
        gradients.append(trainer.denoiser.conv_out.bias.grad.clone())
    assert torch.equal(*values)
    # the bias enters both branches: 1 g - (g - 1) = 1 with both, g = 2 with the conditional one alone
    assert torch.allclose(gradients[1], 2 * gradients[0], rtol=1e-4)
