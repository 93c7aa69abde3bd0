"""SmPO on real tiny pipelines: soft labels, and noise by inversion: whose, where, and when it is found again."""

from __future__ import annotations

import json
import math

import pytest
import torch

from diffalign.errors import ConfigError, DivergenceError
from diffalign.trainers.batches import Draw
from tests.tiny import tiny_flux, tiny_sd, tiny_sdxl
from tests.trainers.conftest import scored_rows


def lines(trainer) -> list[dict]:
    return [json.loads(line) for line in (trainer.output_dir / "metrics.jsonl").read_text().splitlines()]


def weights(trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.denoiser.parameters() if p.requires_grad]


def test_smpo_with_sure_labels_and_ordinary_noise_is_dpo_bit_for_bit(make):
    dpo, smpo = make("dpo", "a"), make("smpo", "b", inversion_steps=0, gamma=1.0)
    dpo.train()
    smpo.train()
    assert all(torch.equal(a, b) for a, b in zip(weights(dpo), weights(smpo), strict=True))


def test_smpo_gives_each_pair_its_own_timestep_weight_and_noise(make):
    """Oracle 7.3.5 on a real network: a batch of different p and t is its pairs one by one."""
    trainer = make("smpo", score="clip", score_range=[0.0, 0.3], pairs="all", batch_size=4)
    torch.manual_seed(0)
    for parameter in trainer.parameters:  # away from the reference, where every loss is ln 2
        parameter.data += 0.01 * torch.randn_like(parameter)

    def losses(draws):
        batch = trainer.noised(trainer.collate(draws))
        reference_error = trainer.reference_error(batch)
        with torch.no_grad():
            policy_error = trainer.passes.errors(trainer.denoiser, batch.images()).view(batch.shape)
        return trainer.compute(policy_error, reference_error, batch).loss, batch

    draws = [Draw(6 * row + row, 0) for row in range(4)]  # another of the six pairs of each row
    together, batch = losses(draws)
    assert len(set(batch.timesteps.tolist())) == 4 and len(set(batch.probability.tolist())) > 1
    alone = torch.cat([losses([draw])[0] for draw in draws])
    assert torch.allclose(together, alone, rtol=1e-3)
    assert together.std() > 0.01


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


@pytest.mark.parametrize(
    ("build", "setting", "values"),
    [
        (lambda: tiny_sd(prediction_type="v_prediction"), "zero_terminal_snr", (False, True)),
        (tiny_flux, "guidance_embedding", (1.0, 3.5)),
    ],
)
def test_smpo_finds_no_noise_that_was_inverted_under_another_schedule_or_guidance(make, build, setting, values):
    found = []
    for value in values:  # one cache_dir
        settings = {"draws_per_row": 1, "resolution": 32, setting: value}
        trainer = make("smpo", f"{value}", pipeline=build(), **settings)
        batch = trainer.noised(trainer.collate(trainer.stream.step(0)))
        fresh = trainer._invert(batch.images()).view(batch.noise.shape)
        torch.testing.assert_close(batch.noise, fresh, rtol=1e-4, atol=1e-4)
        found.append(batch.noise)
        trainer.inversions.flush()
    assert (found[0] - found[1]).abs().max() > 1e-2


@pytest.mark.parametrize("inverter", ["reference", "policy"])
def test_smpo_inverts_an_image_of_several_pairs_once(make, inverter):
    trainer = make("smpo", dataset=scored_rows(2), pairs="all", batch_size=6, inverter=inverter)
    plain = trainer.collate([Draw(i, 0) for i in range(6)])  # the six pairs of four images
    whole, invert, counts = trainer._invert(plain.images()), trainer._invert, []
    trainer._invert = lambda images: (counts.append(len(images)), invert(images))[1]
    noise = trainer.noised(plain).noise
    assert counts == [4]
    torch.testing.assert_close(noise, whole.view(noise.shape), rtol=1e-4, atol=1e-4)


