"""How well inversion finds its way back: pictures inverted by the micro SDXL and denoised again on the same grid.

    python benchmarks/inversion_roundtrip.py

Every picture is rendered from its caption, encoded, inverted with that caption, and denoised with plain DDIM. The PSNR
compares the decoded round trip with the decoded latents that went in, so that the VAE's own loss counts for nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import diffusers
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffalign import load_pipeline
from diffalign.diffusion import denoise, invert
from diffalign.evaluation.statistics import compare_paired
from diffalign.pipelines import PipelineAdapter, adapter_for
from diffalign.shapes import render, sample_caption

# (t, steps for the whole range)
WALKS = [(250, 10), (500, 10), (999, 10), (500, 50)]
# (label, renoise, weights)
WAYS: list[tuple[str, int, list[float] | None]] = [
    ("0 (plain DDIM)", 0, None),
    ("1, mean of both", 1, None),
    ("1, last only", 1, [0.0, 1.0]),
    ("2, last only", 2, None),
    ("4, last only", 4, None),
]
SHOWN = {0: "DDIM (R = 0)", 1: "R = 1", 3: "R = 2", 4: "R = 4"}  # rows of the picture, by place in WAYS
PICTURED = (999, 10)
ERROR_SCALE = 10
INK = (28, 30, 34)


@dataclass(frozen=True)
class Scene:
    """What is inverted: pictures as latents, and the network that is asked about them."""

    adapter: PipelineAdapter
    captions: list[str]
    latents: Tensor
    predict: Callable[[Tensor, Tensor, Tensor], Tensor]

    def decoded(self, latents: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1], not rounded to 8 bits."""
        vae = self.adapter.pipeline.vae
        with torch.no_grad():
            return vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1)


def prepare(count: int, seed: int) -> Scene:
    rng = np.random.default_rng(seed)
    captions = [sample_caption(rng) for _ in range(count)]
    pictures = np.stack([np.array(render(caption, rng)) for caption in captions])
    adapter = adapter_for(load_pipeline("shapes"))
    latents = adapter.latents(adapter.encode_images(torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1))
    prompts = adapter.encode_prompts([str(caption) for caption in captions])
    sizes = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]]).expand(count, -1)

    def predict(x: Tensor, told: Tensor, rows: Tensor) -> Tensor:
        conditioning = {name: value[rows] for name, value in prompts.items()}
        return adapter.predict(adapter.denoiser, x, told, conditioning, sizes[rows])

    return Scene(adapter, [str(caption) for caption in captions], latents, predict)


def psnr(one: Tensor, other: Tensor) -> np.ndarray:
    """(N,) decibels; the range of values is 2."""
    return (10 * torch.log10(4 / (one - other).square().flatten(1).mean(1))).double().numpy()


def measure(scene: Scene) -> tuple[list[list[str]], dict[int, Tensor]]:
    """Rows of the table, and the decoded round trips of the walk that is pictured."""
    x0, schedule = scene.latents, scene.adapter.noise_schedule()
    original = scene.decoded(x0)
    table, pictured = [], {}
    for target, steps in WALKS:
        t = torch.full((len(x0),), target)
        plain = None
        for place, (label, renoise, weights) in enumerate(WAYS):
            found = invert(scene.predict, x0, t, schedule, steps=steps, renoise=renoise, weights=weights)
            back = denoise(scene.predict, found.latents, t, schedule, steps=steps)
            decoded = scene.decoded(back)
            values = psnr(decoded, original)
            plain = values if plain is None else plain
            gain = compare_paired(plain, values, scene.captions).difference
            error = (back - x0).flatten(1).norm(dim=1) / x0.flatten(1).norm(dim=1)
            table.append(
                [
                    str(target),
                    f"{steps} ({int(found.steps[0])})",
                    label,
                    str(int(found.evaluations[0])),
                    f"{values.mean():.1f}",
                    f"{gain.mean:+.1f} [{gain.low:+.1f}, {gain.high:+.1f}]" if place else "",
                    f"{100 * float(error.mean()):.1f} %",
                    f"{float(found.residual.mean()):.3f}",
                    f"{int(found.fell_back.sum())}/{len(x0)}",
                    f"{float(found.noise.flatten(1).var(1).mean()):.2f}",
                ]
            )
            print(" | ".join(table[-1]), flush=True)
            if (target, steps) == PICTURED and place in SHOWN:
                pictured[place] = decoded
    return table, {-1: original, **pictured}


def sheet(rows: dict[int, Tensor], columns: int) -> Image.Image:
    """One row of pictures per way, the originals on top; on the right how far each is from its original."""
    side, gap, label, top = 128, 6, 118, 28
    original, block = rows[-1], columns * (side + gap)
    names = {-1: "original", **SHOWN}
    font, small = ImageFont.load_default(15), ImageFont.load_default(13)
    page = Image.new("RGB", (label + 2 * block + 3 * gap, top + len(rows) * (side + gap)), "white")
    pen = ImageDraw.Draw(page)
    pen.text((label, 5), "round trip", INK, font=font)
    pen.text((label + block + 3 * gap, 5), f"its error, {ERROR_SCALE} times as large", INK, font=font)
    for line, (place, decoded) in enumerate(rows.items()):
        y = top + line * (side + gap)
        pen.text((gap, y + side // 2 - 18), names[place], INK, font=font)
        if place >= 0:
            pen.text((gap, y + side // 2 + 4), f"{psnr(decoded, original).mean():.1f} dB", INK, font=small)
        for column in range(columns):
            x = label + column * (side + gap)
            page.paste(drawn(decoded[column], side), (x, y))
            if place >= 0:
                error = (decoded[column] - original[column]).abs() * ERROR_SCALE - 1
                page.paste(drawn(error, side), (x + block + 3 * gap, y))
    return page.quantize(256, dither=Image.Dither.NONE)


def drawn(pixels: Tensor, side: int) -> Image.Image:
    """A picture (3, H, W) in [-1, 1], enlarged."""
    values = ((pixels.clamp(-1, 1).permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy()
    return Image.fromarray(values).resize((side, side), Image.Resampling.NEAREST)


HEAD = [
    "t", "steps (of this walk)", "renoise R", "calls per picture", "PSNR, dB", "gain over R = 0 [95 %]",
    "latent error", "residual", "fell back", "variance of the noise",
]  # fmt: skip


def report(table: list[list[str]], count: int, seed: int, seconds: float) -> str:
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    lines += ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join(
        [
            "# Round trips through inversion",
            "",
            f"`python benchmarks/inversion_roundtrip.py --pictures {count} --seed {seed}`, {date.today()}, "
            f"torch {torch.__version__}, diffusers {diffusers.__version__}, CPU, {torch.get_num_threads()} thread(s), "
            f"{seconds:.0f} s.",
            "",
            f"{count} rendered pictures with their captions, the embedded micro SDXL, fp32, no guidance. Inverted to "
            "t, denoised with plain DDIM on the same grid, decoded, and compared with the decoded latents put in. "
            "Means over pictures; intervals are of the paired gain per picture.",
            "",
            *lines,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/inversion.md"))
    parser.add_argument("--picture", type=Path, default=Path("docs/images/inversion.png"))
    args = parser.parse_args()
    began = time.perf_counter()
    table, rows = measure(prepare(args.pictures, args.seed))
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(report(table, args.pictures, args.seed, time.perf_counter() - began))
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    sheet(rows, min(4, args.pictures)).save(args.picture, optimize=True)


if __name__ == "__main__":
    main()
