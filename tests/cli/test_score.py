"""`diffalign score`: every kind of source, exact files, one model at a time, continuing after a kill, bad input."""

from __future__ import annotations

import csv
import io
import json
import signal
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffalign.cli import main
from diffalign.data import write_preferences
from diffalign.evaluation import scores
from diffalign.shapes import parse, render, sample_captions
from diffalign.shapes.scorer import ShapesScorer
from reward_models import BaseRewardModel
from tests import children

CAPTIONS = sample_captions(4, seed=5)
HERE = "tests.cli.test_score:"
ALIVE: weakref.WeakSet[BaseRewardModel] = weakref.WeakSet()


class Brightness(BaseRewardModel):
    """A user's model. It refuses to be loaded while another is in memory."""

    name = "brightness"

    def __init__(self, scale: float = 1.0) -> None:
        assert not ALIVE, "two models in memory"
        ALIVE.add(self)
        self.scale = scale

    @property
    def identity(self):
        return {"id": self.name, "revision": "r1", "code_version": "1"}

    def score_batch(self, images, prompts):
        return [self.scale * float(np.asarray(image).mean()) for image in images]


class Picky(Brightness):
    """Gives no score for dark pictures."""

    name = "picky"

    def score_batch(self, images, prompts):
        return [score if score > 100 else None for score in super().score_batch(images, prompts)]


class Comparer:
    name, identity = "comparer", {"id": "comparer", "revision": None, "code_version": None}

    def compare(self, pairs, prompts): ...


