"""What the pages say can be typed: examples run, commands parse, links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from diffalign.cli.app import app
from diffalign.config import load_job
from diffalign.quickstart import next_commands

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SELF_CONTAINED = [
    ROOT / "docs" / name for name in ("beta.md", "methods/mapo.md", "methods/smpo.md", "methods/rankdpo.md")
]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def commands() -> list[tuple[str, list[str]]]:
    """Each shell command of the pages, without comments and continuations; and those that the quickstart suggests."""
    found = [(f"quickstart: {line}", shlex.split(line)) for line in next_commands(Path("out/quickstart"))]
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    found.append((f"{page.relative_to(ROOT)}: {line.strip()}", words))
    return found


@pytest.mark.parametrize("page", SELF_CONTAINED, ids=lambda page: page.stem)
def test_examples_run(page):
    examples = blocks(page, "python")
    assert examples
    for example in examples:
        exec(compile(example, page.name, "exec"), {})


@pytest.mark.parametrize(("where", "words"), commands(), ids=[where for where, _ in commands()])
def test_commands_parse(where, words):
    program, *rest = words
    if program == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert {word for word in rest if "=" not in word} <= targets
    elif program == "accelerate":
        recipe, *overrides = rest[rest.index("training/train.py") + 1 :]
        load_job(recipe, overrides)
    elif program == "diffalign" and rest[0] == "train" and rest[1] != "--help":
        load_job(rest[1], [word for word in rest[2:] if "=" in word])
    elif program == "diffalign":
        command = typer.main.get_command(app)
        while hasattr(command, "commands"):
            assert rest[0] in command.commands, where
            command = command.commands[rest.pop(0)]
        options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        assert {word for word in rest if word.startswith("--")} <= options | {"--help"}
    elif program in ("python", "bash") and not rest[0].startswith("-"):
        assert (ROOT / rest[0]).is_file(), where


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
