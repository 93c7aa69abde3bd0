"""Train the embedded reader of the shapes world from scratch: a detector that has seen drawn pictures only.

    python training/train_shapes_reader.py --output-dir out/shapes-reader

Scenes are drawn from known content: things of every colour and shape, and things that are none (two colours, a blob, a
chimera of two shapes, a stretched shape), since an imperfect model draws those. Half of the pictures pass through the
micro SDXL's autoencoder, whose edges all its pictures have. The checker has no part in it; it is only compared with at
the end, on pictures that the embedded model draws. One CPU thread suffices: about ten minutes.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import Tensor

from diffalign.pipelines import load_pipeline
from diffalign.shapes import check, parse, render, sample_captions
from diffalign.shapes.grammar import BACKGROUNDS, COLORS, SHAPES
from diffalign.shapes.reader import CELLS, STRIDE, ReaderNet, ShapesReader
from diffalign.shapes.renderer import SIZE, draw_shape, jitter
from diffalign.shapes.renderer import SUPERSAMPLE as SCALE
from diffalign.synthesis import generate_images

log = logging.getLogger("train_shapes_reader")
NONE_COLOR, NONE_SHAPE = len(COLORS), len(SHAPES)
RGB, PAPER = list(COLORS.values()), list(BACKGROUNDS.values())


# --- scenes ------------------------------------------------------------------------------------------------------


def scene(rng: np.random.Generator) -> tuple[Image.Image, int, list[tuple[int, int, float, float, float]]]:
    """A picture, the index of its background, and its things as (colour, shape, x, y, half-extent)."""
    background = int(rng.integers(len(PAPER)))
    canvas = Image.new("RGB", (SIZE * SCALE,) * 2, jitter(PAPER[background], rng, 12))
    things: list[tuple[int, int, float, float, float]] = []
    for _ in range(rng.choice(5, p=[0.03, 0.3, 0.35, 0.22, 0.1])):
        half = rng.uniform(5, 14)
        for _ in range(30):
            x, y = rng.uniform(half, SIZE - half, 2)
            air = rng.uniform(0, 5)
            if all(max(abs(x - u), abs(y - v)) > half + h + air for _, _, u, v, h in things):
                color, shape = draw_thing(canvas, x, y, half, rng)
                things.append((color, shape, x, y, half))
                break
    picture = canvas.resize((SIZE, SIZE), Image.Resampling.BOX)
    return picture, background, things


def draw_thing(canvas: Image.Image, x: float, y: float, half: float, rng: np.random.Generator) -> tuple[int, int]:
    """Draw one thing and return the indices of its colour and its shape; one in four is not as it should be."""
    shape, color = int(rng.integers(len(SHAPES))), int(rng.integers(len(RGB)))
    fault = rng.choice(["", "two colours", "blob", "chimera", "stretched"], p=[0.74, 0.08, 0.06, 0.06, 0.06])
    mask = blob(canvas.size, x, y, half, rng) if fault == "blob" else mask_of(canvas.size, shape, x, y, half)
    if fault == "chimera":
        second = (shape + int(rng.integers(1, len(SHAPES)))) % len(SHAPES)
        other = mask_of(canvas.size, second, x, y, half)
        mask.paste(other.crop((0, 0, int(x * SCALE), mask.height)), (0, 0))
    elif fault == "stretched":
        mask = stretched(mask, x, y, half, rng)
    canvas.paste(jitter(RGB[color], rng, 18), (0, 0), mask)
    if fault == "two colours":
        second = (color + int(rng.integers(1, len(RGB)))) % len(RGB)
        cut = part_of(mask, x, y, half, rng)
        canvas.paste(jitter(RGB[second], rng, 18), (0, 0), cut)
    return (NONE_COLOR if fault == "two colours" else color, shape if fault in ("", "two colours") else NONE_SHAPE)


def mask_of(size: tuple[int, int], shape: int, x: float, y: float, half: float) -> Image.Image:
    """Where a shape is, in pixels of the enlarged picture."""
    mask = Image.new("L", size, 0)
    draw_shape(ImageDraw.Draw(mask), SHAPES[shape], x, y, half, 255, background=0)
    return mask


def blob(size: tuple[int, int], x: float, y: float, half: float, rng: np.random.Generator) -> Image.Image:
    """A polygon of five to eight corners at random distances."""
    mask = Image.new("L", size, 0)
    angles = np.linspace(0, 2 * math.pi, int(rng.integers(5, 9)), endpoint=False) + rng.uniform(0, 1)
    radii = half * rng.uniform(0.35, 1.0, len(angles))
    corners = zip(x + radii * np.cos(angles), y + radii * np.sin(angles), strict=True)
    ImageDraw.Draw(mask).polygon([(u * SCALE, v * SCALE) for u, v in corners], 255)
    return mask


def stretched(mask: Image.Image, x: float, y: float, half: float, rng: np.random.Generator) -> Image.Image:
    """The thing about half as high, or as wide, as it should be."""
    squeeze = rng.uniform(0.45, 0.62)
    left, top, right, bottom = (int(v * SCALE) for v in (x - half, y - half, x + half, y + half))
    part = mask.crop((left, top, right, bottom))
    flat = rng.random() < 0.5
    size = (part.width, int(part.height * squeeze)) if flat else (int(part.width * squeeze), part.height)
    result = Image.new("L", mask.size, 0)
    result.paste(part.resize(size), (int(x * SCALE) - size[0] // 2, int(y * SCALE) - size[1] // 2))
    return result


def part_of(mask: Image.Image, x: float, y: float, half: float, rng: np.random.Generator) -> Image.Image:
    """The thing right of, or below, a line that leaves at least three tenths of its extent on either side."""
    share = rng.uniform(-0.4, 0.4) * half
    upright = rng.random() < 0.5
    edge = (int((x + share) * SCALE), mask.height) if upright else (mask.width, int((y + share) * SCALE))
    cut = mask.copy()
    cut.paste(0, (0, 0, *edge))
    return cut


def targets(background: int, things: list[tuple[int, int, float, float, float]]) -> dict[str, Tensor]:
    """What the network is to say of a scene; a cell of weight 0 is next to a centre and may say anything."""
    centre, weight = torch.zeros(CELLS, CELLS), torch.ones(CELLS, CELLS)
    box, classes = torch.zeros(3, CELLS, CELLS), torch.full((2, CELLS, CELLS), -100)
    cells = [(min(int(y / STRIDE), CELLS - 1), min(int(x / STRIDE), CELLS - 1)) for _, _, x, y, _ in things]
    for row, column in cells:
        weight[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2] = 0
    for (color, shape, x, y, half), (row, column) in zip(things, cells, strict=True):
        centre[row, column] = weight[row, column] = 1
        box[:, row, column] = torch.tensor([x / STRIDE - column - 0.5, y / STRIDE - row - 0.5, half / STRIDE])
        classes[:, row, column] = torch.tensor([color, shape])
    return {"centre": centre, "weight": weight, "box": box, "classes": classes, "background": torch.tensor(background)}


@torch.inference_mode()
def make_scenes(count: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """(n, 3, 64, 64) uint8 pictures, every second one through the autoencoder, and their targets, stacked."""
    rng = np.random.default_rng(seed)
    drawn = [scene(rng) for _ in range(count)]
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture, _, _ in drawn])).permute(0, 3, 1, 2).clone()
    vae = load_pipeline("shapes").vae
    for start in range(0, count, 128):
        rows = slice(start + 1, start + 128, 2)
        decoded = vae.decode(vae.encode(pixels[rows] / 127.5 - 1).latent_dist.mean).sample
        pixels[rows] = ((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    wanted = [targets(background, things) for _, background, things in drawn]
    return pixels, {name: torch.stack([one[name] for one in wanted]) for name in wanted[0]}


# --- training ----------------------------------------------------------------------------------------------------


def loss_of(predicted: dict[str, Tensor], wanted: dict[str, Tensor]) -> Tensor:
    """Focal loss of the centres; where they are, classes and boxes; the background."""
    logits = predicted["centre"][:, 0]
    miss = (wanted["centre"] - logits.sigmoid()).abs().square()
    focal = F.binary_cross_entropy_with_logits(logits, wanted["centre"], reduction="none") * miss * wanted["weight"]
    here = wanted["centre"] > 0
    number = here.sum().clamp(min=1)
    box = (predicted["box"] - wanted["box"]).abs().sum(1)[here].sum() / number
    classes = sum(
        F.cross_entropy(predicted[name], wanted["classes"][:, i], ignore_index=-100)
        for i, name in enumerate(("color", "shape"))
    )
    return 4 * focal.sum() / number + box + classes + F.cross_entropy(predicted["background"], wanted["background"])


def roughened(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Pixels in [-1, 1] from uint8 ones, with a little noise and a little shift of all colours."""
    x = pixels / 127.5 - 1
    n = len(x)
    x = x + 0.06 * (torch.rand((n, 3, 1, 1), generator=generator) - 0.5)
    return x + 0.05 * torch.rand((n, 1, 1, 1), generator=generator) * torch.randn(x.shape, generator=generator)


