"""Loading tables from everywhere, and refusing what cannot be used."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffalign.data import load_preferences, select_pairs, soften, write_preferences
from diffalign.errors import ConfigError, DataError

from .conftest import Rows, picture, png


def pickapic_rows(labels: list[float | None], **cells: object) -> Rows:
    return [
        {
            "caption": f"c{i}",
            "jpg_0": png(2 * i),
            "jpg_1": png(2 * i + 1),
            "label_0": label,
            "label_1": None if label is None else 1 - label,
            "has_label": True,
            **cells,
        }
        for i, label in enumerate(labels)
    ]


def image_folder(folder: Path, rows: Rows) -> Rows:
    """Saves the pictures and returns the rows with file names."""
    for i, row in enumerate(rows):
        names = []
        for j, data in enumerate(row["images"]):
            (folder / "pictures").mkdir(parents=True, exist_ok=True)
            (folder / "pictures" / f"{i}-{j}.png").write_bytes(data)
            names.append(f"pictures/{i}-{j}.png")
        row["images"] = names
    return rows


# --- where rows come from --------------------------------------------------------------------------------------


def test_every_source_gives_the_same_rows(tmp_path: Path, make_rows: Callable[..., Rows]) -> None:
    rows = make_rows(3)
    write_preferences(rows, tmp_path / "table", shard_rows=2)
    named = image_folder(tmp_path / "jsonl", make_rows(3))
    (tmp_path / "jsonl" / "metadata.jsonl").write_text("\n".join(map(json.dumps, named)) + "\n")
    image_folder(tmp_path / "parquet", make_rows(3))
    pq.write_table(pa.Table.from_pylist(named), tmp_path / "parquet" / "metadata.parquet")
    image_folder(tmp_path / "csv", make_rows(3))
    with (tmp_path / "csv" / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "images", "preference"])
        writer.writerows([r["prompt"], ";".join(r["images"]), ";".join(map(str, r["preference"]))] for r in named)
    memory = datasets.Dataset.from_list(rows)
    memory.save_to_disk(str(tmp_path / "saved"))
    memory.to_parquet(str(tmp_path / "plain" / "file.parquet"))
    sources = [
        rows,
        memory,
        datasets.DatasetDict({"train": memory}),
        tmp_path / "table",
        str(tmp_path / "table" / "train-00000.parquet"),
        tmp_path / "plain" / "file.parquet",
        tmp_path / "saved",
        tmp_path / "jsonl",
        tmp_path / "jsonl" / "metadata.jsonl",
        tmp_path / "csv",
        tmp_path / "parquet",
    ]
    expected = [(row.row_id, row.prompt, row.rank, row.image_bytes) for row in load_preferences(rows)]
    for source in sources:
        found = [(row.row_id, row.prompt, row.rank, row.image_bytes) for row in load_preferences(source)]
        assert found == expected[: len(found)] and len(found) >= 2, source


def test_splits_of_a_hub_layout(tmp_path: Path, make_rows: Callable[..., Rows]) -> None:
    write_preferences(make_rows(2), tmp_path / "data", split="train")
    write_preferences(make_rows(1), tmp_path / "data", split="test")
    (tmp_path / "README.md").write_text("A card beside the table.\n")
    (tmp_path / "report.json").write_text("{}")
    assert len(load_preferences(tmp_path)) == 2 and len(load_preferences(tmp_path, split="test")) == 1
    with pytest.raises(DataError, match="expected a split named 'validation', got"):
        load_preferences(tmp_path, split="validation")


def test_rows_are_lazy_and_arrow_is_memory_mapped(tmp_path: Path, make_rows: Callable[..., Rows]) -> None:
    write_preferences(make_rows(3), tmp_path)
    dataset = load_preferences(tmp_path)
    row = dataset[1]
    assert "images" not in vars(row) and len(row.images) == 2 and "images" in vars(row)
    assert dataset[-1].prompt == "prompt 2" and dataset.prompt(0) == "prompt 0"
    with pytest.raises(IndexError):
        dataset[3]


def test_a_changed_table_has_another_fingerprint(tmp_path: Path, make_rows: Callable[..., Rows]) -> None:
    write_preferences(make_rows(3), tmp_path)
    first = load_preferences(tmp_path)
    assert first.fingerprint == load_preferences(tmp_path).fingerprint
    assert first.select([0, 1]).fingerprint != first.fingerprint
    write_preferences(make_rows(1), tmp_path, append=True)
    assert load_preferences(tmp_path).fingerprint != first.fingerprint
    memory = [datasets.Dataset.from_list(make_rows(n)) for n in (2, 3)]
    assert load_preferences(memory[0]).fingerprint != load_preferences(memory[1]).fingerprint
    assert load_preferences(make_rows(2)).fingerprint is None


def test_a_changed_picture_changes_the_fingerprint_of_an_image_folder(tmp_path: Path, make_rows: Callable) -> None:
    named = image_folder(tmp_path, make_rows(2))
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, named)))
    first = load_preferences(tmp_path)
    (tmp_path / named[0]["images"][0]).write_bytes(png(99, 16, 16))
    assert load_preferences(tmp_path).fingerprint != first.fingerprint


LINE_ENDS = "one\u2028two\u2029three\u0085four\x0bfive"


def test_only_line_feeds_end_a_row_of_jsonl(tmp_path: Path, make_rows: Callable[..., Rows]) -> None:
    named = image_folder(tmp_path, make_rows(2))
    named[0]["prompt"] = LINE_ENDS
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in named)
    (tmp_path / "metadata.jsonl").write_bytes(lines.encode())
    assert [row.prompt for row in load_preferences(tmp_path)] == [LINE_ENDS, "prompt 1"]


def test_a_quoted_cell_of_a_csv_keeps_its_line_ends(tmp_path: Path, make_rows: Callable[..., Rows]) -> None:
    named = image_folder(tmp_path, make_rows(2))
    named[0]["prompt"] = LINE_ENDS + "\r\nsix\nseven"
    with (tmp_path / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "images", "preference"])
        writer.writerows([row["prompt"], ";".join(row["images"]), "1;0"] for row in named)
    assert [row.prompt for row in load_preferences(tmp_path)] == [named[0]["prompt"], "prompt 1"]
    (tmp_path / "metadata.csv").write_text("prompt,images,preference\n" + "x" * 200_000 + ",a.png;b.png,1;0\n")
    with pytest.raises(DataError, match="metadata.csv: cannot be read as a table"):
        load_preferences(tmp_path)


# --- pictures named by path ------------------------------------------------------------------------------------


def path_only(paths: list[Path | str], **cells: object) -> datasets.Dataset:
    images = [{"bytes": None, "path": str(path)} for path in paths]
    return datasets.Dataset.from_list([{"prompt": "p", "images": images, "rank": [1, 2], **cells}])


def test_a_table_names_pictures_in_its_own_folder_alone(tmp_path: Path) -> None:
    """A downloaded table must not pull a private picture into what is made of it."""
    folder, private = tmp_path / "table", tmp_path / "private.png"
    folder.mkdir()
    for path in (private, folder / "a.png", folder / "b.png"):
        picture(len(path.name)).save(path)
    path_only(["a.png", folder / "b.png"]).to_parquet(folder / "inside.parquet")
    assert load_preferences(folder / "inside.parquet")[0].images[1].size == (32, 32)
    path_only(["a.png", private]).to_parquet(folder / "outside.parquet")
    path_only(["a.png", "../private.png"]).save_to_disk(str(tmp_path / "saved"))
    pickapic = {"caption": "p", "jpg_0": str(private), "jpg_1": str(folder / "a.png"), "label_0": 1.0}
    (tmp_path / "pairs").mkdir()
    pq.write_table(pa.Table.from_pylist([pickapic]), tmp_path / "pairs" / "train.parquet")
    for source in (folder / "outside.parquet", tmp_path / "saved", tmp_path / "pairs"):
        with pytest.raises(DataError, match=r"row 0, (images\[1\]|jpg_0): .*private.png lies outside"):
            _ = load_preferences(source)[0]
    assert load_preferences(path_only([private, private]))[0].images[0].size == (32, 32)  # one's own rows in memory


def test_a_hub_table_names_pictures_where_they_were_downloaded_to(tmp_path: Path, monkeypatch) -> None:
    from huggingface_hub.errors import EntryNotFoundError

    def no_ranges(*arguments: object, **options: object) -> None:
        raise EntryNotFoundError("no score_ranges.json")

    hub, downloads = tmp_path / "hub" / "datasets--me--table", tmp_path / "downloads"
    for folder in (hub, downloads, tmp_path / "hub" / "datasets--me--other"):
        folder.mkdir(parents=True)
        picture(0).save(folder / "a.png")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("datasets.config.DOWNLOADED_DATASETS_PATH", downloads)
    monkeypatch.setattr("diffalign.data.sources.hf_hub_download", no_ranges)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **o: path_only([hub / "a.png", downloads / "a.png"]))
    assert len(load_preferences("me/table")[0].images) == 2
    other = tmp_path / "hub" / "datasets--me--other" / "a.png"
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **o: path_only([hub / "a.png", other]))
    with pytest.raises(DataError, match=r"me/table, row 0, images\[1\]: .* lies outside"):
        _ = load_preferences("me/table")[0]


# --- Pick-a-Pic ------------------------------------------------------------------------------------------------


def test_pickapic_rows_are_pairs_with_ties_kept_apart() -> None:
    rows = pickapic_rows([1.0, 0.0, 0.5], model_0="dream", model_1="other")
    rows.append(pickapic_rows([None], has_label=False)[0])
    dataset = load_preferences(rows)
    assert [row.rank for row in dataset] == [[1, 2], [2, 1], [1, 1]]
    assert dataset[0].sources[1]["model"] == "other" and dataset[0].prompt == "c0"
    assert dataset.report.rows == 4 and dataset.report.kept == 3
    assert dict(dataset.report.dropped) == {"without a label": 1}
    assert len(load_preferences(rows, ties="drop")) == 2


def test_pickapic_with_label_0_alone() -> None:
    rows = [{key: row[key] for key in ("caption", "jpg_0", "jpg_1", "label_0")} for row in pickapic_rows([1.0, 0.5])]
    assert [row.preference for row in load_preferences(rows)] == [[1.0, 0.0], [0.5, 0.5]]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"label_0": 1.0, "label_1": 1.0}, "row 0: expected label_0 and label_1"),
        ({"label_0": None, "label_1": None}, r"row 0, preference\[0\].*NaN"),
        ({"label_0": 0.7, "label_1": 0.3}, "row 0: expected label_0 and label_1"),
        ({"caption": None}, "row 0, prompt: expected a text"),
    ],
)
def test_pickapic_rows_that_cannot_be_used(cells: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_preferences(pickapic_rows([1.0], **cells))


# --- bad input -------------------------------------------------------------------------------------------------


def test_bad_rows_are_named_or_dropped_and_counted(make_rows: Callable[..., Rows], caplog: object) -> None:
    rows = make_rows(5)
    rows[1]["images"] = rows[1]["images"][:1]
    rows[2]["preference"] = [1.0, float("nan")]
    rows[3]["images"] = [png(0), b"not a picture"]
    with pytest.raises(DataError, match="the rows: row 1, images: expected at least two images"):
        load_preferences(rows)
    with caplog.at_level(logging.WARNING):  # type: ignore[attr-defined]
        dataset = load_preferences(rows, bad_rows="drop")
    assert [dataset.number(i) for i in range(len(dataset))] == [0, 4]
    assert dataset.report.dropped["unusable"] == 3
    assert "5 rows read, 2 kept, dropped 3 unusable (first: row 1" in caplog.text  # type: ignore[attr-defined]
    assert dataset[1].prompt == "prompt 4" and dataset[1].number == 4


def test_a_corrupt_image_is_found_when_it_is_read(make_rows: Callable[..., Rows]) -> None:
    rows = make_rows(2)
    rows[1]["images"][1] = rows[1]["images"][1][:200]
    dataset = load_preferences(rows)
    with pytest.raises(DataError, match=r"row 1, images\[1\]: the image is damaged"):
        _ = dataset[1].images


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": None}, "row 1, prompt: expected a text, got None"),
        ({"images": "a.png"}, "row 1, images: expected a list"),
        ({"images": None}, "row 1, images: expected a list"),
        ({"preference": ["9", "10"]}, r"row 1, preference\[0\]: expected a share of wins in \[0, 1\], got 9.0"),
        ({"preference": ["good", "bad"]}, r"row 1, preference\[0\]: expected a number, got 'good'"),
        ({"sources": [{}]}, "row 1, sources: expected 2 entries"),
    ],
)
def test_a_cell_that_cannot_be_used_is_named(make_rows: Callable[..., Rows], change: dict, message: str) -> None:
    rows = make_rows(2)
    rows[1] |= change
    with pytest.raises(DataError, match=message):
        load_preferences(rows)


def test_an_empty_image_cell_is_named(make_rows: Callable[..., Rows]) -> None:
    rows = make_rows(1)
    rows[0]["images"][1] = b""
    with pytest.raises(DataError, match=r"row 0, images\[1\]: expected an image .* got nothing"):
        _ = load_preferences(rows)[0]


def test_a_missing_column_is_named_with_what_is_there() -> None:
    with pytest.raises(DataError, match="missing column images; the table has prompt, preference"):
        load_preferences([{"prompt": "p", "preference": [1, 0]}])
    with pytest.raises(DataError, match="missing column one of preference, rank, scores"):
        load_preferences([{"prompt": "p", "images": [png(0), png(1)]}])
    with pytest.raises(DataError, match="missing column label_0; the table has caption"):
        load_preferences([{"caption": "p", "jpg_0": png(0), "jpg_1": png(1)}])


def test_places_that_hold_no_table_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        load_preferences(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds neither \*.parquet nor metadata.jsonl"):
        load_preferences(tmp_path)
    (tmp_path / "table.xlsx").write_bytes(b"x")
    with pytest.raises(DataError, match="expected a .parquet, .jsonl or .csv table, got .xlsx"):
        load_preferences(tmp_path / "table.xlsx")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="cut.parquet: not a readable Parquet file"):
        load_preferences(tmp_path / "cut.parquet")
    with pytest.raises(DataError, match="expected a folder, a file, a hub id"):
        load_preferences(7)
    with pytest.raises(DataError, match="empty table"):
        load_preferences([])


def test_a_hub_name_that_cannot_be_reached_is_one_clear_error() -> None:
    with pytest.raises(DataError, match="nobody/no-such-table: no such file or folder here, and the hub's dataset"):
        load_preferences("nobody/no-such-table")


def test_options_that_mean_nothing_are_refused(tmp_path: Path, make_rows: Callable[..., Rows]) -> None:
    write_preferences(make_rows(1), tmp_path)
    with pytest.raises(DataError, match="revision='main' means nothing"):
        load_preferences(tmp_path, revision="main")
    with pytest.raises(DataError, match="has only the split 'train'"):
        load_preferences(tmp_path / "train-00000.parquet", split="test")
    with pytest.raises(ConfigError, match="bad_rows: expected one of"):
        load_preferences(tmp_path, bad_rows="skip")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "p", "images": ["a.png", "b.png"], "rank": [1, 2]', "line 1: not JSON"),
        ('{"prompt": "p", "images": ["a.png", "none.png"], "rank": [1, 2]}', r"row 0, images\[1\]: cannot read"),
        ('{"prompt": "p", "images": ["a.png", "../b.png"], "rank": [1, 2]}', "lies outside the folder"),
        ('{"prompt": "p", "images": ["a.png", 7], "rank": [1, 2]}', "expected a file name, got 7"),
    ],
)
def test_mistakes_in_an_image_folder_are_named(tmp_path: Path, line: str, message: str) -> None:
    picture(0).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(line)
    with pytest.raises(DataError, match=message):
        _ = load_preferences(tmp_path)[0]


# --- controls --------------------------------------------------------------------------------------------------


def test_shuffled_preferences_keep_everything_but_who_won(make_rows: Callable[..., Rows]) -> None:
    dataset = load_preferences(make_rows(64))
    shuffled = dataset.with_shuffled_preferences(seed=0)
    wins = np.array([shuffled.rank(i)[0] == 1 for i in range(64)])
    assert 16 < wins.sum() < 48
    assert all(sorted(shuffled.preference(i)) == [0.0, 1.0] for i in range(64))
    assert shuffled[5].row_id == dataset[5].row_id and shuffled[5].rank == shuffled.rank(5)
    again = dataset.with_shuffled_preferences(seed=0)
    other = dataset.with_shuffled_preferences(seed=1)
    ranks = [[d.rank(i) for i in range(64)] for d in (shuffled, again, other)]
    assert ranks[0] == ranks[1] != ranks[2]


def test_shuffled_preferences_take_the_scores_along(make_rows: Callable[..., Rows]) -> None:
    """Soft labels by scores would otherwise keep the signal that the control is to lose."""
    rows = make_rows(64)
    for row in rows:
        row["images"].append(png(99))
        row["preference"] = [1.0, 0.5, 0.0]
        row["scores"] = {"clip": [1.0, 0.5, 0.0]}
    once = load_preferences(rows).with_shuffled_preferences(seed=0)
    for shuffled in (once, once.select(range(63, -1, -1)), once.with_shuffled_preferences(seed=1)):
        for i in range(64):
            assert shuffled.scores(i)["clip"] == shuffled.preference(i) == shuffled[i].scores["clip"]
        soft, counts = soften(select_pairs(shuffled)[0], shuffled, "clip", (0.0, 1.0), contradiction="follow_scores")
        assert counts == {"score_missing": 0, "contradictions": 0}
        wins = [sum(example.candidates[0] == candidate for example in soft) for candidate in range(3)]
        assert all(10 < count < 34 for count in wins)


def test_rows_are_selected_from_the_end_too(make_rows: Callable[..., Rows]) -> None:
    dataset = load_preferences(make_rows(3))
    assert dataset.select([-1])[0].prompt == "prompt 2" and dataset.select([-1]).rank(0) == [1, 2]
    with pytest.raises(IndexError):
        dataset.select([3])
