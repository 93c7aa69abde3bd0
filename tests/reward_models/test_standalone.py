"""The scorers without anything else of this repository: what they declare, what they import, and that they score."""

from __future__ import annotations

import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from diffalign import __version__
from tests.test_imports import IMPORT_NAMES, _imports

from .checkpoints import PROMPTS, pictures

ROOT = Path(__file__).parents[2]
OWN = (ROOT / "reward_models" / "pyproject.toml").read_text()
NAMES = ("imagereward", "mps", "pickscore", "vqascore")

ALONE = """
import importlib.abc, pickle, pkgutil, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        assert name.partition(".")[0] != "diffalign", name

sys.meta_path.insert(0, Blocked())
with open(sys.argv[1], "rb") as file:
    asked = pickle.load(file)
import reward_models
assert reward_models.__file__.startswith(sys.argv[2])
for module in pkgutil.walk_packages(reward_models.__path__, "reward_models."):
    __import__(module.name)
scores = {
    name: reward_models.load_reward_model(name, **options).score(asked["pictures"], asked["prompts"])
    for name, options in asked["options"].items()
}
with open(sys.argv[1], "wb") as file:
    pickle.dump(scores, file)
"""


def dependencies(text: str) -> list[str]:
    listed = text[text.index("\ndependencies = [") :]
    return re.findall(r'^    "([^"]+)"', listed[: listed.index("\n]")], re.MULTILINE)


def test_the_folder_declares_what_it_imports_as_the_repository_does():
    own = dependencies(OWN)
    assert set(own) <= set(dependencies((ROOT / "pyproject.toml").read_text()))
    assert f'version = "{__version__}"' in OWN
    names = {re.split(r"[>=<]", line)[0].replace("_", "-") for line in own}
    declared = {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names}
    sources = (ROOT / "reward_models").rglob("*.py")
    tops = {name.partition(".")[0] for path in sources for name in _imports(path)}
    assert tops - set(sys.stdlib_module_names) - {"reward_models"} == declared


def test_a_copy_of_the_folder_scores_where_there_is_no_diffalign(tmp_path, scorer_options, load_scorer):
    shutil.copytree(ROOT / "reward_models", tmp_path / "reward_models")
    asked = {"pictures": pictures(), "prompts": PROMPTS, "options": {name: scorer_options(name) for name in NAMES}}
    file = tmp_path / "asked.pickle"
    file.write_bytes(pickle.dumps(asked))
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{ALONE}"
    run = subprocess.run(
        [sys.executable, "-c", code, str(file), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    scores = pickle.loads(file.read_bytes())
    for name in NAMES:
        assert torch.allclose(scores[name], load_scorer(name).score(pictures(), PROMPTS), rtol=1e-5, atol=1e-6)
