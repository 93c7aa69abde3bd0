"""Settings: what is read is what was written, and nothing is ignored."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from diffalign import config as settings
from diffalign import config_rules
from diffalign.config import METHODS, Job, describe, dump, load_job, load_object, recipes
from diffalign.config_rules import check, check_installed
from diffalign.errors import ConfigError
from diffalign.trainers.config import DPOConfig, SFTConfig

PACKAGE = Path(settings.__file__).parent
MINIMAL = "dataset: table\nmax_steps: 3\n"


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(MINIMAL)
    return path


# --- slip 8: no field is accepted and then ignored -----------------------------------------------------------------


def _attributes_read(receivers: set[str]) -> set[str]:
    """Names read as `receiver.name` or `anything.receiver.name` in the package, outside where they are defined."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        if path.name == "config.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                base = node.value
                name = base.id if isinstance(base, ast.Name) else base.attr if isinstance(base, ast.Attribute) else ""
                if name in receivers:
                    found.add(node.attr)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_is_read_by_the_library(method: str) -> None:
    read = _attributes_read({"config", "settings"})
    names = {f.name for f in dataclasses.fields(load_object(METHODS[method].config))}
    assert sorted(names - read) == []


def test_every_key_of_a_job_is_read_by_the_library() -> None:
    assert sorted({f.name for f in dataclasses.fields(Job)} - _attributes_read({"job"})) == []


def test_every_range_belongs_to_a_setting() -> None:
    names = {f.name for method in METHODS.values() for f in dataclasses.fields(load_object(method.config))}
    assert set(config_rules.RANGES) <= names
    assert set(config_rules.BELOW_ONE) <= set(config_rules.RANGES)


# --- slip 18: an unknown key is an error that names the nearest ------------------------------------------------------


def test_a_typo_in_the_file_names_the_nearest_key_and_the_file(job_file: Path) -> None:
    job_file.write_text(MINIMAL + "lerning_rate: 1e-5\n")
    with pytest.raises(ConfigError, match=r"job\.yaml: unknown key 'lerning_rate'.*'learning_rate'"):
        load_job(job_file)


def test_a_typo_in_an_override_names_the_nearest_key(job_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"override 'bata=3': unknown key 'bata'.*'beta'"):
        load_job(job_file, ["bata=3"])


def test_a_key_of_another_method_says_whose_it_is(job_file: Path) -> None:
    with pytest.raises(ConfigError, match="beta.*belongs to method dpo"):
        load_job(job_file, ["method=sft", "beta=3"])


@pytest.mark.parametrize("method", ["dop", "", "[dpo]"])
def test_an_unknown_method_lists_the_known(job_file: Path, method: str) -> None:
    with pytest.raises(ConfigError, match="no method.*Known: dpo, mapo, smpo, rankdpo, sft"):
        load_job(job_file, [f"method={method}"])


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="shapes-dop is neither a file nor a recipe.*'shapes-dpo'"):
        load_job("shapes-dop")


def test_a_folder_is_not_a_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder"):
        load_job(tmp_path)


# --- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["1e-5", "1.0e-5", "1E-05", "0.00001", "+1e-5"])
def test_scientific_numbers_are_numbers(job_file: Path, text: str) -> None:
    assert load_job(job_file, [f"learning_rate={text}"])[1].learning_rate == pytest.approx(1e-5)
    job_file.write_text(MINIMAL + f"learning_rate: {text}\n")
    assert load_job(job_file)[1].learning_rate == pytest.approx(1e-5)


def test_no_is_a_word_not_false(job_file: Path) -> None:
    job_file.write_text(MINIMAL + "mixed_precision: no\n")
    assert load_job(job_file)[1].mixed_precision == "no"


def test_a_revision_that_looks_like_a_number_stays_text(job_file: Path) -> None:
    job, _ = load_job(job_file, ["model_revision=1e5", "dataset_revision=0123", "dataset=a #b: c"])
    assert (job.model_revision, job.dataset_revision, job.dataset) == ("1e5", "0123", "a #b: c")


def test_null_quotes_lists_and_whole_numbers(job_file: Path) -> None:
    job, config = load_job(
        job_file, ["model_variant=null", "dataset='x y'", "timesteps=[249, 499]", "beta=2000", "max_grad_norm=null"]
    )
    assert (job.model_variant, job.dataset, config.timesteps) == (None, "x y", [249, 499])
    assert config.max_grad_norm is None
    assert isinstance(config, DPOConfig)
    assert config.beta == 2000.0


@pytest.mark.parametrize(
    ("override", "expected", "got"),
    [
        ("max_steps=2.5", "a whole number or null", "2.5"),
        ("max_steps=true", "a whole number or null", "True"),
        ("learning_rate=fast", "a number", "'fast'"),
        ("gradient_checkpointing=1", "true or false", "1"),
        ("adapter=loar", "one of lora, dora, none", "'loar'"),
        ("trackers=wandb", "a list of texts", "'wandb'"),
        ("timesteps=[1, b]", "a list of whole numbers", "'b'"),
        ("output_dir=", "must not be empty", ""),
    ],
)
def test_a_wrong_type_says_what_was_expected_and_what_came(
    job_file: Path, override: str, expected: str, got: str
) -> None:
    with pytest.raises(ConfigError) as error:
        load_job(job_file, [override])
    assert override.split("=")[0] in str(error.value)
    assert expected in str(error.value)
    assert got in str(error.value)


