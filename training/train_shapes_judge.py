"""Train the embedded learned judge from scratch: a small open_clip model that prefers pictures as the checker does.

    python training/train_shapes_judge.py --output-dir out/shapes-judge

PickScore's way: of two pictures of one caption, softmax over ``exp(logit scale) * cosine`` is the probability of each
to be preferred; a tie is half. The preferences come from the exact checker. The stages leave their results in the
output folder and are skipped when these are there: samples of the micro SDXL, the training, the export with its
measurement on held-out combinations. One CPU thread suffices.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import shutil
import time
from dataclasses import dataclass, replace
from datetime import date
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.data import PreferenceDataset, load_preferences
from diffalign.evaluation.statistics import bootstrap_mean
from diffalign.pipelines import load_pipeline
from diffalign.randomness import keyed_permutation, keyed_seed
from diffalign.shapes import Caption, parse, pipeline_folder, render, sample_caption, sample_captions
from diffalign.shapes.checker import Thing, judge, read
from diffalign.shapes.grammar import BACKGROUNDS, COLORS, COUNTS, POSITIONS, RELATIONS, SEEN, SHAPES
from diffalign.shapes.judge import ShapesJudge, judge_folder
from diffalign.shapes.renderer import SIZE
from diffalign.shapes.scorer import ShapesScorer, ShapesStrictScorer
from diffalign.synthesis import build_preferences

log = logging.getLogger("train_shapes_judge")
CONTEXT = 24
MEAN = STD = 0.5  # of the pixels, as open_clip normalises them
DRAWN_LIKE = {"steps": 12, "guidance": 3.0, "batch_size": 32}  # as the model card of the micro SDXL draws


# --- pictures and what the checker reads in them ---------------------------------------------------------------


@dataclass
class Pictures:
    """k pictures for each of n captions.

    Args:
        captions: n of them.
        pixels: (n, k, 64, 64, 3) uint8.
        readings: n lists of k (background, things).
    """

    captions: list[Caption]
    pixels: np.ndarray
    readings: list[list[tuple[str, list[Thing]]]]


def read_all(captions: list[Caption], pixels: np.ndarray) -> Pictures:
    return Pictures(captions, pixels, [[read(picture) for picture in row] for row in pixels])


def draw_samples(folder: Path, count: int, images: int, seed: int, *, held_out: bool) -> PreferenceDataset:
    """A preference table of the micro SDXL's own pictures, scored by the checker; made when it is not there."""
    if not any(folder.glob("*.parquet")):
        build_preferences(
            load_pipeline("shapes"),
            sample_captions(count, seed=1000 + seed, held_out=held_out),
            images_per_prompt=images,
            reward_models=[ShapesScorer(), ShapesStrictScorer()],
            folder=folder,
            seed=seed,
            **DRAWN_LIKE,  # type: ignore[arg-type]
        )
    return load_preferences(folder)


def pictures_of(table: PreferenceDataset) -> Pictures:
    rows = [table[index] for index in range(len(table))]
    pixels = np.stack([np.stack([np.asarray(image) for image in row.images]) for row in rows])
    return read_all([parse(row.prompt) for row in rows], pixels)


def draw_renders(count: int, images: int, seed: int) -> Pictures:
    """Renders of a caption beside renders of nearly the same caption, some of them noisy, soft or through the VAE."""
    rng = np.random.default_rng(keyed_seed(seed, "judge renders"))
    captions, rows = [], []
    for _ in range(count):
        caption = sample_caption(rng)
        row = []
        for index in range(images):
            told = caption
            for _ in range(0 if index == 0 else int(rng.integers(0, 3))):
                told = perturb(told, rng)
            row.append(np.asarray(_degrade(render(told, rng), rng)))
        captions.append(caption)
        rows.append(np.stack(row))
    pixels = np.stack(rows)
    through = rng.random(pixels.shape[:2]) < 0.3
    pixels[through] = reconstruct(pixels[through])
    return read_all(captions, pixels)


