"""Tables, charts, pictures as HTML, and training runs as they lie on the disk."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from diffalign.demo.charts import curve_charts, rate_chart, rating_chart
from diffalign.demo.engine import Ask, Picture
from diffalign.demo.runs import MAX_POINTS, Runs
from diffalign.demo.sheet import VIEWS, render_ratings, render_sheet, render_standings
from diffalign.demo.tally import Tally, best
from diffalign.errors import ConfigError
from diffalign.evaluation.ratings import Game, duels, rate_models


def test_best_marks_the_highest_and_no_one_when_all_are_equal():
    assert best([1.0, 3.0, 2.0]) == {1} and best([3.0, 1.0, 3.0]) == {0, 2}
    assert best([2.0, 2.0]) == best([1.0]) == best([math.nan, 1.0]) == set()
    assert best([math.nan, 1.0, 2.0]) == {2}


def test_win_rates_compare_equal_cells_alone():
    tally = Tally()
    for seed, (a, b) in enumerate([(0.1, 0.9), (0.5, 0.5), (0.9, 0.1), (0.2, 0.4), (math.nan, 0.4)]):
        tally.add(("p", seed), f"prompt {seed}", "base", {"score": a})
        tally.add(("p", seed), f"prompt {seed}", "tuned", {"score": b})
    tally.add(("other settings", 0), "prompt 0", "tuned", {"score": 9.0})
    (standing,) = tally.standings("score", ["base", "tuned"])
    assert (standing.wins, standing.ties, standing.losses) == (2, 1, 1)
    assert standing.rate.mean == 2.5 / 4 and standing.difference == pytest.approx(0.05)
    tally.add(("p", 0), "prompt 0", "tuned", {"score": 0.0})  # drawn again: replaced, not counted twice
    assert tally.standings("score", ["base", "tuned"])[0].wins == 1
    assert tally.scores() == ["score"] and tally.models() == {"base", "tuned"}
    small = Tally(limit=3)
    for seed in range(10):
        small.add(seed, "p", "base", {})
        small.add(0, "p", "base", {"kept": 1.0})  # drawn again: the newest, not the oldest
    assert len(small) == 3 and small.scores() == ["kept"]


@pytest.fixture
def pictures(tmp_path: Path) -> list[Picture]:
    made = []
    for model, score in (("base", 0.25), ("<b>tuned</b>", 0.75)):
        for seed in (0, 1):
            path = tmp_path / f"{len(made)}.png"
            Image.new("RGB", (8, 8), (len(made) * 20, 0, 0)).save(path)
            made.append(Picture(model, "a <i>cat</i> 'x'", seed, path, (8, 8), {"score": score, "none": math.nan}))
    return made


@pytest.mark.parametrize("view", VIEWS)
def test_sheets_have_words_for_every_picture_and_escape_what_people_typed(pictures, view):
    ask = Ask(("a <i>cat</i> 'x'",), (0, 1), ("base", "<b>tuned</b>"))
    page = render_sheet(pictures, ask, view)
    assert page.count("<img ") == page.count(" alt='") == 4
    assert "<i>cat" not in page and "<b>tuned" not in page and "'x'" not in page
    assert page.count("★") == 2 and page.count("class='best'") == 2 and "–" in page
    assert "No picture: black" in render_sheet([replace(pictures[0], problem="black")], ask, view)
    pictures[0].path.unlink()
    assert "no longer kept" in render_sheet(pictures, ask, view)
    assert render_sheet([], ask, view) == ""


def test_charts_say_in_words_what_they_show_and_take_the_pages_colour():
    games = [Game("a", "b", 1.0, i) for i in range(3)] + [Game("x <&> $1$", "a", 0.5, 9)]
    drawing = rating_chart(rate_models(games))
    assert 'role="img"' in drawing and "currentColor" in drawing and "x &lt;&amp;&gt; $1$" in drawing
    assert "http-equiv" not in drawing and "<script" not in drawing and rating_chart([]) == ""
    table = render_ratings(rate_models(games), duels(games), len(games))
    assert "over 4 votes" in table and "nan" not in table and "No votes yet" in render_ratings([], [], 0)
    tally = Tally()
    tally.add(0, "p", "a", {"s": 1.0})
    tally.add(0, "p", "b", {"s": 2.0})
    standings = tally.standings("s", ["a", "b", "never drawn"])
    assert "b 1.00, from" in rate_chart(standings, "s") and rate_chart(standings[1:], "s") == ""
    assert "never drawn" in render_standings(standings, "s")


def make_run(folder: Path, steps: int = 5) -> Path:
    folder.mkdir(parents=True)
    lines = [{"step": i, "loss": 1 / (i + 1), "rewards/accuracies": None if i == 2 else 0.6} for i in range(steps)]
    text = "\n".join(map(json.dumps, lines)) + '\n{"step": 9, "lo'  # the trainer is writing the last line
    (folder / "metrics.jsonl").write_text(text)
    return folder


def test_runs_are_found_read_and_fenced_in(tmp_path):
    root = tmp_path / "out"
    first = make_run(root / "quickstart" / "run")
    make_run(tmp_path / "elsewhere")
    runs = Runs(root)
    assert runs.names() == ["quickstart/run"]
    for name in ("../elsewhere", str(tmp_path / "elsewhere"), ""):
        with pytest.raises(ConfigError, match="no training run"):
            runs[name]
    run = runs["quickstart/run"]
    steps, losses = run.curves()["loss"]
    assert steps == [0, 1, 2, 3, 4] and losses[1] == 0.5
    assert math.isnan(run.curves()["rewards/accuracies"][1][2])
    drawing = curve_charts(run.curves())
    assert drawing.count("<figure>") == 2 and "loss from 1 to 0.2 at step 4" in drawing
    assert "still going" in run.verdict() and run.checkpoints() == run.grids() == {}
    assert drawing.count("<polyline") == 2 and drawing.count('r="2"') == 5 + 4  # the step without a value is bridged
    alarms = [{"name": "x", "message": "the winner's error rises.", "step": 3}]
    (first / "training_report.json").write_text(json.dumps({"steps": 5, "alarms": alarms}))
    assert "with 1 alarm at step 3: the winner's error rises." in run.verdict()
    (first / "config.yaml").write_text("model: shapes\n")
    assert run.settings() == "model: shapes\n"
    with pytest.raises(ConfigError, match="no checkpoint"):
        run.specs(["start", "step 7"], "shapes")


def test_an_online_run_has_its_own_curves():
    steps = [1, 2, 3]
    holdout = {f"holdout/{name}": (steps, [0.0, math.nan, 0.25]) for name in ("clip", "clip_change", "clip_error")}
    judge = {"reward/a <b>/ties": (steps, [0.5] * 3), "reward/a <b>/missing": (steps, [math.nan] * 3)}
    drawing = curve_charts(holdout | judge | {"clip_share": (steps, [0.1] * 3), "group/diversity": (steps, [1.0] * 3)})
    assert "clip change from 0 to 0.25 at step 3" in drawing and "clip error" not in drawing
    assert drawing.count("<figure>") == 4 and "a &lt;b&gt;/ties" in drawing and "missing from" not in drawing


def test_a_run_of_whole_models_starts_from_its_base_not_from_its_end(weights, tmp_path):
    run = make_run(tmp_path / "run")
    (run / "config.yaml").write_text(f"model: {weights['base']}\n")
    shutil.copytree(weights["other"], run / "final")
    specs = Runs(tmp_path)["run"].specs(["start", "final"], "shapes")
    assert specs["start"].source == str(weights["base"]) and specs["final"].source == str(run / "final")
    assert list(specs) == [spec.label for spec in specs.values()] == ["start", "final"]


def test_long_curves_are_thinned(tmp_path):
    run = Runs(make_run(tmp_path / "out" / "long", steps=3 * MAX_POINTS).parent)["long"]
    steps, values = run.curves()["loss"]
    assert len(steps) == len(values) == MAX_POINTS and steps[1] == 3
    assert values[0] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
