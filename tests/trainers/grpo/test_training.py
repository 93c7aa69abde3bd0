"""What a run does: it learns, it refuses, it survives judges that hang or die, and it continues exactly."""

from __future__ import annotations

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import httpx
import pytest
import torch

from diffalign.errors import CheckpointError, ConfigError, DivergenceError, RewardError
from diffalign.trainers import PrefGRPOConfig, PrefGRPOTrainer
from diffalign.trainers.grpo import rewards
from diffalign.trainers.grpo.record import Rollout
from diffalign.trainers.grpo.rollouts import Plan
from diffalign.trainers.prompts import load_prompts
from reward_models import FunctionRewardModel
from tests.tiny import tiny_sdxl
from tests.trainers.grpo.conftest import PROMPTS, Judge, brightness


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(trainer):
    return [parameter.detach().clone() for parameter in trainer.parameters]


@pytest.mark.parametrize(("reward", "ratio_norm"), [("score", False), ("win_rate", False), ("win_rate", True)])
def test_an_update_makes_better_pictures_likelier_and_worse_ones_rarer(make, reward, ratio_norm):
    trainer = make(reward=reward, ratio_norm=ratio_norm, learning_rate=1e-4, adapter="none")
    rollout = trainer.rollout = trainer.roll_out(0)
    trainer.optimizer_step()
    gain = 0.0
    for chunk in rollout.chunks:
        told = trainer.sampling.conditioning(chunk.samples, torch.device("cpu"))
        advantage = rollout.advantages[[trainer._place(sample) for sample in chunk.samples]]
        for index in rollout.plan.trained:
            out, _ = trainer._term_loss(rollout, chunk, index, told)
            gain += float((advantage * out.stats["log_ratio"]).sum())
    assert gain > 1e-5
    brightest = max(range(4), key=lambda n: rollout.advantages[n])
    assert rollout.advantages[brightest] > 0 > rollout.advantages[:4].min()


def test_equal_rewards_change_nothing(make):
    trainer = make(models=[FunctionRewardModel(lambda images, prompts: [3.3] * len(images), "same")], max_steps=2)
    before = weights(trainer)
    metrics = trainer.train()["metrics"]
    assert metrics["grad_norm"] == 0.0
    assert metrics["group/silent"] == 1.0
    assert all(torch.equal(a, b) for a, b in zip(before, weights(trainer), strict=True))


@pytest.mark.parametrize("form", ["prediction", "density"])
def test_the_pull_to_the_reference_starts_at_zero(make, form):
    trainer = make(kl_weight=0.5, kl_form=form, max_steps=2, learning_rate=1e-3)
    trainer.train()
    first, second = lines(trainer.output_dir)
    assert first["kl"] == 0.0
    assert second["kl"] > 0
    assert second["loss"] == pytest.approx(second["surrogate"] + 0.5 * second["kl"], rel=1e-5)