@pytest.mark.parametrize("text", ["a: [", "- a\n- b\n", "a: 1\na: 2\n", "\x00"])
def test_a_file_that_is_no_mapping_is_refused(job_file: Path, text: str) -> None:
    job_file.write_text(text)
    with pytest.raises(ConfigError, match=r"job\.yaml"):
        load_job(job_file)


@pytest.mark.parametrize("override", ["max_steps", "=3", ""])
def test_an_override_without_key_or_value_is_refused(job_file: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="expected key=value"):
        load_job(job_file, [override])


def test_the_dataset_is_required(job_file: Path) -> None:
    job_file.write_text("max_steps: 3\n")
    with pytest.raises(ConfigError, match="dataset is missing"):
        load_job(job_file)


# --- rules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": None}, "either max_steps or max_epochs"),
        ({"max_epochs": 1.0}, "either max_steps or max_epochs"),
        ({"batch_size": 0}, "batch_size must be .* at least 1"),
        ({"beta": 0.0}, "beta must be .* above 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite"),
        ({"learning_rate": float("inf")}, "learning_rate must be a finite"),
        ({"adam_beta2": 1.0}, "adam_beta2 must be .* below 1"),
        ({"min_margin": 1.5}, "min_margin must be .* at most 1"),
        ({"timesteps": [-1]}, "timesteps must be .* at least 0"),
        ({"min_timestep": 5, "max_timestep": 4}, "min_timestep=5 must not be above"),
        ({"timesteps": [5], "max_timestep": 4}, "max_timestep=4 has no effect with a list of timesteps"),
        ({"validate_every": 5}, "needs validation_prompts"),
        ({"validation_prompts": ["x"]}, "no effect with validate_every=null"),
        ({"lr_schedule": "cosin"}, "lr_schedule must be one of"),
        ({"lr_schedule": "constant", "warmup_steps": 3}, "warmup_steps=3 has no effect"),
        ({"trackers": ["wnadb"]}, "Did you mean 'wandb'"),
        ({"trackers": ["wandb", "wandb"]}, "named twice"),
        ({"adapter": "none", "lora_rank": 8}, "lora_rank=8 has no effect with adapter=none.*lora_rank=16"),
        ({"adapter": "none", "lora_targets": ["to_q"]}, "lora_targets.* has no effect"),
        ({"reference_dtype": "bf16"}, "reference_dtype=bf16 has no effect with adapter=lora"),
        ({"optimizer": "adafactor", "adam_beta1": 0.5}, "adam_beta1=0.5 has no effect with optimizer=adafactor"),
        ({"hub_private": True}, "hub_private=true has no effect with push_to_hub=false"),
        ({"ties": "soft", "min_margin": 0.1}, "ties=soft keeps ties"),
        ({"learning_rate": "1e-5"}, "learning_rate must be a number; got '1e-5'"),
        ({"resume": " "}, "resume must not be empty"),
        (
            {"adapter": "none", "mixed_precision": "bf16", "reference_dtype": "fp16"},
            "fp16 needs mixed_precision=fp16.*bf16",
        ),
        ({"adapter": "none", "reference_dtype": "bf16"}, "bf16 needs mixed_precision=bf16, not no: make them equal"),
        ({"target_gradient_factor": 0.0}, "target_gradient_factor must be .* above 0 and below 0.5"),
        ({"target_gradient_factor": 0.3, "loss_type": "ipo"}, "target_gradient_factor=0.3 needs loss_type=sigmoid"),
        ({"target_gradient_factor": 0.3, "loss_type": "hinge"}, "target_gradient_factor=0.3 needs loss_type=sigmoid"),
        ({"target_gradient_factor": 0.2, "label_smoothing": 0.2}, "above label_smoothing=0.2.*Raise the target"),
    ],
)
def test_a_contradiction_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(DPOConfig(**{"max_steps": 3, **changes}))


def test_sft_has_no_reference_and_no_soft_ties() -> None:
    check(SFTConfig(max_steps=1))
    with pytest.raises(ConfigError, match="ties=soft has no effect with a method without a reference"):
        check(SFTConfig(max_steps=1, ties="soft"))


def test_what_is_allowed_passes() -> None:
    check(DPOConfig(max_epochs=0.5, adapter="none", reference_dtype="bf16", mixed_precision="bf16", warmup_steps=3))
    check(DPOConfig(max_steps=1, validate_every=1, validation_prompts=["x"], trackers=["wandb", "tensorboard"]))
    check(DPOConfig(max_steps=1, push_to_hub=True, hub_private=True, hub_model_id="a/b", ties="soft"))
    check(DPOConfig(max_steps=1, target_gradient_factor=0.2, label_smoothing=0.1))
    check(DPOConfig(max_steps=1, target_gradient_factor=0.2, label_smoothing=0.3, smoothing="robust"))


