"""What a run does, on real tiny pipelines."""

from __future__ import annotations

import json
import math
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from diffalign.data import load_preferences
from diffalign.errors import CheckpointError, ConfigError, DataError, DivergenceError
from diffalign.objectives.dpo import LOSS_TYPES
from diffalign.synthesis import generate_images
from diffalign.trainers import DPOConfig, SFTConfig, SFTTrainer, SmPOConfig, SmPOTrainer
from diffalign.trainers.checkpoints import damage
from tests.tiny import tiny_sd, tiny_sd3, tiny_sdxl
from tests.trainers.conftest import preference_rows


def lines(trainer) -> list[dict]:
    return [json.loads(line) for line in (trainer.output_dir / "metrics.jsonl").read_text().splitlines()]


def trained(trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.denoiser.parameters() if p.requires_grad]


def pictures(pipeline) -> list[np.ndarray]:
    return [np.asarray(image) for image in generate_images(pipeline, ["one", "two"], [0, 1], steps=2, guidance=2.0)]


@pytest.mark.parametrize("adapter", ["lora", "dora", "none"])
@pytest.mark.parametrize("build", [tiny_sdxl, tiny_sd, lambda: tiny_sd(prediction_type="v_prediction")])
def test_every_family_starts_at_ln2_and_learns(make_trainer, build, adapter):
    trainer = make_trainer(build(), adapter=adapter, max_steps=3, learning_rate=1e-3)
    before = trained(trainer)
    report = trainer.train()
    first = lines(trainer)[0]
    if adapter != "dora":  # DoRA recomputes the norm of its weights, so it equals the base up to rounding only
        assert first["loss"] == pytest.approx(math.log(2), rel=1e-6)
        assert first["rewards/margins"] == 0.0
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-2)
    assert report["steps"] == 3
    assert any(not torch.equal(a, b) for a, b in zip(before, trained(trainer), strict=True))


def test_training_raises_the_accuracy_on_its_own_pairs(make_trainer):
    trainer = make_trainer(adapter="none", max_steps=40, learning_rate=1e-3, beta=500.0, batch_size=6)
    trainer.train()
    history = lines(trainer)
    assert np.mean([line["rewards/accuracies"] for line in history[-10:]]) > 0.8
    assert np.mean([line["loss"] for line in history[-10:]]) < math.log(2)


@pytest.mark.parametrize("loss_type", get_args(get_type_hints(DPOConfig)["loss_type"]))
def test_every_loss_type_that_is_offered_runs(make_trainer, loss_type):
    assert loss_type in LOSS_TYPES
    assert make_trainer(max_steps=1, loss_type=loss_type).train()["steps"] == 1


def test_two_equal_images_never_differ(make_trainer):
    """Whatever is random is shared: the margin of a pair of equal images stays exactly zero while weights move."""
    rows = preference_rows(4)
    for row in rows[:2]:
        row["images"] = [row["images"][0]] * 2
    settings = {"horizontal_flip": True, "random_crop": True, "caption_dropout": 0.5, "resolution": 32, "batch_size": 1}
    trainer = make_trainer(dataset=rows, max_steps=8, adapter="none", learning_rate=1e-3, **settings)
    trainer.train()
    margins = {}
    for step in range(8):
        draw = trainer.stream.step(step)[0]
        row = trainer.examples[draw.example].row
        margins.setdefault(row, []).append(lines(trainer)[step]["rewards/margins"])
    assert all(margin == 0 for row in (0, 1) for margin in margins[row])
    assert any(margin != 0 for row in (2, 3) for margin in margins[row])


def test_both_images_share_timestep_noise_prompt_and_flip(make_trainer):
    trainer = make_trainer(caption_dropout=0.5, horizontal_flip=True)
    batch = trainer.collate(trainer.stream.step(0) + trainer.stream.step(1))
    assert batch.latents.shape[:2] == batch.noise.shape[:2] == (4, 2)
    assert torch.equal(batch.noise[:, 0], batch.noise[:, 1])
    assert batch.timesteps.shape == (4,)
    assert batch.conditioning["prompt_embeds"].shape[0] == 4
    empty = trainer.encoded.unconditional()["prompt_embeds"]
    dropped = [torch.equal(row, empty) for row in batch.conditioning["prompt_embeds"]]
    assert 0 < sum(dropped) < 4 or len(set(dropped)) == 1