@pytest.mark.parametrize("form", ["prediction", "density"])
def test_a_moved_policy_is_pulled_back_by_the_kl_alone(make, form):
    """All pictures are equally good: what gradient there is comes through the KL and the policy's forward pass."""
    same = FunctionRewardModel(lambda images, prompts: [1.0] * len(images), "same")
    trainer = make(models=[same], kl_weight=1.0, kl_form=form, learning_rate=1e-4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.parameters:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    rollout = trainer.rollout = trainer.roll_out(0)

    def distance() -> float:
        told = trainer.objective.conditioning(rollout.chunks[0], torch.device("cpu"))
        terms = [trainer._term_loss(rollout, rollout.chunks[0], i, told)[0] for i in rollout.plan.trained]
        return sum(float(out.stats["kl"].sum()) for out in terms)

    before = distance()
    metrics = trainer.optimizer_step()
    assert metrics["surrogate"] == 0.0 and metrics["grad_norm"] > 0
    assert 0 < distance() < before


@pytest.mark.parametrize(("processes", "updates", "batch"), [(4, 1, 6), (2, 2, 3), (4, 2, 3), (1, 3, 8)])
def test_pictures_are_dealt_to_processes_each_once(make, processes, updates, batch):
    """Three groups of eight; what each picture is worth comes back to where it lies, whoever drew it."""
    trainer = make(prompts_per_rollout=3, group_size=8, batch_size=8)
    trainer.config.batch_size, trainer.config.updates_per_rollout = batch, updates
    rewards = torch.tensor([10.0 * (n // 8) + n % 8 / 7 for n in range(24)], dtype=torch.float64)[:, None]
    advantages = trainer._advantages(1, rewards)
    worth = [(slot / 7 - 0.5) / (9 / 84) ** 0.5 for slot in range(8)]
    found, updated = [], []
    for index in range(processes):
        trainer.accelerator = SimpleNamespace(num_processes=processes, process_index=index)
        trainer._divide()
        chunks = trainer._chunks(1)
        assert len(chunks) == updates * 8 * 3 // (updates * processes * batch) and {len(c) for c in chunks} == {batch}
        part = len(chunks) // updates
        for number, samples in enumerate(chunks):
            for sample in samples:
                assert sample.group == 3 + trainer._place(sample) // 8 and sample.prompt == trainer._prompt(
                    sample.group
                )
                assert float(advantages[trainer._place(sample)]) == pytest.approx(worth[sample.member])
                found.append(trainer._place(sample))
                updated.append((number // part, trainer._place(sample)))
    assert sorted(found) == list(range(24))
    block = 24 // updates
    assert all(place // block == update for update, place in updated), "each update has its own groups"


def test_every_pair_is_asked_in_both_orders_under_its_own_prompt(make):
    judge = Judge()
    trainer = make(models=[judge])
    trainer.train()
    assert len(judge.asked) == 2 * 4 * 3
    groups = {prompt for _, prompt in judge.asked}
    assert groups == {trainer.sample_of(0, 0).prompt, trainer.sample_of(0, 4).prompt}
    for (a, b), prompt in judge.asked:
        assert a is not b
        assert any(x is b and y is a and text == prompt for (x, y), text in judge.asked)


def test_a_judge_works_while_pictures_are_drawn(make):
    began, asked, drawn = [], threading.Event(), []

    def slow(images, prompts):
        began.append(len(drawn))
        asked.set()
        return brightness(images, prompts)

    trainer = make(models=[FunctionRewardModel(slow)], prompts_per_rollout=4, batch_size=4)
    draw = trainer.sampling.draw

    def watched(*arguments):
        result = draw(*arguments)
        if drawn:  # the first pictures are with the judge, and these are not handed in yet
            assert asked.wait(600)
        drawn.append(len(began))
        return result

    trainer.sampling.draw = watched
    trainer.train()
    assert len(began) == len(drawn) == 4
    assert began[0] == 1, "asked before the second pictures were drawn"


def test_a_judge_that_hangs_does_not_stall_training(make):
    release, hanging = threading.Event(), threading.Event()
    calls = []

    def sometimes(images, prompts):
        calls.append(1)
        if len(calls) == 1:
            hanging.set()
            release.wait(600)
            hanging.clear()
        return brightness(images, prompts)

    class Patient(PrefGRPOTrainer):
        def roll_out(self, iteration):
            self.config.reward_timeout = 600.0 if iteration else 0.3  # only the first judgement is late
            return super().roll_out(iteration)

    trainer = make(models=[FunctionRewardModel(sometimes)], cls=Patient, max_steps=2)
    trainer.train()
    assert hanging.is_set()
    release.set()
    first, second = lines(trainer.output_dir)
    assert first["reward/sometimes/timeouts"] == 2.0  # the group that hangs, and the one behind it
    assert first["grad_norm"] == 0.0
    assert second["reward/sometimes/timeouts"] == 0.0
    assert second["grad_norm"] > 0


class Server:
    """A judge behind HTTP that can be taken down and brought back."""

    def __init__(self):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                values = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps([value / 255 for value in values]).encode())

            def log_message(self, *arguments):
                return

        self.handler, self.port = Handler, 0
        self.start()

    def start(self):
        self.server = HTTPServer(("127.0.0.1", self.port), self.handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()

    def score(self, images, prompts):
        means = brightness(images, prompts)
        return httpx.post(f"http://127.0.0.1:{self.port}", json=means, timeout=5, trust_env=False).json()


def test_a_judge_that_dies_pauses_the_run_which_then_continues_exactly(make, tmp_path):
    server = Server()
    model = FunctionRewardModel(server.score, "served")
    settings = {"max_steps": 3, "judge_patience": 0.0, "save_every": 1}
    whole = make(models=[model], output_dir=str(tmp_path / "whole"), **settings)
    whole.train()

    class Dies(PrefGRPOTrainer):
        def roll_out(self, iteration):
            if iteration == 1:
                server.stop()
            return super().roll_out(iteration)

    with pytest.raises(RewardError, match=r"(?s)paused: served.*resume=latest"):
        make(models=[model], cls=Dies, **settings).train()
    server.start()
    resumed = make(models=[model], resume="latest", **settings)
    resumed.train()
    server.stop()
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))
    assert lines(resumed.output_dir) == lines(whole.output_dir)


def test_training_waits_for_a_judge_that_comes_back(make, monkeypatch, caplog):
    monkeypatch.setattr(rewards, "RETRY_SECONDS", 0.05)
    server, refused = Server(), []
    server.stop()

    def score(images, prompts):
        try:
            return server.score(images, prompts)
        except httpx.ConnectError:
            refused.append(prompts[0])
            if len(refused) == 4:  # both groups, and both again: it is back for the third time
                server.start()
            raise

    trainer = make(models=[FunctionRewardModel(score, "served")], judge_patience=300.0)
    trainer.train()
    server.stop()
    assert lines(trainer.output_dir)[0]["reward/served/missing"] == 0.0
    assert len(refused) == 4 and "Training waits for it" in caplog.text and "answers again" in caplog.text


class Killed(Exception):
    """Stands for a kill: nothing is saved after it."""


@pytest.mark.parametrize("where", ["in the second update", "in the second rollout", "before the fourth update"])
def test_a_run_stopped_anywhere_continues_as_if_it_had_not(make, tmp_path, where):
    settings = {"max_steps": 4, "updates_per_rollout": 2, "save_every": 1, "ema_decay": 0.9, "ratio_norm": True}
    whole = make(output_dir=str(tmp_path / "whole"), **settings)
    whole.train()

    class Mortal(PrefGRPOTrainer):
        def _backward(self, rollout, chunks, number):
            out = super()._backward(rollout, chunks, number)
            if (where, self.step) in {("in the second update", 1), ("before the fourth update", 3)}:
                raise Killed
            return out

        def _collect(self, iteration, work):
            if where == "in the second rollout" and iteration == 1:
                raise Killed
            return super()._collect(iteration, work)

    with pytest.raises(Killed):
        make(cls=Mortal, **settings).train()
    resumed = make(resume="latest", **settings)
    resumed.train()
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))
    assert (resumed.output_dir / "metrics.jsonl").read_bytes() == (whole.output_dir / "metrics.jsonl").read_bytes()


def test_a_rollout_makes_room_for_the_next(make):
    held = []

    class Watched(PrefGRPOTrainer):
        def roll_out(self, iteration):
            held.append(self.rollout)
            return super().roll_out(iteration)

    make(cls=Watched, max_steps=2).train()
    assert held == [None, None]


def test_the_middle_of_a_rollout_belongs_to_the_processes_that_drew_it(make):
    make(updates_per_rollout=2, save_every=1).train()
    resumed = make(resume="latest", max_steps=2, updates_per_rollout=2)
    replayed = resumed._replayed()
    resumed._replayed = lambda: replayed | {"number of processes": 2}
    with pytest.raises(CheckpointError, match="number of processes=1, this run has 2"):
        resumed.train()


def test_the_advice_of_an_alarm_can_be_followed(make, caplog):
    """Go on from a checkpoint with another reward and a pull to the base; but not on another base."""
    gentle = {"learning_rate": 1e-4}
    make(max_steps=2, save_every=2, **gentle).train()
    darkness = FunctionRewardModel(
        lambda images, prompts: [-value for value in brightness(images, prompts)], "darkness"
    )
    models = [FunctionRewardModel(brightness), darkness]
    trainer = make(models=models, resume="latest", max_steps=3, kl_weight=0.1, **gentle)
    metrics = trainer.train()["metrics"]
    assert math.isfinite(metrics["loss"]) and metrics["kl"] > 0 and "reward/darkness/score" in metrics
    assert "other rewards than before" in caplog.text
    for weight in (0.0, 0.1):
        with pytest.raises(CheckpointError, match="its reference is"):
            make(tiny_sdxl(seed=1), resume="latest", max_steps=4, kl_weight=weight, **gentle).train()


def test_another_runs_checkpoint_is_refused(make):
    make(save_every=1).train()
    with pytest.raises(CheckpointError, match="groups"):
        make(resume="latest", max_steps=2, group_size=2, prompts_per_rollout=4).train()


def test_a_rollout_without_any_judgement_teaches_nothing_and_ends_nothing(make):
    class Once(Judge):
        def compare(self, pairs, prompts):
            answers = super().compare(pairs, prompts)
            return answers * float("nan") if len(self.asked) <= 24 else answers  # both groups of the first rollout

    trainer = make(models=[Once()], max_steps=2)
    trainer.train()
    first, second = lines(trainer.output_dir)
    assert first["reward/judge/missing"] == 1.0 and first["loss"] == first["grad_norm"] == 0.0
    assert second["reward/judge/missing"] == 0.0 and second["grad_norm"] > 0


def test_time_is_told_but_kept_out_of_the_repeatable_file(make):
    trainer = make(updates_per_rollout=2)
    metrics = trainer.train()["metrics"]
    assert {"time/sampling", "time/training", "time/waiting_for_rewards", "time/brightness"} <= metrics.keys()
    assert not any(name.startswith("time/") for name in lines(trainer.output_dir)[0])
    assert metrics["reward/brightness/calls"] == 8 and metrics["reward/calls_per_update"] == 4
    assert metrics["time/judging_share"] == pytest.approx(metrics["time/brightness"] / metrics["time/step"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 3}, "cannot be divided"),
        ({"lora_dropout": 0.1}, "replay"),
        ({"gradient_accumulation_steps": 2}, "no effect"),
        ({"pairing": "opponents"}, "opponents"),
        ({"pairing": "opponents", "opponents": 4}, "opponents=4 in groups of 4 is impossible"),
        ({"pairing": "opponents", "opponents": 1, "group_size": 3}, "must be even"),
        ({"reward": "score", "tie_margin": 0.1}, "no effect"),
        ({"kl_form": "density"}, "no effect"),
        ({"guidance_scale": 1.0, "guidance_gradient": "conditional"}, "no effect"),
        ({"sampler": "flow_sde"}, "ddim, cps"),
        ({"holdout_every": 1}, "need each other"),
        ({"reward_weights": [1.0, 2.0]}, "one weight for each"),
        ({"resolution": 20}, "multiple"),
    ],
)
def test_settings_that_cannot_be_meant(make, settings, message):
    with pytest.raises(ConfigError, match=message):
        make(**settings)


