"""`check_preferences`: every bad row by its number, and what else is worth knowing."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from diffalign.data import FEATURES, check_preferences, row_id_of, write_preferences
from diffalign.errors import DataError

from .conftest import png


def test_a_sound_table_has_counts_and_no_complaints(tmp_path: Path) -> None:
    rows = [
        {"prompt": "one two three", "images": [png(0), png(1)], "preference": [1, 0]},
        {"prompt": "one", "images": [png(2, 32, 40), png(3, 32, 40), png(4, 32, 40)], "rank": [1, 1, 3]},
        {"prompt": "one", "images": [png(5), png(6)], "preference": [0.5, 0.5], "scores": {"judge": [1, None]}},
    ]
    write_preferences(rows, tmp_path)
    report = check_preferences(tmp_path)
    assert report.ok and (report.rows, report.usable, report.errors) == (3, 3, [])
    assert report.candidates == {"2": 2, "3": 1} and report.sizes == {"32x32": 4, "32x40": 3}
    assert report.ties == {"all": 1, "some": 1, "pairs": 2}
    assert report.scores == {"judge": {"present": 1, "missing": 1}}
    assert report.prompts == {"different": 2, "least": 1, "median": 1, "greatest": 3}
    assert not (report.stale_row_ids or report.duplicate_rows or report.mixed_aspect or report.long_prompts)
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True
    assert "3 rows, 3 usable, 0 with errors" in str(report) and "score judge: 1 present, 1 missing" in str(report)


def test_every_bad_row_is_named_and_the_rest_still_counted(tmp_path: Path) -> None:
    good = {"prompt": "p", "images": [png(0), png(1)], "preference": [1.0, 0.0]}
    rows = [
        good,
        good | {"images": [png(0)], "preference": [1.0]},
        good | {"images": [png(0), png(1)[:150]]},
        good | {"preference": [1.0, float("nan")]},
        good | {"images": [png(0), png(1, 4, 32)]},
        good | {"images": [png(0), b""]},
        good | {"prompt": None},
        good,
    ]
    table = [
        {**row, "images": [{"bytes": data, "path": None} for data in row["images"]], "row_id": f"stale {i}"}
        | {key: [] for key in ("sources", "scores")}
        | {"rank": None}
        for i, row in enumerate(rows)
    ]
    datasets.Dataset.from_list(table, features=FEATURES).to_parquet(str(tmp_path / "train.parquet"))
    report = check_preferences(tmp_path)
    assert not report.ok and report.rows == 8 and report.usable == 2
    assert [error["row"] for error in report.errors] == [1, 2, 3, 4, 5, 6]
    text = [error["message"] for error in report.errors]
    for message, part in zip(
        text, ("at least two", "damaged", "NaN", "latent cell", "got nothing", "prompt"), strict=True
    ):
        assert part in message
    assert "error: row 3, preference[1]" in str(report)
    assert report.duplicate_rows == [[0, 7]] and report.stale_row_ids == [0, 7]


def test_notes_on_rows_that_load_but_deserve_a_look() -> None:
    rows = [
        {"prompt": "word " * 500, "images": [png(0), png(1)], "rank": [1, 2]},
        {"prompt": "p", "images": [png(0), png(0)], "rank": [1, 2]},
        {"prompt": "p", "images": [png(0, 32, 64), png(1)], "rank": [1, 2]},
        {"prompt": " ", "images": [png(0), png(1)], "rank": [1, 2]},
        {"prompt": "p", "images": [png(0), png(1)], "rank": [1, 2], "row_id": row_id_of("p", [png(0), png(1)])},
    ]
    report = check_preferences(rows)  # type: ignore[arg-type]
    assert report.ok and report.long_prompts == [0] and report.duplicate_images == [1]
    assert report.mixed_aspect == [2] and report.empty_prompts == [3] and report.stale_row_ids == []
    assert report.prompts["greatest"] == 500
    assert "1 rows with a prompt of more than 75 words, which CLIP cuts: 0" in str(report)


def test_pickapic_tables_and_places_without_a_table(tmp_path: Path) -> None:
    rows = [
        {"caption": "c", "jpg_0": png(0), "jpg_1": png(1), "label_0": label, "label_1": 1 - label, "has_label": known}
        for label, known in ((1.0, True), (0.5, True), (0.0, False))
    ]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "part.parquet"))
    report = check_preferences(tmp_path)
    assert report.ok and (report.rows, report.usable, report.unlabelled) == (3, 2, 1) and report.ties["all"] == 1
    with pytest.raises(DataError, match="no such file or folder"):
        check_preferences(tmp_path / "none")
