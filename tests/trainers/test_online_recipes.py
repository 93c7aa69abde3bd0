"""Settings files of the methods that draw their own pictures: published numbers, and a step on a toy of each family."""

from __future__ import annotations

import math

import pytest

from diffalign.config import load_job, recipes
from diffalign.trainers import PrefGRPOTrainer, SelfNPOTrainer
from tests.tiny import tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl
from tests.trainers.grpo.conftest import PROMPTS, Judge

FAMILIES = {"sd15": tiny_sd, "sdxl": tiny_sdxl, "sd3": lambda: tiny_sd3(version="3.5"), "flux": tiny_flux}
TRAINERS = {"selfnpo": SelfNPOTrainer, "prefgrpo": PrefGRPOTrainer}
LARGE = [name for name in recipes() if name.split("-")[1] in TRAINERS and not name.startswith("shapes")]


@pytest.mark.parametrize("name", LARGE)
def test_a_recipe_runs_on_a_toy_of_its_family(name, tmp_path):
    family, method = name.split("-")[:2]
    small = [f"output_dir={tmp_path / 'run'}", "resolution=32", "max_steps=1", "progress_bar=false"]
    if "adamw_8bit" in recipes()[name].read_text():
        small.append("optimizer=adamw")  # the other needs a package and a GPU
    if method == "prefgrpo":
        small += ["rewards=[]", "group_size=4", "holdout_every=null", "holdout_prompts=null", "holdout_rewards=[]"]
        updates = load_job(name)[1].updates_per_rollout
        small.append(f"prompts_per_rollout={updates}")
        told = {"reward_models": [Judge()]}
    else:
        small.append("batch_size=2")
        told = {}
    job, config = load_job(name, small)
    assert job.method == method
    metrics = TRAINERS[method](FAMILIES[family](), config, PROMPTS, **told).train()["metrics"]
    assert math.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
    if method == "prefgrpo":
        assert metrics["ratio"] == 1.0


def test_published_numbers():
    """Self-NPO's programs (teacher guidance is 1 + w of theirs), and Pref-GRPO's script for FLUX."""
    for name, guidance, rate, batch, decay in (("sd15-selfnpo", 0, 1e-6, 20, 1e-3), ("sdxl-selfnpo", -4, 1e-7, 10, 0)):
        config = load_job(name)[1]
        assert (config.teacher_guidance, config.learning_rate, config.batch_size) == (guidance, rate, batch)
        assert (config.weight_decay, config.max_steps, config.adapter) == (decay, 1000, "none")
        assert (config.loss, config.huber_c, config.teacher, config.teacher_decay) == ("huber", 1e-3, "ema", 0.999)
    flux = load_job("flux-prefgrpo-lora")[1]
    assert (flux.group_size, flux.sampling_steps, flux.noise_level, flux.resolution) == (8, 25, 0.7, 720)
    assert (flux.learning_rate, flux.clip_range, flux.lora_rank, flux.lora_alpha) == (1e-5, 1e-4, 64, 128)
    assert flux.ratio_norm and flux.sampler == "flow_sde" and flux.guidance_embedding == 3.5
