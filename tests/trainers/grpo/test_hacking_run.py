"""The benchmark that hacks a reward, for two updates: too few to hack anything, enough to keep it alive."""

from __future__ import annotations

import json

import pytest

from tests.scripts import script


@pytest.mark.slow
def test_the_hacking_run_measures_both_sides_and_reads_a_finished_arm_back(tmp_path, capsys):
    main = script("benchmarks/hacking_run.py").main
    arguments = ["--output-dir", str(tmp_path / "out"), "--arms", "foolish", "--updates", "2", "--every", "1"]
    arguments += ["--prompts", "2", "--heldout", "4", "--results", str(tmp_path / "numbers.json")]
    assert main([*arguments, "--sheet", str(tmp_path / "sheet.png")]) == 1
    assert "NOT as expected" in capsys.readouterr().out and (tmp_path / "sheet.png").is_file()
    first = json.loads((tmp_path / "numbers.json").read_text())
    curve = first["arms"]["foolish"]["curve"]
    assert [row["step"] for row in curve] == [1, 2] and first["arms"]["foolish"]["alarms"] == []
    assert curve[0].keys() == {"step"} | {
        f"holdout/{name}_{what}" for name in ("training-colourful", "shapes-strict") for what in ("change", "error")
    }
    assert main(arguments) == 1
    assert json.loads((tmp_path / "numbers.json").read_text())["arms"] == first["arms"]
