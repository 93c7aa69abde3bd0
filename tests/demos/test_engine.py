"""Drawing and scoring for several pages at once: the same noise, limits, cancelling, and bounded memory."""

from __future__ import annotations

import math
import threading
from dataclasses import replace

import pytest
from PIL import Image

from diffalign.demo.engine import Engine, Limits, watched
from diffalign.demo.session import Session, Sessions, StoppedError
from diffalign.errors import CheckpointError, ConfigError
from diffalign.synthesis import generate_images


def everything(engine: Engine, ask, session=None):
    session = session or engine.sessions["page"]
    return [picture for part in engine.compare(ask, session) for picture in part]


def test_every_model_draws_what_it_would_draw_alone(make_engine, ask, pool, weights):
    engine = make_engine(limits=Limits(batch=3))
    pictures = everything(engine, ask("base", "lora", "other", prompts=("a cat", "a dog"), seeds=(0, 5)))
    assert len(pictures) == 12 and len({p.path for p in pictures}) == 12
    with pool.ready(engine.specs["lora"]) as pipeline:
        alone = generate_images(pipeline, ["a dog"], [5], steps=2, guidance=2.0)[0]
    found = next(p for p in pictures if (p.model, p.prompt, p.seed) == ("lora", "a dog", 5))
    assert Image.open(found.path).tobytes() == alone.tobytes()
    assert found.scores["red"] > 0 and math.isnan(found.scores["only_cats"])
    assert found.path.parent == engine.pictures and found.scheduler == "EulerDiscreteScheduler"


def test_a_picture_that_is_known_is_not_drawn_again(make_engine, ask):
    engine, calls = make_engine("base"), []
    request = ask("base")
    first = everything(engine, request)[0]
    with watched(engine.pool.pipeline(engine.specs["base"].base).unet, 2, lambda: calls.append(1), lambda share: None):
        again = everything(engine, request)[0]
        assert not calls and again.path == first.path
        first.path.unlink()
        assert everything(engine, request)[0].path == first.path and calls  # a lost file is drawn anew


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": ()}, "Expected a prompt"),
        ({"prompts": ("x" * 1001,)}, "1000 letters"),
        ({"prompts": tuple(map(str, range(17)))}, "1 to 16 prompts, got 17"),
        ({"prompts": ("a", "a")}, "may come once"),
        ({"seeds": ()}, "1 to 8 seeds, got 0"),
        ({"seeds": (-1,)}, "seeds from 0"),
        ({"prompts": tuple(map(str, range(16))), "seeds": tuple(range(8))}, "256 pictures"),
        ({"steps": 0}, "1 to 10 steps"),
        ({"steps": 11}, "1 to 10 steps"),
        ({"guidance": math.nan}, "guidance"),
        ({"guidance": 31.0}, "guidance"),
        ({"prompts": (1,)}, "prompts as texts"),
        ({"prompts": ("\ud800",)}, "half a character"),
        ({"seeds": (0.5,)}, "seeds as whole numbers"),
        ({"steps": "4"}, "steps as whole numbers"),
        ({"side": 8.0}, "a size as whole numbers"),
        ({"guidance": "3"}, "guidance as a number"),
        ({"side": 12}, "in steps of 8"),
        ({"side": 128}, "8 to 64 pixels"),
    ],
)
def test_too_much_and_impossible_requests_are_refused(make_engine, ask, change, message):
    engine = make_engine()
    with pytest.raises(ConfigError, match=message) as caught:
        everything(engine, ask(**change))
    assert "\n" not in str(caught.value)


def test_models_are_checked_too(make_engine, ask):
    engine = make_engine("base", "misfit")
    with pytest.raises(ConfigError, match="no model called 'else'"):
        everything(engine, ask("base", "else"))
    with pytest.raises(CheckpointError, match="does not fit"):
        everything(engine, ask("base", "misfit"))
    with pytest.raises(ConfigError, match="1 to 1 models, got 2"):
        everything(make_engine(limits=Limits(models=1)), ask("base", "lora"))
    assert not engine.worker.busy


@pytest.mark.parametrize("prompt", ["鸟在飞", "кот", "قطة", "🐈 <b>&", "'; drop table"])
def test_prompts_of_any_script(make_engine, ask, prompt):
    assert everything(make_engine("base"), ask("base", prompts=(prompt,)))[0].prompt == prompt