def train(count: int, epochs: int, seed: int) -> ReaderNet:
    """The network after ``epochs`` passes over ``count`` scenes."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    pixels, wanted = make_scenes(count, seed)
    log.info("%d scenes drawn", count)
    model, batch = ReaderNet().to(memory_format=torch.channels_last), 64
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.01)
    steps = epochs * (count // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for epoch in range(epochs):
        total = 0.0
        for rows in torch.randperm(count, generator=generator)[: count // batch * batch].split(batch):
            loss = loss_of(model(roughened(pixels[rows], generator)), {name: t[rows] for name, t in wanted.items()})
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * batch / count
        log.info("epoch %d: loss %.4f", epoch + 1, total)
    return model


# --- what it is worth --------------------------------------------------------------------------------------------


def measure(reader: ShapesReader, prompts: int) -> dict[str, Any]:
    """Captions told right of true and of false ones on drawn pictures, and agreement with the checker on the embedded
    model's own pictures of held-out combinations."""
    captions = sample_captions(prompts, seed=91, held_out=True)
    rng = np.random.default_rng(91)
    drawn = [render(parse(caption), rng) for caption in captions]
    true = np.array(reader.score_batch(drawn, captions))
    false = np.array(reader.score_batch(drawn, captions[1:] + captions[:1]))
    pictures = generate_images(load_pipeline("shapes"), captions, list(range(prompts)), steps=12, guidance=3.0)
    ours = np.array(reader.score_batch(pictures, captions))
    theirs = np.array(
        [float(check(picture, caption).strict) for picture, caption in zip(pictures, captions, strict=True)]
    )
    agreement = float((ours == theirs).mean())
    chance = ours.mean() * theirs.mean() + (1 - ours.mean()) * (1 - theirs.mean())
    return {
        "n": prompts,
        "drawn, true caption": float(true.mean()),
        "drawn, caption of another picture": float(false.mean()),
        "generated, reader": float(ours.mean()),
        "generated, checker": float(theirs.mean()),
        "generated, agreement": agreement,
        "generated, kappa": float((agreement - chance) / (1 - chance)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("out/shapes-reader"))
    parser.add_argument("--scenes", type=int, default=12000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--prompts", type=int, default=400, help="of the measurement")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    began = time.monotonic()
    model = train(args.scenes, args.epochs, args.seed)
    minutes = (time.monotonic() - began) / 60
    args.output_dir.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, args.output_dir / "model.safetensors")
    measured = measure(ShapesReader(args.output_dir), args.prompts)
    settings = {"scenes": args.scenes, "epochs": args.epochs, "seed": args.seed}
    record = {"date": date.today().isoformat(), "torch": torch.__version__, "settings": settings, "measured": measured}
    (args.output_dir / "record.json").write_text(json.dumps(record, indent=2) + "\n")
    log.info("%.1f minutes; %s", minutes, measured)


if __name__ == "__main__":
    main()