def test_a_missing_package_is_named_with_its_extra() -> None:
    if config_rules.find_spec("bitsandbytes") is not None:
        pytest.skip("bitsandbytes is installed")
    with pytest.raises(ConfigError, match=r"optimizer=adamw_8bit needs bitsandbytes.*diffalign\[bnb\]"):
        check_installed(DPOConfig(max_steps=1, optimizer="adamw_8bit"))


def test_names_known_here_are_those_of_the_trainers() -> None:
    from diffalign.trainers import trackers

    assert config_rules.TRACKERS == trackers.TRACKERS


def test_every_method_has_a_trainer_of_its_config() -> None:
    for name, method in METHODS.items():
        trainer = settings.trainer_class(name)
        assert trainer.method == name
        assert trainer.config_class is load_object(method.config)


# --- recipes, help, writing ----------------------------------------------------------------------------------------


def test_the_recipes_of_the_readme_are_there() -> None:
    table = Path(__file__).parents[1] / "README.md"
    listed = set(re.findall(r"^\| `([a-z0-9-]+)` \|", table.read_text(), re.MULTILINE))
    assert listed == set(recipes())


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_loads_and_has_a_header(name: str) -> None:
    job, config = load_job(name)
    assert Path(config.output_dir).name == name
    assert job.method in METHODS
    header = recipes()[name].read_text().split("\nmethod:")[0]
    for heading in ("# Hardware:", "# Expected time:", "# Source:", "# Run:", "2026"):
        assert heading in header


def test_published_numbers() -> None:
    for name in ("sdxl-dpo-full", "sd15-dpo-full"):
        _, config = load_job(name)
        assert config.batch_size * config.gradient_accumulation_steps * 16 == 2048
        assert config.learning_rate == pytest.approx(1e-8 * 2048)
        assert (config.max_steps, config.beta) == (2000, 5000.0)  # type: ignore[attr-defined]


def test_published_numbers_of_the_other_methods() -> None:
    for name in ("sdxl-mapo-lora", "sd15-mapo-lora"):
        _, mapo = load_job(name)
        assert (mapo.margin_weight, mapo.kappa, mapo.margin_scale, mapo.learning_rate) == (0.1, 0.5, 1000, 1e-5)  # type: ignore[attr-defined]
        assert mapo.batch_size * mapo.gradient_accumulation_steps == 16
    for name, beta in (("sdxl-smpo-full", 5000), ("sd15-smpo-full", 2000)):
        _, smpo = load_job(name)
        assert smpo.batch_size * smpo.gradient_accumulation_steps * 8 == 1024
        assert (smpo.beta, smpo.gamma, smpo.max_steps) == (beta, 10, 200)  # type: ignore[attr-defined]
        assert smpo.learning_rate == pytest.approx(1e-8 * 1024)
    for name in ("sdxl-rankdpo-full", "sd3-rankdpo-full", "sd15-rankdpo-full"):
        _, rank = load_job(name)
        assert rank.batch_size * rank.gradient_accumulation_steps * 8 == 1024
        assert (rank.max_steps, rank.list_size) == (400, 4)  # type: ignore[attr-defined]


def test_help_explains_every_key_under_its_heading() -> None:
    text = describe()
    for cls in (Job, DPOConfig, SFTConfig):
        for field in dataclasses.fields(cls):
            assert f"\n  {field.name}: " in text
            assert field.metadata["help"] in text
    assert "Noise levels\n  min_timestep: a whole number; default 0" in text
    assert "mixed_precision: one of no, fp16, bf16; default 'no'" in text
    assert text.count("\n  seed: ") == 1


@pytest.mark.parametrize("name", recipes())
def test_the_resolved_settings_read_back_to_the_same(name: str, tmp_path: Path) -> None:
    job, config = load_job(name, ["seed=7"])
    path = tmp_path / "config.yaml"
    path.write_text(dump(job, config))
    assert load_job(path) == (job, config)


TRAPS = st.sampled_from(["no", "1e-5", "null", "010", "1:30", "~", "y", "2024-01-01"])
SAFE_TEXT = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1).filter(str.strip)


@given(
    prompts=st.lists(st.one_of(SAFE_TEXT, TRAPS), max_size=5),
    rate=st.floats(min_value=1e-300, max_value=1e300),
    seed=st.integers(min_value=0, max_value=2**63),
)
def test_any_value_survives_writing_and_reading(prompts: list[str], rate: float, seed: int) -> None:
    config = DPOConfig(max_steps=1, learning_rate=rate, seed=seed)
    if prompts:
        config = dataclasses.replace(config, validate_every=1, validation_prompts=prompts)
    text = dump(Job(dataset=prompts[0] if prompts else "x"), config)
    values = yaml.load(text, settings.Loader)
    assert values["validation_prompts"] == prompts
    assert values["learning_rate"] == rate
    assert values["seed"] == seed
    assert yaml.safe_load(text)["validation_prompts"] == prompts  # other people's readers agree about text
