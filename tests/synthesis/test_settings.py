"""Settings of the generator: overrides reach every part, mistakes name the nearest key."""

from __future__ import annotations

import pytest

from diffalign.errors import ConfigError
from diffalign.synthesis.config import (
    GenerationConfig,
    PipelineSpec,
    RewardSpec,
    apply_override,
    describe,
    dump,
    examples,
    load_generation,
)


def test_every_shipped_example_can_be_read_and_written(tmp_path):
    assert {"shapes-synpic", "shapes-style", "sdxl-synpic"} <= set(examples())
    for name in examples():
        config = load_generation(name)
        (tmp_path / "copy.yaml").write_text(dump(config), encoding="utf-8")
        assert load_generation(tmp_path / "copy.yaml") == config


def test_overrides_reach_parts_by_name_and_number():
    config = load_generation(
        "shapes-synpic",
        ["seed=3", "pipelines.base.steps=4", "pipelines.1.guidance=1", "reward_models.shapes.weight=2"],
    )
    assert (config.seed, config.pipelines[0].steps, config.pipelines[1].guidance) == (3, 4, 1.0)
    assert config.scorers["shapes"].weight == 2


def test_overrides_reach_names_with_dots():
    overrides = ["pipelines.sd3.5-medium.steps=3", "reward_models.hpsv2.1.weight=2"]
    config = load_generation("sdxl-synpic", overrides)
    assert (config.artists["sd3.5-medium"].steps, config.scorers["hpsv2.1"].weight) == (3, 2.0)
    derived = [
        "pipelines=[a/sd-1.4, my/weights.v2.safetensors]",
        "pipelines.sd-1.4.steps=3",
        "pipelines.weights.v2.steps=4",
    ]
    config = load_generation("sdxl-synpic", derived)
    assert [spec.steps for spec in config.artists.values()] == [3, 4]
    values = {"pipeline_weights": {"sdxl": 0.0}}
    for override in ("pipeline_weights.sd3.5-medium=1", "pipeline_weights.sdxl=2"):
        apply_override(values, override)
    assert values == {"pipeline_weights": {"sdxl": 2, "sd3.5-medium": 1}}


@pytest.mark.parametrize("part", ["family: clip", "tie: 0.1"])
def test_what_a_weighted_sum_would_ignore_is_refused(part):
    judges = "reward_models=[{model: shapes, weight: -1.0, %s}]"
    assert (
        load_generation("shapes-synpic", ["rank_by=weighted_sum", judges % "votes: true"]).scorers["shapes"].weight < 0
    )
    with pytest.raises(ConfigError, match="family and tie have no effect on rank_by=weighted_sum"):
        load_generation("shapes-synpic", ["rank_by=weighted_sum", judges % part])


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("sed=1", "unknown key 'sed'; did you mean 'seed'"),
        ("pipelines.0.step=4", "unknown key 'pipelines.0.step'; did you mean 'steps'"),
        ("reward_models.0.wieght=4", "did you mean 'weight'"),
        ("pipelines.base.steps=no", "pipelines.0.steps: .*valid integer; got 'no'"),
        ("pipelines.bass.steps=4", "one of base, strong"),
        ("pipelines.0.steps=0", "greater than or equal to 1; got 0"),
        ("pipelines.0.scheduler=EulerScheduler", "did you mean 'EulerDiscreteScheduler'|diffusers has no"),
        ("pipelines.0.prompt=a cat", "expected a text with {prompt}"),
        ("pipelines=[shapes]", "at least two images per prompt"),
        ("pipelines=[shapes, shapes]", "two of them are named 'shapes'"),
        ("pipelines=[{model: shapes, name: a/b}]", "'a/b' is no name"),
        ("reward_models=[]", "needs at least one that votes"),
        ("rank_by=vote", "'votes', 'weighted_sum' or 'pipelines'; got 'vote'"),
        ("image_quality=80", "no effect on png"),
        ("held_out=1", "less than 1"),
        ("reward_models.0.weight=.nan", "finite number"),
        ("pipelines.0.guidance=.inf", "finite number"),
        ("reward_models.0.weight=-1", "weight: a share of the votes, at least 0"),
        ("diversity=shape", "none of reward_models; did you mean 'shapes'"),
        ("nonsense", "expected key=value"),
        ("pipelines.=[]", "expected key=value"),
        ("pipelines.base.steps.x=1", "no 'steps' with parts"),
    ],
)
def test_mistakes_are_named(override, word):
    with pytest.raises(ConfigError, match=word):
        load_generation("shapes-synpic", [override])


def test_a_pipeline_is_named_after_the_last_part_of_its_model():
    given = ["a/sd-1.4", "a/sd-1.5", "my/weights.safetensors"]
    config = load_generation("shapes-synpic", [f"pipelines=[{', '.join(given)}]"])
    assert list(config.artists) == ["sd-1.4", "sd-1.5", "weights"]


def test_what_changes_no_score_may_change_between_starts():
    judge = {"model": "unified-reward", "options": {"base_url": "http://a:1/v1", "api_key": "secret", "batch_size": 4}}
    first = load_generation("shapes-synpic").model_dump() | {"reward_models": [judge]}
    moved = judge | {"options": {"base_url": "http://b:2/v1", "api_key": "other", "timeout": 9.0}}
    assert GenerationConfig(**first).content() == GenerationConfig(**first | {"reward_models": [moved]}).content()
    assert "secret" not in str(GenerationConfig(**first).content())
    other = judge | {"options": {"family": "think"}}
    assert GenerationConfig(**first).content() != GenerationConfig(**first | {"reward_models": [other]}).content()


def test_a_missing_key_is_explained():
    with pytest.raises(ConfigError, match="output_dir is missing: Folder of the table"):
        load_generation(None, ["prompts=shapes", "pipelines=[{images: 2}]", "reward_models=[shapes]"])
    with pytest.raises(ConfigError, match="shapes-synpic"):
        load_generation("shapes-sympic")


def test_every_key_is_described_and_read():
    from pathlib import Path

    import diffalign.synthesis

    source = "".join(path.read_text() for path in Path(diffalign.synthesis.__file__).parent.glob("*.py"))
    for kind in (GenerationConfig, PipelineSpec, RewardSpec):
        for name, field in kind.model_fields.items():
            assert field.description and f"  {name}: " in describe()
            assert f".{name}" in source, f"{kind.__name__}.{name} is never read"
