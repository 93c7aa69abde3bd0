"""The shipped SDXL settings, run as they are with tiny models of the true classes in place of the large ones."""

from __future__ import annotations

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

from diffalign.data import load_preferences
from diffalign.synthesis.config import GenerationConfig, load_generation
from diffalign.synthesis.run import generate
from tests.reward_models.conftest import scorer_options  # noqa: F401  (a fixture)
from tests.tiny import (
    NOISE,
    T5_WIDTH,
    tiny_sd3,
    tiny_sdxl,
    tiny_t5,
    tiny_t5_tokenizer,
    tiny_vae,
)


def tiny_pixart() -> PixArtSigmaPipeline:
    tokenizer = tiny_t5_tokenizer()
    transformer = PixArtTransformer2DModel(
        sample_size=32,  # one that has aspect ratios; pictures are then cut to the size asked for
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        cross_attention_dim=16,
        caption_channels=T5_WIDTH,
        in_channels=4,
        out_channels=8,
        use_additional_conditions=False,
    )
    scheduler = DPMSolverMultistepScheduler(**NOISE)
    return PixArtSigmaPipeline(tokenizer, tiny_t5(tokenizer), tiny_vae(), transformer, scheduler)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders by the names of the settings."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    pipelines = {"sdxl": tiny_sdxl(), "sd3-medium": tiny_sd3(), "pixart-sigma": tiny_pixart()}
    for name, pipeline in (pipelines | {"sd3.5-medium": tiny_sd3(version="3.5")}).items():
        pipeline.save_pretrained(root / name)
    return root


def test_the_sdxl_settings_run_from_prompts_to_a_table(models, scorer_options, tmp_path):  # noqa: F811
    (tmp_path / "prompts.txt").write_text("a red star\ntwo blue circles\na square\n")
    shipped = load_generation("sdxl-synpic", [f"prompts={tmp_path}/prompts.txt", f"output_dir={tmp_path}/table"])
    values = shipped.model_dump()
    for spec in values["pipelines"]:
        spec |= {"model": str(models / spec["name"]), "variant": None, "steps": 2, "height": 32, "width": 32}
    for spec in values["reward_models"]:
        options = {key: str(value) for key, value in scorer_options(spec["model"]).items() if key != "device"}
        assert spec["options"].keys() <= options.keys()
        spec["options"] = options
    report = generate(GenerationConfig(**values))
    assert report["drawn"] == 4 * report["prompts"]["train"] and not any(
        "failed" in problem for problem in report["problems"]
    )
    row = next(iter(load_preferences(tmp_path / "table")))
    assert set(row.scores) == {"pickscore", "hpsv2.1", "mps", "imagereward", "aesthetic"}
    assert {source["pipeline"] for source in row.sources} <= {"sdxl", "sd3-medium", "pixart-sigma", "sd3.5-medium"}
    assert row.image_bytes[0][8:12] == b"WEBP"
    assert not report["reward_models"]["aesthetic"]["votes"]
