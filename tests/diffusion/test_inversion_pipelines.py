"""Inversion with real diffusers pipelines, and the documentation's example as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from diffalign.diffusion import denoise, invert
from diffalign.pipelines import adapter_for
from tests.tiny import tiny_sd, tiny_sdxl

PAGE = Path(__file__).parents[2] / "docs" / "inversion.md"


@pytest.mark.parametrize(("build", "kind"), [(tiny_sdxl, "epsilon"), (tiny_sd, "v_prediction")])
def test_each_row_keeps_its_own_prompt_size_and_target(build, kind):
    pipeline = build() if kind == "epsilon" else build(prediction_type=kind)
    adapter, t = adapter_for(pipeline), torch.tensor([500, 20, 250])
    prompts = adapter.encode_prompts(["a cat", "two dogs", ""])
    sizes = torch.tensor([[32.0, 32, 0, 0, 32, 32], [64, 32, 5, 0, 32, 32], [32, 48, 0, 9, 32, 32]])
    x0 = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    schedule = adapter.noise_schedule()

    def network(chosen):
        def predict(x, time, rows):
            rows = chosen[rows]
            conditioning = {name: value[rows] for name, value in prompts.items()}
            return adapter.predict(adapter.denoiser, x, time, conditioning, sizes[rows])

        return predict

    everyone = torch.arange(3)
    together = invert(network(everyone), x0, t, schedule, steps=4, renoise=2)
    for i in range(3):
        alone = invert(network(everyone[i : i + 1]), x0[i : i + 1], t[i : i + 1], schedule, steps=4, renoise=2)
        assert torch.allclose(together.latents[i], alone.latents[0], atol=1e-5)
    back = denoise(network(everyone), together.latents, t, schedule, steps=4)
    plain = invert(network(everyone), x0, t, schedule, steps=4, renoise=0)
    worse = denoise(network(everyone), plain.latents, t, schedule, steps=4)
    assert (back - x0).norm() < 0.5 * (worse - x0).norm()
    assert not together.fell_back.any()


@pytest.mark.weights
def test_the_example_of_the_documentation(tmp_path, monkeypatch):
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(example, str(PAGE), "exec"), names)
    found, back, x0 = names["found"], names["back"], names["x0"]
    assert found.steps.tolist() == [3, 6, 10] and not found.latents.requires_grad
    assert float((back - x0).norm() / x0.norm()) < 0.06
    assert (tmp_path / "round-trip.png").is_file()
