"""The package's metadata, its extras, its make targets, and the broken torch pair."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from diffalign import __version__, environment

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
TEXTS = [p for folder in ("diffalign", "reward_models", "docs") for p in (ROOT / folder).rglob("*.*")]
TEXTS = [p for p in [*TEXTS, ROOT / "README.md"] if p.suffix in (".py", ".md") and p.is_file()]


def _section(name: str) -> dict[str, str]:
    body = re.search(rf"^\[{re.escape(name)}\]\n(.*?)(?=^\[|\Z)", PYPROJECT, re.S | re.M)
    assert body is not None, name
    return dict(re.findall(r"^([\w-]+) = (.+?)$", body.group(1), re.M))


# --- metadata ----------------------------------------------------------------------------------------------------


def test_licence_and_version() -> None:
    assert 'license = "Apache-2.0"' in PYPROJECT
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert f"## {__version__} " in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("section", ["project.scripts", "project.entry-points.reward_models"])
def test_entry_points_lead_somewhere(section: str) -> None:
    for target in _section(section).values():
        module, _, name = target.strip('"').partition(":")
        assert hasattr(import_module(module), name), target


def test_every_extra_that_is_recommended_exists() -> None:
    extras = set(_section("project.optional-dependencies"))
    assert {"demo", "xformers", "dev", "all"} <= extras
    for path in TEXTS:
        for named in re.findall(r"diffalign\[([a-z0-9_,-]+)\]", path.read_text()):
            assert set(named.split(",")) <= extras, f"{path.relative_to(ROOT)} recommends diffalign[{named}]"


def test_every_make_target_that_is_recommended_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    assert {"quickstart", "test", "lint", "types", "slow", "study-dpo", "clean", "help"} <= targets
    for path in [*TEXTS, ROOT / "CONTRIBUTING.md", ROOT / ".ci" / "run"]:
        for named in re.findall(r"`make ([a-z-]+)", path.read_text()):
            assert named in targets, f"{path.relative_to(ROOT)} recommends make {named}"


def test_make_help_lists_every_target() -> None:
    listed = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.M)
    assert phony is not None
    assert {line.split()[0] for line in listed.splitlines()} == set(phony.group(1).split())


def test_ci_runs_everything_without_input() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text()
    assert re.search(r"for target in test lint types slow;", text)
    assert "< /dev/null" in text


def test_ci_fails_when_one_step_fails(tmp_path: Path) -> None:
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci" / "run").write_text((ROOT / ".ci" / "run").read_text())
    (tmp_path / "Makefile").write_text("test types slow:\n\t@echo ok\nlint:\n\t@false\n")
    done = subprocess.run(["bash", ".ci/run"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout.count("ok\n") == 3  # the others ran all the same
    assert "failed: lint" in done.stdout
    (tmp_path / "Makefile").write_text("test types slow lint:\n\t@echo ok\n")
    assert subprocess.run(["bash", ".ci/run"], cwd=tmp_path, capture_output=True).returncode == 0


@pytest.mark.parametrize("path", sorted((ROOT / "training" / "launch").glob("*.yaml")), ids=lambda p: p.stem)
def test_launch_files_are_accelerates(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes == yaml.safe_load(path.read_text())["num_processes"]
    assert "mixed_precision" not in path.read_text().split("compute_environment")[1]  # the recipe decides


# --- the broken pair -----------------------------------------------------------------------------------------------


def _fake(folder: Path, name: str, version: str, *, requires: str = "", code: str = "") -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(code)
    (folder / name / "version.py").write_text(f"__version__ = '{version}'\n")
    info = folder / f"{name}-{version.split('+')[0]}.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version.split('+')[0]}"]
    (info / "METADATA").write_text("\n".join(lines + [f"Requires-Dist: {requires}"] * bool(requires)) + "\n")


def _python(arguments: list[str], path: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{path}{os.pathsep}{ROOT}"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=600)


BROKEN = {
    "too old a torch": ("2.13.0+cpu", "0.29.2+cu132", "torch >=2.14.0"),
    "cpu beside cuda": ("2.15.0+cpu", "0.29.2+cu132", "torch >=2.14.0"),
    "seen only at import": ("2.15.0", "0.29.2", ""),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_pair_is_said_in_one_line(case: str, tmp_path: Path) -> None:
    torch, vision, requires = BROKEN[case]
    _fake(tmp_path, "torch", torch)
    fails = "raise RuntimeError('operator torchvision::nms does not exist')\n"
    _fake(tmp_path, "torchvision", vision, requires=requires, code=fails)
    done = _python(["-m", "diffalign.environment"], tmp_path)
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"error: torch {torch} and torchvision {vision} do not match")
    assert "--reinstall torch torchvision" in lines[0]
    done = _python(["-m", "diffalign.cli", "info", "--json"], tmp_path)
    assert done.returncode == 1
    assert "do not match" in json.loads(done.stdout)["problem"]


def test_the_public_names_and_the_commands_refuse_a_broken_pair(tmp_path: Path) -> None:
    _fake(tmp_path, "torch", "2.13.0+cpu", code="raise SystemExit('torch was imported')\n")
    _fake(tmp_path, "torchvision", "0.29.2+cu132", requires="torch >=2.14.0")
    done = _python(["-c", "import diffalign; diffalign.load_preferences"], tmp_path)
    assert "TorchPairError: torch 2.13.0+cpu and torchvision 0.29.2+cu132 do not match" in done.stderr
    done = _python(["-m", "diffalign.cli", "quickstart"], tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: torch 2.13.0+cpu")
    assert len(done.stderr.strip().splitlines()) == 1


def test_this_installation_is_a_matching_pair() -> None:
    environment.check_torch_pair()
    assert environment.find_problem() is None


def test_a_failure_inside_a_chain_of_imports_is_recognised() -> None:
    try:
        try:
            raise RuntimeError("operator torchvision::nms does not exist")
        except RuntimeError as error:
            raise ImportError("cannot import open_clip") from error
    except ImportError as error:
        assert environment.is_torch_pair_error(error)
    assert not environment.is_torch_pair_error(RuntimeError("another"))


def test_info_is_complete_and_plain() -> None:
    report = environment.info()
    assert json.loads(json.dumps(report)) == report
    assert report["packages"]["torch"]
    assert report["devices"][0]["type"] == "cpu"
    assert "sdpa" in report["attention"]
    assert "shapes-dpo" in report["recipes"]
    assert report["problem"] is None
