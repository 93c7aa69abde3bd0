"""Every offline method on real tiny pipelines: what it compares, what it keeps in memory, how it divides its work."""

from __future__ import annotations

import gc
import json
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel

from diffalign.errors import CheckpointError, ConfigError
from diffalign.trainers.reference import FrozenReference, Reference, weights_hash
from tests.tiny import tiny_sd, tiny_sd3, tiny_sdxl
from tests.trainers.conftest import METHODS, scored_rows


def lines(trainer) -> list[dict]:
    return [json.loads(line) for line in (trainer.output_dir / "metrics.jsonl").read_text().splitlines()]


def weights(trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.denoiser.parameters() if p.requires_grad]


def gap(trainer) -> float:
    """Mean error of the best images above that of the worst, on the draws of the first batch."""
    batch = trainer.noised(trainer.collate(trainer.stream.step(0)))
    with torch.no_grad():
        errors = trainer.passes.errors(trainer.denoiser, batch.images()).view(batch.shape)
    return float((errors[:, 0] - errors[:, -1]).mean())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_the_best_image_more_likely_than_the_worst(make, method):
    settings = {"mapo": {"margin_weight": 1.0}, "smpo": {"score": "clip"}}.get(method, {})
    settings |= {} if method == "mapo" else {"beta": 500.0}
    trainer = make(method, max_steps=8, batch_size=4, draws_per_row=1, **settings)
    before = gap(trainer)
    trainer.train()
    assert gap(trainer) < before - 2e-4


def test_mapo_never_builds_or_calls_a_reference(make, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("MaPO has no reference")

    def networks() -> set[int]:
        gc.collect()
        return {id(thing) for thing in gc.get_objects() if type(thing) is UNet2DConditionModel}

    for cls in (Reference, FrozenReference):
        monkeypatch.setattr(cls, "__init__", refuse)
    monkeypatch.setattr("diffalign.trainers.loop.build_reference", refuse)
    for adapter in ("none", "lora"):
        pipeline, before = tiny_sdxl(), networks()
        trainer = make("mapo", adapter, pipeline=pipeline, adapter=adapter, max_steps=2)
        if adapter == "lora":
            trainer.denoiser.disable_adapters = refuse
        calls = []
        trainer.denoiser.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trainer.train()
        assert trainer.reference is None
        assert len(calls) == 2
        assert networks() <= before  # no second one in memory
    with pytest.raises(ConfigError, match="precompute_reference=2, but this method compares with no reference"):
        make("mapo", "x", precompute_reference=2, draws_per_row=8)


def test_rankdpo_without_weights_on_two_images_is_dpo(make):
    rows = scored_rows(4, 2)
    dpo, rank = make("dpo", "a", dataset=rows), make("rankdpo", "b", dataset=rows, weighting="none")
    dpo.train()
    rank.train()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(weights(dpo), weights(rank), strict=True))


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_the_reference_does_not_move_when_the_policy_trains(make, adapter):
    """Oracle 7.1.10: after updates with weight decay its predictions are the base's, to the last bit."""
    trainer = make("dpo", adapter=adapter, weight_decay=0.1, max_steps=2)
    images = trainer.collate(trainer.stream.step(0)).images()

    def reference() -> torch.Tensor:
        with torch.no_grad(), trainer.reference.use(trainer.model) as module:
            return trainer.passes.errors(module, images)

    before, start = reference(), weights(trainer)
    trainer.train()
    assert any(not torch.equal(a, b) for a, b in zip(start, weights(trainer), strict=True))
    assert torch.equal(reference(), before)
    frozen = trainer.denoiser if adapter == "lora" else trainer.reference.module
    assert weights_hash(frozen, skip="lora_") == trainer.reference.identity == weights_hash(tiny_sdxl().unet)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_images_in_parts_give_the_same_gradients(make, method, adapter):
    """k = 4 lists train in the memory of two images."""
    settings = {"adapter": adapter, "max_steps": 2, "adam_epsilon": 0.1, "batch_size": 3}
    whole, parts = make(method, "a", **settings), make(method, "b", images_per_pass=2, **settings)
    widest = []
    parts.denoiser.register_forward_pre_hook(lambda _, args: widest.append(len(args[0])) if args else None)
    whole.train()
    parts.train()
    for a, b in zip(lines(whole), lines(parts), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(weights(whole), weights(parts), strict=True))
    assert max(widest) <= 2
    with pytest.raises(ConfigError, match="lora_dropout=0"):
        make(method, "x", images_per_pass=2, adapter="lora", lora_dropout=0.1)
    pipeline = tiny_sdxl()
    next(module for module in pipeline.unet.modules() if isinstance(module, torch.nn.Dropout)).p = 0.1
    with pytest.raises(ConfigError, match="dropout of this network"):
        make(method, "y", pipeline=pipeline, images_per_pass=2)


