"""`diffalign generate` and what `diffalign data` does with its tables."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from diffalign.cli import main
from diffalign.cli.failures import one_line
from diffalign.data import load_preferences
from diffalign.synthesis.config import load_generation
from tests.tiny import tiny_sd


def run(capsys, *arguments):
    """Exit status, stdout and stderr of one command."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return int(stopped.value.code or 0), output.out, output.err


@pytest.fixture
def job(tmp_path) -> Path:
    """A YAML file of a tiny run on the shapes prompts."""
    tiny_sd().save_pretrained(tmp_path / "model")
    spec = {"model": str(tmp_path / "model"), "images": 2, "steps": 1, "guidance": 1.0}
    settings = {
        "output_dir": str(tmp_path / "table"), "prompts": "shapes", "max_prompts": 3, "pipelines": [spec],
        "reward_models": [{"name": "red", "model": "tests.synthesis.judges:red"}],
    }  # fmt: skip
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "job.yaml"


def test_from_prompts_to_a_table_and_on(capsys, job, tmp_path):
    status, out, err = run(capsys, "generate", job)
    assert status == 0, err
    assert "3 rows with 6 ranked pictures of 6 drawn" in out
    report = json.loads((tmp_path / "table" / "generation_report.json").read_text())
    assert report["rows"] == 3 and report["pictures_per_second"] > 0
    assert run(capsys, "data", "check", tmp_path / "table")[0] == 0
    status, out, _ = run(capsys, "data", "rerank", tmp_path / "table", tmp_path / "again", "rank_by=weighted_sum")
    assert status == 0 and "3 rows" in out
    for form in ("pickapic", "folder", "webdataset"):
        assert run(capsys, "data", "export", tmp_path / "table", tmp_path / form, "--format", form)[0] == 0
    assert len(load_preferences(tmp_path / "folder")) == len(load_preferences(tmp_path / "pickapic")) == 3


def test_check_prints_the_resolved_settings(capsys, tmp_path):
    status, out, _ = run(capsys, "generate", "shapes-synpic", "pipelines.base.steps=7", "--check")
    assert status == 0
    (tmp_path / "job.yaml").write_text(out)
    assert load_generation(tmp_path / "job.yaml") == load_generation("shapes-synpic", ["pipelines.base.steps=7"])


def test_help_explains_every_key(capsys):
    status, out, _ = run(capsys, "generate", "--help")
    assert status == 0
    assert "  prompts_per_shard: a whole number; default 100" in out and "shapes-style" in out


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["generate", "shapes-sinpic"], "did you mean 'shapes-synpic'"),
        (["generate", "shapes-synpic", "imagse=3"], "unknown key 'imagse'"),
        (["generate", "shapes-synpic", "reward_models=[shaps]"], "Did you mean 'shapes'"),
        (["generate", "shapes-synpic", "--policy", "/nowhere"], "/nowhere does not exist"),
        (["generate", "shapes-synpic", "--process", "2/2"], "a process from 0 to 1, got 2"),
        (["generate", "shapes-synpic", "--process", "x"], "expected I/N"),
        (["generate", "shapes-synpic", "pipelines=[{model: /nowhere, images: 2}]", "max_prompts=2"], "/nowhere"),
        (["data", "rerank", "/nowhere", "x"], "/nowhere"),
        (["data", "export", "/nowhere", "x", "--format", "zip"], "pickapic, folder, webdataset"),
        (["data", "export", "/nowhere", "x", "--format", "folder", "--pairs", "all"], "writes whole rows"),
        (["data", "push", "/nowhere", "me/x"], "no finished table"),
    ],
)
def test_bad_input_is_one_clear_line(capsys, monkeypatch, tmp_path, arguments, word):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys, *arguments)
    assert status == 1
    assert word in err and "Traceback" not in err


def test_what_to_do_without_memory_names_keys_of_each_command():
    from diffalign.trainers.config import DPOConfig

    said = one_line(torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"))
    assert "Tried to allocate 2 GiB Lower the batch size" in said
    generating, training = said.split("`generate`")[1].split(";")
    assert set(re.findall(r"(\w+_\w+)", generating)) == {"load_models", "one_by_one"}
    assert set(re.findall(r"(\w+_\w+)", training)) <= set(DPOConfig.__dataclass_fields__)
