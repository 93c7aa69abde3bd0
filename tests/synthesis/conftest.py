"""A small run of the generator on two tiny pipelines, and ways to run it in children that may be killed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from diffalign.synthesis.config import GenerationConfig, parse
from diffalign.synthesis.run import generate
from tests import children
from tests.tiny import tiny_sd

PROMPTS = ["a cat", "a dog", "a bird", "two dogs", "a red fish"]
JUDGES = "tests.synthesis.judges:"


@pytest.fixture(scope="session")
def painters(tmp_path_factory) -> list[str]:
    """Folders of two tiny pipelines."""
    folders = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp("painter") / f"painter{seed}"
        tiny_sd(seed).save_pretrained(folder)
        folders.append(str(folder))
    return folders


@pytest.fixture(scope="session")
def prompts(tmp_path_factory) -> Path:
    """A file of prompts."""
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(PROMPTS), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def in_folder(painters, prompts) -> Callable[..., GenerationConfig]:
    """Settings of a small run in a folder, with changes."""

    def make(folder: Path, **changes: Any) -> GenerationConfig:
        common = {"steps": 1, "guidance": 2.0, "batch_size": 3}
        values = {
            "output_dir": str(folder),
            "prompts": str(prompts),
            "pipelines": [
                {"name": "one", "model": painters[0], "images": 2, **common},
                {"name": "two", "model": painters[1], "images": 1, **common},
            ],
            "reward_models": [
                {"name": "red", "model": JUDGES + "red"},
                {"name": "spread", "model": JUDGES + "spread"},
            ],
            "prompts_per_shard": 2,
        }
        return parse(GenerationConfig, values | changes)

    return make


@pytest.fixture
def settings(in_folder, tmp_path) -> Callable[..., GenerationConfig]:
    """Settings of a run in a folder of the test's own."""
    return lambda name="run", **changes: in_folder(tmp_path / name, **changes)


@pytest.fixture(scope="session")
def clean(in_folder, tmp_path_factory) -> tuple[GenerationConfig, dict[str, Any]]:
    """A finished run, which no test changes, and its report."""
    config = in_folder(tmp_path_factory.mktemp("clean") / "run")
    report = generate(config)
    assert report is not None
    return config, report


@pytest.fixture
def own_clean(clean, tmp_path) -> GenerationConfig:
    """A copy of the finished run, to be changed."""
    shutil.copytree(clean[0].output_dir, tmp_path / "copy")
    return clean[0].model_copy(update={"output_dir": str(tmp_path / "copy")})


def table_bytes(folder: str | Path) -> dict[str, bytes]:
    """Everything of a finished table that must not depend on how it came to be."""
    names = ["*.parquet", "set_aside/*.parquet", "score_ranges.json", "manifest.json", "heldout.jsonl"]
    return {str(p.relative_to(folder)): p.read_bytes() for name in names for p in sorted(Path(folder).glob(name))}


def child(config: GenerationConfig, before: Callable[[], None] | None = None, **options: Any) -> BaseProcess:
    """A started child that runs the generator, after ``before``."""
    return children.start(_generate, config, before, options)


def _generate(config: GenerationConfig, before: Callable[[], None] | None, options: dict[str, Any]) -> None:
    if before is not None:
        before()
    generate(config, **options)
