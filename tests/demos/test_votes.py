"""Blind votes: hidden until cast, safe on the disk, one row of the preference table each, and never mixed up."""

from __future__ import annotations

import errno
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from diffalign.data import load_preferences
from diffalign.demo.sheet import render_ballot
from diffalign.demo.votes import CHOICES, VOTE_SCORE, VoteBook, draw_ballot
from diffalign.errors import ConfigError, DataError
from diffalign.evaluation.ratings import rate_models
from diffalign.synthesis.sampling import picture_seed


@pytest.fixture
def book(tmp_path: Path) -> VoteBook:
    return VoteBook(tmp_path / "votes")


def test_a_vote_is_a_row_with_models_seeds_settings_and_scores(make_engine, ask, book):
    engine = make_engine()
    session = engine.sessions["page"]
    ballot = draw_ballot(engine, ask("base", "lora"), session)
    book.cast(session, ballot.id, "right", voter="ab12")
    (file,) = book.folder.iterdir()
    assert file.name == f"train-{ballot.id}-ab12.parquet"
    (row,) = load_preferences(book.folder)
    assert row.prompt == "a cat" and row.preference == [0.0, 1.0] and row.rank == [2, 1]
    assert row.image_bytes == [picture.path.read_bytes() for picture in ballot.pictures]
    assert row.scores[VOTE_SCORE] == [0.0, 1.0] and row.scores["red"][0] > 0
    for source, spec, picture in zip(row.sources, ballot.specs, ballot.pictures, strict=True):
        assert (source["model"], source["revision"]) == (spec.identity, spec.revision)
        assert source["seed"] == picture_seed("a cat", picture.seed)
        assert (source["steps"], source["guidance"], source["scheduler"]) == (2, 2.0, "EulerDiscreteScheduler")


def test_a_tie_and_both_bad_are_ties_that_stay_apart(make_engine, ask, book):
    engine = make_engine("base", "lora")
    session = engine.sessions["page"]
    for choice in ("tie", "both bad"):
        book.cast(session, draw_ballot(engine, ask(), session).id, choice)
    rows = list(load_preferences(book.folder))
    assert [row.preference for row in rows] == [[0.5, 0.5]] * 2 and [row.rank for row in rows] == [[1, 1]] * 2
    assert [row.scores[VOTE_SCORE] for row in rows] == [[0.5, 0.5], [0.0, 0.0]]
    assert [vote.both_bad for vote in book.votes()] == [False, True]


def test_names_stay_hidden_until_the_vote(make_engine, ask):
    engine, told = make_engine("base", "lora"), []
    ballot = draw_ballot(engine, ask(), engine.sessions["page"], lambda share, text: told.append(text))
    page = render_ballot(ballot).replace(str(engine.pictures), "")
    for secret in ("base", "lora", "red", "best"):  # labels, scores and marks
        assert secret not in page and not any(secret in text for text in told)
    assert not len(engine.sessions["page"].tally)  # the win-rate table would tell too
    shown = render_ballot(ballot, "left")
    assert "base" in shown and "lora" in shown and "your choice" in shown


def test_sides_prompts_and_seeds_are_shuffled(make_engine, ask, monkeypatch):
    numbers = iter(range(10))  # of the ballots, in place of what the system's randomness gives
    monkeypatch.setattr("diffalign.demo.votes._ballot_id", lambda: f"ballot-{next(numbers)}")
    engine = make_engine("base", "lora")
    session = engine.sessions["page"]
    request = ask(prompts=("a cat", "a dog"), steps=1, guidance=1.0)
    ballots = [draw_ballot(engine, request, session) for _ in range(10)]
    assert {ballot.specs[0].label for ballot in ballots} == {"base", "lora"}
    assert {ballot.ask.prompts[0] for ballot in ballots} == {"a cat", "a dog"}
    assert len({ballot.ask.seeds for ballot in ballots}) == 10
    assert len(session.ballots) == 8  # only the newest wait for a vote


def test_one_vote_a_pair_by_the_page_that_saw_it(make_engine, ask, book):
    engine = make_engine("base", "lora")
    mine, yours = engine.sessions["mine"], engine.sessions["yours"]
    ballot = draw_ballot(engine, ask(), mine)
    with pytest.raises(ConfigError, match="not waiting for your vote"):
        book.cast(yours, ballot.id, "left")
    with pytest.raises(ConfigError, match="Expected one of"):
        book.cast(mine, ballot.id, "middle")
    book.cast(mine, ballot.id, "left", voter="../../evil")
    with pytest.raises(ConfigError, match="has one already"):
        book.cast(mine, ballot.id, "right")
    (vote,) = book.votes()
    assert vote.voter == "anyone" and vote.outcome == 1.0


def test_two_people_at_once_do_not_mix_votes(make_engine, ask, book):
    engine = make_engine("base", "lora")

    def person(name: str, favourite: str) -> None:
        session = engine.sessions[name]
        for _ in range(2):
            ballot = draw_ballot(engine, ask(steps=1, guidance=1.0), session)
            choice = "left" if ballot.specs[0].label == favourite else "right"
            book.cast(session, ballot.id, choice, voter=name)

    with ThreadPoolExecutor() as pool:
        list(pool.map(person, ["anna", "ben"], ["base", "lora"]))
    specs = list(engine.specs.values())
    anna, ben = (rate_models(book.games(voter, specs)) for voter in ("anna", "ben"))
    assert (anna[0].name, anna[0].wins, anna[1].wins) == ("base", 2, 0)
    assert (ben[0].name, ben[0].wins, ben[1].wins) == ("lora", 2, 0)
    assert len(book.games()) == 4


