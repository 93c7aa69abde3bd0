"""Pictures per second of `diffalign generate` against the plain loop: ``pipe(prompt)``, score it, one by one.

    python benchmarks/generate_throughput.py                    # the embedded default, on whatever this machine has
    python benchmarks/generate_throughput.py --model some/model --reward pickscore --steps 25

Both draw the same number of pictures for the same prompts with the same settings, score each with the same reward model
and keep them as PNG. Times include loading the models, and the run's also its table, card and report. A round of one
prompt comes first, untimed, since Python's imports and the first kernels are nobody's work. The two take turns, round
by round, so that what else the machine does meets both; CPU seconds are given beside wall seconds, since they depend on
it least. Results: ``--output``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from record import ROOT, run_record

from diffalign.pipelines import load_pipeline
from diffalign.synthesis.artists import local_device
from diffalign.synthesis.candidates import encode
from diffalign.synthesis.config import GenerationConfig
from diffalign.synthesis.prompts import plan_prompts
from diffalign.synthesis.run import generate
from reward_models import load_reward_model


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        race(Path(folder) / "warm-up", 0, arguments, prompts=1)
        rounds = [
            race(Path(folder) / str(number), number, arguments, prompts=arguments.prompts)
            for number in range(arguments.rounds)
        ]
    ratios = {kind: sorted(r["loop"][kind] / r["generate"][kind] for r in rounds) for kind in ("wall", "cpu")}
    result: dict[str, Any] = {
        **run_record(),
        "pictures_per_round": arguments.prompts * arguments.images,
        "settings": {key: value for key, value in vars(arguments).items() if key != "output"},
        "rounds": rounds,
        "ratio": {kind: {"median": statistics.median(values), "all": values} for kind, values in ratios.items()},
    }
    text = json.dumps(result, indent=2)
    arguments.output.write_text(text + "\n")
    print(text)


def race(folder: Path, number: int, arguments: argparse.Namespace, *, prompts: int) -> dict[str, dict[str, float]]:
    """Wall and CPU seconds of both ways over the same prompts; they take turns in being first."""
    spec = {"model": arguments.model, "images": arguments.images, "steps": arguments.steps}
    spec |= {"guidance": arguments.guidance, "batch_size": arguments.batch_size, "name": "one"}
    config = GenerationConfig(
        output_dir=str(folder / "table"), prompts=arguments.source, seed=number, max_prompts=prompts,
        pipelines=[spec], reward_models=[arguments.reward], prompts_per_shard=arguments.shard,
    )  # fmt: skip
    (folder / "loop").mkdir(parents=True)
    chosen = plan_prompts(config).train
    if len(chosen) != prompts:
        raise SystemExit(f"{arguments.source} has {len(chosen)} different prompts, not {prompts}.")
    ways = {"loop": partial(plain_loop, chosen, arguments, folder / "loop"), "generate": partial(generate, config)}
    order = list(ways) if number % 2 else list(reversed(ways))
    return {name: timed(ways[name]) for name in order}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Throughput of the generator against the plain loop.")
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--reward", default="shapes")
    parser.add_argument("--source", default="shapes", help="prompts, as in the settings of the generator")
    parser.add_argument("--rounds", type=int, default=4, help="each draws all prompts both ways")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--shard", type=int, default=16, help="prompts per shard")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "generate_throughput.json")
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
