"""The command line: bad input is one clear line and a non-zero exit; reports are machine-readable."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from diffalign import __version__
from diffalign.cli import main
from diffalign.cli.failures import one_line
from diffalign.cli.tables import score_table
from diffalign.config import load_job
from diffalign.data import FEATURES, write_preferences
from diffalign.errors import ConfigError, DivergenceError, is_disk_full

ROOT = Path(__file__).parents[2]


def png(seed: int, size: int = 32) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def table(folder: Path, **changes: Any) -> Path:
    rows = [
        {"prompt": f"prompt {i}", "images": [png(2 * i), png(2 * i + 1)], "preference": [1.0, 0.0], "rank": [1, 2]}
        for i in range(4)
    ]
    rows[2] |= changes
    write_preferences(rows, folder)
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of one command."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    output = capsys.readouterr()
    return int(stopped.value.code or 0), output.out, output.err


# --- train -------------------------------------------------------------------------------------------------------


def test_check_prints_the_resolved_settings(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, _ = run(capsys, "train", "shapes-dpo", "beta=123", "--check")
    assert status == 0
    (tmp_path / "job.yaml").write_text(out)
    assert load_job(tmp_path / "job.yaml") == load_job("shapes-dpo", ["beta=123"])


def test_help_of_train_explains_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "train", "--help")
    assert status == 0
    assert "Noise levels\n  min_timestep: a whole number; default 0\n      Lowest timestep" in out
    assert "Method dpo: Diffusion-DPO\n  beta: a number; default 5000.0" in out
    assert "shapes-dpo" in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "shapes-dop"], "Did you mean 'shapes-dpo'"),
        (["train", "shapes-dpo", "bata=1"], "Did you mean 'beta'"),
        (["train", "shapes-dpo", "beta=0"], "beta must be"),
        (["train", "shapes-dpo", "dataset=/nowhere/at/all"], "/nowhere/at/all"),
        (["data", "check", "/nowhere/at/all"], "/nowhere/at/all"),
        (["evaluate", "/nowhere/at/all"], "/nowhere/at/all"),
        (["evaluate", "x", "--base", "some/model"], "--prompts"),
        (["evaluate", "x", "--seeds", "0"], "seeds must be at least 1"),
    ],
)
def test_bad_input_is_one_clear_line(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, *arguments)
    assert status == 1
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    assert err.startswith("error: ")
    assert expected in err


def test_debug_keeps_the_traceback() -> None:
    for arguments in (["--debug", "train", "shapes-dop"], ["train", "shapes-dop", "--debug"]):
        with pytest.raises(ConfigError):
            main(arguments)


def test_a_process_of_many_says_which_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run(capsys, "train", "shapes-dop")[2].startswith("error (process 1): ")


def test_an_unknown_command_or_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["trian"], ["train", "shapes-dpo", "--sedes", "3"], ["info", "--jsno"]):
        status, _, err = run(capsys, *arguments)
        assert status == 2
        assert "No such" in err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version")[:2] == (0, f"{__version__}\n")


# --- data check ----------------------------------------------------------------------------------------------------


def test_a_good_table_passes_and_its_report_is_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder, report = table(tmp_path / "table"), tmp_path / "report.json"
    status, out, _ = run(capsys, "data", "check", str(folder), "--json", "--output", str(report))
    assert status == 0
    assert json.loads(out) == json.loads(report.read_text())
    assert json.loads(out)["rows"] == json.loads(out)["usable"] == 4
    status, out, _ = run(capsys, "data", "check", str(folder))
    assert status == 0
    assert "4 rows, 4 usable" in out


def test_a_bad_row_is_named_by_its_number(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = table(tmp_path / "table")
    shard = next(folder.rglob("*.parquet"))
    content = parquet.read_table(shard)
    rows = content.to_pylist()
    rows[2]["images"][1]["bytes"] = b"no picture"
    parquet.write_table(type(content).from_pylist(rows, schema=content.schema), shard)
    status, out, _ = run(capsys, "data", "check", str(folder))
    assert status == 1
    assert "error: row 2" in out
    assert "4 rows, 3 usable, 1 with errors" in out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_said_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = table(tmp_path / "table")
    capsys.readouterr()  # writing the table showed a progress bar
    status, _, err = run(capsys, "data", "check", str(folder), "--output", "/dev/full")
    assert status == 1
    assert err.splitlines()[-1].startswith("error: the disk is full")
    assert "Traceback" not in err


# --- failures ------------------------------------------------------------------------------------------------------


def test_what_is_not_a_bug_is_one_line_and_a_bug_is_not() -> None:
    assert one_line(DivergenceError("a\n b")) == "a b"
    assert one_line(FileNotFoundError(2, "No such file or directory", "x.yaml")) == "No such file or directory: x.yaml"
    assert one_line(PermissionError(13, "Permission denied", "/root")) == "Permission denied: /root"
    for bug in (KeyError("x"), RuntimeError("shape mismatch"), AttributeError("x"), ValueError("x")):
        assert one_line(bug) is None


def test_a_full_disk_is_recognised_through_every_writer() -> None:
    full = OSError(28, "No space left on device")
    wrapped = RuntimeError("saving failed")
    wrapped.__cause__ = full
    for error in (full, wrapped, RuntimeError("I/O error: No space left on device (os error 28)")):
        assert is_disk_full(error)
    assert not is_disk_full(OSError(2, "No such file or directory"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_recognised_in_what_torch_raises() -> None:
    import torch

    with pytest.raises((RuntimeError, OSError)) as error:
        torch.save({"x": torch.zeros(1_000_000)}, "/dev/full")
    assert is_disk_full(error.value)


# --- reports -------------------------------------------------------------------------------------------------------


def test_score_table() -> None:
    score = {
        "base": 0.25,
        "aligned": 0.5,
        "difference": {"mean": 0.25, "ci95": [0.1, 0.4], "n": 8},
        "win_rate": {"value": 0.75, "ci95": [0.5, None], "ties": 0.125},
    }
    empty = {**score, "base": None}
    head, first, second = score_table({"scores": {"strict": score, "x": empty}}).splitlines()
    assert head.split()[0] == "score"
    assert " ".join(first.split()) == "strict 0.250 0.500 +0.250 [+0.100, +0.400] 0.750 [0.500, -] 0.125 8"
    assert second.split()[:2] == ["x", "-"]
    one_pair = score | {"role": "trained-on", "difference": {"mean": 0.25, "ci95": None, "n": 1}}
    assert "strict (trained-on)" in (line := score_table({"scores": {"strict": one_pair}})) and "[-, -]" in line


# --- the whole path ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny import tiny_sdxl

    folder = tmp_path_factory.mktemp("job")
    tiny_sdxl().save_pretrained(folder / "model")
    table(folder / "table")
    (folder / "job.yaml").write_text(
        f"model: {folder / 'model'}\ndataset: {folder / 'table'}\noutput_dir: {folder / 'out'}\n"
        "max_steps: 2\nbatch_size: 2\nlora_rank: 2\nprogress_bar: false\n"
    )
    return folder


def test_train_writes_settings_weights_and_report(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main_done = run_ok(capsys, "train", str(job / "job.yaml"), "seed=3")
    out = job / "out"
    report = json.loads((out / "training_report.json").read_text())
    assert (report["method"], report["steps"], report["examples"]) == ("dpo", 2, 4)
    assert load_job(out / "config.yaml") == load_job(job / "job.yaml", ["seed=3"])
    assert (out / "final" / "pytorch_lora_weights.safetensors").is_file()
    assert "2 steps" in main_done
    status, _, err = run(capsys, "train", str(job / "job.yaml"))  # the folder holds a run now
    assert status == 1
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("error: ")  # below the bars of loading the model
    assert "resume=latest" in err.splitlines()[-1]


def raw_table(folder: Path, **changes: Any) -> Path:
    """Four rows as another program may have written them: unchecked, the third one changed."""
    rows: list[dict[str, Any]] = [
        {"prompt": f"prompt {i}", "images": [png(2 * i), png(2 * i + 1)], "preference": [1.0, 0.0]} for i in range(4)
    ]
    rows[2] |= changes
    for row in rows:
        row["images"] = [{"bytes": data, "path": None} for data in row["images"]]
    empty: dict[str, Any] = {"sources": [], "scores": [], "rank": None, "row_id": None}
    folder.mkdir()
    dataset = datasets.Dataset.from_list([empty | row for row in rows], features=FEATURES)
    dataset.to_parquet(str(folder / "train-00000.parquet"))
    return folder


NAN = float("nan")
BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "corrupt image": ({"images": [png(4), png(5)[:150]]}, r"row 2, images\[1\]: the image is damaged"),
    "one image": ({"images": [png(4)], "preference": [1.0]}, "row 2, images: expected at least two images"),
    "missing judgement": ({"preference": [1.0, NAN]}, r"row 2, preference\[1\]: expected a number, got NaN"),
    "missing score": (
        {"preference": None, "scores": [{"name": "judge", "values": [NAN, 0.5]}]},
        r"row 2, scores\['judge'\]\[0\]: expected a number, got NaN",
    ),
    "no pixel to encode": ({"images": [png(4, 3), png(5, 3)]}, r"row 2, images\[0\]: 3 x 3 pixels is smaller than"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_ends_training_in_one_line_that_names_it(
    kind: str, job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, expected = BAD_ROWS[kind]
    folder = raw_table(tmp_path / "table", **changes)
    capsys.readouterr()
    status, out, err = run(
        capsys, "train", str(job / "job.yaml"), f"dataset={folder}", f"output_dir={tmp_path / 'out'}"
    )
    assert (status, out) == (1, "")
    line = err.splitlines()[-1]
    assert line.startswith("error: ") and re.search(f"{folder}.*{expected}", line)
    assert "Traceback" not in err


def test_a_table_without_a_column_ends_training_in_one_line(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = raw_table(tmp_path / "table")
    file = folder / "train-00000.parquet"
    parquet.write_table(parquet.read_table(file).drop_columns(["preference", "rank", "scores"]), file)
    status, _, err = run(capsys, "train", str(job / "job.yaml"), f"dataset={folder}", f"output_dir={tmp_path / 'out'}")
    assert status == 1
    assert re.fullmatch(
        r"error: .*missing column one of preference, rank, scores; the table has .*", err.splitlines()[-1]
    )


def test_a_prompt_of_500_words_is_cut_and_said(job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = raw_table(tmp_path / "table", prompt="word " * 500)
    run_ok(capsys, "train", str(job / "job.yaml"), f"dataset={folder}", f"output_dir={tmp_path / 'out'}")
    status, out, _ = run(capsys, "data", "check", str(folder))
    assert status == 0 and "1 rows with a prompt of more than 75 words, which CLIP cuts: 2" in out


@pytest.mark.slow
def test_a_disk_that_fills_up_while_saving_ends_in_one_line_and_the_run_goes_on(job: Path, tmp_path: Path) -> None:
    """A limit on file size stands for the disk: the optimizer's file is twice that of the weights."""
    from tests.tiny import tiny_sdxl

    limit = 6 * sum(parameter.numel() for parameter in tiny_sdxl().unet.parameters())
    settings = [f"output_dir={tmp_path / 'out'}", "adapter=none", "lora_rank=16", "save_every=1"]
    command = [sys.executable, "-m", "diffalign.cli", "train", str(job / "job.yaml"), *settings]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def fill_the_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    options: dict[str, Any] = {"env": environment, "capture_output": True, "text": True, "timeout": 600}
    done = subprocess.run(command, preexec_fn=fill_the_disk, **options)
    assert done.returncode == 1
    assert re.match(r"error: could not write .*checkpoint-000001: the disk is full\.", done.stderr.splitlines()[-1])
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").glob("*checkpoint*")) + list((tmp_path / "out").glob(".*checkpoint*"))
    done = subprocess.run([*command, "resume=latest"], **options)
    assert done.returncode == 0 and "2 steps in" in done.stdout


def run_ok(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    status, out, err = run(capsys, *arguments)
    assert status == 0, err
    return out


@pytest.mark.slow
def test_train_on_two_processes(job: Path) -> None:
    command = [str(ROOT / "training" / "launch" / "two_cpu.sh"), str(job / "job.yaml"), f"output_dir={job / 'two'}"]
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": search}
    done = subprocess.run([*command, "batch_size=1"], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads((job / "two" / "training_report.json").read_text())
    assert (report["steps"], report["global_batch"]) == (2, 2)
    assert done.stdout.count("2 steps in") == 1  # the main process alone reports
