"""What the trainer costs beyond its arithmetic: its step over a hand-written one on the same tensors, as a ratio.

    python benchmarks/step_overhead.py

The bare step noises, predicts with reference and policy, takes the DPO loss, back-propagates, clips and steps: no cache
look-ups, no keyed draws, no metrics. Both run in turn in one process, so the machine's drift hits both.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from diffalign.data import load_preferences
from diffalign.shapes import render, sample_caption
from diffalign.trainers import DPOConfig, DPOTrainer


def table(rows: int) -> list[dict]:
    rng = np.random.default_rng(0)
    captions = [sample_caption(rng) for _ in range(rows)]
    return [
        {"prompt": f"{c} {i}", "images": [render(c, rng), render(c, rng)], "preference": [1, 0]}
        for i, c in enumerate(captions)
    ]


def bare_step(trainer: DPOTrainer, batch, optimizer: torch.optim.Optimizer) -> None:
    """One Diffusion-DPO step, as short as it can be written."""
    unet, reference, schedule = trainer.denoiser, trainer.reference, trainer.schedule
    x0, noise = batch.latents.flatten(0, 1), batch.noise.flatten(0, 1)
    t = batch.timesteps.repeat_interleave(2)
    a = schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
    noisy = a.sqrt() * x0 + (1 - a).sqrt() * noise
    prompt = batch.conditioning["prompt_embeds"].repeat_interleave(2, 0)
    added = {
        "text_embeds": batch.conditioning["pooled_prompt_embeds"].repeat_interleave(2, 0),
        "time_ids": batch.size_ids.flatten(0, 1),
    }
    with torch.no_grad(), reference.use(unet) as module:
        predicted = module(noisy, t, prompt, added_cond_kwargs=added).sample
        r = (predicted - noise).square().mean((1, 2, 3)).view(-1, 2)
    predicted = unet(noisy, t, prompt, added_cond_kwargs=added).sample
    gap = (predicted - noise).square().mean((1, 2, 3)).view(-1, 2) - r
    loss = -F.logsigmoid(-0.5 * trainer.config.beta * (gap[:, 0] - gap[:, 1])).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trainer.parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--adapters", nargs="+", default=["none", "lora"])
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/step_overhead.json"))
    args = parser.parse_args()
    logging.getLogger("diffalign").setLevel(logging.ERROR)
    rows = load_preferences(table(4 * args.batch_size))
    result: dict = {"date": str(date.today()), "torch": torch.__version__, "threads": torch.get_num_threads()}
    result |= {"batch_size": args.batch_size, "steps": args.steps}
    for adapter in args.adapters:
        with tempfile.TemporaryDirectory() as folder:
            config = DPOConfig(
                output_dir=folder, adapter=adapter, batch_size=args.batch_size, max_steps=10**6, progress_bar=False
            )
            trainer = DPOTrainer("shapes", config, train_dataset=rows)
            batch = trainer.collate(trainer.stream.step(0))
            optimizer = torch.optim.AdamW(trainer.parameters, lr=1e-5)
            ratios, ours, bare = [], [], []
            for step in range(args.steps + 2):
                began = time.perf_counter()
                bare_step(trainer, batch, optimizer)
                middle = time.perf_counter()
                trainer.optimizer_step()
                ended = time.perf_counter()
                if step >= 2:  # the first two warm up
                    bare.append(middle - began)
                    ours.append(ended - middle)
                    ratios.append(ours[-1] / bare[-1])
        result[adapter] = {
            "ratio_median": round(statistics.median(ratios), 4),
            "ratio_of_medians": round(statistics.median(ours) / statistics.median(bare), 4),
            "bare_seconds": round(statistics.median(bare), 4),
        }
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
