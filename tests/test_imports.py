"""Every module imports, on every supported Python, from declared packages; arrows point down (slips 10 and 11)."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(p for folder in ("diffalign", "reward_models") for p in (ROOT / folder).rglob("*.py"))
SCRIPTS = sorted(p for folder in ("training", "benchmarks", "demos") for p in (ROOT / folder).rglob("*.py"))
MODULES = [".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in SOURCES]

# Modules of the standard library that a supported Python no longer has.
REMOVED = {
    "asynchat",
    "asyncore",
    "cgi",
    "cgitb",
    "distutils",
    "imghdr",
    "imp",
    "pipes",
    "smtpd",
    "sndhdr",
    "telnetlib",
}
# Distributions whose import name differs.
IMPORT_NAMES = {"open-clip-torch": "open_clip", "pillow": "PIL", "pyyaml": "yaml", "bitsandbytes": "bitsandbytes"}


def _imports(path: Path) -> set[str]:
    """Absolute module names imported anywhere in a file; a relative import as its absolute name."""
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(str(node.module))
        elif isinstance(node, ast.ImportFrom):
            found.add(".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])]))
    return found


def _declared() -> set[str]:
    text = (ROOT / "pyproject.toml").read_text()
    listed = text[text.index("\ndependencies = [") : text.index("[project.scripts]")]
    items = re.findall(r'"([^"]+)"', listed)
    names = {re.split(r"[\s\[<>=!;]", item)[0].lower().replace("_", "-") for item in items}
    return {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names}


@pytest.mark.parametrize("name", [m for m in MODULES if not m.endswith("__main__")])
def test_module_imports(name: str) -> None:
    importlib.import_module(name)


@pytest.mark.parametrize("path", [*SOURCES, *SCRIPTS], ids=lambda p: str(p.relative_to(ROOT)))
def test_syntax_and_standard_library_of_every_supported_python(path: Path) -> None:
    ast.parse(path.read_text(), feature_version=(3, 10))
    assert not {name.split(".")[0] for name in _imports(path)} & REMOVED


@pytest.mark.parametrize("path", [*SOURCES, *SCRIPTS], ids=lambda p: str(p.relative_to(ROOT)))
def test_only_declared_packages_are_imported(path: Path) -> None:
    own = {"diffalign", "reward_models", "tests", *(p.stem for p in path.parent.glob("*.py"))}
    tops = {name.split(".")[0] for name in _imports(path)}
    assert sorted(tops - set(sys.stdlib_module_names) - own - _declared()) == []


def test_the_declared_packages_were_read() -> None:
    assert {"torch", "open_clip", "PIL", "yaml", "hypothesis", "gradio"} <= _declared()


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_point_down(path: Path) -> None:
    package, area = path.relative_to(ROOT).parts[0], path.relative_to(ROOT).parts[1]
    forbidden = {"training", "demos", "benchmarks", "tests"}
    if package == "reward_models":
        forbidden.add("diffalign")
    below = {"objectives": ["data", "pipelines", "trainers", "evaluation", "synthesis"], "cli": []}
    lower = below.get(area, ["cli"] if package == "diffalign" else [])
    for name in _imports(path):
        assert name.split(".")[0] not in forbidden
        assert not any(name == f"diffalign.{upper}" or name.startswith(f"diffalign.{upper}.") for upper in lower), name


def test_importing_the_package_and_its_help_costs_nothing() -> None:
    code = (
        "import sys, diffalign, diffalign.cli\n"
        "try:\n    diffalign.cli.main(['--help'])\nexcept SystemExit as exit:\n    assert not exit.code\n"
        "heavy = {'torch', 'torchvision', 'diffusers', 'transformers', 'numpy', 'datasets', 'pydantic'}\n"
        "assert not heavy & set(sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "quickstart" in done.stdout


def test_public_names_exist_and_are_listed() -> None:
    import diffalign

    for name in diffalign.__all__:
        assert getattr(diffalign, name) is not None
    assert set(diffalign._HOME_OF) | {"__version__"} == set(diffalign.__all__) <= set(dir(diffalign))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = diffalign.nothing
