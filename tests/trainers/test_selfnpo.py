"""Self-NPO on real tiny pipelines: what the teacher does, what the student is told, and that a run is exact."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffalign.errors import CheckpointError, ConfigError
from diffalign.evaluation.lora import find_weights
from diffalign.guidance import negative_guidance
from diffalign.synthesis import generate_images
from diffalign.trainers import SelfNPOConfig, SelfNPOTrainer
from diffalign.trainers.reference import weights_hash
from tests.tiny import tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl

ROOT = Path(__file__).parents[2]
PROMPTS = ["a red circle", "two blue stars", "a green square", "a star"]


@pytest.fixture
def make(tmp_path):
    def build(pipeline=None, folder: str = "run", prompts=PROMPTS, **settings) -> SelfNPOTrainer:
        defaults = {"output_dir": str(tmp_path / folder), "max_steps": 2, "batch_size": 2, "learning_rate": 1e-2}
        defaults |= {"progress_bar": False, "cache_dir": str(tmp_path / "cache"), "resolution": 32, "log_every": 1}
        return SelfNPOTrainer(pipeline or tiny_sd(), SelfNPOConfig(**(defaults | settings)), prompts)

    return build


def batch_of(trainer: SelfNPOTrainer):
    return trainer._draw(trainer.stream.step(0))


@pytest.mark.parametrize(
    ("builder", "adapter"),
    [(tiny_sd, "none"), (lambda: tiny_sd(prediction_type="v_prediction"), "lora"), (tiny_sdxl, "lora")]
    + [(tiny_sd3, "lora"), (tiny_flux, "lora")],
)
def test_every_family_trains_and_its_result_guides(make, builder, adapter, tmp_path):
    trainer = make(builder(), adapter=adapter, teacher_guidance=-4.0)
    report = trainer.train()
    assert math.isfinite(report["metrics"]["loss"]) and report["examples"] == 4
    assert find_weights(tmp_path / "run")[0] == ("pipeline" if adapter == "none" else "lora")
    card = (tmp_path / "run" / "final" / "README.md").read_text()
    assert "This is a negative model" in card and "with negative_guidance(" in card
    pipe = builder()
    settings = {"steps": 2, "guidance": 4.0, "height": 32, "width": 32}
    plain = generate_images(pipe, ["a star"], [0], **settings)[0]
    with negative_guidance(pipe, tmp_path / "run") as calls:
        guided = generate_images(pipe, ["a star"], [0], **settings)[0]
    assert calls.negative_calls == 2 and guided.tobytes() != plain.tobytes()


@pytest.mark.parametrize("scale", [1.0, 0.0, -4.0])
def test_teacher_guidance(make, scale):
    """1 is the conditional prediction, 0 the unconditional one, -4 is -4 c + 5 u."""
    trainer = make(teacher_guidance=scale)
    batch = batch_of(trainer)
    rows = torch.arange(2)
    x, time = torch.randn(2, 4, 8, 8), trainer.schedule.time(batch.t)
    with trainer._teacher() as module, torch.no_grad():
        c, u = (trainer._call(module, x, time, told) for told in (batch.prompts, batch.empty))
        got = trainer._guided(module, x, time, batch, rows)
    torch.testing.assert_close(got, scale * c + (1 - scale) * u, rtol=1e-4, atol=1e-5)
    calls = []
    handle = trainer.denoiser.register_forward_pre_hook(lambda m, args: calls.append(len(args[0])))
    trainer._teach(batch)
    handle.remove()
    assert len(calls) == trainer.config.truncation_steps + 1
    assert calls[-1] == (4 if scale == -4 else 2)  # both branches only where both count


def test_draws_are_keyed_by_prompt_and_stay_in_bounds(make):
    trainer = make(batch_size=4, min_timestep=300, max_timestep=700)
    for step in range(40):
        batch = trainer._draw(trainer.stream.step(step))
        assert (batch.t >= 0).all() and (batch.t < batch.s).all()
        assert (batch.s >= 300).all() and (batch.s <= 700).all()
    together, alone = trainer._draw(trainer.stream.step(0)), trainer._draw(trainer.stream.step(0)[2:3])
    for name in ("t", "s", "start", "noise"):
        assert torch.equal(getattr(together, name)[2:3], getattr(alone, name))
    assert together.start[0].std() > 0.5 and not torch.equal(together.start, together.noise)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_student_is_told_the_empty_prompt_and_the_teacher_is_not(make, share):
    batch = batch_of(make(tiny_sdxl(), negative_share=share))
    expected = batch.empty if share else batch.prompts
    for name, value in batch.told.items():
        assert torch.equal(value, expected[name])
    assert not torch.equal(batch.prompts["prompt_embeds"], batch.empty["prompt_embeds"])
    assert (batch.empty["prompt_embeds"] == 0).all(), "SDXL's negative branch at inference is zeros"


def test_a_frozen_teacher_does_not_move_and_targets_carry_no_gradient(make):
    for adapter in ("lora", "none"):
        trainer = make(folder=adapter, adapter=adapter)
        identity = trainer.reference.identity
        first = trainer._teach(batch_of(trainer))
        assert not any(tensor.requires_grad for tensor in first)
        trainer.train()
        again = trainer._teach(batch_of(trainer))
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
        if adapter == "none":
            assert weights_hash(trainer.reference.module) == identity != weights_hash(trainer.denoiser)


def test_a_moving_teacher_follows_exactly(make):
    trainer = make(adapter="none", teacher="ema", teacher_decay=0.9, max_steps=3)
    parameters = trainer.average.parameters
    expected = [p.detach().clone() for p in parameters]
    for _ in range(2):
        trainer.optimizer_step()
        expected = [0.9 * e + 0.1 * p.detach() for e, p in zip(expected, parameters, strict=True)]
        for mine, theirs in zip(trainer.average.shadow, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert make(folder="usual", adapter="none", teacher="ema").average.decay == 0.999
    student = [p.detach().clone() for p in parameters]
    with trainer._teacher():
        assert all(torch.equal(p, a) for p, a in zip(parameters, [p.data for p in parameters], strict=True))
        torch.testing.assert_close(parameters[0].data, expected[0], rtol=1e-5, atol=1e-6)
    assert all(torch.equal(p, s) for p, s in zip(parameters, student, strict=True))


@pytest.mark.parametrize("teacher", ["frozen", "ema"])
def test_resume_is_exact(make, teacher):
    settings = {"teacher": teacher, "max_steps": 4, "save_every": 2, "lora_dropout": 0.2, "ema_decay": 0.5}
    settings |= {"teacher_decay": 0.5} if teacher == "ema" else {}
    whole = make(folder="whole", **settings)
    whole.train()
    first = make(folder="parts", **settings)
    while first.step < 2:
        first.optimizer_step()
    first.save_checkpoint()
    second = make(folder="parts", resume="latest", **settings)
    second.train()
    for a, b in zip(whole.parameters, second.parameters, strict=True):
        assert torch.equal(a, b)
    if teacher == "ema":
        assert all(torch.equal(a, b) for a, b in zip(whole.average.shadow, second.average.shadow, strict=True))
    with pytest.raises(CheckpointError, match="data"):
        make(folder="parts", resume="latest", prompts=PROMPTS[:3], **settings).train()


def test_batch_and_accumulation_give_the_same_weights(make):
    one = make(folder="one", batch_size=4, max_steps=1, learning_rate=1e-3)
    four = make(folder="four", batch_size=1, gradient_accumulation_steps=4, max_steps=1, learning_rate=1e-3)
    for trainer in (one, four):
        batch = [trainer.optimizer_step()]
        assert math.isfinite(batch[0]["loss"])
    for a, b in zip(one.parameters, four.parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)


def run_program(folder: Path, processes: int, *settings: str) -> tuple[list[dict[str, float]], dict]:
    """Metrics and final weights of a run in so many processes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] * (processes > 1)
    command = [sys.executable, *launcher, "-m", "tests.trainers.selfnpo_program", str(folder), *settings]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    weights = load_file(folder / "final" / "pytorch_lora_weights.safetensors")
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()], weights


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["frozen", "ema"])
def test_two_processes_equal_one(tmp_path, teacher):
    """The same prompts, noise and timesteps, hence weights that agree up to the order of additions."""
    told = [f'teacher="{teacher}"'] + ["teacher_decay=0.5"] * (teacher == "ema")
    one, weights = run_program(tmp_path / "one", 1, "batch_size=4", *told)
    two, other = run_program(tmp_path / "two", 2, "batch_size=2", *told)
    assert len(one) == 3
    for x, y in zip(one, two, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            assert x[name] == pytest.approx(y[name], rel=2e-3, abs=1e-5), name
    for name, weight in weights.items():
        assert torch.allclose(weight, other[name], rtol=1e-4, atol=5e-6), name
    assert any(weight.abs().max() > 1e-4 for name, weight in weights.items() if "lora_B" in name), "they have moved"


def test_losses(make):
    trainer = make()
    d, s = torch.randn(2, 4, 8, 8), torch.tensor([200, 900])
    mse = d.square().flatten(1).mean(1)
    torch.testing.assert_close(trainer._loss(d, s), mse)
    trainer.config.loss, trainer.config.huber_c = "huber", 0.1
    torch.testing.assert_close(trainer._loss(d, s), ((d**2 + 0.01).sqrt() - 0.1).flatten(1).mean(1))
    trainer.config.loss, trainer.config.loss_space = "mse", "epsilon"
    factor = trainer.schedule.snr(s)
    torch.testing.assert_close(trainer._loss(d, s), mse * factor, rtol=1e-4, atol=1e-6)
    # of an epsilon model: the same as the squared difference of its outputs
    x, a, b = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    x0 = trainer.schedule.to_x0(a, x, s) - trainer.schedule.to_x0(b, x, s)
    torch.testing.assert_close(trainer._loss(x0, s), (a - b).square().flatten(1).mean(1), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_decay": 0.9}, "teacher_decay=0.9 has no effect"),
        ({"huber_c": 0.1}, "huber_c=0.1 has no effect"),
        ({"negative_share": 1.5}, "negative_share"),
        ({"truncation_steps": 0}, "truncation_steps"),
        ({"min_timestep": 500, "max_timestep": 400}, "min_timestep"),
        ({"max_timestep": 1000}, "max_timestep"),
        ({"resolution": 40}, "multiple of 16"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(make, settings, message):
    with pytest.raises(ConfigError, match=message):
        make(**settings)
