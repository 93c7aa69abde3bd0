"""An iteration of Pref-GRPO at SDXL's size: `pytest -m gpu`; and at toy size everywhere, so that the script lives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.scripts import script


def run_benchmark(arguments: list[str], output: Path) -> dict:
    main = script("benchmarks/gpu/sdxl_prefgrpo_iteration.py").main
    return json.loads(main([*arguments, "--output-dir", str(output)]).read_text())


def test_the_benchmark_script_runs_on_a_toy_model(tmp_path):
    arguments = ["--tiny", "--iterations", "1", "--warmup", "1", "--sampling-steps", "4", "--group-size", "4"]
    report = run_benchmark(arguments, tmp_path)
    assert [result["case"] for result in report["results"]] == ["sampling", "matching"]
    for result in report["results"]:
        assert "error" not in result and result["log_ratio"] == 0.0 and result["grad_norm"] > 0
        seconds, (each,) = result["seconds"], result["seconds_each_iteration"]
        assert 0 < seconds["sampling"] + seconds["training"] < 1.01 * seconds["step"] + 1e-3
        assert each == pytest.approx(seconds["step"], abs=1e-3)
        assert result["peak_memory_gib"]["drawing"] > 0 and result["peak_memory_gib"]["update"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["sampling", "matching"])
def test_full_size_sdxl_iteration(case, tmp_path):
    (result,) = run_benchmark(["--cases", case, "--iterations", "1"], tmp_path)["results"]
    assert "error" not in result, result
    assert result["log_ratio"] == 0.0, "the update must see exactly what was drawn"
    assert max(result["peak_memory_gib"].values()) < 1.5 * result["estimated_memory_gib"] + 3
