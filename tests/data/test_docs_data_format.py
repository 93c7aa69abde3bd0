"""Every Python block of docs/data-format.md runs, in order, in one folder, on the toy pipeline."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import diffalign.pipelines
from tests.tiny import tiny_sdxl

PAGE = Path(__file__).parents[2] / "docs" / "data-format.md"


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 6
    monkeypatch.chdir(tmp_path)
    # the page names the embedded default; its weights would make this test slow
    monkeypatch.setattr(diffalign.pipelines, "load_pipeline", lambda name: tiny_sdxl())
    names: dict[str, object] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"data-format.md, block {number}", "exec"), names)
    assert (tmp_path / "my-table" / "train-00000.parquet").exists()