def test_smpo_inverts_an_image_once_for_each_bucket_and_trains_there(make, caplog, tmp_path):
    settings = {"sample_latents": False, "inversion_buckets": 3, "min_timestep": 100, "max_timestep": 399}
    trainer = make("smpo", max_steps=2, **settings)
    everything = torch.arange(100, 400)
    assert torch.equal(trainer._bucketed(everything), torch.tensor([150, 250, 350]).repeat_interleave(100))
    calls = []
    trainer.reference.module.register_forward_hook(lambda *_: calls.append(1))
    for step in range(30):
        draws = trainer.stream.step(step)
        batch = trainer.noised(trainer.collate(draws))
        assert set(batch.timesteps.tolist()) <= {150, 250, 350}
        noise = trainer._invert(batch.images()).view(batch.shape + batch.noise.shape[2:])
        assert torch.allclose(noise, batch.noise, atol=1e-3)  # exact for the timestep that is trained on
    assert len(trainer.inversions) <= 3 * 2 * len(trainer.examples)
    calls.clear()
    for step in range(30):
        trainer.noised(trainer.collate(trainer.stream.step(step)))
    assert calls == []
    batch = trainer.noised(trainer.collate(trainer.stream.step(1)))
    assert trainer.train()["metrics"]["noise/std"] == pytest.approx(batch.noise.flatten(1).std(1).mean().item())
    assert "needed twice" not in caplog.text
    for count in (1, 7, 300, 5000):  # any number stays inside, and a bucket for each timestep is that timestep
        middles = make("smpo", f"{count}", **(settings | {"inversion_buckets": count}))._bucketed(everything)
        assert len(middles.unique()) == min(count, 300) and middles.min() >= 100 and middles.max() <= 399
        assert count < 300 or torch.equal(middles, everything)
    once = make("smpo", "once", max_steps=9)
    assert "needed twice" in caplog.text
    assert once.train()["steps"] == 9 and once.inversions is None
    shared = make(  # an epoch: 24 pairs of 16 images
        "smpo", "shared", pairs="all", max_steps=6, batch_size=4, cache_dir=str(tmp_path / "own")
    )
    shared.train()
    assert len(shared.inversions) == 16
    for wrong, named in (
        ({"sample_latents": True}, "sample_latents=false"),
        ({"inverter": "policy"}, "inverter=policy"),
        ({"inversion_steps": 0}, "inversion_steps=0"),
        ({"timesteps": [500], "min_timestep": 0, "max_timestep": None}, "a list of timesteps"),
        ({"inversion_buckets": 0}, "at least 1"),
    ):
        with pytest.raises(ConfigError, match=named):
            make("smpo", "x", **(settings | wrong))


@pytest.mark.parametrize("settings", [{}, {"draws_per_row": 1}])
def test_an_inversion_that_breaks_stops_the_run_by_the_names_of_its_rows(make, settings):
    trainer = make("smpo", max_steps=3, **settings)
    poisoned, invert = trainer.collate(trainer.stream.step(1)).row_ids[0], trainer.passes.predict

    def broken(model, noisy, images, time=None):
        out = invert(model, noisy, images, time)
        if trainer.step == 1 and model is trainer.reference.module:
            out[0] = math.nan
        return out

    trainer.passes.predict = broken
    with pytest.raises(DivergenceError, match=f"step 2 for row.* {poisoned}") as caught:
        trainer.train()
    assert "checkpoint-000001" in str(caught.value) and (trainer.output_dir / "checkpoint-000001").is_dir()
    assert all(torch.isfinite(p).all() for p in weights(trainer))
    if settings:
        assert all(trainer.inversions.get(key).isfinite().all() for key in trainer.inversions)


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


def test_the_policy_inverts_without_dropout(make):
    """Oracle 7.4.10: what it is trained on is not random, though it trains with dropout."""
    pipeline = tiny_sdxl()
    dropouts = [module for module in pipeline.unet.modules() if isinstance(module, torch.nn.Dropout)]
    for module in dropouts:
        module.p = 0.5
    trainer = make("smpo", pipeline=pipeline, inverter="policy")
    plain = trainer.collate(trainer.stream.step(0))
    trainer.denoiser.train()
    assert dropouts and torch.equal(trainer.noised(plain).noise, trainer.noised(plain).noise)
    assert all(module.training for module in dropouts)