def picture(number: int) -> Image.Image:
    """Even ones show their row's caption, odd ones the next row's."""
    return render(parse(CAPTIONS[(number + 1) // 2 % 4]), np.random.default_rng(number))


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, format="PNG")
    return buffer.getvalue()


def table(folder: Path) -> Path:
    rows = [
        {"prompt": CAPTIONS[n], "images": [png(2 * n), png(2 * n + 1)], "preference": [1.0, 0.0], "rank": [1, 2]}
        for n in range(4)
    ]
    write_preferences(rows, folder)
    return folder


def files(folder: Path) -> Path:
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.png").write_bytes(png(number))
    return folder


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of one command."""
    with pytest.raises(SystemExit) as stopped:
        main(["score", *map(str, arguments)])
    output = capsys.readouterr()
    return int(stopped.value.code or 0), output.out, output.err


def refusal(capsys, *arguments: str) -> str:
    """The one line on stderr of a command that fails."""
    status, _, err = run(capsys, *arguments)
    lines = [line for line in err.splitlines() if line.startswith("error")]
    assert status != 0 and len(lines) == 1, err
    return lines[0]


# --- sources -----------------------------------------------------------------------------------------------------


def truth() -> list[float]:
    prompts = [CAPTIONS[number // 2] for number in range(8)]
    return ShapesScorer().score([picture(number) for number in range(8)], prompts).tolist()


def as_table(folder: Path) -> tuple[Path, list[str]]:
    return table(folder), []


def as_folder_with_texts(folder: Path) -> tuple[Path, list[str]]:
    files(folder)
    for number in range(8):
        (folder / f"{number}.txt").write_text(CAPTIONS[number // 2] + "\n")
    return folder, []


def as_folder_with_metadata(folder: Path) -> tuple[Path, list[str]]:
    files(folder)
    rows = [{"file_name": f"{number}.png", "text": CAPTIONS[number // 2]} for number in range(8)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder, []


def as_jsonl(folder: Path) -> tuple[Path, list[str]]:
    files(folder)
    rows = [{"prompt": CAPTIONS[number // 2], "image": str(folder / f"{number}.png")} for number in range(8)]
    (folder.parent / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder.parent / "list.jsonl", []


def as_csv(folder: Path) -> tuple[Path, list[str]]:
    files(folder)
    lines = ["path,caption", *(f"{number}.png,{CAPTIONS[number // 2]}" for number in range(8))]
    (folder / "list.csv").write_text("\n".join(lines))
    return folder / "list.csv", []


SOURCES = [as_table, as_folder_with_texts, as_folder_with_metadata, as_jsonl, as_csv]


@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)
def test_every_source_gives_the_same_scores(make, tmp_path, capsys):
    source, options = make(tmp_path / "pictures")
    output = tmp_path / "scores.parquet"
    status, out, _ = run(capsys, source, "--model", "shapes", "--output", output, *options)
    assert status == 0 and "shapes" in out
    written = pq.read_table(output)
    assert written["shapes"].to_pylist() == truth()
    assert written["prompt"].to_pylist() == [CAPTIONS[number // 2] for number in range(8)]
    identities = json.loads(written.schema.metadata[b"reward_models"])
    assert identities == {"shapes": ShapesScorer().identity}
    assert sorted(path.name for path in tmp_path.glob("scores*")) == ["scores.parquet", "scores.parquet.json"]


def test_one_prompt_for_a_folder_without(tmp_path, capsys):
    folder = files(tmp_path / "pictures")
    output = tmp_path / "scores.parquet"
    run(capsys, folder, "--prompt", CAPTIONS[0], "--model", "shapes", "--output", output)
    pictures = [picture(number) for number in range(8)]
    assert pq.read_table(output)["shapes"].to_pylist() == ShapesScorer().score(pictures, CAPTIONS[:1] * 8).tolist()
    assert pq.read_table(output)["file"].to_pylist() == [f"{number}.png" for number in range(8)]


def test_a_scorer_of_the_working_folder(tmp_path, capsys, monkeypatch):
    """An installed command has the folder of programs at the head of its path, not the user's."""
    (tmp_path / "my_own_scorer.py").write_text(
        "def count(images, prompts):\n    return [float(len(images))] * len(images)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    output = tmp_path / "scores.parquet"
    run(capsys, files(tmp_path / "pictures"), "--prompt", "x", "--model", "n=my_own_scorer:count", "--output", output)
    assert pq.read_table(output)["n"].to_pylist() == [8.0] * 8


# --- several models ----------------------------------------------------------------------------------------------


def test_models_take_turns_and_agree_by_rank(tmp_path, capsys):
    output = tmp_path / "scores.csv"
    status, out, err = run(
        capsys,
        *(table(tmp_path / "table"), "--output", output, "--ensemble", "votes", "--weight", "shapes=2"),
        *("--model", HERE + "Brightness", "--model", "shapes", "--model", f"twice={HERE}Brightness"),
        *("--model", f"picky={HERE}Picky", "--set", "twice.scale=2.5"),
    )
    assert status == 0, err
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    bright = np.array([float(row["Brightness"]) for row in rows])
    assert [float(row["shapes"]) for row in rows] == pytest.approx(truth())
    assert [float(row["twice"]) for row in rows] == pytest.approx((2.5 * bright).tolist())
    assert [row["picky"] == "" for row in rows] == (bright <= 100).tolist()  # missing is empty, not a number
    summary = json.loads((tmp_path / "scores.csv.json").read_text())
    assert summary["models"]["twice"]["identity"] == {"id": "brightness", "revision": "r1", "code_version": "1"}
    assert summary["models"]["twice"]["options"] == {"scale": "2.5"}
    assert summary["models"]["picky"]["missing"] == int((bright <= 100).sum()) > 0
    found = {tuple(pair["between"]): pair for pair in summary["correlations"]}
    assert found["Brightness", "twice"]["spearman"] == pytest.approx(1)
    assert found["Brightness", "twice"]["pearson"] == pytest.approx(1)
    assert found["Brightness", "picky"]["n"] == int((bright > 100).sum())
    by_hand = np.corrcoef(bright, truth())[0, 1]
    assert found["Brightness", "shapes"]["pearson"] == pytest.approx(by_hand, abs=1e-5)
    first = [float(row["ensemble"]) for row in rows[:2]]
    assert 0 <= min(first) <= max(first) <= 1
    assert "correlation" in out and "Brightness ~ twice" in out


# --- continuing --------------------------------------------------------------------------------------------------


class Slow(Brightness):
    """Notes every picture it is asked for, and says nothing any more after some."""

    name = "slow"
    notes: Path
    answers = 8

    def score_batch(self, images, prompts):
        with self.notes.open("a") as file:
            file.write("x" * len(images))
        if len(self.notes.read_text()) > self.answers:
            time.sleep(3600)
        return super().score_batch(images, prompts)


def score_slowly(arguments: list[str], notes: Path, answers: int) -> None:
    """In a child: every two scores are saved, and after some answers there are no more."""
    scores._AT_ONCE, scores._SAVE_EVERY = 2, 0.0
    Slow.notes, Slow.answers = notes, answers
    main(arguments)


def test_a_killed_command_continues_with_what_is_missing(tmp_path, monkeypatch, capsys):
    (source, _), output = as_folder_with_texts(tmp_path / "pictures"), tmp_path / "scores.parquet"
    arguments = ["score", str(source), "--model", f"slow={HERE}Slow", "--output", str(output)]
    monkeypatch.setattr(scores, "_AT_ONCE", 2)
    monkeypatch.setattr(Slow, "notes", tmp_path / "asked", raising=False)
    kept = tmp_path / "scores.parquet.parts" / "slow.json"
    first = children.start(score_slowly, arguments, Slow.notes, 4)
    while not (Slow.notes.exists() and len(Slow.notes.read_text()) == 6):
        assert first.is_alive()
        time.sleep(0.02)
    first.kill()  # SIGKILL
    assert children.wait(first) == -signal.SIGKILL and not output.exists()
    stored, before = len(json.loads(kept.read_text())["values"]), len(Slow.notes.read_text())
    assert (stored, before) == (4, 6)
    monkeypatch.setattr(Slow, "answers", 100)
    assert run(capsys, *arguments[1:])[0] == 0
    assert len(Slow.notes.read_text()) - before == 8 - stored  # nothing that was kept is asked for again
    found = pq.read_table(output)["slow"].to_pylist()
    assert found == pytest.approx([float(np.asarray(picture(number)).mean()) for number in range(8)])
    assert not kept.parent.exists()


# --- bad input ---------------------------------------------------------------------------------------------------


def test_bad_pictures_are_named_by_row(tmp_path, capsys):
    source, output = as_jsonl(tmp_path / "pictures")[0], tmp_path / "scores.parquet"
    (tmp_path / "pictures" / "5.png").write_bytes(png(5)[:200])
    line = refusal(capsys, source, "--model", "shapes", "--output", output)
    assert "row 5" in line and "5.png" in line and "damaged" in line
    (tmp_path / "pictures" / "3.png").unlink()
    assert "row 3" in refusal(capsys, source, "--model", "shapes", "--output", output)
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "--model", "shapes", "--output", "{0}/x.parquet"], "no such file or folder"),
        (["{0}/empty", "--model", "shapes", "--output", "{0}/x.parquet"], "expected pictures"),
        (["{0}/plain", "--model", "shapes", "--output", "{0}/x.parquet"], "0.txt"),
        (["{0}/table", "--model", "shapes", "--prompt", "x", "--output", "{0}/x.parquet"], "own prompts"),
        (["{0}/table", "--model", "shape", "--output", "{0}/x.parquet"], "Did you mean 'shapes'"),
        (["{0}/table", "--model", "shapes", "--output", "{0}/x.txt"], ".parquet or .csv"),
        (["{0}/table", "--model", "shapes", "--output", "{0}/plain/0.csv"], "--overwrite"),
        (["{0}/table", "--model", "shapes", "--model", "shapes", "--output", "{0}/x.csv"], "two models are named"),
        (["{0}/table", "--model", "shapes", "--set", "scale=2", "--output", "{0}/x.csv"], "COLUMN.OPTION=VALUE"),
        (["{0}/table", "--model", "shapes", "--set", "shapes.scale=2", "--output", "{0}/x.csv"], "no option 'scale'"),
        (["{0}/table", "--model", "a=shapes?scale=2", "--output", "{0}/x.csv"], "no option 'scale'"),
        (
            ["{0}/table", "--model", "shapes", "--set", "shapes.api_key=k", "--output", "{0}/x.csv"],
            "REWARD_MODEL_API_KEY",
        ),
        (["{0}/table", "--model", "shapes", "--weight", "shapes=2", "--output", "{0}/x.csv"], "--ensemble"),
        (["{0}/table", "--model", "shapes", "--ensemble", "best", "--output", "{0}/x.csv"], "votes, zscore or mean"),
        (["{0}/table", "--model", "ensemble", "--output", "{0}/x.csv"], "--ensemble RULE"),
        (["{0}/table", "--model", HERE + "Comparer", "--output", "{0}/x.csv"], "compares pairs"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_one_clear_line(arguments, words, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    files(tmp_path / "plain")
    (tmp_path / "plain" / "0.csv").write_text("")
    table(tmp_path / "table")
    assert words in refusal(capsys, *(argument.format(tmp_path) for argument in arguments))
