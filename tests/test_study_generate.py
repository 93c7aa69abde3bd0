"""The generator's study and its costs: what a table of results says is what its files hold."""

from __future__ import annotations

import json

import pytest

from diffalign.config import load_job
from diffalign.data import load_preferences, select_pairs
from diffalign.synthesis.config import GenerationConfig
from diffalign.synthesis.ranking import Voter, rank_candidates
from tests.scripts import script


@pytest.fixture(scope="module")
def study():
    return script("benchmarks/study_generate.py")


def shard(seconds: float, prompts: int = 10):
    images = {"base": 2 * prompts, "policy": 2 * prompts}
    parts = {"draw base": 0.5, "draw policy": 0.25, "score shapes": 0.25}
    return {"prompts": prompts, "images": images, "seconds": {name: part * seconds for name, part in parts.items()}}


def test_a_large_run_ends_with_its_last_process(study):
    (one, eight) = study.project([shard(36.0)], 1000, [1, 8], load_seconds=18.0)
    assert one["hours"] == pytest.approx((100 * 36 + 18) / 3600) == one["device_hours"]
    assert eight["hours"] == pytest.approx((13 * 36 + 18) / 3600)  # 100 shards: four processes have 13, four 12
    assert eight["device_hours"] == pytest.approx(8 * eight["hours"])
    assert eight["busy"] == pytest.approx(100 * 36 / (8 * (13 * 36 + 18)))


def test_more_devices_than_shards_help_no_further(study):
    two, many = study.project([shard(60.0)], 20, [2, 64], load_seconds=0.0)
    assert two["hours"] == many["hours"] == pytest.approx(60 / 3600)
    assert many["busy"] == pytest.approx(2 / 64)


def test_a_short_last_shard_is_no_measure_of_the_others(study):
    (cost,) = study.project([shard(100.0), shard(10.0, prompts=1)], 25, [1], load_seconds=0.0)
    assert cost["hours"] == pytest.approx(250 / 3600)


def test_rates_are_per_picture_of_the_stage(study):
    lines = study.rates([shard(40.0), shard(40.0)]).splitlines()
    assert "| draw base | 40 | 1.0000 |" in lines  # 40 s for 40 pictures of this pipeline
    assert "| score shapes | 80 | 0.2500 |" in lines  # 20 s for the pictures of both


def test_shards_of_a_real_run_are_read(study, tmp_path):
    record = {"counts": {"prompts": 3}, "pipelines": {"one": {"images": 6, "ranked": 5}}, "seconds": {"draw one": 2.0}}
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "00000.json").write_text(json.dumps(record))
    assert study.read_shards(tmp_path) == [{"prompts": 3, "images": {"one": 6}, "seconds": {"draw one": 2.0}}]
    with pytest.raises(SystemExit, match="no finished shards"):
        study.read_shards(tmp_path / "shards")


def test_its_settings_are_four_pictures_by_two_checkpoints_and_three_voters(study):
    base = dict(study.BASE)
    scorers = study.SCORERS
    config = GenerationConfig(output_dir="x", prompts="shapes", max_prompts=9, pipelines=[base], reward_models=scorers)
    assert base["images"] == 2 and len(config.scorers) == 3 and all(spec.votes for spec in config.scorers.values())
    for arm in study.ARMS.values():
        load_job(arm.recipe, arm.overrides)
        assert arm.small is None or study.ARMS[arm.small].table == "quickstart/preferences"


def test_the_margin_leaves_out_what_the_judge_alone_decides(study):
    """And keeps each right picture against each wrong one, whatever the judge says."""
    voters = {"shapes": Voter(), "shapes-strict": Voter(), "shapes-judge": Voter(study.SCORERS[2]["weight"])}
    judged = [1.0, 2.0, 3.0, 4.0]
    margins = {override for arm in study.ARMS.values() for override in arm.overrides if "margin" in override}
    (margin,) = (float(override.removeprefix("min_margin=")) for override in margins)

    def kept(checker: list[float], strict: list[float]) -> set[tuple[int, ...]]:
        scores = {"shapes": checker, "shapes-strict": strict, "shapes-judge": judged}
        ranking = rank_candidates(scores, voters=voters)
        row = {"prompt": "x", "images": [b"a", b"b", b"c", b"d"], "preference": ranking.preference}
        examples, _ = select_pairs(load_preferences([row]), pairs="all", min_margin=margin)
        return {example.candidates for example in examples}

    assert not kept([1.0] * 4, [0.0] * 4)
    assert kept([1.3, 0.5, 0.5, 0.5], [1.0, 0.0, 0.0, 0.0]) == {(0, 1), (0, 2), (0, 3)}
    assert kept([1.3, 1.3, 1.3, 0.5], [1.0, 1.0, 1.0, 0.0]) == {(0, 3), (1, 3), (2, 3)}


def test_a_finished_stage_keeps_its_time_and_a_killed_one_says_so(study, tmp_path):
    stages = study.Stages(tmp_path / "stages.json")
    with pytest.raises(KeyboardInterrupt), stages.timed("generate"):
        raise KeyboardInterrupt
    stages = study.Stages(tmp_path / "stages.json")
    with stages.timed("generate"):
        pass
    known = dict(stages.known["generate"])
    assert known["starts"] == 2 and known["done"]
    with study.Stages(tmp_path / "stages.json").timed("generate"):
        pass
    assert json.loads((tmp_path / "stages.json").read_text())["generate"] == known
    assert "2 starts" in "\n".join(study.stage_lines(stages.known))


def test_arms_are_paired_by_prompt_with_the_small_set(study, tmp_path):
    places = {"quickstart": "quickstart"} | {name: f"{name}/evaluation" for name in list(study.ARMS)[1:]}
    gains = {"quickstart": 0.25, "rankdpo-small": 0.5, "dpo": 0.75, "rankdpo": 1.0, "rankdpo-small-long": 0.125}
    prompts = [f"p{number}" for number in range(8)]
    for name, place in places.items():
        (tmp_path / place).mkdir(parents=True)
        order = prompts if name == "dpo" else list(reversed(prompts))
        pairs = [
            {"prompt": p, "base": dict.fromkeys(study.SCORES, 0.0), "aligned": dict.fromkeys(study.SCORES, gains[name])}
            for p in order
        ]
        (tmp_path / place / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    arms = study.compare(tmp_path)
    assert {name: own["shapes"]["difference"]["mean"] for name, own in arms.items()} == gains
    assert arms["dpo"]["shapes"]["above_small"]["mean"] == pytest.approx(0.5)
    assert arms["rankdpo"]["shapes-strict"]["above_small"]["mean"] == pytest.approx(0.5)
    lines = "\n".join(study.arm_lines(arms))
    numbers = "**+0.750 [+0.750, +0.750]** | +0.500 [+0.500, +0.500] |"
    assert f"| DPO, this table (`min_margin=0.12 max_steps=1000`) | {numbers}" in lines