@pytest.mark.parametrize("method", ["dpo", "smpo", "rankdpo"])
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_a_precomputed_reference_changes_nothing_and_leaves_memory(make, method, adapter):
    settings = {"adapter": adapter, "max_steps": 6, "adam_epsilon": 0.1, "caption_dropout": 0.3}
    plain = make(method, "a", draws_per_row=2, **settings)
    quick = make(method, "b", precompute_reference=2, **settings)
    calls = []
    quick.denoiser.register_forward_hook(lambda *_: calls.append(1))
    plain.train()
    quick.train()
    assert len(calls) == 6  # one per step: the policy's
    for a, b in zip(lines(plain), lines(quick), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(weights(plain), weights(quick), strict=True))
    assert not any(isinstance(value, torch.nn.Module) for value in vars(quick.reference).values()) or adapter == "lora"


def test_precomputed_errors_are_read_again_and_checked(make, caplog):
    settings = {"precompute_reference": 2, "resume": "latest"}
    first = make("dpo", max_steps=2, **settings)
    first.train()
    file = first.output_dir / "reference-errors.safetensors"
    stamp = file.stat().st_mtime_ns
    again = make("dpo", max_steps=4, **settings)
    assert file.stat().st_mtime_ns == stamp
    again.train()
    whole = make("dpo", "whole", max_steps=4, precompute_reference=2)
    whole.train()
    assert all(torch.equal(a, b) for a, b in zip(weights(again), weights(whole), strict=True))
    make("dpo", max_steps=4, **settings, caption_dropout=0.5)
    assert "computed again" in caplog.text
    file.write_bytes(b"broken")
    make("dpo", max_steps=4, **settings)
    assert "damaged" in caplog.text


@pytest.mark.parametrize(
    ("build", "scheduler", "change", "settings"),
    [
        (tiny_sd3, FlowMatchEulerDiscreteScheduler, {"shift": 12.0}, {"timestep_density": "shift"}),
        (tiny_sd, DDIMScheduler, {"beta_end": 0.02}, {}),
    ],
)
def test_precomputed_errors_are_those_of_the_scheduler(make, build, scheduler, change, settings):
    """Its shift decides which timesteps are drawn, its betas what noise a timestep means; output_dir is the same."""
    make("dpo", pipeline=build(), precompute_reference=1, **settings)
    pipeline = build()
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **change)
    trainer = make("dpo", pipeline=pipeline, precompute_reference=1, **settings)
    batch = trainer.collate(trainer.stream.step(0))
    with torch.no_grad():  # the policy is still what the reference was
        fresh = trainer.passes.errors(trainer.denoiser, batch.images()).view(batch.shape)
    torch.testing.assert_close(trainer.reference_error(batch), fresh, rtol=1e-4, atol=1e-6)


def test_adaptive_beta_moves_and_survives_a_restart(make):
    settings = {"target_gradient_factor": 0.2, "log_every": 1, "resume": "latest"}
    whole = make("dpo", "whole", max_steps=6, **settings)
    whole.train()
    betas = [line["beta"] for line in lines(whole)]
    assert betas[0] == 5000.0
    assert betas[-1] != betas[1]
    make("dpo", "cut", max_steps=3, **settings).train()
    cut = make("dpo", "cut", max_steps=6, **settings)
    cut.train()
    assert [line["beta"] for line in lines(cut)] == betas
    plain = make("dpo", "cut", max_steps=7, resume="latest")
    with pytest.raises(CheckpointError, match="beta"):
        plain.train()