def test_rewards_must_exist_and_fit(make, tmp_path):
    with pytest.raises(ConfigError, match="at least one"):
        make(models=[])
    with pytest.raises(ConfigError, match="only compares"):
        make(models=[Judge()], reward="score")
    with pytest.raises(ConfigError, match="no effect"):
        load_prompts(PROMPTS, score="clip")
    assert len(load_prompts("shapes:train")) == 4000
    assert PrefGRPOConfig(kl_weight=0.1).has_reference
    assert not PrefGRPOConfig().has_reference


def test_pictures_that_are_not_finite_stop_the_run_with_their_prompts(make):
    trainer = make(adapter="none", batch_size=8)
    with torch.no_grad():
        trainer.denoiser.conv_out.bias.fill_(float("nan"))
    with pytest.raises(DivergenceError, match=f"not finite at step 1 for .*{trainer.sample_of(0, 0).prompt}"):
        trainer.train()


def test_processes_wait_for_one_that_a_judge_keeps_waiting(make):
    """NCCL gives up after ten minutes of itself, in which a reward may time out and its judge be asked again."""
    trainer = make()
    longest = trainer.config.reward_timeout + trainer.config.judge_patience
    assert trainer.accelerator.init_handler.timeout.total_seconds() > 3600 + longest


def test_channels_last_keeps_the_ratio_at_one_and_its_rollouts_on_disk(make):
    settings = {"channels_last": True, "updates_per_rollout": 2, "max_steps": 2, "save_every": 1, "ratio_norm": True}
    trainer = make(**settings)
    trainer.train()
    assert lines(trainer.output_dir)[0]["ratio"] == 1.0
    whole = weights(trainer)
    max(trainer.output_dir.glob("checkpoint-*")).rename(trainer.output_dir / "away")
    resumed = make(resume="latest", **settings)
    resumed.train()
    assert all(torch.equal(a, b) for a, b in zip(whole, weights(resumed), strict=True))


def test_an_update_is_the_mean_over_pictures_and_trained_steps(make):
    trainer = make(adapter="none", sampling_steps=4)
    rollout = trainer.roll_out(0)
    assert len(rollout.plan.trained) == 2

    def gradient(trained):
        part = Rollout(Plan(rollout.plan.steps, trained), rollout.chunks, rollout.advantages)
        trainer._backward(part, rollout.chunks, 0)
        found = torch.cat([p.grad.flatten() for p in trainer.parameters])
        trainer.optimizer.zero_grad()
        return found

    steps = [gradient([index]) for index in rollout.plan.trained]
    together = gradient(rollout.plan.trained)
    assert together.norm() > 0
    torch.testing.assert_close(together, sum(steps) / 2, rtol=1e-3, atol=1e-5 * float(together.abs().max()))
    # what advantages are divided by where nothing is said: win rates have a scale of their own, scores their group's
    rewards = torch.tensor([0.5, 0.5, 0.5, 0.6] * 2, dtype=torch.float64)[:, None]
    fixed = trainer._advantages(0, rewards)
    trainer.config.reward = "score"
    assert fixed.max() < 0.5 < 1.5 < trainer._advantages(0, rewards).max()
