"""One adapter per family of diffusers pipelines: how to encode, predict, export."""

from . import flux as _flux  # noqa: F401  (importing a family's file registers it)
from . import sd as _sd  # noqa: F401
from . import sd3 as _sd3  # noqa: F401
from . import sdxl as _sdxl  # noqa: F401
from .base import PipelineAdapter, adapter_for, supported_pipelines
from .export import save_lora, save_pipeline
from .load import load_pipeline
from .memory import MemoryEstimate, estimate_memory

__all__ = [
    "MemoryEstimate",
    "PipelineAdapter",
    "adapter_for",
    "estimate_memory",
    "load_pipeline",
    "save_lora",
    "save_pipeline",
    "supported_pipelines",
]
