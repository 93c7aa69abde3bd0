"""The table that a paper pastes: what it says, and what it refuses to put side by side."""

from __future__ import annotations

import copy
import json

import pytest

from diffalign.cli.app import main
from diffalign.errors import ConfigError, DataError
from diffalign.evaluation import claims_table

SCORE = {"base": 0.5, "aligned": 0.6, "difference": {"mean": 0.1, "ci95": [0.02, 0.18], "n": 40}, "role": "hold-out"}
MODEL = {
    "name": "aligned",
    "method": "dpo",
    "training_seed": 0,
    "training_commit": "a" * 40,
    "scores": {"shapes_strict": SCORE, "red": SCORE | {"role": "trained-on"}},
}
REPORT = {
    "method": "dpo",
    "base": "shapes",
    "prompts": 40,
    "seeds": 1,
    "prompts_hash": "abcd",
    "scores": MODEL["scores"],
    "models": [MODEL],
    "sampling": {"steps": 12, "guidance": 3.0},
    "reward_models": {"red": {"id": "red", "code_version": "1"}, "shapes_strict": {"id": "s"}},
    "commit": "b" * 40 + "+changes",
}


@pytest.fixture
def write(tmp_path):
    def write(name, **changes):
        report = copy.deepcopy(REPORT)
        model = report["models"][0]
        for key in ("training_seed", "method"):
            if key in changes:
                model[key] = changes.pop(key)
        if "mean" in changes:
            model["scores"]["red"]["difference"]["mean"] = changes.pop("mean")
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(report | changes))
        return tmp_path / name

    return write


def test_a_row_has_differences_intervals_and_marks_and_notes_name_seeds_and_commits(write):
    table = claims_table([write("a")])
    lines = table.splitlines()
    assert lines[0] == "| method | Δ shapes_strict | Δ red |"
    assert lines[2] == "| dpo | +0.100 [+0.020, +0.180] | +0.100 [+0.020, +0.180]† |"
    assert "†: the score made the preferences" in table
    for fact in (
        "training seed 0",
        f"training commit {'a' * 12}",
        f"evaluation commit {'b' * 12}+changes",
        "guidance 3",
    ):
        assert fact in lines[-1]


def test_what_differs_becomes_a_column(write):
    table = claims_table([write("a"), write("b", method="mapo", sampling={"steps": 12, "guidance": 7.0})])
    assert table.splitlines()[0] == "| method | guidance | Δ shapes_strict | Δ red |"
    assert "| mapo | 7 |" in table and "steps 12" in table.splitlines()[-1]


def test_runs_of_one_method_get_their_mean_with_an_interval_over_seeds(write):
    runs = [write(str(seed), training_seed=seed, mean=mean) for seed, mean in enumerate((0.1, 0.2, 0.3))]
    last = [line for line in claims_table(runs, scores=["red"]).splitlines() if line.startswith("| dpo")][-1]
    assert "mean of 3" in last and "+0.200 [-0.048, +0.448]†" in last  # 4.303 x 0.1 / sqrt(3)
    assert "mean of" not in claims_table([runs[0], write("again", training_seed=0)])
    apart = write("apart", training_seed=3, sampling={"steps": 12, "guidance": 7.0})
    assert "mean of" not in claims_table([runs[0], apart])  # two guidance scales have no common mean
    assert "mean of 3" in claims_table([*runs, apart])


def test_latex_is_escaped_and_whole(write):
    table = claims_table([write("a")], format="latex")
    assert table.startswith(r"\begin{tabular}{lrr}") and r"\end{tabular}" in table
    assert r"$\Delta$ shapes\_strict" in table and r"$^{\dagger}$" in table
    assert all(line.startswith("%") for line in table.split(r"\end{tabular}")[1].strip().splitlines())


def test_reports_of_the_first_version_are_read(write):
    old = {key: value for key, value in REPORT.items() if key not in ("models", "prompts_hash", "commit")}
    folder = write("a")
    (folder / "report.json").write_text(json.dumps(old))
    assert "| dpo |" in claims_table([folder / "report.json"])


def test_what_cannot_be_compared_is_refused(write, tmp_path):
    a = write("a")
    other = write("b", reward_models={"red": {"id": "red", "code_version": "2"}, "shapes_strict": {"id": "s"}})
    with pytest.raises(ConfigError, match="another scorer"):
        claims_table([a, other])
    assert "red" not in claims_table([a, other], scores=["shapes_strict"])
    with pytest.raises(ConfigError, match="no report has the score nothing"):
        claims_table([a], scores=["nothing"])
    with pytest.raises(ConfigError, match="format"):
        claims_table([a], format="word")
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(DataError, match="no report"):
        claims_table([tmp_path / "x.json"])


def test_the_command_writes_a_file_and_fails_in_one_line(write, tmp_path, capsys):
    with pytest.raises(SystemExit) as done:
        main(["claims", str(write("a")), "--format", "latex", "--output", str(tmp_path / "t.tex")])
    assert not done.value.code and (tmp_path / "t.tex").read_text().startswith(r"\begin{tabular}")
    with pytest.raises(SystemExit) as failed:
        main(["claims", str(tmp_path / "nowhere.json")])
    assert failed.value.code == 1 and "no report" in capsys.readouterr().err
