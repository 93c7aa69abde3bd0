"""Every offline method on real tiny pipelines: what it compares, what it keeps in memory, how it divides its work."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from diffalign.errors import CheckpointError, ConfigError
from diffalign.trainers import (
    DPOConfig,
    DPOTrainer,
    MaPOConfig,
    MaPOTrainer,
    RankDPOConfig,
    RankDPOTrainer,
    SmPOConfig,
    SmPOTrainer,
)
from diffalign.trainers.reference import FrozenReference, Reference
from tests.tiny import tiny_sd, tiny_sdxl
from tests.trainers.conftest import preference_rows

METHODS = {
    "dpo": (DPOTrainer, DPOConfig, {}),
    "mapo": (MaPOTrainer, MaPOConfig, {}),
    "smpo": (SmPOTrainer, SmPOConfig, {"inversion_steps": 3}),
    "rankdpo": (RankDPOTrainer, RankDPOConfig, {}),
}


def scored_rows(count: int = 4, candidates: int = 4) -> list[dict]:
    rows = preference_rows(count, candidates)
    for row in rows:
        row["scores"] = {"clip": [0.1 * value for value in row["preference"]]}
    return rows


def lines(trainer) -> list[dict]:
    return [json.loads(line) for line in (trainer.output_dir / "metrics.jsonl").read_text().splitlines()]


def weights(trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.denoiser.parameters() if p.requires_grad]


@pytest.fixture
def make(make_trainer, tmp_path):
    def build(method: str, folder: str = "run", pipeline=None, **settings):
        cls, config, own = METHODS[method]
        settings = {"output_dir": str(tmp_path / folder), "adapter": "none", "learning_rate": 1e-3, **own, **settings}
        return make_trainer(
            pipeline, settings.pop("dataset", None) or scored_rows(), cls=cls, config=config, **settings
        )

    return build


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

    for cls in (Reference, FrozenReference):
        monkeypatch.setattr(cls, "__init__", refuse)
    for adapter in ("none", "lora"):
        trainer = make("mapo", adapter, adapter=adapter, max_steps=2)
        if adapter == "lora":
            trainer.denoiser.disable_adapters = refuse
        calls = []
        trainer.denoiser.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trainer.train()
        assert trainer.reference is None
        assert len(calls) == 2
    with pytest.raises(ConfigError, match="precompute_reference"):
        make("mapo", "x", precompute_reference=2)


def test_rankdpo_without_weights_on_two_images_is_dpo(make):
    rows = scored_rows(4, 2)
    dpo, rank = make("dpo", "a", dataset=rows), make("rankdpo", "b", dataset=rows, weighting="none")
    dpo.train()
    rank.train()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(weights(dpo), weights(rank), strict=True))


def test_smpo_with_sure_labels_and_ordinary_noise_is_dpo_bit_for_bit(make):
    dpo, smpo = make("dpo", "a"), make("smpo", "b", inversion_steps=0, gamma=1.0)
    dpo.train()
    smpo.train()
    assert all(torch.equal(a, b) for a, b in zip(weights(dpo), weights(smpo), strict=True))


def test_smpo_learns_nothing_from_undecided_pairs(make):
    rows = scored_rows()
    for row in rows:
        row["scores"]["clip"] = [0.3] * 4
    trainer = make("smpo", dataset=rows, score="clip", score_range=[0.0, 1.0], max_steps=1)
    assert trainer.train()["metrics"]["grad_norm"] == 0.0


@pytest.mark.parametrize("build", [tiny_sdxl, lambda: tiny_sd(prediction_type="v_prediction")])
def test_smpo_noise_is_the_inversion_and_is_found_again(make, build):
    trainer = make("smpo", pipeline=build(), draws_per_row=1)
    draws = trainer.stream.step(0)
    plain = trainer.collate(draws)
    batch = trainer.noised(plain)
    assert not torch.equal(batch.noise, plain.noise)
    assert not torch.equal(batch.noise[:, 0], batch.noise[:, 1])  # each image has its own
    assert torch.equal(batch.latents, plain.latents)
    calls = []
    trainer.reference.module.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(trainer.noised(plain).noise, batch.noise)
    assert calls == []
    again = make("smpo", "again", pipeline=build(), draws_per_row=1)
    assert torch.allclose(again.noised(plain).noise, batch.noise)


def test_smpo_inverts_with_the_policy_when_asked(make):
    trainer = make("smpo", inverter="policy", max_steps=2)
    plain = trainer.collate(trainer.stream.step(0))
    before = trainer.noised(plain).noise
    trainer.train()
    assert trainer.inversions is None
    assert not torch.equal(trainer.noised(plain).noise, before)
    assert trainer.denoiser.training
    with pytest.raises(ConfigError, match="inverter=reference"):
        make("smpo", "x", inverter="policy", precompute_reference=1)


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
        ("dpo", {"curriculum_stages": 1}, "curriculum_stages"),
        ("rankdpo", {"weighting": "none", "log_base": 3.0}, "log_base=3.0 has no effect"),
    ],
)
def test_settings_without_effect_are_refused(make, method, settings, named):
    with pytest.raises(ConfigError, match=named):
        make(method, **settings)
