"""Which Self-NPO settings pull the embedded default anywhere? Agreement of gradients at the first step.

    python benchmarks/selfnpo_drift.py --batches 12

At the start student and teacher are equal. Where the training is a fixed point in expectation, gradients of independent
batches point in unrelated directions (mean cosine 0); a cosine c among batches of n rows means that a share c of such a
gradient's square is pull and the rest is noise.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from diffalign.trainers import SelfNPOConfig, SelfNPOTrainer

SETTINGS = {
    "teacher_guidance=1": {"teacher_guidance": 1.0},
    "teacher_guidance=0": {"teacher_guidance": 0.0},
    "teacher_guidance=-4": {"teacher_guidance": -4.0},
}


def gradient(trainer: SelfNPOTrainer, step: int) -> Tensor:
    """Of the mean loss of one batch, as one vector."""
    batch = trainer._draw(trainer.stream.step(step))
    target, noisy = trainer._teach(batch)
    seen = trainer.schedule.to_x0(trainer._predict(trainer.model, noisy, batch.s, batch.told), noisy, batch.s)
    loss = trainer._loss(seen - target, batch.s).mean()
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, trainer.parameters)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--loss-space", default="epsilon", choices=["x0", "epsilon"])
    parser.add_argument("--cache-dir", default=None)
    args = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, settings) in enumerate(SETTINGS.items()):
            config = SelfNPOConfig(
                output_dir=str(Path(folder) / str(number)),
                cache_dir=args.cache_dir or folder,
                max_steps=1,
                batch_size=args.batch_size,
                adapter="none",
                negative_share=0.0,
                loss_space=args.loss_space,
                progress_bar=False,
                **settings,
            )
            trainer = SelfNPOTrainer("shapes", config, "shapes:train")
            found = [gradient(trainer, step) for step in range(args.batches)]
            cosines = [float(torch.cosine_similarity(a, b, dim=0)) for a, b in combinations(found, 2)]
            mean = sum(cosines) / len(cosines)
            # pairs share batches, so the error is that of leaving out one batch at a time
            left_out = []
            for skipped in range(args.batches):
                kept = [found[i] for i in range(args.batches) if i != skipped]
                pairs = [float(torch.cosine_similarity(a, b, dim=0)) for a, b in combinations(kept, 2)]
                left_out.append(sum(pairs) / len(pairs))
            centre = sum(left_out) / len(left_out)
            error = math.sqrt((args.batches - 1) / args.batches * sum((x - centre) ** 2 for x in left_out))
            results[name] = {"mean_cosine": mean, "jackknife_error": error}
            print(json.dumps({name: results[name]}), flush=True)


if __name__ == "__main__":
    main()
