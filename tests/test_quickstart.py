"""The quickstart end to end, small; at its real size it is one of tests/test_proofs.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import datasets
import pytest
from PIL import Image

from diffalign.errors import ConfigError
from diffalign.quickstart import run

SMALL = {"prompts": 6, "images_per_prompt": 4, "heldout_prompts": 5, "steps": 2}
FEW = ["max_steps=2", "warmup_steps=0", "min_margin=0.0"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("quickstart") / "out"
    return folder, run(folder, overrides=FEW, **SMALL)


def test_it_writes_everything_it_promises(finished):
    folder, report = finished
    assert json.loads((folder / "report.json").read_text()) == report
    assert "<html" in (folder / "report.html").read_text()
    assert Image.open(folder / "grid.png").width > 100
    assert report["prompts"] == 5
    assert set(report["seconds"]) == {"generate_and_rank", "train", "evaluate", "total"}
    for score in report["scores"].values():
        assert score["difference"]["n"] == 5
    assert len(report["next_commands"]) == 3
    assert 0.2 < report["peak_memory_gib"] < 6
    card = (folder / "run" / "final" / "README.md").read_text()
    assert str(folder.parent.parent) not in card and "license: apache-2.0" in card


def test_the_table_has_the_final_schema(finished):
    folder, _ = finished
    table = datasets.load_dataset(str(folder / "preferences"), split="train")
    assert {"prompt", "images", "sources", "scores", "preference", "rank", "row_id"} <= set(table.column_names)
    assert len(table) == 6
    assert all(len(row["images"]) == 4 for row in table)


def test_running_it_again_continues_and_other_settings_are_refused(finished, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    drawn = {path: path.stat().st_mtime_ns for path in (folder / "preferences").glob("*.parquet")}
    again = run(folder, overrides=FEW, **SMALL)
    assert again["scores"] == finished[1]["scores"]
    assert {path: path.stat().st_mtime_ns for path in drawn} == drawn
    with pytest.raises(ConfigError, match="other settings"):
        run(folder, seed=1, overrides=FEW, **SMALL)
