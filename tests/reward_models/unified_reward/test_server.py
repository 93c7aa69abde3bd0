"""A judge behind HTTP: honest, biased, slow, broken, lying. No hang, no made-up score, the right count of missing."""

from __future__ import annotations

import email.utils
import math
import os
import signal
import socket
import threading
import time

import pytest
import torch
from PIL import Image

from reward_models import PairwiseRewardModel, RewardModelError, load_reward_model

from .judge_server import Asked, JudgeServer, Reply

PICTURES = [Image.new("RGB", (8, 8), (value, 0, 0)) for value in range(0, 250, 10)]
# A long timeout: where a test does not want one, a busy machine must not make a question be asked twice.
QUICK = {"timeout": 300.0, "retries": 2, "backoff": 0.01, "longest_wait": 0.5}


def redness(image: Image.Image) -> int:
    return image.getpixel((0, 0))[0]


def honest(asked: Asked) -> Reply:
    first, second = map(redness, asked.images)
    return Reply(f"Image {1 if first > second else 2} is better")


def judge_of(server: JudgeServer, **options):
    return load_reward_model("unified-reward", backend="server", base_url=server.url, **(QUICK | options))


def pairs(n: int) -> list[tuple[Image.Image, Image.Image]]:
    return [(PICTURES[i % 25], PICTURES[(i + 1 + i // 25) % 25]) for i in range(n)]


def test_the_key_may_stand_in_the_environment(monkeypatch):
    monkeypatch.setenv("REWARD_MODEL_API_KEY", "from outside")
    with JudgeServer(honest) as server:
        judge_of(server).compare([(PICTURES[3], PICTURES[1])], ["a fox"])
        assert server.authorizations == {"Bearer from outside"}


def test_both_orders_are_asked_each_with_its_own_prompt():
    with JudgeServer(honest) as server:
        judge = judge_of(server, api_key="secret", revision="v1", extra_body={"repetition_penalty": 1.0})
        assert isinstance(judge, PairwiseRewardModel)
        shares = judge.compare([(PICTURES[3], PICTURES[1]), (PICTURES[0], PICTURES[2])], ["a fox", "two hens"])
        assert shares.tolist() == [1.0, 0.0]
        seen = sorted((("two hens" in asked.text), *map(redness, asked.images)) for asked in server.asked)
        assert seen == [(False, 10, 30), (False, 30, 10), (True, 0, 20), (True, 20, 0)]
        body = server.asked[0].body
        assert (body["temperature"], body["top_p"], body["model"]) == (0.0, 1.0, "judge")
        assert body["repetition_penalty"] == 1.0
        assert len({asked.body["seed"] for asked in server.asked}) == 4
        assert server.authorizations == {"Bearer secret"}
        assert "secret" not in str(judge.identity) + repr(vars(judge))
        assert judge.identity["id"] == "judge"
        assert judge.identity["revision"] == "v1"
        statistics = judge.statistics
        assert (statistics.agreement, statistics.position_bias, statistics.tie_rate) == (1.0, 0.0, 0.0)
        judge.close()


@pytest.mark.parametrize(("always", "bias"), [("Image 1 is better", 1.0), ("Image 2 is better", -1.0)])
def test_a_judge_that_follows_the_place_is_found_out_and_prefers_nothing(always, bias, caplog):
    with JudgeServer(lambda _: Reply(always)) as server:
        judge = judge_of(server)
        assert judge.compare(pairs(20), ["p"] * 20).tolist() == [0.5] * 20
    statistics = judge.statistics
    assert (statistics.position_bias, statistics.agreement, statistics.reversed) == (bias, 0.0, 20)
    assert statistics.follows_position
    assert "follows the place" in caplog.text
    group = [(i, j) for i in range(4) for j in range(4) if i < j]
    with JudgeServer(lambda _: Reply(always)) as server:
        judge = judge_of(server)
        shares = judge.compare([(PICTURES[i], PICTURES[j]) for i, j in group], ["p"] * len(group))
        assert len(server.asked) == 4 * 3
    wins = torch.zeros(4)
    for (i, j), share in zip(group, shares.tolist(), strict=True):
        wins[i], wins[j] = wins[i] + share, wins[j] + 1 - share
    assert (wins / 3).tolist() == [0.5] * 4


def test_swapping_a_pair_swaps_its_share_exactly():
    with JudgeServer(
        lambda asked: honest(asked) if redness(asked.images[0]) % 20 else Reply("Image 1 is better")
    ) as server:
        judge = judge_of(server)
        there = judge.compare(pairs(10), ["p"] * 10)
        back = judge.compare([(b, a) for a, b in pairs(10)], ["p"] * 10)
        assert len(server.asked) == 20  # the swapped pairs were answered already
    assert torch.equal(there + back, torch.ones(10))
    assert set(there.tolist()) == {0.0, 0.5}


def test_equal_pictures_tie_unasked_and_equal_questions_are_asked_once():
    with JudgeServer(honest) as server:
        judge = judge_of(server)
        twice = [(PICTURES[1], PICTURES[1].copy()), (PICTURES[1], PICTURES[2]), (PICTURES[2], PICTURES[1])]
        assert judge.compare(twice, ["p"] * 3).tolist() == [0.5, 0.0, 1.0]
        assert len(server.asked) == 2
        assert judge.statistics.identical == 1


def test_ties_are_half_and_junk_is_missing_and_asked_once_more():
    def behaviour(asked: Asked) -> Reply:
        if "tie" in asked.text:
            return Reply("Both images are equally good")
        if "late" in asked.text and asked.body["temperature"] > 0:
            return honest(asked)
        return Reply("I like Image 1 and Image 2")

    with JudgeServer(behaviour) as server:
        judge = judge_of(server)
        shares = judge.compare(pairs(3), ["tie", "late", "never"])
        assert shares[0] == 0.5
        assert shares[1] == 0.0
        assert shares[2].isnan()
        assert len(server.asked) == 6 + 4
    statistics = judge.statistics
    assert (statistics.pairs, statistics.pairs_missing, statistics.judged) == (3, 1, 2)
    assert (statistics.asked_again, statistics.failures) == (4, {"no verdict": 2})
    assert statistics.tie_rate == 0.5
    assert statistics.missing_rate == pytest.approx(1 / 3)
    assert statistics.as_dict()["failures"] == {"no verdict": 2}
    statistics.reset()
    assert statistics.pairs == 0
    assert math.isnan(statistics.agreement)


def test_one_order_alone_is_no_judgement():
    with JudgeServer(
        lambda asked: honest(asked) if redness(asked.images[0]) < redness(asked.images[1]) else Reply("?")
    ) as server:
        judge = judge_of(server, second_try=False)
        assert judge.compare([(PICTURES[0], PICTURES[1])], ["p"]).isnan().all()


def test_half_the_answers_fail():
    def behaviour(asked: Asked) -> Reply:
        return Reply(status=500) if "broken" in asked.text else honest(asked)

    with JudgeServer(behaviour) as server:
        judge = judge_of(server, concurrency=40, retries=1)
        shares = judge.compare(pairs(24), ["fine", "broken"] * 12)
    assert shares.isnan().tolist() == [False, True] * 12
    assert (judge.statistics.pairs_missing, judge.statistics.failures) == (12, {"no answer": 24})


def test_failures_with_answers_between_them_never_stop_the_asking():
    def behaviour(asked: Asked) -> Reply:
        return Reply(status=500) if "broken" in asked.text else honest(asked)

    with JudgeServer(behaviour) as server:
        shares = judge_of(server, concurrency=1, retries=0).compare(pairs(12), ["fine", "broken"] * 6)
        assert len(server.asked) == 24
    assert shares.isnan().tolist() == [False, True] * 6


def test_what_had_no_reply_is_asked_again_by_the_next_call():
    replies = iter([Reply(status=400)] * 2)
    with JudgeServer(lambda asked: next(replies, None) or honest(asked)) as server:
        judge = judge_of(server, model="m", concurrency=1)
        pair = [(PICTURES[2], PICTURES[1])]
        assert judge.compare(pair, ["p"]).isnan().all()
        assert judge.compare(pair, ["p"]).tolist() == [1.0]


FAULTS = {
    "500": (Reply(status=500, raw=b"oops"), True),
    "503 with a page": (Reply(status=503, raw=b"<html>busy</html>"), True),
    "cut connection": (Reply("Image 1 is better", cut=True), True),
    "slow": (Reply("Image 1 is better", wait=20.0), True),
    "dripping": (Reply("Image 1 is better", drip=1.0), True),
    "not JSON": (Reply(raw=b"Image 1 is better"), True),
    "not a completion": (Reply(raw=b'{"choices": []}'), False),
    "a list": (Reply(raw=b"[[]]"), False),
    "no text": (Reply(None), False),
    "too long a question": (Reply(status=400, raw=b"context length"), False),
    "too large": (Reply(raw=b" " * (17 * 2**20)), False),
    "filtered": (Reply("Image 1 is better", finish="content_filter"), False),
    "aborted": (Reply("Image 1 is better in its colours, but", finish="abort"), False),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_retried_where_that_helps_and_end_as_missing(fault):
    reply, again = FAULTS[fault]
    with JudgeServer(lambda _: reply) as server:
        judge = judge_of(server, retries=1, **({"timeout": 2.0} if fault in ("slow", "dripping") else {}))
        assert judge.compare(pairs(1), ["p"]).isnan().all()
        assert len(server.asked) == (4 if again else 2)
        assert judge.statistics.failures == {"no answer": 2}


def test_a_prompt_that_cannot_be_sent_costs_its_own_answer_alone():
    with JudgeServer(honest) as server:
        judge = judge_of(server)
        shares = judge.compare([(PICTURES[2], PICTURES[1])] * 3, ["a", "\ud800", "c"])
        assert shares[[0, 2]].tolist() == [1.0, 1.0] and shares[1].isnan()
        assert len(server.asked) == 4
        assert judge.statistics.failures == {"no answer": 2}


def test_a_failure_that_passes_costs_nothing_but_time():
    faults = iter([Reply(status=500), Reply("?", cut=True), Reply(status=429, headers={"Retry-After": "0"})])
    lock = threading.Lock()

    def behaviour(asked: Asked) -> Reply:
        with lock:
            return next(faults, None) or honest(asked)

    with JudgeServer(behaviour) as server:
        judge = judge_of(server)
        assert judge.compare([(PICTURES[2], PICTURES[1])], ["p"]).tolist() == [1.0]
        assert judge.backend.connection.attempts == len(server.asked) + 1 == 6  # one more for the model's name


def test_retry_after_is_kept_and_too_long_a_wait_is_not_waited_for():
    lock = threading.Lock()
    for after, waited in (("0.3", True), ("3600", False), (email.utils.formatdate(time.time() + 3600), False)):
        times: dict[int, list[float]] = {}

        def behaviour(asked: Asked, after=after, times=times) -> Reply:
            with lock:
                tries = times.setdefault(redness(asked.images[0]), [])
                tries.append(time.monotonic())
                return Reply(status=429, headers={"Retry-After": after}) if len(tries) == 1 else honest(asked)

        with JudgeServer(behaviour) as server:
            share = judge_of(server).compare([(PICTURES[2], PICTURES[1])], ["p"])
        assert share.isnan().item() != waited
        assert all(len(tries) == (2 if waited else 1) for tries in times.values())
        assert not waited or all(tries[1] - tries[0] >= 0.3 for tries in times.values())


def test_a_dead_server_costs_a_bounded_time_and_every_answer():
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))  # without listen(): connections are refused, and nobody else gets the port
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}/v1"
        judge = load_reward_model("unified-reward", backend="server", base_url=url, model="m", concurrency=2, **QUICK)
        shares = judge.compare(pairs(100), ["p"] * 100)
        assert shares.isnan().all()
        assert sum(judge.statistics.failures.values()) == judge.statistics.answers == 2 * 25 * 4
        assert judge.backend.connection.attempts <= 3 * 8
        with pytest.raises(RewardModelError, match="is it up"):
            load_reward_model("unified-reward", backend="server", base_url=url, **QUICK)


def test_a_dead_server_is_left_alone_by_the_portions_that_follow(capsys):
    with JudgeServer(lambda _: Reply(status=503)) as server:
        judge = judge_of(server, model="m", concurrency=1, retries=1, batch_size=5, longest_wait=60.0)
        assert judge.compare(pairs(100), ["p"] * 100, progress=True).isnan().all()
        assert judge.statistics.pairs_missing == 100
        assert len(server.asked) == 4 * 2  # four questions, asked twice each, of 200 in 20 portions
        assert "unified-reward: 100%" in capsys.readouterr().err


def test_a_server_that_is_back_is_asked_again():
    broken = [True]
    with JudgeServer(lambda asked: Reply(status=503) if broken[0] else honest(asked)) as server:
        judge = judge_of(server, model="m", concurrency=1, retries=0, longest_wait=0.0)
        assert judge.compare(pairs(10), ["p"] * 10).isnan().all()
        broken[0] = False
        assert judge.compare(pairs(10), ["p"] * 10).isfinite().all()


@pytest.mark.parametrize("status", [401, 404])
def test_a_wrong_key_or_name_is_said_at_once(status):
    with JudgeServer(lambda _: Reply(status=status, raw=b"no such thing")) as server:
        with pytest.raises(RewardModelError, match=rf"refuses.*{status} no such thing.*api_key"):
            judge_of(server, model="m").compare(pairs(1), ["p"])
        assert len(server.asked) == 2


def test_several_served_models_have_to_be_told_apart():
    with JudgeServer(honest, models=("a", "b")) as server:
        with pytest.raises(RewardModelError, match="'a', 'b'"):
            judge_of(server).compare(pairs(1), ["p"])
        assert judge_of(server, model="b").identity["id"] == "b"


def test_no_more_requests_than_allowed_over_all_threads():
    with JudgeServer(lambda asked: Reply(honest(asked).text, wait=0.02)) as server:
        judge = judge_of(server, concurrency=3)
        results: list[torch.Tensor] = []
        threads = [
            threading.Thread(target=lambda: results.append(judge.compare(pairs(6), ["p"] * 6))) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(300)
        assert len(results) == 4
        assert all(torch.equal(result, results[0]) for result in results)
        assert server.most_under_way <= 3
        assert judge.statistics.pairs == 24


@pytest.fixture
def interruptible():
    """A process started in the background ignores Ctrl-C, and Python then raises nothing."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_caller_takes_its_requests_along():

    def behaviour(asked: Asked) -> Reply:
        if len(server.asked) == 4:  # the caller waits for his second answer
            os.kill(os.getpid(), signal.SIGINT)
        return Reply("Image 1 is better", wait=0.2)

    with JudgeServer(behaviour) as server:
        judge = judge_of(server, concurrency=1, model="m")
        judge.compare(pairs(1), ["p"])
        with pytest.raises(KeyboardInterrupt):
            judge.compare(pairs(20), ["p"] * 20)
        asked = len(server.asked)
        time.sleep(0.5)
        assert len(server.asked) <= asked + 1 < 40  # those that waited were never sent
        assert judge.compare([(PICTURES[1], PICTURES[2])], ["again"]).tolist() == [0.5]
        judge.close()


def test_points_by_dimension():
    text = "Alignment Score (1-5): {}\nCoherence Score (1-5): 3\nStyle Score (1-5): 4"
    with JudgeServer(lambda asked: Reply(text.format("2" if "fox" in asked.text else "?"))) as server:
        judge = judge_of(server)
        assert judge.score(PICTURES[:2], ["fox", "hen"])[0] == 3.0
        assert judge.score(PICTURES[:2], ["fox", "hen"])[1].isnan()
        assert judge.statistics.scores_missing == 2
        numbers = judge.score_dimensions(PICTURES[:2], ["fox", "hen"])
        assert numbers["style"].tolist() == [4.0, 4.0]
        assert numbers["alignment"].isnan().tolist() == [False, True]
        style = judge_of(server, dimension="style")
        assert style.score(PICTURES[:2], ["fox", "hen"]).tolist() == [4.0, 4.0]
        assert style.identity != judge.identity
        assert style.statistics.failures == {}  # an answer without alignment has all that was wanted of it


def test_a_second_try_that_says_less_does_not_replace_the_first():
    text = "Coherence Score (1-5): 3\nStyle Score (1-5): 4"
    with JudgeServer(lambda asked: Reply("?" if asked.body["temperature"] > 0 else text)) as server:
        style = judge_of(server, dimension="style")
        assert style.score(PICTURES[:1], ["fox"]).tolist() == [4.0]
        assert len(server.asked) == 2


def test_truncated_answers_are_missing_whatever_they_say():
    with JudgeServer(lambda _: Reply("Image 1 is better in colour, but", finish="length")) as server:
        judge = judge_of(server)
        assert judge.compare(pairs(1), ["p"]).isnan().all()
        assert judge.statistics.failures == {"truncated": 2}


def weighed(first: float, text: str = "Image 1 is better", **changes) -> Reply:
    """An answer with P("1") = ``first`` and P("2") the rest."""
    other = {"1": math.log(first), "2": math.log(1 - first)}
    alternatives = [{"token": token, "logprob": value} for token, value in other.items()] + [
        {"token": "x", "logprob": -20}
    ]
    tokens = [{"token": token, "logprob": -0.1, "top_logprobs": []} for token in ("Image", " ", "1", " is better")]
    tokens[2]["top_logprobs"] = [entry for entry in alternatives if entry["token"] not in changes.get("hidden", ())]
    return Reply(text, logprobs=tokens)


def test_logits_of_a_server():
    def behaviour(asked: Asked) -> Reply:
        assert asked.body["logprobs"] is True
        brighter = redness(asked.images[0]) > redness(asked.images[1])
        if "silent" in asked.text:
            return Reply("Image 1 is better")
        if "lost" in asked.text:
            return weighed(0.5, hidden=("1", "2"))
        if "spelt" in asked.text:  # the second form of a number must neither replace the first nor be lost
            reply = weighed(0.5)
            forms = {"1": 0.6, "2": 0.2, " 2": 0.1, " 1": 0.1} if brighter else {"1": 0.1, " 2": 0.3, "2": 0.6}
            reply.logprobs[2]["top_logprobs"] = [{"token": t, "logprob": math.log(p)} for t, p in forms.items()]
            return reply
        if "sure" in asked.text:
            return weighed(0.9 if brighter else 0.1, hidden=("2",) if brighter else ("1",))
        return weighed(0.8 if brighter else 0.4)

    with JudgeServer(behaviour) as server:
        judge = judge_of(server, mode="logits", second_try=False)
        pair = (PICTURES[5], PICTURES[1])
        shares = judge.compare([pair, pair[::-1], *[pair] * 4], ["p", "p", "silent", "lost", "sure", "spelt"])
    assert shares[0] == pytest.approx((0.8 + 0.6) / 2, abs=1e-6)
    assert shares[1] == pytest.approx(1 - (0.8 + 0.6) / 2, abs=1e-6)
    assert shares[2:4].isnan().all()
    assert shares[4] == pytest.approx(1.0, abs=1e-6)
    assert shares[5] == pytest.approx((0.7 + 0.9) / 2, abs=1e-6)
    assert judge.statistics.failures == {"no probabilities of Image 1 and Image 2": 4}
    assert judge.statistics.position_bias == pytest.approx((2 * 0.2 + 0 + (0.7 - 0.9)) / 4, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"backend": "server"}, "base_url"),
        ({"backend": "server", "base_url": "localhost:8000"}, "http://"),
        ({"backend": "server", "base_url": "http://localhost", "timeout": 0.0}, "timeout"),
        ({"backend": "server", "base_url": "http://localhost", "dtype": torch.float16}, "dtype"),
        ({"backend": "local", "base_url": "http://localhost", "retries": 1}, "base_url, retries"),
        ({"backend": "cloud"}, "cloud"),
        ({"family": "3.0"}, "families"),
        ({"family": "2.0", "pair_form": "shares", "mode": "logits"}, "no verdict to weigh"),
        ({"family": "think", "point_form": "dimensions"}, "only compares pairs"),
        ({"family": "7b", "pair_form": "think"}, "no form 'think'"),
        ({"family": "7b", "dimension": "style"}, "no style"),
        ({"dimension": "beauty"}, "beauty"),
        ({"mode": "guess"}, "guess"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"pair_prompt": "/nowhere/prompt.txt"}, "cannot read"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, word):
    with pytest.raises(RewardModelError, match=word):
        load_reward_model("unified-reward", **options)


def test_a_prompt_file_needs_a_place_for_the_caption_and_counts_in_the_identity(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("which?")
    with pytest.raises(RewardModelError, match=r"\{prompt\}"):
        load_reward_model("unified-reward", pair_prompt=path)
    path.write_text('{"json": "{prompt}"} which?')
    with JudgeServer(honest) as server:
        judge = judge_of(server, pair_prompt=path)
        judge.compare(pairs(1), ["{x}"])
        assert server.asked[0].text == '{"json": "{x}"} which?'
        assert judge.identity != judge_of(server).identity


def test_whatever_may_change_an_answer_is_in_the_identity():
    with JudgeServer(honest) as server:
        plain, *others = (
            judge_of(server, **changes).identity
            for changes in (
                {},
                {"extra_body": {"repetition_penalty": 1.1}},
                {"template_options": {"enable_thinking": False}},
                {"max_pixels": 9},
                {"seed": 1},
                {"revision": "v2"},
            )
        )
        assert plain == judge_of(server, timeout=7.0, api_key="k").identity
        assert all(other != plain for other in others)


def test_large_pictures_are_shown_smaller_when_asked():
    with JudgeServer(lambda _: Reply("Image 1 is better")) as server:
        judge_of(server, max_pixels=100).compare([(Image.new("RGB", (40, 10)), Image.new("RGB", (8, 8), "red"))], ["p"])
        assert sorted(image.size for image in server.asked[0].images) == [(8, 8), (20, 5)]
