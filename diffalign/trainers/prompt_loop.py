"""What trainers on prompts alone share: their data, and its embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .config import PrefGRPOConfig, SelfNPOConfig
from .loop import TrainingLoop
from .prompts import EncodedPrompts, Prompts, load_prompts


class PromptLoop(TrainingLoop):
    """A loop whose data are prompts; a subclass calls :meth:`encode` before anything else needs embeddings."""

    config: SelfNPOConfig | PrefGRPOConfig
    dataset: Prompts
    encoded: EncodedPrompts

    @staticmethod
    def load_dataset(source: Any, **options: Any) -> Prompts:
        return load_prompts(source, **options)

    def encode(self, texts: Sequence[str]) -> None:
        """Fill ``encoded`` with these prompts and those of validation, and move the text encoders out of the way."""
        config = self.config
        self.encoded = EncodedPrompts.build(
            [*texts, *config.validation_prompts],
            self.adapter,
            Path(config.cache_dir) if config.cache_dir else self.output_dir / "cache",
            self.accelerator,
            batch_size=config.encode_batch_size,
            progress=config.progress_bar and self.accelerator.is_main_process,
        )
        self.adapter.offload_encoders()

    def data_report(self) -> dict[str, Any]:
        return {"examples": len(self.dataset)}

    @property
    def data_name(self) -> str:
        return self.dataset.name

    def validation_embeddings(self) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        return [self.encoded.prompt(text) for text in self.config.validation_prompts], self.encoded.unconditional()

    def _identity(self) -> dict[str, Any]:
        return super()._identity() | {"data": self.dataset.identity}
