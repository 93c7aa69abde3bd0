"""A run's checkpoint in its base model for a while: the weights of that step, and nothing left behind."""

from __future__ import annotations

import shutil

import pytest

from diffalign.data import load_preferences
from diffalign.errors import CheckpointError
from diffalign.evaluation.checkpoint import checkpoint_loaded, is_checkpoint
from diffalign.evaluation.lora import lora_loaded
from diffalign.pipelines import load_pipeline
from diffalign.synthesis import generate_images
from diffalign.trainers import DPOConfig, DPOTrainer
from tests.tiny import tiny_sd, tiny_sdxl
from tests.trainers.conftest import preference_rows


def drawn(pipeline):
    return generate_images(pipeline, ["a cat"], [0], steps=2, guidance=2.0)[0].tobytes()


@pytest.mark.parametrize("adapter", ["lora", pytest.param("none", marks=pytest.mark.slow)])
def test_the_last_checkpoint_draws_what_the_final_weights_draw(tmp_path, adapter):
    trainer = DPOTrainer(
        tiny_sdxl(),
        DPOConfig(
            output_dir=str(tmp_path / "run"),
            cache_dir=str(tmp_path / "cache"),
            max_steps=2,
            save_every=1,
            batch_size=2,
            learning_rate=1e-2,
            warmup_steps=0,
            adapter=adapter,
            progress_bar=False,
        ),
        train_dataset=load_preferences(preference_rows(count=2)),
    )
    trainer.train()
    trainer.save_model()
    first, last = sorted((tmp_path / "run").glob("checkpoint-*"))
    assert is_checkpoint(last) and not is_checkpoint(tmp_path)
    final, base = tmp_path / "run" / "final", tiny_sdxl()
    before, layers = drawn(base), [name for name, _ in base.unet.named_modules()]
    with checkpoint_loaded(base, last):
        found = drawn(base)
    if adapter == "lora":
        with lora_loaded(base, final / "pytorch_lora_weights.safetensors"):
            assert drawn(base) == found
    else:
        assert drawn(load_pipeline(final)) == found
    with checkpoint_loaded(base, first):
        assert drawn(base) not in (found, before)
    assert drawn(base) == before != found
    assert [name for name, _ in base.unet.named_modules()] == layers
    with pytest.raises(CheckpointError, match="does not fit"), checkpoint_loaded(tiny_sd(), last):
        pass
    broken = shutil.copytree(last, tmp_path / "broken")
    (broken / "trainable.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="cannot read"), checkpoint_loaded(base, broken):
        pass