def perturb(caption: Caption, rng: np.random.Generator) -> Caption:
    """A caption that differs in one claim; it names no held-out combination either."""

    def other(values: Any, own: object) -> Any:
        pool = [value for value in values if value != own]
        return pool[int(rng.integers(len(pool)))]

    edits = ["color", "shape", "background"]
    edits += {"single": ["position", "number"], "count": ["number"], "pair": ["swap", "swap", "relation"]}[caption.kind]
    edit = edits[int(rng.integers(len(edits)))]
    if edit == "background":
        return replace(caption, background=other(BACKGROUNDS, caption.background))
    if edit == "position":
        return replace(caption, position=other(POSITIONS, caption.position))
    if edit == "relation":
        return replace(caption, relation=other(RELATIONS, caption.relation))
    if edit == "swap":
        return replace(caption, things=caption.things[::-1])
    if edit == "number":
        number = other((1, *COUNTS), caption.number)
        return Caption("single" if number == 1 else "count", caption.things, number, background=caption.background)
    which = int(rng.integers(len(caption.things)))
    color, shape = caption.things[which]
    thing = (other(COLORS, color), shape) if edit == "color" else (color, other(SHAPES, shape))
    if thing not in SEEN or thing in caption.things:
        return perturb(caption, rng)
    return replace(caption, things=(*caption.things[:which], thing, *caption.things[which + 1 :]))


def _degrade(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    kind = rng.random()
    if kind < 0.6:
        return image
    if kind < 0.8:
        return image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.4, 1.5))))
    noisy = np.asarray(image) + rng.normal(0, rng.uniform(4, 30), (SIZE, SIZE, 3))
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