def test_what_a_row_sees_does_not_depend_on_its_batch(make_trainer):
    trainer = make_trainer(caption_dropout=0.3)
    draws = trainer.stream.step(0) + trainer.stream.step(1)
    together, alone = trainer.collate(draws), [trainer.collate([draw]) for draw in draws]
    for i, single in enumerate(alone):
        assert torch.equal(together.latents[i], single.latents[0])
        assert torch.equal(together.noise[i], single.noise[0])
        assert together.timesteps[i] == single.timesteps[0]
        assert torch.equal(together.conditioning["prompt_embeds"][i], single.conditioning["prompt_embeds"][0])


def test_ties_are_dropped_and_counted_or_kept_without_a_pull(make_trainer):
    rows = preference_rows(4)
    for row in rows:
        row["preference"] = [0.5, 0.5]
    with pytest.raises(DataError, match="ties_dropped"):
        make_trainer(dataset=rows)
    trainer = make_trainer(dataset=rows, ties="soft", max_steps=1, adapter="none")
    assert trainer.pair_counts["ties_soft"] == 4
    before = trained(trainer)
    report = trainer.train()
    assert report["metrics"]["grad_norm"] == 0.0
    assert report["metrics"]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    decayed = [b * (1 - trainer.config.learning_rate * trainer.config.weight_decay) for b in before]
    assert all(torch.allclose(a, b) for a, b in zip(decayed, trained(trainer), strict=True))


@pytest.mark.parametrize("loss_space", ["default", "native", "epsilon", "x0"])
def test_every_loss_space_runs_on_a_v_model(make_trainer, loss_space):
    trainer = make_trainer(tiny_sd(prediction_type="v_prediction"), max_steps=1, loss_space=loss_space)
    assert math.isfinite(trainer.train()["metrics"]["loss"])


def test_timesteps_stay_where_they_are_allowed(make_trainer):
    trainer = make_trainer(min_timestep=400, max_timestep=410, max_steps=1)
    seen = [t for step in range(20) for t in trainer.collate(trainer.stream.step(step)).timesteps.tolist()]
    assert min(seen) >= 400
    assert max(seen) <= 410
    turbo = make_trainer(timesteps=[249, 499, 749, 999], zero_terminal_snr=True, max_steps=1)
    seen = {t for step in range(20) for t in turbo.collate(turbo.stream.step(step)).timesteps.tolist()}
    assert seen == {249, 499, 749, 999}
    assert math.isfinite(turbo.train()["metrics"]["loss"])


def test_sft_has_no_reference_and_follows_the_winner(make_trainer):
    trainer = make_trainer(cls=SFTTrainer, config=SFTConfig, adapter="none", max_steps=30, learning_rate=1e-3)
    assert trainer.reference is None
    trainer.train()
    history = [line["error/winner"] for line in lines(trainer)]
    assert np.mean(history[-8:]) < np.mean(history[:8])


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_half_precision_starts_at_ln2_and_keeps_fp32_masters(make_trainer, adapter):
    trainer = make_trainer(mixed_precision="bf16", adapter=adapter, max_steps=1)
    assert trainer.train()["metrics"]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert all(p.dtype == torch.float32 for p in trainer.parameters)


