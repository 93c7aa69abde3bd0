"""Every family with every method, LoRA and full: two steps, export, reload into a fresh pipeline, equal pictures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from diffalign.data import load_preferences
from diffalign.evaluation.lora import find_weights
from diffalign.pipelines import load_pipeline
from diffalign.synthesis import generate_images
from tests.synthesis.test_sampling import FAMILIES
from tests.trainers.test_methods import METHODS, scored_rows, weights


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One table, and one cache for all cells of a family."""
    return load_preferences(scored_rows(2, 3)), tmp_path_factory.mktemp("cache")


def picture(pipeline) -> np.ndarray:
    return np.asarray(generate_images(pipeline, ["a"], [0], steps=1, guidance=1.0, height=32, width=32)[0])


@pytest.mark.parametrize("adapter", ["lora", "none"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_two_steps_export_and_reload(make_trainer, shared, tmp_path, family, method, adapter):
    table, cache = shared
    cls, config, own = METHODS[method]
    settings = {"adapter": adapter, "max_steps": 2, "resolution": 32, "cache_dir": str(cache / family), **own}
    pipeline = FAMILIES[family]()
    untrained = picture(pipeline)
    trainer = make_trainer(pipeline, table, cls=cls, config=config, **settings)
    before = weights(trainer)
    metrics = trainer.train()["metrics"]
    assert math.isfinite(metrics["loss"])
    assert any(not torch.equal(a, b) for a, b in zip(before, weights(trainer), strict=True))

    kind, file = find_weights(tmp_path / "run")
    assert kind == ("lora" if adapter == "lora" else "pipeline")
    if adapter == "lora":
        fresh = FAMILIES[family]()
        fresh.load_lora_weights(str(file.parent), weight_name=file.name)
    else:
        fresh = load_pipeline(str(file))
    assert np.array_equal(picture(fresh), picture(pipeline))
    assert not np.array_equal(picture(fresh), untrained)