@torch.inference_mode()
def reconstruct(pixels: np.ndarray) -> np.ndarray:
    """(n, 64, 64, 3) uint8 through the micro SDXL's VAE and back."""
    vae = load_pipeline("shapes").vae.float()
    parts = []
    for start in range(0, len(pixels), 64):
        images = torch.from_numpy(pixels[start : start + 64]).permute(0, 3, 1, 2).float() / 127.5 - 1
        back = vae.decode(vae.encode(images).latent_dist.mode()).sample
        parts.append(((back + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy())
    return np.concatenate(parts)


# --- model and loss --------------------------------------------------------------------------------------------


def write_model_folder(folder: Path, width: int) -> None:
    """The files that ``open_clip.create_model('local-dir:...')`` reads, all but the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):  # the words of the world, one token each
        shutil.copy(pipeline_folder() / "tokenizer" / name, folder / name)
    words = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    config = {
        "model_cfg": {
            "embed_dim": 128,
            "vision_cfg": {"image_size": SIZE, "layers": [1, 1, 1, 1], "width": width, "head_width": width},
            "text_cfg": {
                "context_length": CONTEXT,
                "vocab_size": len(words),
                "width": 64,
                "heads": 4,
                "layers": 2,
                "hf_tokenizer_name": "shapes",  # its files lie beside this one
            },
        },
        "preprocess_cfg": {"mean": [MEAN] * 3, "std": [STD] * 3},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")


def preference_loss(logits: Tensor, scores: Tensor, own: Tensor) -> Tensor:
    """Cross-entropy of the softmax over two pictures' logits, averaged over pairs.

    Args:
        logits: (c, n) of every caption and every picture of the batch.
        scores: (c, n) by the checker; the higher is preferred, equal ones are half each.
        own: (c, k) which pictures were drawn for the caption. Each is held against its siblings, and against all.

    Returns:
        The sum of the two means.
    """
    first, better = logits.gather(1, own), scores.gather(1, own)
    total = logits.new_zeros(())
    for others, worse in ((first, better), (logits, scores)):
        gap = first[:, :, None] - others[:, None, :]
        wins = (1 + (better[:, :, None] - worse[:, None, :]).sign()) / 2
        total = total + F.binary_cross_entropy_with_logits(gap, wins)
    return total


def score_all(captions: list[Caption], readings: list[tuple[str, list[Thing]]]) -> Tensor:
    """(c, n) the checker's score of every picture under every caption."""
    scorer = ShapesScorer()
    return torch.tensor([[scorer.value(judge(*reading, caption)) for reading in readings] for caption in captions])


# --- training --------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace, sources: list[Pictures]) -> dict[str, Any]:
    """Half of each batch from the renders, half from the samples; writes ``open_clip_model.safetensors`` in fp32."""
    folder = args.output_dir / "model"
    write_model_folder(folder, args.width)
    torch.manual_seed(args.seed)  # of the initial weights
    model, tokenizer = (f(f"local-dir:{folder}") for f in (open_clip.create_model, open_clip.get_tokenizer))
    model = model.train().to(memory_format=torch.channels_last)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.98)
    )
    began, losses = time.perf_counter(), []
    for step in range(args.train_steps):
        warm = min(1.0, (step + 1) / 50)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warm * (0.5 + 0.5 * math.cos(math.pi * step / args.train_steps))
        captions, pixels, readings = [], [], []
        for number, source in enumerate(sources):
            for row, columns in _choose(source, step, args.batch_size // len(sources), args.seed, number):
                captions.append(source.captions[row])
                pixels += [source.pixels[row, column] for column in columns]
                readings += [source.readings[row][column] for column in columns]
        seen = F.normalize(model.encode_image(_to_input(np.stack(pixels))), dim=-1)
        told = F.normalize(model.encode_text(tokenizer([str(caption) for caption in captions])), dim=-1)
        own = torch.arange(len(pixels)).view(len(captions), -1)
        loss = preference_loss(model.logit_scale.exp() * told @ seen.T, score_all(captions, readings), own)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        losses.append(float(loss.detach()))
        if (step + 1) % 50 == 0:
            log.info("step %d: loss %.4f, %.0f s", step + 1, np.mean(losses[-50:]), time.perf_counter() - began)
    model = model.to(memory_format=torch.contiguous_format)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return {
        "seconds": round(time.perf_counter() - began),
        "loss": round(float(np.mean(losses[-50:])), 4),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def _choose(source: Pictures, step: int, count: int, seed: int, number: int) -> list[tuple[int, list[int]]]:
    """The rows of one step, without repeats within an epoch, and four of each row's pictures."""
    per_epoch = len(source.captions) // count
    epoch, place = divmod(step, per_epoch)
    order = keyed_permutation(len(source.captions), seed, number, epoch, "judge rows")
    rows = order[place * count : (place + 1) * count]
    k = source.pixels.shape[1]
    return [(row, keyed_permutation(k, seed, number, epoch, row, "judge columns")[:4]) for row in rows]


def _to_input(pixels: np.ndarray) -> Tensor:
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return ((images - MEAN) / STD).contiguous(memory_format=torch.channels_last)


# --- export and measurement ------------------------------------------------------------------------------------


def export(args: argparse.Namespace, held_out: PreferenceDataset, seen: PreferenceDataset) -> dict[str, Any]:
    """Copy the model as fp16 and measure what was copied."""
    folder = args.output_dir / "model"
    args.weights_dir.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "open_clip_config.json"):
        shutil.copy(folder / name, args.weights_dir / name)
    weights = load_file(folder / "open_clip_model.safetensors")
    halves = {key: value.half() if value.is_floating_point() else value for key, value in weights.items()}
    target = args.weights_dir / "open_clip_model.safetensors"
    save_file(halves, target)
    scorer = ShapesJudge(folder=args.weights_dir, device="cpu")
    return {
        "bytes": target.stat().st_size,
        "held-out": pair_accuracy(scorer, held_out),
        "seen": pair_accuracy(scorer, seen),
    }


def pair_accuracy(scorer: ShapesJudge, table: PreferenceDataset) -> dict[str, Any]:
    """How often the judge prefers the picture that the checker prefers, over all pairs of a caption it does not tie."""
    hits: dict[str, list[float]] = {"all": [], "single": [], "pair": [], "count": [], "one is right": []}
    clusters: dict[str, list[int]] = {name: [] for name in hits}
    for index in range(len(table)):
        row = table[index]
        truth, strict = table.scores(index)["shapes"], table.scores(index)["shapes-strict"]
        given = scorer.score(row.images, [row.prompt] * len(truth)).tolist()
        for i, j in combinations(range(len(truth)), 2):
            if truth[i] == truth[j]:
                continue
            hit = float((given[i] > given[j]) == (truth[i] > truth[j]))
            for name in ["all", parse(row.prompt).kind] + ["one is right"] * (strict[i] != strict[j]):
                hits[name].append(hit)
                clusters[name].append(index)
    result = {}
    for name, values in hits.items():
        _, ids = np.unique(clusters[name], return_inverse=True)
        found = bootstrap_mean(values, ids)
        interval = [round(found.low, 4), round(found.high, 4)]
        result[name] = {"accuracy": round(found.mean, 4), "ci95": interval, "n": len(values), "prompts": len(set(ids))}
    return result


def unet_hash() -> str:
    """Which micro SDXL is embedded: its pictures are what is judged."""
    weights = pipeline_folder() / "unet" / "diffusion_pytorch_model.safetensors"
    return hashlib.blake2b(weights.read_bytes(), digest_size=6).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("out/shapes-judge"))
    parser.add_argument("--weights-dir", type=Path, default=judge_folder(), help="where the fp16 model goes")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the renders and the order")
    parser.add_argument("--sample-seeds", type=int, nargs="+", default=[42], help="one table of samples for each")
    parser.add_argument("--sample-prompts", type=int, default=1000, help="captions a table")
    parser.add_argument("--sample-images", type=int, default=6, help="pictures a caption, at least 4")
    parser.add_argument("--render-prompts", type=int, default=3000)
    parser.add_argument("--eval-prompts", type=int, default=200, help="captions of each of the two measurements")
    parser.add_argument("--eval-seed", type=int, default=45, help="of the held-out captions and their pictures")
    parser.add_argument("--train-steps", type=int, default=1600)
    parser.add_argument("--batch-size", type=int, default=24, help="captions a step, four pictures each")
    parser.add_argument("--width", type=int, default=12, help="of the first layers of the image tower")
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    began = time.perf_counter()
    folder = args.output_dir / "samples"
    tables = [
        draw_samples(folder / f"train-{seed}", args.sample_prompts, args.sample_images, seed, held_out=False)
        for seed in args.sample_seeds
    ]
    last = len(tables[-1]) - args.eval_prompts  # the rows from here on are measured on, not trained on
    seen, tables[-1] = tables[-1].select(range(last, len(tables[-1]))), tables[-1].select(range(last))
    log.info("samples: %.0f s", time.perf_counter() - began)
    settings = {key: value for key, value in vars(args).items() if not isinstance(value, Path)}
    record_file = args.output_dir / "record.json"
    record = {"date": str(date.today()), "torch": torch.__version__, "threads": torch.get_num_threads()} | settings
    record["samples_drawn_by"] = unet_hash()
    if not (args.output_dir / "model" / "open_clip_model.safetensors").exists():
        samples = [pictures_of(table) for table in tables]
        rows = [row for part in samples for row in part.readings]
        joined = Pictures([c for p in samples for c in p.captions], np.concatenate([p.pixels for p in samples]), rows)
        renders = draw_renders(args.render_prompts, 6, args.seed)
        log.info("pictures read: %.0f s", time.perf_counter() - began)
        record["train"] = train(args, [renders, joined])
        record_file.write_text(json.dumps(record, indent=2) + "\n")
    record = json.loads(record_file.read_text()) | {"eval_seed": args.eval_seed, "measured_on": unet_hash()}
    target = folder / f"held-out-{args.eval_seed}"
    held_out = draw_samples(target, args.eval_prompts, args.sample_images, args.eval_seed, held_out=True)
    record["export"] = export(args, held_out, seen)
    record_file.write_text(json.dumps(record, indent=2) + "\n")
    shutil.copy(record_file, args.weights_dir / "record.json")
    log.info("%s", json.dumps(record["export"]))


if __name__ == "__main__":
    main()