def test_label_smoothing_and_the_winners_term_are_in_the_loss(make):
    plain, smooth = make("dpo", "a", max_steps=2), make("dpo", "b", max_steps=2, label_smoothing=0.3)
    anchored = make("dpo", "c", max_steps=2, sft_weight=10.0)
    for trainer in (plain, smooth, anchored):
        trainer.train()
    assert lines(smooth)[0]["loss"] == pytest.approx(math.log(2))
    assert lines(smooth)[0]["grad_norm"] == pytest.approx(0.4 * lines(plain)[0]["grad_norm"], rel=1e-4)
    first = lines(anchored)[0]
    assert first["loss"] == pytest.approx(math.log(2) + 10 * first["error/winner"], rel=1e-5)


def test_a_curriculum_shows_clear_pairs_first(make):
    trainer = make("dpo", pairs="all", curriculum_stages=3, max_steps=6, batch_size=4)
    margins = [[trainer.examples[d.example].margin for d in trainer.stream.step(step)] for step in range(6)]
    means = [np.mean(margins[2 * stage] + margins[2 * stage + 1]) for stage in range(3)]
    assert means[0] > means[1] > means[2]
    assert min(margins[0]) >= max(margins[5])
    trainer.train()
    with pytest.raises(CheckpointError, match="curriculum"):  # its stages would lie elsewhere
        make("dpo", pairs="all", curriculum_stages=3, max_steps=9, batch_size=4, resume="latest").train()


def test_lists_of_different_length_train_together(make):
    rows = scored_rows(2, 3) + scored_rows(3, 4)[1:]
    trainer = make("rankdpo", dataset=rows, batch_size=4, max_steps=2)
    assert {shape[-1] for shape in trainer.buckets} == {3, 4}
    assert trainer.train()["steps"] == 2
    assert {len(e.candidates) for e in make("rankdpo", "b", dataset=rows, list_size=2).examples} == {2}


def test_a_list_of_equals_is_dropped_and_counted(make):
    rows = scored_rows(3, 3)
    rows[0]["preference"] = [0.5, 0.5, 0.5]
    trainer = make("rankdpo", dataset=rows)
    assert trainer.pair_counts["ties_dropped"] == 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("t", [0, 999])
def test_the_first_and_the_last_timestep_train(make, method, t):
    trainer = make(method, timesteps=[t], max_steps=2)
    assert math.isfinite(trainer.train()["metrics"]["loss"])
    assert all(torch.isfinite(p).all() for p in weights(trainer))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("t", [0, 999])
@pytest.mark.parametrize("kind", ["flow", "v, zero terminal SNR"])
def test_the_first_and_the_last_timestep_train_in_other_parameterisations(make, method, t, kind):
    flow = kind == "flow"
    pipeline = tiny_sd3() if flow else tiny_sd(prediction_type="v_prediction")
    settings = {"timesteps": [t], "timestep_density": "uniform", "zero_terminal_snr": not flow, "max_steps": 2}
    trainer = make(method, pipeline=pipeline, **settings)
    metrics = trainer.train()["metrics"]
    assert math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])
    assert all(torch.isfinite(p).all() for p in weights(trainer))
    if t == 999 and not flow:  # nothing of the picture is left: an error in epsilon space is worth 0
        assert metrics["grad_norm"] == 0


@pytest.mark.parametrize(
    ("method", "settings", "named"),
    [
        ("rankdpo", {"pairs": "all"}, "pairs=all has no effect"),
        ("mapo", {"exponent": 64.0}, "exponent=64.0 has no effect"),
        ("mapo", {"variant": "paper", "kappa": 0.4}, "kappa=0.4 has no effect"),
        ("smpo", {"contradiction": "drop"}, "score=null"),
        ("smpo", {"score": "clip", "score_range": [1.0, 0.0]}, "lowest, highest"),
        ("dpo", {"smoothing": "robust"}, "label_smoothing=0"),
        ("dpo", {"label_smoothing": 0.5}, "below 0.5"),
        ("dpo", {"density_mean": 1.0}, "drawn uniformly"),
        ("dpo", {"timestep_density": "shift"}, "shift of a flow model"),
        ("dpo", {"curriculum_stages": 1}, "curriculum_stages"),
        ("rankdpo", {"weighting": "none", "log_base": 3.0}, "log_base=3.0 has no effect"),
    ],
)
def test_settings_without_effect_are_refused(make, method, settings, named):
    with pytest.raises(ConfigError, match=named):
        make(method, **settings)


