"""What a measurement says of itself."""

from __future__ import annotations

from tests.scripts import script


def test_a_command_is_recorded_without_anybodys_folders():
    command = script("benchmarks/record.py").command
    called = [
        "/home/me/benchmarks/study.py",
        "--arms",
        "dpo",
        "--output-dir",
        "/home/me/x",
        "--results=/y",
        "--seeds",
        "0",
    ]
    assert command(called) == "python benchmarks/study.py --arms dpo --seeds 0"
    assert command(["study.py", "--output"]) == "python benchmarks/study.py"
