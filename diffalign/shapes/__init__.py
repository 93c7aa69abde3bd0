"""The embedded default: a drawn world of captioned shapes, its checker, and a micro SDXL trained on it."""

from __future__ import annotations

from pathlib import Path

from .checker import Verdict, check
from .grammar import HELD_OUT, Caption, parse, sample_caption, sample_captions
from .renderer import render

__all__ = [
    "HELD_OUT",
    "Caption",
    "Verdict",
    "check",
    "parse",
    "pipeline_folder",
    "render",
    "sample_caption",
    "sample_captions",
]


def pipeline_folder() -> Path:
    """Folder of the micro SDXL; ``StableDiffusionXLPipeline.from_pretrained`` takes it as it is."""
    return Path(__file__).parent / "weights"