def test_gradient_checkpointing_changes_no_gradient(make_trainer, tmp_path):
    norms = []
    for on in (False, True):
        trainer = make_trainer(gradient_checkpointing=on, max_steps=1, output_dir=str(tmp_path / f"run-{on}"))
        norms.append(trainer.train()["metrics"]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_channels_last_changes_the_layout_and_nothing_else(make_trainer, tmp_path, adapter):
    """Adam's epsilon damps what rounding makes of its tiny denominators."""
    settings = {"adapter": adapter, "adam_epsilon": 0.1, "max_steps": 2, "save_every": 1}
    settings |= {} if adapter == "lora" else {"ema_decay": 0.5}
    runs = {}
    for on in (False, True):
        trainer = make_trainer(channels_last=on, output_dir=str(tmp_path / f"run-{on}"), **settings)
        trainer.train()
        runs[on] = trainer
    assert runs[True].denoiser.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert runs[True].reference.identity == runs[False].reference.identity
    for plain, other in zip(trained(runs[False]), trained(runs[True]), strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-5, atol=1e-5)
    for plain, other in zip(lines(runs[False]), lines(runs[True]), strict=True):
        assert other["loss"] == pytest.approx(plain["loss"], rel=1e-3)
    max(runs[True].output_dir.glob("checkpoint-*")).rename(tmp_path / "away")
    resumed = make_trainer(channels_last=True, output_dir=str(tmp_path / "run-True"), resume="latest", **settings)
    resumed.train()
    assert all(torch.equal(a, b) for a, b in zip(trained(resumed), trained(runs[True]), strict=True))


def test_channels_last_is_refused_for_a_transformer(make_trainer):
    with pytest.raises(ConfigError, match="channels_last=true is for networks of convolutions, a SD3Transformer"):
        make_trainer(tiny_sd3(), channels_last=True)


# --- when things go wrong ----------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_its_row_and_leaves_a_usable_checkpoint(make_trainer):
    trainer = make_trainer(batch_size=6, max_steps=3)
    poisoned, example = trainer.encoded.row_ids[2], trainer.encoded.example

    def broken(row, candidates, *, flip):
        item = example(row, candidates, flip=flip)
        if trainer.step == 1 and trainer.encoded.row_ids[row] == poisoned:
            item["moments"] = item["moments"] * float("inf")
        return item

    trainer.encoded.example = broken
    with pytest.raises(DivergenceError, match=poisoned) as caught:
        trainer.train()
    assert not any(row in str(caught.value) for row in trainer.encoded.row_ids if row != poisoned)
    checkpoint = trainer.output_dir / "checkpoint-000001"
    assert damage(checkpoint) is None
    again = make_trainer(batch_size=6, max_steps=3, resume="latest")
    assert again.train()["steps"] == 3
    assert all(torch.isfinite(p).all() for p in again.parameters)


def test_a_finished_run_is_not_overwritten(make_trainer):
    make_trainer(max_steps=1).train()
    with pytest.raises(CheckpointError, match="resume=latest"):
        make_trainer(max_steps=1)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"seed": 1}, "seed"), ({"batch_size": 3}, "global_batch"), ({"adapter": "none"}, "adapter")],
)
def test_a_checkpoint_of_another_run_is_refused(make_trainer, change, named):
    make_trainer(max_steps=1).train()
    with pytest.raises(CheckpointError, match=named):
        make_trainer(max_steps=2, resume="latest", **change).train()


def test_the_reference_is_checked_on_resume(make_trainer):
    first = make_trainer(max_steps=1)
    identity = first.reference.identity
    first.train()
    again = make_trainer(max_steps=2, resume="latest")
    assert again.reference.identity == identity
    again.train()
    assert again.reference.identity == first.reference.identity
    with pytest.raises(CheckpointError, match="reference"):
        make_trainer(tiny_sdxl(seed=1), max_steps=3, resume="latest").train()


def test_other_data_is_refused_on_resume(make_trainer):
    make_trainer(max_steps=1).train()
    with pytest.raises(CheckpointError, match="data"):
        make_trainer(dataset=preference_rows(seed=5), max_steps=2, resume="latest").train()


def judged_rows(preference: tuple[float, ...] = (1.0, 0.0, 0.0)) -> list[dict]:
    rows = preference_rows(4, candidates=3)
    for row in rows:
        row["preference"] = list(preference)
        row["scores"] = {"clip": [0.1 * value for value in preference]}
    return rows