# --- labels that say nothing, or the opposite ------------------------------------------------------------------------


def error_slopes(trainer) -> torch.Tensor:
    """d loss / d error of the first batch, at the reference."""
    batch = trainer.collate(trainer.stream.step(0))
    error = torch.full(batch.shape, 0.1, requires_grad=True)
    return torch.autograd.grad(trainer.compute(error, error.detach(), batch).loss.sum(), error)[0]


def test_the_winners_term_splits_ties_and_follows_scores(make):
    rows = scored_rows(2, 2)
    for row in rows:
        row["preference"] = [0.5, 0.5]
    tied = make("dpo", "a", dataset=rows, ties="soft", sft_weight=10.0)
    assert torch.equal(error_slopes(tied), torch.full((2, 2), 5.0))
    rows = scored_rows(2, 2)
    for row in rows:
        row["scores"]["clip"] = [0.0, 0.1]  # against the label
    settings = {"dataset": rows, "score": "clip", "inversion_steps": 0}
    undecided = make("smpo", "b", **settings, sft_weight=10.0)
    assert error_slopes(undecided).abs().max() == 0
    followed, plain = (
        error_slopes(make("smpo", f"c{weight}", **settings, contradiction="follow_scores", sft_weight=weight))
        for weight in (10.0, 0.0)
    )
    assert torch.allclose(followed - plain, torch.tensor([0.0, 10.0]).expand(2, 2))
    assert (plain[:, 0] < 0).all() and (plain[:, 1] > 0).all()


# --- adaptive beta -----------------------------------------------------------------------------------------------


def test_an_adaptive_beta_continues_no_other_checkpoint(make):
    make("dpo", "plain", max_steps=1).train()
    with pytest.raises(CheckpointError, match=r"gradient_factor=0.2 cannot continue .*beta and factor.*got \[\]"):
        make("dpo", "plain", max_steps=2, resume="latest", target_gradient_factor=0.2).train()
    make("dpo", "small", max_steps=1, beta=10.0, target_gradient_factor=0.2).train()
    with pytest.raises(CheckpointError, match=r"saved beta 10.* lies outside \[500"):
        make("dpo", "small", max_steps=2, resume="latest", target_gradient_factor=0.2).train()


# --- memory, caches, dropout -------------------------------------------------------------------------------------


def test_lists_of_eight_have_the_gradient_of_one_pass_with_two_images_in_memory(make):
    rows = scored_rows(2, 8)
    whole, parts = make("rankdpo", "a", dataset=rows), make("rankdpo", "b", dataset=rows, images_per_pass=2)
    most = []
    for trainer in (whole, parts):
        torch.manual_seed(0)
        for parameter in trainer.parameters:  # away from the reference, where all pairs pull alike
            parameter.data += 0.01 * torch.randn_like(parameter)
        held = [0]  # images in a graph since each backward pass

        def count(module, args, held=held):
            held[-1] += len(args[0]) * torch.is_grad_enabled()

        def backward(loss, held=held, run=trainer.accelerator.backward):
            run(loss)
            held.append(0)

        trainer.denoiser.register_forward_pre_hook(count)
        trainer.accelerator.backward = backward
        trainer._forward_backward(trainer.collate(trainer.stream.step(0)), sync=True)
        most.append(max(held))
    assert most == [16, 2]
    for a, b in zip(whole.parameters, parts.parameters, strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-4 * a.grad.abs().max())


def test_a_precomputed_reference_changes_nothing_for_a_flow_model(make):
    settings = {"max_steps": 4, "adam_epsilon": 0.1, "beta": 500.0}
    plain = make("dpo", "a", pipeline=tiny_sd3(), draws_per_row=2, **settings)
    quick = make("dpo", "b", pipeline=tiny_sd3(), precompute_reference=2, **settings)
    plain.train()
    quick.train()
    for a, b in zip(lines(plain), lines(quick), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(weights(plain), weights(quick), strict=True))
