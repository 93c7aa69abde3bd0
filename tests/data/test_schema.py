"""Writing tables: what others see, row ids, refusals, and a full disk."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from diffalign.data import (
    FEATURES,
    PreferenceRow,
    load_preferences,
    row_id_of,
    select_pairs,
    write_pickapic,
    write_preferences,
)
from diffalign.data.files import atomic_file, remove_stale
from diffalign.data.images import decode_image, image_size
from diffalign.errors import DataError

from .conftest import Rows, picture, png


def test_a_table_shows_pictures_to_the_datasets_library(tmp_path: Path, make_rows: Callable[..., Rows]) -> None:
    paths = write_preferences(make_rows(5), tmp_path / "table", shard_rows=2)
    assert [path.name for path in paths] == [f"train-0000{i}.parquet" for i in range(3)]
    table = datasets.load_dataset(str(tmp_path / "table"), split="train")
    assert table.features == FEATURES and len(table) == 5
    assert isinstance(table[0]["images"][0], Image.Image)
    assert np.array_equal(np.asarray(table[3]["images"][1]), np.asarray(picture(7)))


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": "a cat, très joli",
            "images": [png(0), picture(1), png(2)],
            "scores": {"judge": [0.5, None, "2"], "other": [1, 2, 3]},
            "preference": [0.25, 0.25, 1.0],
            "sources": [{"model": "shapes", "seed": 2**40, "guidance": 7.5}, {}, {"steps": 20}],
        }
    ]
    write_preferences(rows, tmp_path)
    row = load_preferences(tmp_path)[0]
    assert row.prompt == rows[0]["prompt"]
    assert row.preference == [0.25, 0.25, 1.0] and row.rank == [2, 2, 1]
    assert row.scores["other"] == [1, 2, 3] and np.isnan(row.scores["judge"][1]) and row.scores["judge"][2] == 2.0
    assert row.sources[0] == {
        "model": "shapes", "revision": None, "seed": 2**40, "steps": None, "guidance": 7.5, "scheduler": None,
        "pipeline": None,
    }  # fmt: skip
    assert row.image_bytes[0] == png(0) and np.array_equal(np.asarray(row.images[1]), np.asarray(picture(1)))
    assert row.row_id == row_id_of(row.prompt, row.image_bytes)


def test_the_row_id_is_the_content() -> None:
    first = row_id_of("p", [b"a", b"b"])
    assert first == row_id_of("p", [b"a", b"b"])
    others = [("q", [b"a", b"b"]), ("p", [b"b", b"a"]), ("p", [b"ab", b""]), ("p", [b"a", b"b", b"c"])]
    assert len({first, *(row_id_of(*other) for other in others)}) == 5


def test_a_table_is_not_written_over_but_may_be_added_to(tmp_path: Path, make_rows: Callable[..., Rows]) -> None:
    write_preferences(make_rows(2), tmp_path)
    before = (tmp_path / "train-00000.parquet").read_bytes()
    with pytest.raises(DataError, match="already holds 1 shards of the split 'train'"):
        write_preferences(make_rows(3), tmp_path)
    assert (tmp_path / "train-00000.parquet").read_bytes() == before
    write_preferences(make_rows(3), tmp_path, append=True)
    assert len(load_preferences(tmp_path)) == 5


def test_a_bad_row_is_named_and_whole_shards_stay(tmp_path: Path, make_rows: Callable[..., Rows]) -> None:
    rows = make_rows(5)
    rows[3]["images"] = rows[3]["images"][:1]
    with pytest.raises(DataError, match="row 3, images: expected at least two images.*first 2 rows are complete"):
        write_preferences(rows, tmp_path, shard_rows=2)
    assert [path.name for path in tmp_path.iterdir()] == ["train-00000.parquet"]


def test_unknown_source_keys_name_the_nearest(tmp_path: Path, make_rows: Callable[..., Rows]) -> None:
    with pytest.raises(DataError, match="row 0, sources: unknown key 'modle'; did you mean 'model'"):
        write_preferences(make_rows(1, sources=[{"modle": "x"}, {}]), tmp_path)


def test_a_full_disk_is_one_error_and_loses_nothing(tmp_path: Path, make_rows: Callable[..., Rows]) -> None:
    """A limit on file size stands for the full disk: the write itself fails."""
    write_preferences(make_rows(2), tmp_path)
    before = (tmp_path / "train-00000.parquet").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(DataError, match="cannot write .*train-00001.parquet: .*Free space"):
            write_preferences(make_rows(50), tmp_path, append=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["train-00000.parquet"]
    assert (tmp_path / "train-00000.parquet").read_bytes() == before


def test_half_written_files_of_dead_processes_are_removed(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic_file(tmp_path / "a"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with atomic_file(tmp_path / "b") as file:
        (own,) = tmp_path.glob(".b.*.tmp")
        dead = own.with_name(".".join([*own.name.split(".")[:-2], "4194305", "tmp"]))  # beyond the largest pid
        dead.write_bytes(b"half")
        assert remove_stale(tmp_path) == [dead.name]
        file.write(b"whole")
    assert (tmp_path / "b").read_bytes() == b"whole" and not list(tmp_path.glob(".*"))


def test_pickapic_columns_go_out_and_come_back(tmp_path: Path) -> None:
    rows = [
        {"prompt": "won by the second", "images": [png(0), png(1)], "preference": [0, 1]},
        {"prompt": "tie", "images": [png(2), png(3)], "preference": [0.5, 0.5]},
        {
            "prompt": "three",
            "images": [png(4), png(5), png(6)],
            "rank": [2, 3, 1],
            "sources": [{"model": "a"}, {"model": "b"}, {"model": "c"}],
        },
    ]
    dataset = load_preferences(rows)
    examples, _ = select_pairs(dataset, ties="soft")
    write_pickapic(dataset, examples, tmp_path, shard_rows=2)
    raw = datasets.load_dataset(str(tmp_path), split="train")
    assert raw["label_0"] == [0.0, 0.5, 0.0] and raw["label_1"] == [1.0, 0.5, 1.0]
    assert raw["jpg_0"][2] == png(5) and raw["jpg_1"][2] == png(6) and raw["model_1"][2] == "c"
    assert raw["best_image_uid"][1] == "tie" and raw["best_image_uid"][0] == raw["image_1_uid"][0]
    back = load_preferences(tmp_path)
    assert [row.rank for row in back] == [[2, 1], [1, 1], [2, 1]]
    assert back[0].row_id == dataset[0].row_id


def test_pictures_come_out_as_they_are_seen() -> None:
    turned = picture(1, 20, 30)
    exif = turned.getexif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    data = _saved(turned, "PNG", exif=exif)
    assert image_size(data, "x") == (30, 20) and decode_image(data, "x").size == (20, 30)
    glass = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert decode_image(_saved(glass, "PNG"), "x").getpixel((0, 0)) == (255, 255, 255)
    deep = Image.fromarray(np.full((8, 8), 32768, dtype=np.uint16))
    assert decode_image(_saved(deep, "PNG"), "x").getpixel((0, 0)) == (127, 127, 127)


def test_a_row_is_named_by_its_number_in_errors() -> None:
    row = PreferenceRow("p", [png(0), b"no picture"], [1, 0], [1, 2], number=7)
    with pytest.raises(DataError, match=r"row 7, images\[1\]: not a readable image"):
        _ = row.images
    cut = PreferenceRow("p", [png(0)[:300], png(1)], [1, 0], [1, 2], number=8)
    with pytest.raises(DataError, match=r"row 8, images\[0\]: the image is damaged"):
        _ = cut.images


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    import io

    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()
