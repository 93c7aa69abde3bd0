"""The study of the methods: its arms can be trained, and its table says what its files hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffalign.config import load_job
from diffalign.evaluation.statistics import compare_paired
from tests.scripts import script


@pytest.fixture(scope="module")
def study():
    return script("benchmarks/study_methods.py")


def test_every_arm_is_a_recipe_with_settings_that_it_reads(study):
    for name, arm in study.ARMS.items():
        job, config = load_job(arm.recipe, arm.overrides)
        assert job.model == "shapes", name
        assert arm.beside is None or arm.beside in study.ARMS
        assert arm.images == study.IMAGES or arm.data == "ranked"
        if arm.recipe == "shapes-rankdpo":  # a step sees about as many images as 16 pairs
            assert 30 <= config.batch_size * arm.images <= 32, name


def test_ablations_stand_beside_what_differs_in_one_thing(study):
    """SmPO with hard labels and random noise needs no arm: it is DPO, setting by setting."""
    (_, hard), (_, dpo) = load_job("shapes-smpo", ["score=null", "gamma=1"]), load_job("shapes-dpo")
    own = {"output_dir", "gamma", "score", "score_range", "contradiction", "inversion_steps", "renoise", "inverter"}
    for name, value in vars(dpo).items():
        if name not in own and name in vars(hard):
            assert vars(hard)[name] == value, name
    inverted, sure = (set(study.ARMS[name].overrides) for name in ("smpo-inverted", "smpo-inverted-hard"))
    assert sure - inverted == {"score=null", "gamma=1"} and inverted < sure


def test_what_arms_share_is_made_before_them(study):
    assert study.shared_stages(["prefgrpo"]) == ["base"]
    assert study.shared_stages(["dpo", "rankdpo-8", "prefgrpo"]) == ["base", "data-6", "data-8"]
    assert study.table_name(6) == "preferences" != study.table_name(8)


def write(root: Path, seed: int, arm: str, changes: list[float], scores: tuple[str, ...]) -> None:
    """A finished run: every score of the base is 0.5, the aligned model's differ by ``changes``."""
    folder = root / f"seed-{seed}" / arm
    folder.mkdir(parents=True)
    prompts = [f"{(7 * i) % len(changes):03}" for i in range(len(changes))]  # not in alphabetical order
    pairs = [
        {"prompt": p, "base": dict.fromkeys(scores, 0.5), "aligned": dict.fromkeys(scores, 0.5 + change)}
        for p, change in zip(prompts, changes, strict=True)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    result = compare_paired([0.5] * len(changes), [0.5 + change for change in changes], prompts).to_json()
    (folder / "report.json").write_text(json.dumps({"scores": dict.fromkeys(scores, result)}))


def test_the_table_pairs_arms_by_seed_and_prompt(study, tmp_path):
    arms, ten = ["smpo", "smpo-inverted", "sft"], range(10)
    for seed in (0, 1):
        write(tmp_path, seed, "smpo", [0.1 * (i % 2) for i in ten], study.SCORES)  # mean 0.05
        write(tmp_path, seed, "smpo-inverted", [0.1 * (i % 2) - 0.2 for i in ten], study.SCORES)
        write(tmp_path, seed, "sft", [0.1 * (i % 2) - 0.3 - 0.1 * seed for i in ten], study.SCORES)
    results = study.collect(tmp_path, [0, 1], arms)
    pooled = results["smpo-inverted"]["pooled"]["shapes-strict"]
    assert pooled["resampled_prompts"] == 20  # the same caption of another seed is another prompt
    assert pooled["difference"]["mean"] == pytest.approx(-0.15)
    # paired: what differs between prompts cancels, so that the interval is a point
    assert pooled["above_smpo"]["ci95"] == pytest.approx([-0.2, -0.2])
    assert pooled["above_sft"]["mean"] == pytest.approx(0.15)
    assert "above_smpo" not in results["sft"]["pooled"]["shapes-strict"]
    assert "above_smpo-inverted" not in results["smpo"]["pooled"]["shapes-strict"]
    record = dict.fromkeys(("command", "date", "commit", "machine", "torch"), "x") | {"prompts": 10, "seeds": [0, 1]}
    page = study.markdown(results, record)
    tables = [[line for line in block.splitlines() if line.startswith("|")] for block in page.split("\n\n")]
    tables = [table for table in tables if table]
    assert len(tables) == len(study.SCORES)
    assert all(len({line.count("|") for line in table}) == 1 and len(table) == 5 for table in tables)
    assert "SmPO: -0.200 [-0.200, -0.200] |" in page

    (tmp_path / "seed-1" / "sft" / "pairs.jsonl").write_text("")
    with pytest.raises(SystemExit, match="different prompts"):
        study.collect(tmp_path, [0, 1], arms)


def test_a_report_that_lacks_a_score_is_made_again(study, tmp_path):
    assert not study.measured(tmp_path)
    (tmp_path / "report.json").write_text(json.dumps({"scores": {"shapes-strict": {}}}))
    assert not study.measured(tmp_path)
    (tmp_path / "report.json").write_text(json.dumps({"scores": dict.fromkeys(study.SCORES, {})}))
    assert study.measured(tmp_path)
