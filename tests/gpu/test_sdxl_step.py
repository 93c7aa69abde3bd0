"""What only a GPU can show: `pytest -m gpu`."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from diffalign.diffusion import NoiseSchedule
from diffalign.pipelines import adapter_for
from tests.scripts import script
from tests.tiny import tiny_sdxl


def run_benchmark(arguments: list[str], output: Path) -> dict:
    main = script("benchmarks/gpu/sdxl_dpo_step.py").main
    return json.loads(main([*arguments, "--output-dir", str(output)]).read_text())


def test_the_benchmark_script_runs_on_a_toy_model(tmp_path):
    """Not marked gpu: keeps the script alive where there is none."""
    report = run_benchmark(["--tiny", "--steps", "2", "--warmup", "1"], tmp_path)
    assert [r["case"] for r in report["results"]] == ["lora", "full"]
    for result in report["results"]:
        assert result["seconds_per_pair"] > 0 and len(result["seconds_per_pair_each_step"]) == 2
        assert result["estimated_memory_gib"] >= 0 and 0.5 < result["loss"] < 0.9
    assert report["packages"]["torch"] == version("torch") and report["date"]


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["lora", "full"])
def test_full_size_sdxl_step(case, tmp_path):
    report = run_benchmark(["--cases", case, "--steps", "3", "--warmup", "1"], tmp_path)
    (result,) = report["results"]
    assert result["peak_memory_gib"] < 1.5 * result["estimated_memory_gib"] + 3
    assert abs(result["loss"] - 0.693) < 0.2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_policy_and_its_copy_agree_bit_for_bit_in_half_precision(dtype):
    """Same kernel, same weights: a DPO run starts at a margin of exactly zero."""
    import copy

    adapter = adapter_for(tiny_sdxl())
    adapter.set_attention("sdpa")
    policy = adapter.denoiser.to("cuda", dtype)
    reference = copy.deepcopy(policy)
    schedule = adapter.noise_schedule()
    x0, noise = torch.randn(4, 4, 8, 8, device="cuda"), torch.randn(4, 4, 8, 8, device="cuda")
    t = torch.tensor([1, 300, 600, 999], device="cuda")
    conditioning = {k: v.cuda().expand(4, *v.shape[1:]) for k, v in adapter.encode_prompts(["a red circle"]).items()}
    sizes = torch.tensor([[1023.0, 765.0, 0.0, 0.0, 1024.0, 768.0]], device="cuda").expand(4, -1)
    noisy = schedule.add_noise(x0, noise, t)
    errors = [
        schedule.denoising_error(adapter.predict(net, noisy, t, conditioning, sizes, dtype=dtype), x0, noise, t)
        for net in (policy, reference)
    ]
    assert torch.equal(*errors) and errors[0].dtype == torch.float32


@pytest.mark.gpu
def test_schedule_follows_its_inputs_to_the_device():
    schedule = NoiseSchedule.from_scheduler(tiny_sdxl().scheduler.config)
    t = torch.tensor([10, 900])
    x0, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    on_gpu = schedule.add_noise(x0.cuda(), noise.cuda(), t.cuda())
    assert on_gpu.is_cuda and torch.allclose(on_gpu.cpu(), schedule.add_noise(x0, noise, t), atol=1e-6)
