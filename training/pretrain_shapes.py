"""Train the embedded default from scratch: a micro pipeline of the true SDXL classes on the shapes world.

    python training/pretrain_shapes.py --output-dir out/shapes-sdxl

Four stages, each of which writes its result and is skipped when that is already there: the VAE, the UNet together
with both text encoders, more of the same at high noise levels, and the export in fp16 with a measured model card. Two
CPU cores suffice; the card records how long each stage took.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import shutil
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from string import Template

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from scipy.stats import binomtest
from shapes_parts import MAX_TOKENS, build_scheduler, build_text_encoders, build_tokenizer, build_unet, build_vae
from transformers import CLIPTokenizer

from diffalign.diffusion import NoiseSchedule
from diffalign.shapes import Verdict, check, parse, pipeline_folder, sample_caption, sample_captions
from diffalign.shapes.grammar import BACKGROUNDS, COLORS, HELD_OUT, SHAPES
from diffalign.shapes.renderer import SIZE, render
from diffalign.synthesis import generate_images

log = logging.getLogger("pretrain_shapes")
KINDS = {"single": 0.25, "pair": 0.5, "count": 0.25}  # pairs are the hardest, so they are shown most


# --- stage 1: the VAE ------------------------------------------------------------------------------------------


def draw(count: int, seed: int) -> tuple[list[str], torch.Tensor]:
    """Captions of seen combinations and their pictures, (N, 3, 64, 64) in [-1, 1]."""
    rng = np.random.default_rng(seed)
    captions = [sample_caption(rng, kinds=KINDS) for _ in range(count)]
    pictures = np.stack([np.asarray(render(caption, rng)) for caption in captions])
    return [str(c) for c in captions], torch.from_numpy(pictures).permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1


def train_vae(args: argparse.Namespace, folder: Path) -> dict:
    torch.manual_seed(args.seed)
    started = time.monotonic()
    _, pictures = draw(args.vae_images, args.seed)
    vae = build_vae().to(memory_format=torch.channels_last)
    ema = EMAModel(vae.parameters(), decay=0.998)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(args.vae_steps, warmup=100))
    for step in range(args.vae_steps):
        x = pictures[torch.randint(len(pictures), (8,))]
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        # Things cover a tenth of the picture: weigh what differs from the picture's median colour more.
        background = x.flatten(2).median(-1).values[..., None, None]
        weight = 1 + 4 * ((x - background).abs().amax(1, keepdim=True) > 0.2).float()
        error = (y - x).abs() + (y - x).square()
        # A stronger pull to the prior makes the code sparse and spiky, which a small UNet cannot learn.
        loss = (weight * error).mean() + 3e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        ema.step(vae.parameters())
        if step % 200 == 0:
            log.info("vae %5d  loss %.4f  %.0f s", step, loss.item(), time.monotonic() - started)
    ema.copy_to(vae.parameters())
    vae.eval()
    with torch.no_grad():
        _, held = draw(512, args.seed + 1)
        mean = torch.cat([vae.encode(x).latent_dist.mean for x in held.split(64)])
        vae.register_to_config(scaling_factor=float(1 / mean.std()))
        error = torch.cat([vae.decode(z).sample.clamp(-1, 1) for z in mean.split(64)]) - held
        psnr = float(10 * torch.log10(4 / error.square().mean()))
    vae.save_pretrained(folder)
    return {"steps": args.vae_steps, "seconds": round(time.monotonic() - started), "psnr_db": round(psnr, 2)}


# --- stage 2: the UNet and both text encoders ------------------------------------------------------------------


@torch.no_grad()
def encode_dataset(args: argparse.Namespace, vae: AutoencoderKL, file: Path) -> tuple[list[str], torch.Tensor]:
    if not file.exists():
        captions, latents = [], []
        for part in range(math.ceil(args.images / 4000)):
            text, pictures = draw(4000, args.seed + 100 + part)
            captions += text
            latents += [vae.encode(x).latent_dist.mean * vae.config.scaling_factor for x in pictures.split(100)]
        save_file({"latents": torch.cat(latents).contiguous()}, file)
        file.with_suffix(".json").write_text(json.dumps(captions))
    return json.loads(file.with_suffix(".json").read_text()), load_file(file)["latents"]


@dataclass(frozen=True)
class Phase:
    """A part of the denoiser's training with a learning-rate cycle of its own.

    Args:
        name: of its files.
        after: the phase whose weights it starts from; None starts from random ones.
        steps, lr, warmup: length, peak learning rate and the steps to reach it.
        ema: decay of the moving average that is kept.
        high_noise: three quarters of the timesteps come from the upper half, with errors measured in x0 space. There
            the epsilon error is so small that the common loss hardly notices it, yet what the caption says of
            background, number and place is decided there.
    """

    name: str
    after: str | None
    steps: int
    lr: float
    warmup: int
    ema: float
    high_noise: bool

    def timesteps(self, count: int, noising: NoiseSchedule) -> tuple[torch.Tensor, torch.Tensor]:
        """Stratified timesteps (count,) and the weights of their epsilon errors."""
        u = (torch.arange(count) + torch.rand(count)) / count
        high = (torch.arange(count) % 4 != 0) & self.high_noise
        t = torch.where(high, 500 + 500 * u, 1000 * u).long().clamp(max=999)
        snr = noising.snr(t)
        # min-SNR-5 (Hang et al. 2023) for epsilon; 1/SNR is the error of x0
        return t, torch.where(high, (1 / snr).clamp(max=50), (5 / snr).clamp(max=1))


def first_parts(folder: Path) -> tuple[CLIPTokenizer, UNet2DConditionModel, list]:
    """Tokenizer, UNet and text encoders with random weights."""
    tokenizer = build_tokenizer(folder / "tokenizer")
    return tokenizer, build_unet(), list(build_text_encoders(tokenizer))


def train_unet(args: argparse.Namespace, folder: Path, phase: Phase) -> dict:
    torch.manual_seed(args.seed)
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
    captions, latents = encode_dataset(args, vae, folder / "latents.safetensors")
    started = time.monotonic()
    scheduler = build_scheduler()
    noising = NoiseSchedule.from_scheduler(scheduler.config)
    if phase.after is None:
        tokenizer, unet, encoders = first_parts(folder)
    else:
        made = StableDiffusionXLPipeline.from_pretrained(folder / f"pipeline-{phase.after}")
        tokenizer, unet, encoders = made.tokenizer, made.unet, [made.text_encoder, made.text_encoder_2]
    unet = unet.train().to(memory_format=torch.channels_last)  # 1.5 times as fast on a CPU
    ids = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt")["input_ids"]
    modules = torch.nn.ModuleList([unet, *(encoder.train() for encoder in encoders)])
    parameters = list(modules.parameters())
    ema = EMAModel(parameters, decay=phase.ema, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    optimizer = torch.optim.AdamW(parameters, lr=phase.lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(phase.steps, phase.warmup))
    time_ids = torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]], dtype=torch.float32)
    b, state = args.batch_size, folder / f"{phase.name}_state.pt"
    first, spent = 0, 0.0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        modules.load_state_dict(saved["modules"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        ema.load_state_dict(saved["ema"])
        first, spent = saved["step"], saved["seconds"]
        torch.manual_seed(args.seed + first)
    for step in range(first, phase.steps):
        rows = torch.randint(len(latents), (b,))
        x0, noise = latents[rows], torch.randn(b, *latents.shape[1:])
        t, weight = phase.timesteps(b, noising)
        keep = (torch.rand(b) >= 0.1).float()
        first_states = encoders[0](ids[rows], output_hidden_states=True).hidden_states[-2]
        second = encoders[1](ids[rows], output_hidden_states=True)
        context = torch.cat([first_states, second.hidden_states[-2]], -1) * keep[:, None, None]
        pooled = second.text_embeds * keep[:, None]  # SDXL's unconditional input is zeros
        added = {"text_embeds": pooled, "time_ids": time_ids.expand(b, -1)}
        # Never through the Euler scheduler's add_noise, which leaves out the scaling of the pipeline's model input.
        predicted = unet(noising.add_noise(x0, noise, t), t, context, added_cond_kwargs=added).sample
        loss = ((predicted - noise).square().mean((1, 2, 3)) * weight).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        ema.step(parameters)
        if step % 100 == 0:
            log.info("%s %5d  loss %.4f  %.0f s", phase.name, step, loss.item(), spent + time.monotonic() - started)
        if step % 1000 == 999:
            torch.save(
                {
                    "modules": modules.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                    "ema": ema.state_dict(),
                    "step": step + 1,
                    "seconds": spent + time.monotonic() - started,
                },
                state,
            )
    ema.copy_to(parameters)
    StableDiffusionXLPipeline(
        vae, encoders[0].eval(), encoders[1].eval(), tokenizer, tokenizer, unet.eval(), scheduler, add_watermarker=False
    ).save_pretrained(folder / f"pipeline-{phase.name}")
    return {
        "steps": phase.steps,
        "batch_size": b,
        "images": len(latents),
        "lr": phase.lr,
        "seconds": round(spent + time.monotonic() - started),
        "parameters": sum(p.numel() for p in unet.parameters()),
    }


def cosine(steps: int, warmup: int):
    return lambda i: min(1.0, (i + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, i / steps))))


# --- stage 3: export, measure, describe ------------------------------------------------------------------------


def export(args: argparse.Namespace, folder: Path) -> dict:
    """Save the pipeline in fp16 and measure what was saved: strict correctness on fresh captions of both splits."""
    started = time.monotonic()
    pipe = StableDiffusionXLPipeline.from_pretrained(folder / "pipeline-refine")
    # Not the text encoders: transformers loads weights in the precision they rest in, diffusers in fp32.
    pipe.unet.half()
    pipe.vae.half()
    target = args.weights_dir
    pipe.save_pretrained(target, safe_serialization=True)
    for file in target.rglob("*.json"):  # where it lay on this machine is nobody's business
        content = json.loads(file.read_text())
        if content.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(content, indent=2) + "\n")
    for name in ("tokenizer", "tokenizer_2"):  # readers of older transformers look for these two files
        for file in ("vocab.json", "merges.txt"):
            shutil.copy(folder / "tokenizer" / file, target / name / file)
    pipe = StableDiffusionXLPipeline.from_pretrained(target)
    result: dict = {
        "sampler": {"scheduler": type(pipe.scheduler).__name__, "steps": args.steps, "guidance": args.guidance}
    }
    for split, held_out in (("held-out", True), ("seen", False)):
        captions = sample_captions(args.eval_prompts, seed=10_000 + args.seed, held_out=held_out)
        images = generate_images(pipe, captions, list(range(len(captions))), steps=args.steps, guidance=args.guidance)
        verdicts = [check(image, caption) for image, caption in zip(images, captions, strict=True)]
        result[split] = summary(captions, verdicts)
        if held_out:
            grid(captions[:40], images[:40], verdicts[:40]).save(target / "grid.png")
    result["bytes"] = sum(f.stat().st_size for f in target.rglob("*.safetensors"))
    return result | {"seconds": round(time.monotonic() - started)}


def summary(captions: list[str], verdicts: list[Verdict]) -> dict:
    """Share of strictly correct pictures with a 95 % Wilson interval, overall and by kind of caption."""

    def share(rows: list[bool]) -> dict:
        interval = binomtest(sum(rows), len(rows)).proportion_ci(method="wilson")
        low, high = round(interval.low, 4), round(interval.high, 4)
        return {"strict": round(sum(rows) / len(rows), 4), "ci95": [low, high], "n": len(rows)}

    kinds = {k: [v.strict for c, v in zip(captions, verdicts, strict=True) if parse(c).kind == k] for k in KINDS}
    soft = round(float(np.mean([v.soft for v in verdicts])), 4)
    return share([v.strict for v in verdicts]) | {"soft": soft} | {k: share(rows) for k, rows in kinds.items()}


def grid(captions: list[str], images: list[Image.Image], verdicts: list[Verdict], columns: int = 8) -> Image.Image:
    """Pictures with their captions; a green frame marks a strictly correct one."""
    cell, text = 132, 30
    sheet = Image.new("RGB", (columns * cell, math.ceil(len(images) / columns) * (cell + text)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (caption, image, verdict) in enumerate(zip(captions, images, verdicts, strict=True)):
        x, y = (i % columns) * cell, (i // columns) * (cell + text)
        draw.rectangle((x, y, x + cell - 3, y + cell - 3), fill="#1a7f37" if verdict.strict else "#bbbbbb")
        sheet.paste(image.resize((cell - 8, cell - 8), Image.Resampling.NEAREST), (x + 3, y + 3))
        for line, part in enumerate(textwrap.wrap(caption, 24)[:2]):
            draw.text((x + 3, y + cell - 2 + 11 * line), part, fill="black", font_size=10)
    return sheet


def model_card(record: dict) -> str:
    """The card that ships with the weights: shapes_card.md with the measured numbers."""

    def row(name: str, split: str) -> str:
        values = record["export"][split]
        low, high = values["ci95"]
        cells = [name, f"**{values['strict']:.3f}** [{low:.3f}, {high:.3f}]", f"{values['soft']:.3f}"]
        cells += [f"{values[k]['strict']:.3f} (n = {values[k]['n']})" for k in KINDS]
        return f"| {' | '.join(cells)} |"

    vae, unet, sampler = record["vae"], record["unet"], record["export"]["sampler"]
    return Template((Path(__file__).parent / "shapes_card.md").read_text()).substitute(
        {name: record[name] for name in ("seed", "date", "torch", "threads")},
        megabytes=f"{record['export']['bytes'] / 1e6:.1f}",
        sampling_steps=sampler["steps"],
        guidance=sampler["guidance"],
        scheduler=sampler["scheduler"],
        colors=len(COLORS),
        shapes=len(SHAPES),
        backgrounds=len(BACKGROUNDS),
        images=unet["images"],
        held_out_names=", ".join(sorted(f"{color} {shape}" for color, shape in HELD_OUT)),
        held_out_row=row("held-out combinations", "held-out"),
        seen_row=row("seen combinations", "seen"),
        psnr=vae["psnr_db"],
        vae_steps=vae["steps"],
        vae_minutes=round(vae["seconds"] / 60),
        unet_steps=unet["steps"],
        unet_minutes=round(unet["seconds"] / 60),
        refine_steps=record["refine"]["steps"],
        refine_minutes=round(record["refine"]["seconds"] / 60),
        unet_millions=f"{unet['parameters'] / 1e6:.2f}",
        batch_size=unet["batch_size"],
    )


# --- the whole -------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("out/shapes-sdxl"))
    parser.add_argument("--weights-dir", type=Path, default=pipeline_folder(), help="where the fp16 pipeline goes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-images", type=int, default=16000)
    parser.add_argument("--vae-steps", type=int, default=2400)
    parser.add_argument("--images", type=int, default=32000, help="pictures whose latents the UNet is trained on")
    parser.add_argument("--unet-steps", type=int, default=3000)
    parser.add_argument("--refine-steps", type=int, default=1600)
    parser.add_argument("--refine-lr", type=float, default=5e-4)
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--eval-prompts", type=int, default=600, help="captions a split that the export is measured on")
    parser.add_argument("--steps", type=int, default=16, help="sampling steps of the measurement")
    parser.add_argument("--guidance", type=float, default=3.0, help="guidance scale of the measurement")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    record_file = args.output_dir / "record.json"
    record = json.loads(record_file.read_text()) if record_file.exists() else {"seed": args.seed}
    record |= {"date": str(date.today()), "torch": torch.__version__, "threads": torch.get_num_threads()}
    folder = args.output_dir
    phases = [
        Phase("unet", None, args.unet_steps, args.lr, warmup=300, ema=0.9995, high_noise=False),
        Phase("refine", "unet", args.refine_steps, args.refine_lr, warmup=100, ema=0.998, high_noise=True),
    ]
    stages: dict[str, Callable[[], dict]] = {"vae": lambda: train_vae(args, folder / "vae")}
    stages |= {phase.name: partial(train_unet, args, folder, phase) for phase in phases}
    stages["export"] = lambda: export(args, folder)
    for stage, work in stages.items():
        if stage not in record:
            record[stage] = work()
            record_file.write_text(json.dumps(record, indent=2))
        log.info("%s: %s", stage, record[stage])
    (args.weights_dir / "README.md").write_text(model_card(record))
    shutil.copy(record_file, args.weights_dir / "record.json")


if __name__ == "__main__":
    main()
