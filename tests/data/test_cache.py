"""The folder of shards: whole or absent, resumed after a kill, repaired when damaged."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
from pathlib import Path

import pytest
import torch

from diffalign.data.cache import TensorCache, as_exact_half
from diffalign.errors import DataError
from tests import children

MANIFEST = {"kind": "latents", "encoder": "abc", "variant": "fp32"}


def filled(folder: Path, first: int, last: int) -> TensorCache:
    cache = TensorCache(folder, MANIFEST)
    for i in range(first, last):
        cache.put({f"k{i}": torch.full((4, 3), float(i))})
    cache.flush()
    return cache


def test_what_is_put_is_read_by_another_opening(tmp_path: Path) -> None:
    filled(tmp_path, 0, 3)
    cache = TensorCache(tmp_path, MANIFEST)
    assert len(cache) == 3 and "k2" in cache and "k3" not in cache and sorted(cache) == ["k0", "k1", "k2"]
    assert torch.equal(cache.get("k2"), torch.full((4, 3), 2.0))
    with pytest.raises(DataError, match="has no entry k3"):
        cache.get("k3")


def test_a_slice_is_stored_without_the_rest_of_its_batch(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path, MANIFEST)
    batch = torch.randn(64, 1000)
    cache.put({"one": batch[3]})
    cache.flush()
    (shard,) = tmp_path.glob("shard-*")
    assert shard.stat().st_size < 8000
    assert torch.equal(cache.get("one"), batch[3])


def test_shards_of_another_process_appear_after_a_refresh(tmp_path: Path) -> None:
    mine, other = TensorCache(tmp_path, MANIFEST), TensorCache(tmp_path, MANIFEST)
    other.put({"k": torch.ones(2)})
    other.flush()
    assert "k" not in mine
    mine.refresh()
    assert torch.equal(mine.get("k"), torch.ones(2))


def keep_three_and_die(folder: Path) -> None:
    filled(folder, 0, 3).put({"lost": torch.ones(1)})
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_kill_loses_only_what_was_not_flushed(tmp_path: Path) -> None:
    assert children.wait(children.start(keep_three_and_die, tmp_path)) == -signal.SIGKILL
    cache = TensorCache(tmp_path, MANIFEST)
    assert sorted(cache) == ["k0", "k1", "k2"]


def test_a_half_written_shard_is_named_and_its_entries_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    filled(tmp_path, 0, 2)
    filled(tmp_path, 2, 4)
    shard = sorted(tmp_path.glob("shard-*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-5])
    with caplog.at_level(logging.WARNING):
        cache = TensorCache(tmp_path, MANIFEST)
    assert shard.name in caplog.text and "damaged" in caplog.text and len(cache) == 2
    assert not shard.exists() and shard.with_name(shard.name + ".damaged").exists()
    caplog.clear()
    again = filled(tmp_path, 0, 4)
    assert len(again) == 4 and not caplog.text


def test_shards_are_cut_by_size_and_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(TensorCache, "shard_bytes", 100)
        filled(tmp_path / "size", 0, 5)  # 48 bytes each
    assert len(list((tmp_path / "size").glob("shard-*"))) == 2
    monkeypatch.setattr(TensorCache, "flush_seconds", -1.0)
    filled(tmp_path / "time", 0, 5)
    assert len(list((tmp_path / "time").glob("shard-*"))) == 5


def test_another_encoder_or_version_is_refused(tmp_path: Path) -> None:
    filled(tmp_path, 0, 1)
    with pytest.raises(DataError, match="was made for .*'abc'.* this run needs .*'other'"):
        TensorCache(tmp_path, MANIFEST | {"encoder": "other"})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 0}))
    with pytest.raises(DataError, match="'schema_version': 0"):
        TensorCache(tmp_path, MANIFEST)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="unreadable manifest"):
        TensorCache(tmp_path, MANIFEST)


def test_a_full_disk_is_one_error_and_keeps_earlier_shards(tmp_path: Path) -> None:
    cache = filled(tmp_path, 0, 2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        cache.put({"large": torch.zeros(5000)})
        with pytest.raises(DataError, match="cannot write .*shard-.*Free space"):
            cache.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(TensorCache(tmp_path, MANIFEST)) == ["k0", "k1"]
    assert not list(tmp_path.glob(".*.tmp"))
    cache.flush()  # with room again, nothing is lost
    assert "large" in TensorCache(tmp_path, MANIFEST)


def test_halves_are_used_only_where_they_are_exact() -> None:
    exact = torch.randn(10).half().float()
    assert as_exact_half(exact).dtype == torch.float16 and torch.equal(as_exact_half(exact).float(), exact)
    wide = torch.tensor([1e38, 1.0]).bfloat16().float()
    assert as_exact_half(wide).dtype == torch.bfloat16
    full = torch.tensor([1 / 3])
    assert as_exact_half(full) is full