def test_progress_tells_of_every_step(make_engine, ask):
    told = []
    for _ in make_engine().compare(ask(steps=4), Session("page"), lambda share, text: told.append((share, text))):
        pass
    shares = [share for share, _ in told]
    assert shares == sorted(shares) and 0.5 in shares and shares[-1] == 0.875
    assert told[-1][1] == "lora: picture 2 of 2"


def test_cancelling_ends_the_job_within_a_step_and_frees_the_worker(make_engine, ask):
    engine, steps = make_engine(), []
    session = engine.sessions["page"]

    def stop_at_third(share: float, text: str) -> None:
        steps.append(share)
        if len(steps) == 4:  # the first word comes before the first step
            engine.sessions["page"].stop()

    with pytest.raises(StoppedError):
        list(engine.compare(ask(steps=10), session, stop_at_third))
    assert len(steps) == 4 and not engine.worker.busy
    assert len(everything(engine, ask(), session)) == 2  # the next request of the page runs


def test_a_new_job_does_not_revive_the_one_that_was_cancelled():
    session = Session("page")
    old = session.begin()
    session.stop()
    new = session.begin()  # before the old job looked up
    with pytest.raises(StoppedError):
        old()
    new()


def test_models_are_added_up_to_a_limit_and_limits_are_above_zero(make_engine):
    engine = make_engine("base", limits=Limits(all_models=2))
    engine.add(replace(engine.specs["base"], label="more"))
    for label, message in (("more", "2 models already"), ("yet more", "2 models already")):
        with pytest.raises(ConfigError, match=message):
            engine.add(replace(engine.specs["base"], label=label))
    with pytest.raises(ConfigError, match="two models"):
        make_engine("base", "base")
    with pytest.raises(ConfigError, match="the limit batch"):
        Limits(batch=0)


def test_closing_the_page_ends_its_job_and_lets_the_next_person_in(make_engine, ask):
    engine, outcome = make_engine(), []
    drawing, waiting = threading.Event(), threading.Event()

    def slow(share: float, text: str) -> None:
        drawing.set()
        waiting.wait(300)

    def first() -> None:
        try:
            list(engine.compare(ask(steps=10), engine.sessions["first"], slow))
        except StoppedError as error:
            outcome.append(error)

    thread = threading.Thread(target=first)
    thread.start()
    assert drawing.wait(300)
    engine.sessions.close("first")
    waiting.set()
    assert len(everything(engine, ask(), engine.sessions["second"])) == 2
    thread.join(300)
    assert outcome and len(engine.sessions) == 1


def test_who_waits_and_leaves_does_not_block(make_engine, ask):
    engine, session = make_engine(), Session("waiting")
    with engine.worker.turn(lambda: None):
        threading.Timer(0.2, session.stop).start()
        with pytest.raises(StoppedError):  # though the turn of the other is not over
            everything(engine, ask(), session)


def test_a_caller_that_goes_away_between_pictures_holds_nothing(make_engine, ask):
    engine = make_engine()
    stream = engine.compare(ask(), engine.sessions["gone"])
    next(stream)
    assert not engine.worker.busy
    assert len(everything(engine, ask("other"))) == 1


def test_many_requests_leave_a_bounded_trace(make_engine, ask):
    engine = make_engine("base", keep_pictures=5)
    for number in range(30):
        session = engine.sessions[f"page {number}"]
        everything(engine, ask("base", seeds=(number,), steps=1, guidance=1.0), session)
    assert len(list(engine.pictures.glob("*.png"))) == 5
    for number in range(9):
        engine.save(bytes([number]))  # validation pictures of runs count too
    assert len(list(engine.pictures.glob("*.png"))) == 5
    assert len(engine._known) <= 5 and len(engine.sessions) <= engine.sessions.limit


def test_sessions_beyond_the_limit_are_closed():
    sessions = Sessions(limit=2)
    first = sessions["a"]
    assert sessions["a"] is first and not first.closed
    _ = sessions["b"], sessions["a"], sessions["c"]
    assert not first.closed and len(sessions) == 2  # the least recently used goes
    _ = sessions["d"]
    _ = sessions["e"]
    assert first.closed and len(sessions) == 2
    with pytest.raises(StoppedError):
        first.begin()()  # a closed page cannot begin again
