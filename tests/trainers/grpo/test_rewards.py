"""The desk that asks reward models, and the hold-out's numbers, without any network."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import wait
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from diffalign.errors import CheckpointError, ConfigError
from diffalign.trainers import PrefGRPOConfig
from diffalign.trainers.grpo import holdout, rewards
from diffalign.trainers.grpo.record import Rollout, judge_metrics
from diffalign.trainers.grpo.rewards import (
    GroupReward,
    RewardDesk,
    Silence,
    down_for_good,
    judge_is_down,
    labels,
)
from diffalign.trainers.grpo.rollouts import Chunk, Moment, Plan, Sample
from reward_models import FunctionRewardModel
from reward_models.errors import RewardModelError
from reward_models.unified_reward import JudgeStatistics
from tests.trainers.grpo.conftest import Judge, brightness

IMAGES = [Image.new("RGB", (8, 8), (value,) * 3) for value in (0, 50, 100, 150)]


def desk_of(*models, **settings) -> RewardDesk:
    defaults = {"max_steps": 1, "judge_patience": 0.0, "reward_timeout": 30.0}
    return RewardDesk(models, PrefGRPOConfig(**(defaults | settings)))


def submit(desk: RewardDesk, groups: int = 2) -> dict:
    return {group: ("a star", IMAGES, desk.submit(group, "a star", IMAGES)) for group in range(groups)}


def test_a_models_own_timeout_is_a_failure_and_not_a_late_answer():
    """A socket's timeout is Python's TimeoutError, which a future that is not done raises too."""

    def unreachable(images, prompts):
        raise TimeoutError("the server did not answer")

    desk = desk_of(FunctionRewardModel(unreachable), FunctionRewardModel(brightness))
    found = desk.collect(submit(desk))
    assert found.down == {"unreachable": Silence("the server did not answer", 1)}
    assert not any(result.timed_out for results in found.rewards.values() for result in results)
    assert found.rewards[1][1].reward.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert "unreachable: the server did not answer" in str(judge_is_down(down_for_good([found.down]), "here"))


def test_nobody_is_asked_about_a_group_that_was_given_up(monkeypatch):
    release, started, asked, waits = threading.Event(), threading.Event(), [], []

    def slow(images, prompts):
        asked.append(len(asked))
        started.set()
        if len(asked) == 1:
            release.wait(600)
        return brightness(images, prompts)

    def noted(futures, timeout):
        waits.append(timeout)
        return wait(futures, timeout)

    monkeypatch.setattr(rewards, "wait", noted)
    desk = desk_of(FunctionRewardModel(slow), reward_timeout=0.5)
    thread = next(t for t in threading.enumerate() if t.name == "reward slow")
    work = submit(desk, 3)
    assert started.wait(600)
    found = desk.collect(work)
    assert len(waits) == 3 and sum(waits) <= 0.5, "one wait for all groups, not one for each"
    assert all(result.timed_out for (result,) in found.rewards.values()) and found.down == {}
    desk.config.reward_timeout = 600.0
    release.set()
    thread.join(600)
    assert not thread.is_alive(), "the thread of an abandoned job ends with it"
    assert asked == [0]
    (after,) = desk.collect(submit(desk, 1)).rewards[0]
    assert not after.timed_out and asked == [0, 1]


def test_a_judge_that_hangs_for_good_pauses_the_run(monkeypatch):
    """Once it may be slow; a run that goes on without any reward learns nothing. Asking again may hang as well."""
    monkeypatch.setattr(rewards, "RETRY_SECONDS", 0.01)
    release, hangs = threading.Event(), [True]

    def stuck(images, prompts):
        if hangs[0]:
            release.wait(600)
        return brightness(images, prompts)

    desk = desk_of(FunctionRewardModel(stuck), reward_timeout=0.2, judge_patience=0.1)
    assert desk.collect(submit(desk)).down == {}
    (down,) = desk.collect(submit(desk)).down.values()
    assert down == Silence("it answered about no group within reward_timeout=0.2 seconds", 2)
    hangs[0], desk.config.reward_timeout = False, 600.0
    assert not any(result.timed_out for (result,) in desk.collect(submit(desk)).rewards.values())
    hangs[0], desk.config.reward_timeout = True, 0.2
    assert desk.collect(submit(desk)).down == {}, "the count starts anew"
    release.set()


class Mute(Judge):
    """Answers nothing, and keeps count of why."""

    def __init__(self):
        super().__init__()
        self.statistics = JudgeStatistics(failures=Counter({"truncated": 99}))  # of before: no reason now

    def compare(self, pairs, prompts):
        self.statistics.failures.update({"no answer": len(pairs)})
        return torch.full((len(pairs),), float("nan"))


def test_a_judge_that_has_nothing_to_say_once_is_not_down(caplog):
    """A hard prompt may be all there is in a rollout; a judge that stays silent is down, for a reason of its own."""
    desk = desk_of(Mute())
    reason = "it gave no usable answer to any group (no answer, 24 times)"
    first = desk.collect(submit(desk))
    assert first.down == {} and f"judge: {reason}" in caplog.text
    assert [result.stats["missing"] for (result,) in first.rewards.values()] == [1.0, 1.0]
    assert desk.collect(submit(desk)).down == {"judge": Silence(reason, 2)}
    assert desk.collect(submit(desk)).down == {"judge": Silence(reason, 3)}


def test_silence_is_counted_in_a_row():
    says = iter([float("nan"), 0.9, float("nan")])

    class Moody(Judge):
        def compare(self, pairs, prompts):
            return torch.full((len(pairs),), next(says))

    desk = desk_of(Moody())
    assert [desk.collect(submit(desk, 1)).down for _ in range(3)] == [{}, {}, {}]


def test_a_judge_that_asks_both_orders_itself_tells_what_it_saw():
    """From outside it gives one answer a pair: order disagreement and unusable answers are in its own book."""

    class Careful(Judge):
        def __init__(self):
            super().__init__()
            self.statistics = JudgeStatistics(answers=100, judged=50, reversed=50, lean=50.0)  # of before

        def compare(self, pairs, prompts):
            book = self.statistics
            book.answers += 2 * len(pairs)
            book.asked_again += 1
            book.failures.update({"truncated": len(pairs)})
            for number in range(len(pairs)):
                book.add_pair(0.9, 0.9 if number == 0 else 0.1)  # the first pair: whichever is shown first
            return super().compare(pairs, prompts)

    desk = desk_of(Careful(), both_orders=False)
    found = desk.collect(submit(desk, 2)).rewards
    told = judge_metrics(["j"], list(found.values()))
    assert told["reward/j/questions"] == 2 * 13 and told["reward/j/calls"] == 2 * 6  # six pairs, each asked twice
    assert told["reward/j/unusable"] == pytest.approx(0.5)
    assert told["reward/j/disagreement"] == pytest.approx(1 / 6)
    assert told["reward/j/first_wins"] == pytest.approx((0.9 + 5 * 0.5) / 6)
    plain = desk_of(Judge(), both_orders=False)
    stats = plain.collect(submit(plain, 1)).rewards[0][0].stats
    assert "disagreement" not in stats and "questions" not in stats, "one order cannot disagree"


def test_a_model_that_is_silent_to_one_process_alone_is_not_down_at_once():
    once, thrice = Silence("refused", 1), Silence("refused", 3)
    assert down_for_good([{"judge": once}, {}]) == {}
    assert down_for_good([{"judge": once}, {"judge": Silence("gone", 2), "other": once}]) == {"judge": "refused"}
    assert down_for_good([]) == {}
    assert down_for_good([{}, {"judge": thrice}]) == {"judge": "refused"}, "its groups would never be learnt from"


def held_out(monkeypatch, folder, base, drawn, *, training=(), unseen=(), **settings) -> holdout.Holdout:
    """A hold-out of these pictures, prepared."""

    class Pictures:
        base_images = base

        def __init__(self, *arguments, **settings):
            return

        def prepare(self, denoiser, *, resumed):
            return

        def draw(self, denoiser):
            return drawn

    monkeypatch.setattr(holdout, "Validation", Pictures)
    prompts = SimpleNamespace(batch=lambda texts: {}, unconditional=lambda: {})
    config, accelerator = PrefGRPOConfig(max_steps=1, **settings), SimpleNamespace(autocast=None)
    texts = ["a star", "a ring"][: len(drawn)]
    scores = holdout.Holdout(None, texts, prompts, config, folder, accelerator, training=training, unseen=unseen)
    scores.prepare(None, resumed=False)
    return scores


def measured(*arguments, training, unseen) -> dict[str, float]:
    """What a hold-out says of these pictures."""
    return held_out(*arguments, training=training, unseen=unseen).measure(None, 20)


def test_a_hold_outs_change_is_paired_and_has_the_standard_error_of_its_mean(tmp_path, monkeypatch):
    model = FunctionRewardModel(brightness)
    values = measured(monkeypatch, tmp_path, IMAGES[:2], [IMAGES[2], IMAGES[1]], training=[], unseen=[model])
    assert values == pytest.approx(
        {"holdout/brightness": 75.0, "holdout/brightness_change": 50.0, "holdout/brightness_error": 50.0}
    )  # of changes 100 and 0, whose sample deviation is 100 / sqrt(2)


def test_a_single_hold_out_picture_has_no_standard_error(tmp_path, monkeypatch):
    model = FunctionRewardModel(brightness)
    values = measured(monkeypatch, tmp_path, IMAGES[:1], IMAGES[2:3], training=[], unseen=[model])
    assert values == {"holdout/brightness": 100.0, "holdout/brightness_change": 100.0}


def test_a_hold_out_scorer_that_is_away_at_first_is_asked_again(tmp_path, monkeypatch, caplog):
    asked = []

    def late(images, prompts):
        asked.append(images)
        if len(asked) == 1:
            raise ConnectionError("not up yet")
        return brightness(images, prompts)

    scores = held_out(monkeypatch, tmp_path, IMAGES[:2], IMAGES[2:], unseen=[FunctionRewardModel(late)])
    assert scores.measure(None, 10) == {} and "late: not up yet" in caplog.text
    assert scores.measure(None, 20)["holdout/late_change"] == 100.0
    scores.measure(None, 30)
    assert len(asked) == 4, "the base's pictures are scored once"


def test_a_hold_out_scorer_that_hangs_costs_its_own_numbers_only(tmp_path, monkeypatch, caplog):
    release = threading.Event()

    def stuck(images, prompts):
        release.wait(600)
        return brightness(images, prompts)

    models = [FunctionRewardModel(stuck), FunctionRewardModel(brightness)]
    scores = held_out(monkeypatch, tmp_path, IMAGES[:2], IMAGES[2:], unseen=models, reward_timeout=1.0)
    values = scores.measure(None, 20)
    release.set()
    assert values["holdout/brightness_change"] == 100.0 and "holdout/stuck" not in values
    assert "stuck: no answer within 1 seconds" in caplog.text


def test_a_judge_that_prefers_a_place_sees_no_change(tmp_path, monkeypatch):
    class First(Judge):
        def compare(self, pairs, prompts):
            return torch.ones(len(pairs))

    values = measured(monkeypatch, tmp_path, IMAGES[:2], IMAGES[2:], training=[First()], unseen=[Judge()])
    assert values["holdout/training-judge_change"] == 0.0
    assert values["holdout/judge_change"] == 0.5


def test_a_judge_that_only_compares_is_never_asked_for_scores(tmp_path, monkeypatch):
    """UnifiedReward's thinking judges have ``score`` as their class has, say ``pairs_only`` and refuse."""

    class Thinking(Judge):
        pairs_only = True

        def score(self, images, prompts):
            raise RewardModelError("this family only compares pairs")

    values = measured(monkeypatch, tmp_path, IMAGES[:2], IMAGES[2:], training=[Thinking()], unseen=[])
    assert values == {"holdout/training-judge_change": 0.5, "holdout/training-judge_error": 0.0}
    with pytest.raises(ConfigError, match="judge only compares"):
        desk_of(Thinking(), reward="score")


