"""Pictures per second of `diffalign generate` against the plain loop: ``pipe(prompt)``, score it, one by one.

    python benchmarks/generate_throughput.py                    # the embedded default, on whatever this machine has
    python benchmarks/generate_throughput.py --model some/model --reward pickscore --steps 25

Both draw the same number of pictures for the same prompts with the same settings, score each with the same reward model
and keep them as PNG; both times include loading. CPU seconds are given beside wall seconds, since they do not depend on
what else runs on the machine. Results go to ``benchmarks/results/generate_throughput.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from diffalign.pipelines import load_pipeline
from diffalign.synthesis.artists import local_device
from diffalign.synthesis.candidates import encode
from diffalign.synthesis.config import GenerationConfig
from diffalign.synthesis.prompts import plan_prompts
from diffalign.synthesis.run import generate
from reward_models import load_reward_model

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        spec = {"model": arguments.model, "images": arguments.images, "steps": arguments.steps}
        spec |= {"guidance": arguments.guidance, "batch_size": arguments.batch_size, "name": "one"}
        config = GenerationConfig(
            output_dir=str(Path(folder) / "table"), prompts=arguments.source, max_prompts=arguments.prompts,
            pipelines=[spec], reward_models=[arguments.reward], prompts_per_shard=arguments.shard,
        )  # fmt: skip
        prompts = plan_prompts(config).train
        timings = {"loop": timed(lambda: plain_loop(prompts, arguments, Path(folder)))}
        timings["generate"] = timed(lambda: generate(config))
    pictures = len(prompts) * arguments.images
    result: dict[str, Any] = {
        "pictures": pictures,
        "settings": vars(arguments),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        **timings,
        "pictures_per_second": {name: pictures / own["wall"] for name, own in timings.items()},
        "ratio": {kind: timings["loop"][kind] / timings["generate"][kind] for kind in ("wall", "cpu")},
    }
    text = json.dumps(result, indent=2)
    (ROOT / "benchmarks" / "results" / "generate_throughput.json").write_text(text + "\n")
    print(text)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Throughput of the generator against the plain loop.")
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--reward", default="shapes")
    parser.add_argument("--source", default="shapes", help="prompts, as in the settings of the generator")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--shard", type=int, default=10, help="prompts per shard")
    return parser.parse_args()


def timed(work: Any) -> dict[str, float]:
    """Wall and CPU seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def plain_loop(prompts: list[str], arguments: argparse.Namespace, folder: Path) -> None:
    """What people write first."""
    device = local_device()
    pipe: Any = load_pipeline(arguments.model, dtype="fp16" if device != "cpu" else "fp32").to(device)
    pipe.set_progress_bar_config(disable=True)
    scorer = load_reward_model(arguments.reward, device=device)
    for number, prompt in enumerate(prompts):
        for index in range(arguments.images):
            generator = torch.Generator("cpu").manual_seed(index)
            (image,) = pipe(
                prompt, generator=generator, num_inference_steps=arguments.steps, guidance_scale=arguments.guidance
            ).images
            scorer.score([image], [prompt])
            (folder / f"{number}-{index}.png").write_bytes(encode(image, "png", None))


if __name__ == "__main__":
    main()
