"""Sampling with a separate negative model: the unconditional branch of guidance is another network's prediction."""

from .export import export_negative
from .mixing import mix_weights
from .negative import EMBEDDINGS, negative_guidance

__all__ = ["EMBEDDINGS", "export_negative", "mix_weights", "negative_guidance"]