def test_a_full_disk_loses_no_pair_and_a_crash_no_vote(make_engine, ask, book, monkeypatch):
    engine = make_engine("base", "lora")
    session = engine.sessions["page"]
    first, second = draw_ballot(engine, ask(), session), draw_ballot(engine, ask(), session)
    book.cast(session, first.id, "left")
    with monkeypatch.context() as patch:
        patch.setattr(
            "os.fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
        )
        with pytest.raises(DataError, match="No space left"):
            book.cast(session, second.id, "left")
    (book.folder / ".train-x.parquet.host.1.2.tmp").write_bytes(b"half a vote")  # what a killed server leaves
    assert len(VoteBook(book.folder).votes()) == len(load_preferences(book.folder)) == 1
    book.cast(session, second.id, "right")  # the pair still waited
    assert len(VoteBook(book.folder).votes()) == 2


def test_another_file_in_the_folder_is_no_vote(make_engine, ask, book, caplog):
    engine = make_engine("base", "lora")
    book.folder.mkdir()
    (book.folder / "train-00000.parquet").write_bytes(b"nonsense")
    book.cast(engine.sessions["p"], draw_ballot(engine, ask(), engine.sessions["p"]).id, "left")
    assert len(book.votes()) == 1 and "is no vote" in caplog.text


def test_a_label_that_is_another_models_name_does_not_merge_the_two(make_engine, ask, book):
    engine = make_engine("base", "lora")
    session = engine.sessions["page"]
    book.cast(session, draw_ballot(engine, ask(), session).id, "left")
    base, tuned = engine.specs.values()
    full = f"{base.identity} ({base.revision})"
    renamed = replace(tuned, label=full)  # this server gives the LoRA the name that the base has in the votes
    (game,) = book.games(models=[renamed])
    assert {game.first, game.second} == {full, f"{tuned.identity} ({tuned.revision})"}
    assert {name for g in book.games(models=[base, tuned]) for name in (g.first, g.second)} == {"base", "lora"}
    assert len(rate_models(book.games(models=[renamed]))) == 2


def test_a_row_of_one_model_alone_is_no_vote(make_engine, ask, book, caplog):
    engine = make_engine("base", "lora")
    session = engine.sessions["page"]
    ballot = draw_ballot(engine, ask(), session)
    session.keep(replace(ballot, specs=(ballot.specs[0],) * 2))
    book.cast(session, ballot.id, "left")
    assert book.votes() == [] and "one model" in caplog.text


def test_exports_in_both_layouts(make_engine, ask, book, tmp_path):
    engine = make_engine("base", "lora")
    session = engine.sessions["page"]
    with pytest.raises(DataError, match="no votes yet"):
        book.export(tmp_path / "none")
    for choice in CHOICES:
        book.cast(session, draw_ballot(engine, ask(), session).id, choice)
    (ours,) = book.export(tmp_path / "ours")
    (theirs,) = book.export(tmp_path / "theirs", "pickapic")
    assert len(load_preferences(ours.parent)) == 4
    rows = pq.read_table(theirs).to_pylist()
    assert [(row["label_0"], row["label_1"]) for row in rows] == [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.5, 0.5)]
    assert rows[0]["model_0"] == load_preferences(ours.parent)[0].sources[0]["model"]
    with pytest.raises(ConfigError, match="preferences or pickapic"):
        book.export(tmp_path / "other", "csv")


def test_the_same_model_twice_gives_nothing_to_choose(make_engine, ask, pool, weights):
    engine = make_engine("base")
    engine.add(replace(engine.specs["base"], label="twin"))
    with pytest.raises(ConfigError, match="very same pictures"):
        draw_ballot(engine, ask("base", "twin"), engine.sessions["page"])
    with pytest.raises(ConfigError, match="between two models"):
        draw_ballot(engine, ask("base"), engine.sessions["page"])


def test_a_picture_that_is_none_is_not_voted_on(make_engine, ask, monkeypatch):
    engine = make_engine("base", "lora")
    drawn = engine._draw_new
    monkeypatch.setattr(engine, "_draw_new", lambda *given: [replace(p, problem="not finite") for p in drawn(*given)])
    with pytest.raises(ConfigError, match="One of the two pictures is none"):
        draw_ballot(engine, ask(), engine.sessions["page"])


def test_a_pair_whose_pictures_are_gone_is_said_to_be(make_engine, ask, book):
    engine = make_engine("base", "lora")
    session = engine.sessions["page"]
    ballot = draw_ballot(engine, ask(), session)
    ballot.pictures[0].path.unlink()
    with pytest.raises(DataError, match="no longer kept"):
        book.cast(session, ballot.id, "left")


def test_missing_scores_stay_missing(make_engine, ask, book):
    engine = make_engine("base", "lora")
    session = engine.sessions["page"]
    book.cast(session, draw_ballot(engine, ask(prompts=("a dog",)), session).id, "left")
    assert all(math.isnan(value) for value in load_preferences(book.folder)[0].scores["only_cats"])