def test_a_tie_margin_needs_scores():
    with pytest.raises(ConfigError, match="tie_margin=0.1 has no effect.*judge compares"):
        desk_of(Judge(), tie_margin=0.1)
    assert desk_of(Judge(), FunctionRewardModel(brightness), tie_margin=0.1).names == ["judge", "brightness"]


def test_what_judges_did_is_added_up_or_averaged_over_groups():
    found = [
        [GroupReward(torch.tensor([0.0, 1.0]), {"calls": 2.0, "pairs": 1.0, "ties": 0.0}, 1.0)],
        [GroupReward(torch.tensor([0.5, 0.5]), {"calls": 2.0, "pairs": 1.0, "ties": 1.0}, 2.0)],
        [GroupReward(torch.tensor([float("nan")] * 2), {"missing": 1.0}, timed_out=True)],
    ]
    told = judge_metrics(["j"], found)
    assert told.pop("reward/j/spread_of_reward") == pytest.approx(0.5 / 3)
    assert {name.removeprefix("reward/j/"): value for name, value in told.items()} == {
        **{"calls": 4.0, "pairs": 2.0, "ties": 0.5, "missing": 1.0, "timeouts": 1.0, "time/j": 3.0}
    }


def test_models_of_one_name_are_told_apart(tmp_path, monkeypatch):
    """One judge with two settings, say: neither its metrics nor its base scores may take the other's place."""
    bright = FunctionRewardModel(brightness, "judge")
    dark = FunctionRewardModel(lambda images, prompts: [-value for value in brightness(images, prompts)], "judge")
    assert labels([bright, dark, FunctionRewardModel(brightness, "other")]) == ["judge", "judge-2", "other"]
    assert desk_of(bright, dark).names == ["judge", "judge-2"]
    values = measured(monkeypatch, tmp_path / "holdout", IMAGES[:2], IMAGES[2:], training=[bright, dark], unseen=[dark])
    changes = {name: value for name, value in values.items() if name.endswith("_change")}
    assert changes == {
        "holdout/training-judge_change": 100.0,
        "holdout/training-judge-2_change": -100.0,
        "holdout/judge_change": -100.0,
    }
    assert (tmp_path / "holdout" / "step-000020.png").is_file(), "the alarm says to look at the pictures"


def test_a_rollout_is_continued_with_the_settings_it_was_drawn_with(tmp_path):
    """The other half of its steps would otherwise be found in another plan, or by another rule."""
    x = torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last)
    samples = [[Sample("a star", 0, 0), Sample("a star", 0, 1)]]
    chunk = Chunk(samples[0], {1: Moment(torch.zeros(2, dtype=torch.float64), x, 2 * x, x)})
    plan, file = Plan([], [1]), tmp_path / "rollout.safetensors"
    Rollout(plan, [chunk], torch.zeros(2, dtype=torch.float64)).save(file, {"sampling_steps": 4, "batch_size": 2})
    again = Rollout.load(file, {"sampling_steps": 4, "batch_size": 2}, plan, samples, torch.device("cpu"))
    assert torch.equal(again.chunks[0].moments[1].x_next, 2 * x)
    for other in ({"sampling_steps": 8, "batch_size": 2}, {"sampling_steps": 4, "batch_size": 1}):
        with pytest.raises(CheckpointError, match=r"sampling_steps=4, this run has 8|batch_size=2, this run has 1"):
            Rollout.load(file, other, plan, samples, torch.device("cpu"))
