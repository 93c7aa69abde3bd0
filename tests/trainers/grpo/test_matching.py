"""objective=matching: denoising errors in place of step densities, for every family and through kills."""

from __future__ import annotations

import json

import pytest
import torch

from diffalign.errors import CheckpointError, ConfigError
from diffalign.trainers import PrefGRPOTrainer
from tests.tiny import tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl
from tests.trainers.grpo.conftest import Judge

FAMILIES = {
    "sdxl": tiny_sdxl,
    "sd-v": lambda: tiny_sd(prediction_type="v_prediction"),
    "sd3": tiny_sd3,
    "flux-dev": tiny_flux,
}


@pytest.fixture
def matching(make):
    def build(pipeline=None, models=None, **settings):
        return make(pipeline, models, **({"objective": "matching", "matching_draws": 3} | settings))

    return build


@pytest.mark.parametrize("adapter", ["lora", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_ratio_is_exactly_one_before_the_first_update_and_moves_after_it(matching, family, adapter):
    settings = {"updates_per_rollout": 2, "max_steps": 2, "adapter": adapter, "learning_rate": 1e-3, "clip_range": 0.5}
    trainer = matching(FAMILIES[family](), **settings)
    trainer.train()
    first, second = map(json.loads, (trainer.output_dir / "metrics.jsonl").read_text().splitlines())
    assert first["log_ratio"] == 0.0 and first["ratio"] == 1.0 and first["grad_norm"] > 0
    assert second["log_ratio"] != 0.0
    assert first["error"] > 0


def test_the_gradient_is_that_of_errors_weighted_by_advantages(matching):
    """Restated: at the start d/dw of mean(A * error), each error at noise and timestep that the group shares."""
    trainer = matching(adapter="none", min_timestep=300, max_grad_norm=None)
    rollout = trainer.rollout = trainer.roll_out(0)
    trainer._backward(rollout, rollout.chunks, 0)
    found = [parameter.grad.clone() for parameter in trainer.parameters]
    trainer.optimizer.zero_grad()
    total = 0.0
    for chunk in rollout.chunks:
        told = trainer.sampling.conditioning(chunk.samples, torch.device("cpu"), guided=False)
        for index in range(3):
            term = trainer.objective.term(rollout.plan, chunk, index, told)
            a, b = trainer.schedule.levels()
            t = term.timesteps + 1
            noisy = a[t].view(-1, 1, 1, 1) * chunk.latents + b[t].view(-1, 1, 1, 1) * term.noise
            output = trainer.adapter.predict(
                trainer.denoiser, noisy, term.timesteps.float(), *told, dtype=torch.float32
            )
            error = (output - term.noise).square().mean((1, 2, 3))
            advantage = rollout.advantages[[trainer._place(sample) for sample in chunk.samples]]
            total = total + (advantage.float() * error).sum() / (8 * 3)
    total.backward()
    for one, other in zip(found, (parameter.grad for parameter in trainer.parameters), strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()) + 1e-9)


@pytest.mark.parametrize("reward", ["score", "win_rate"])
def test_an_update_denoises_better_pictures_better_and_worse_ones_worse(matching, reward):
    trainer = matching(reward=reward, learning_rate=1e-4, adapter="none")
    rollout = trainer.rollout = trainer.roll_out(0)
    trainer.optimizer_step()
    gain = 0.0
    for chunk in rollout.chunks:
        told = trainer.objective.conditioning(chunk, torch.device("cpu"))
        advantage = rollout.advantages[[trainer._place(sample) for sample in chunk.samples]]
        for index in range(3):
            out, _ = trainer._term_loss(rollout, chunk, index, told)
            gain += float((advantage * out.stats["log_ratio"]).sum())
    assert gain > 1e-5


def test_a_group_shares_noise_and_timesteps_which_cover_all_levels(matching):
    trainer = matching(matching_draws=5)
    rollout = trainer.roll_out(0)
    for chunk in rollout.chunks:  # one group each
        told = trainer.objective.conditioning(chunk, torch.device("cpu"))
        terms = [trainer.objective.term(rollout.plan, chunk, index, told) for index in range(5)]
        for index, term in enumerate(terms):
            assert torch.equal(term.noise, term.noise[:1].expand_as(term.noise))
            assert set(term.timesteps.tolist()) == {int(term.timesteps[0])}
            assert 200 * index <= int(term.timesteps[0]) < 200 * (index + 1)
        assert not torch.equal(terms[0].noise, terms[1].noise)
    first, second = (trainer.objective.term(rollout.plan, chunk, 0, told) for chunk in rollout.chunks)
    assert not torch.equal(first.noise, second.noise)


def test_rollouts_are_deterministic_and_keep_no_steps(matching):
    trainer = matching()
    plan = trainer.sampling.plan(0)
    assert all(step.std == 0 for step in plan.steps) and plan.trained == []


def test_the_pull_to_the_reference_is_a_difference_of_predictions(matching):
    trainer = matching(kl_weight=0.5, max_steps=2, learning_rate=1e-3)
    trainer.train()
    first, second = map(json.loads, (trainer.output_dir / "metrics.jsonl").read_text().splitlines())
    assert first["kl"] == 0.0 and second["kl"] > 0
    assert second["loss"] == pytest.approx(second["surrogate"] + 0.5 * second["kl"], rel=1e-5)


class Killed(Exception):
    """Stands for a kill: nothing is saved after it."""


def test_a_run_stopped_between_updates_of_a_rollout_continues_as_if_it_had_not(make, tmp_path):
    settings = {"objective": "matching", "max_steps": 4, "updates_per_rollout": 2, "save_every": 1}
    whole = make(output_dir=str(tmp_path / "whole"), **settings)
    whole.train()

    class Mortal(PrefGRPOTrainer):
        def _backward(self, rollout, chunks, number):
            out = super()._backward(rollout, chunks, number)
            if self.step == 3:
                raise Killed
            return out

    with pytest.raises(Killed):
        make(cls=Mortal, **settings).train()
    with pytest.raises(CheckpointError, match="matching_draws"):
        make(resume="latest", **(settings | {"matching_draws": 2})).train()
    resumed = make(resume="latest", **settings)
    resumed.train()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters, resumed.parameters, strict=True))
    assert (resumed.output_dir / "metrics.jsonl").read_bytes() == (whole.output_dir / "metrics.jsonl").read_bytes()


def test_a_judge_that_only_compares_will_do(matching):
    assert matching(models=[Judge()]).train()["metrics"]["grad_norm"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "matching", "shared_noise": True}, "one picture"),
        ({"objective": "matching", "sde_window": 2}, "no effect with objective=matching"),
        ({"objective": "matching", "noise_level": 0.5}, "no effect with objective=matching"),
        ({"objective": "matching", "ratio_norm": True}, "no effect with objective=matching"),
        ({"objective": "matching", "min_timestep": 900, "max_timestep": 800}, "must not be above"),
        ({"objective": "matching", "max_timestep": 1000}, "max_timestep=1000"),
        ({"objective": "matching", "density_mean": 1.0}, "drawn uniformly"),
        ({"min_timestep": 500}, "no effect with objective=sampling"),
        ({"matching_draws": 2}, "no effect with objective=sampling"),
    ],
)
def test_settings_that_cannot_be_meant(make, settings, message):
    with pytest.raises(ConfigError, match=message):
        make(**settings)