SMPO = {"cls": SmPOTrainer, "config": SmPOConfig, "inversion_steps": 0}


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ({"curriculum_stages": 2}, {}, "its curriculum is .2, 1., this run's is None"),
        ({}, {"dataset": load_preferences(judged_rows()).with_shuffled_preferences(0)}, "its data is"),
        ({}, {"dataset": judged_rows((0.8, 0.2, 0.2))}, "its data is"),
        ({"pairs": "best_worst"}, {"pairs": "adjacent"}, "its data is"),  # of two losers alike another is taken
        ({**SMPO, "score": "clip", "score_range": [0.0, 0.1]}, SMPO, "its data is"),
    ],
)
def test_other_pairs_or_labels_are_refused_on_resume(make_trainer, before, after, named):
    rows = judged_rows()
    first = make_trainer(**({"dataset": rows, "max_steps": 1} | before))
    first.train()
    again = make_trainer(**({"dataset": rows, "max_steps": 2, "resume": "latest"} | after))
    assert len(again.examples) == len(first.examples) and again.encoded.row_ids == first.encoded.row_ids
    with pytest.raises(CheckpointError, match=named):
        again.train()


@pytest.mark.parametrize(
    ("build", "settings", "named"),
    [
        (tiny_sdxl, {"max_timestep": 1500}, "max_timestep=1500"),
        (tiny_sd3, {"timesteps": [999]}, "as good as nothing"),
        (tiny_sdxl, {"timestep_density": "shift"}, "shift of a flow model"),
        (tiny_sdxl, {"curriculum_stages": 7}, "curriculum_stages=7 needs at least as many examples, got 6"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_encoded(
    make_trainer, monkeypatch, build, settings, named
):
    def encode(*args, **kwargs):
        raise AssertionError("encoded")

    monkeypatch.setattr("diffalign.trainers.base.EncodedPreferences.build", encode)
    with pytest.raises(ConfigError, match=named):
        make_trainer(build(), **settings)


def test_an_older_checkpoint_is_continued_and_the_later_ones_are_kept_aside(make_trainer):
    settings = {"save_every": 1, "keep_checkpoints": None}
    first = make_trainer(max_steps=3, **settings)
    first.train()
    older = str(first.output_dir / "checkpoint-000001")
    make_trainer(max_steps=2, resume=older, learning_rate=1e-3, **settings).train()
    assert sorted(path.name for path in first.output_dir.glob("*-00000?")) == [
        *("abandoned-000002", "abandoned-000003", "checkpoint-000001", "checkpoint-000002"),
    ]
    again = make_trainer(max_steps=2, resume="latest", **settings)
    again.train()
    assert json.loads((again.checkpoint / "training_config.json").read_text())["learning_rate"] == 1e-3
    whole = make_trainer(max_steps=3, resume=str(first.output_dir / "abandoned-000003"), **settings)
    whole.train()
    assert all(torch.equal(a, b) for a, b in zip(trained(whole), trained(first), strict=True))


def test_a_finished_run_that_is_resumed_reports_what_it_did(make_trainer):
    first = make_trainer(max_steps=2)
    before, card = first.train(), (first.output_dir / "final" / "README.md").read_text()
    again = make_trainer(max_steps=2, resume="latest")
    report = again.train()
    assert report["metrics"] == before["metrics"] != {}
    assert report["seconds"] >= before["seconds"] > 0
    assert report["seconds_per_step"] >= before["seconds_per_step"]
    assert (again.output_dir / "final" / "README.md").read_text() == card
    longer = make_trainer(max_steps=3, resume="latest").train()
    assert longer["seconds"] > before["seconds"] and longer["metrics"]["loss"] == lines(again)[-1]["loss"]


def test_wrong_settings_are_refused_with_a_word(make_trainer):
    with pytest.raises(ConfigError, match="DPOConfig"):
        make_trainer(config=SFTConfig)
    with pytest.raises(ConfigError, match="to_qq"):
        make_trainer(lora_targets=["to_qq"])
    with pytest.raises(ConfigError, match="max_steps"):
        make_trainer(max_steps=None)
    with pytest.raises(ConfigError, match="already carries adapters"):
        pipeline = tiny_sdxl()
        make_trainer(pipeline)
        make_trainer(pipeline)


# --- what comes out ----------------------------------------------------------------------------------------------


def test_the_lora_loads_into_a_fresh_pipeline_with_equal_pictures(make_trainer):
    trainer = make_trainer(lora_rank=4, lora_alpha=8.0)
    before = pictures(tiny_sdxl())
    trainer.train()
    fresh = tiny_sdxl()
    fresh.load_lora_weights(trainer.output_dir / "final", weight_name="pytorch_lora_weights.safetensors")
    expected = pictures(trainer.pipeline)
    assert all(np.array_equal(a, b) for a, b in zip(pictures(fresh), expected, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(before, expected, strict=True))


def test_full_weights_load_as_a_pipeline_with_equal_pictures(make_trainer):
    trainer = make_trainer(adapter="none", learning_rate=1e-3)
    trainer.train()
    fresh = StableDiffusionXLPipeline.from_pretrained(trainer.output_dir / "final")
    assert all(np.array_equal(a, b) for a, b in zip(pictures(fresh), pictures(trainer.pipeline), strict=True))


def test_the_moving_average_is_what_is_saved(make_trainer, tmp_path):
    trainer = make_trainer(ema_decay=0.9, adapter="none", learning_rate=1e-3)
    trainer.train()
    saved = StableDiffusionXLPipeline.from_pretrained(trainer.output_dir / "final").unet
    average = dict(zip([n for n, _ in trainer.denoiser.named_parameters()], trainer.ema.shadow_params, strict=True))
    raw = dict(trainer.denoiser.named_parameters())
    weight = dict(saved.named_parameters())
    assert all(torch.equal(weight[name], average[name]) for name in weight)
    assert any(not torch.equal(weight[name], raw[name]) for name in weight)


def test_with_a_full_cache_neither_vae_nor_text_encoders_are_needed(make_trainer, tmp_path):
    whole = make_trainer(max_steps=2)
    whole.train()
    bare = tiny_sdxl()
    config = bare.vae.config
    trainer = make_trainer(bare, max_steps=2, output_dir=str(tmp_path / "bare"))
    assert trainer.adapter.vae_scale_factor == 2 ** (len(config.block_out_channels) - 1)
    trainer.adapter.drop_encoders()
    assert bare.vae is bare.text_encoder is bare.text_encoder_2 is None
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(trained(whole), trained(trainer), strict=True))


def test_validation_pictures_come_in_pairs_and_do_not_disturb_training(make_trainer, tmp_path):
    settings = {"validation_prompts": ["a red circle"], "validation_steps": 2, "max_steps": 2}
    plain = make_trainer(max_steps=2)
    plain.train()
    watched = make_trainer(validate_every=1, output_dir=str(tmp_path / "watched"), **settings)
    watched.train()
    assert all(torch.equal(a, b) for a, b in zip(trained(plain), trained(watched), strict=True))
    names = sorted(path.name for path in (watched.output_dir / "validation").glob("*.png"))
    assert names == ["step-000001.png", "step-000002.png"]


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_optimizers_run(make_trainer, optimizer):
    assert make_trainer(optimizer=optimizer, max_steps=2, learning_rate=1e-4).train()["steps"] == 2


def test_lists_give_the_pairs_that_are_asked_for(make_trainer):
    rows = preference_rows(2, candidates=3)
    counts = {
        pairs: len(make_trainer(dataset=rows, pairs=pairs).examples) for pairs in ("best_worst", "adjacent", "all")
    }
    assert counts == {"best_worst": 2, "adjacent": 4, "all": 6}


def test_a_loaded_table_and_its_rows_are_the_same_thing(make_trainer, tmp_path):
    a = make_trainer(max_steps=1)
    b = make_trainer(dataset=load_preferences(preference_rows()), max_steps=1, output_dir=str(tmp_path / "b"))
    a.train()
    b.train()
    assert all(torch.equal(x, y) for x, y in zip(trained(a), trained(b), strict=True))


def test_max_epochs_counts_passes_over_the_examples(make_trainer):
    trainer = make_trainer(max_steps=None, max_epochs=1.5, batch_size=2)
    assert trainer.total_steps == math.ceil(1.5 * len(trainer.examples) / 2)
    assert isinstance(trainer.config, DPOConfig)
