"""Conversions of beta against the logits themselves, and the table of docs/beta.md against the function."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from diffalign.objectives import CONVENTIONS, convert_beta, dpo_loss, smpo_loss

DOC = (Path(__file__).parents[2] / "docs" / "beta.md").read_text()
LATENTS = {"SD 1.5, 512": 4 * 64 * 64, "SDXL, 1024": 4 * 128 * 128, "SD3, 1024": 16 * 128 * 128}


@pytest.mark.parametrize("name", sorted(set(CONVENTIONS) - {"smpo"}))
def test_the_converted_beta_gives_the_same_logit(name):
    """The other code's logit, written out from squared errors per element, equals ours."""
    generator = torch.Generator().manual_seed(1)
    n, beta, convention = 24, 0.7, CONVENTIONS[name]
    squares = torch.rand(4, n, generator=generator, dtype=torch.float64)  # policy w, l; reference w, l
    reduced = squares.sum(1) if convention.summed else squares.mean(1)
    gap = (reduced[0] - reduced[1]) - (reduced[2] - reduced[3])
    logit = -beta * gap * (0.5 if convention.logit.startswith("-1/2") else 1.0)
    mean = squares.mean(1)
    ours = dpo_loss(mean[None, :2], mean[None, 2:], beta=convert_beta(beta, source=name, elements=n))
    assert ours.stats["rewards/margins"].item() == pytest.approx(logit.item(), rel=1e-9)


def test_smpos_beta_is_that_of_its_own_loss():
    policy, reference = (torch.tensor([row], dtype=torch.float64) for row in ((0.1001, 0.1), (0.1, 0.1)))
    p = 0.6
    logit = -0.5 * 5000 * (2 * p - 1) * 10 * 1e-4
    beta = convert_beta(5000, source="smpo")
    loss = smpo_loss(policy, reference, torch.tensor([p], dtype=torch.float64), beta=beta, gamma=10.0).loss
    assert loss.item() == pytest.approx(
        torch.nn.functional.softplus(torch.tensor(-logit, dtype=torch.float64)).item(), rel=1e-6
    )


@pytest.mark.parametrize("source", CONVENTIONS)
@pytest.mark.parametrize("target", CONVENTIONS)
def test_there_and_back(source, target):
    there = convert_beta(123.0, source=source, target=target, elements=65536)
    assert convert_beta(there, source=target, target=source, elements=65536) == pytest.approx(123.0, rel=1e-12)


def test_known_numbers():
    assert convert_beta(2500, source="diffusers_sd") == 5000
    assert convert_beta(5000, source="diffusers_sd", target="diffusers_sdxl") == 10000
    assert convert_beta(1, source="simpletuner", elements=262144) == 262144
    assert convert_beta(5000, source="salesforce", target="simpletuner", elements=65536) == pytest.approx(0.0762939)
    assert convert_beta(3, source="rankdpo_paper", target="simpletuner") == 6  # both sum: elements cancel


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "salesfrce"}, "Did you mean 'salesforce'.*Known: diffalign"),
        ({"source": "diffusers"}, "Did you mean 'diffusers_"),
        ({"source": "zzz"}, "unknown beta convention 'zzz'. Known"),
        ({"source": "salesforce", "target": "flowgrpo"}, "Did you mean 'flow_grpo'"),
        ({"source": "mapo"}, "cannot be converted.*no reference"),
        ({"source": "trl"}, "cannot be converted.*log-likelihood"),
        ({"source": "simpletuner"}, r"simpletuner sums.*elements=C\*h\*w"),
        ({"source": "salesforce", "target": "dpo_paper"}, "dpo_paper sums"),
        ({"source": "simpletuner", "elements": 0}, "at least 1"),
        ({"value": 0.0, "source": "salesforce"}, "above 0"),
        ({"value": float("nan"), "source": "salesforce"}, "above 0"),
    ],
)
def test_bad_input_is_refused_with_a_word(arguments, message):
    with pytest.raises(ValueError, match=message):
        convert_beta(**({"value": 1.0} | arguments))


# --- docs/beta.md ------------------------------------------------------------------------------------------------


def rows(heading: str) -> list[list[str]]:
    """Cells of the table below a heading, without its head."""
    section = DOC.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_page_lists_every_convention_as_it_is_in_the_code():
    table = {cells[0].strip("`"): cells[1:] for cells in rows("The conventions")}
    assert list(table) == list(CONVENTIONS)
    for name, convention in CONVENTIONS.items():
        default = "-" if convention.default is None else f"{convention.default:g}"
        reduction = "sum" if convention.summed else "mean"
        assert table[name] == [f"`{convention.logit}`", reduction, default, convention.space, convention.source]


def test_the_numbers_of_the_page_are_the_functions():
    table = rows("Their numbers in ours")
    assert len(table) >= 8
    for name, value, *converted in table:
        for number, elements in zip(converted, LATENTS.values(), strict=True):
            ours = convert_beta(float(value), source=name.strip("`"), elements=elements)
            assert float(number.replace(" ", "")) == pytest.approx(ours, rel=5e-4), (name, value)


def test_the_reverse_numbers_of_the_page_are_the_functions():
    table = rows("Ours in theirs")
    assert len(table) >= 3
    for name, *converted in table:
        for number, elements in zip(converted, LATENTS.values(), strict=True):
            theirs = convert_beta(5000, source="diffalign", target=name.strip("`"), elements=elements)
            assert float(number) == pytest.approx(theirs, rel=5e-4), name


@pytest.mark.parametrize("page", ["beta", "methods/mapo", "methods/smpo", "methods/rankdpo"])
def test_examples_run(page):
    text = (Path(__file__).parents[2] / "docs" / f"{page}.md").read_text()
    examples = re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)
    assert examples
    for example in examples:
        exec(compile(example, f"docs/{page}.md", "exec"), {})
