"""The hold-out of a run: how its pictures are drawn, and where its numbers are written."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from reward_models import FunctionRewardModel
from tests.trainers.grpo.conftest import Judge, brightness


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_hold_out_is_drawn_with_the_deployed_sampler_and_compared_with_the_base(make):
    unseen = FunctionRewardModel(lambda images, prompts: [-value for value in brightness(images, prompts)], "darkness")
    settings = {"holdout_every": 1, "holdout_prompts": "shapes:heldout", "holdout_count": 2, "validation_steps": 2}
    trainer = make(models=[Judge()], holdout=[unseen], adapter="none", max_steps=2, learning_rate=1e-3, **settings)
    trainer.train()
    last = lines(trainer.output_dir)[-1]
    assert {"holdout/darkness", "holdout/darkness_change", "holdout/darkness_error"} <= last.keys()
    assert -0.5 <= last["holdout/training-judge_change"] <= 0.5
    assert sorted(path.name for path in (trainer.output_dir / "holdout/validation/base").glob("*.png")) == [
        "000.png",
        "001.png",
    ]
    before = trainer.holdout.base["darkness"].mean().item()
    assert last["holdout/darkness"] - before == pytest.approx(last["holdout/darkness_change"], abs=1e-4)


def test_hold_out_scores_have_their_own_step_and_the_last_step_has_a_line(make):
    settings = {"holdout_every": 2, "holdout_prompts": "shapes:heldout", "holdout_count": 2, "validation_steps": 2}
    trainer = make(max_steps=3, log_every=10, **settings)
    trainer.train()
    told = {line["step"]: line for line in lines(trainer.output_dir)}
    assert list(told) == [1, 2, 3]
    assert ["holdout/training-brightness" in line for line in told.values()] == [False, True, False]


def test_a_long_wait_between_hold_outs_is_remembered(make):
    settings = {"holdout_every": 200, "holdout_prompts": "shapes:heldout", "holdout_count": 2}
    assert make(**settings).health.keep == 400


def test_the_hold_out_is_drawn_with_the_moving_average(make):
    trainer = make(ema_decay=0.5, adapter="none", max_steps=2)
    seen = []
    trainer.config.holdout_every = 1
    weight = trainer.denoiser.conv_out.weight
    trainer.holdout = SimpleNamespace(measure=lambda denoiser, step: seen.append((step, weight.detach().clone())) or {})
    trainer.train()
    step, drawn_with = seen[-1]
    with trainer.averaged_weights():
        assert torch.equal(drawn_with, weight)
    assert step == 2 and not torch.equal(drawn_with, weight)
