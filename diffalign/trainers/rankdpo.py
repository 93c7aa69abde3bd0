"""RankDPO: ranked lists."""

from __future__ import annotations

from torch import Tensor

from ..data import Example, select_lists
from ..objectives import LossOutput, rankdpo_loss, with_sft
from .base import PreferenceTrainer
from .batches import Batch
from .config import RankDPOConfig


class RankDPOTrainer(PreferenceTrainer):
    """Trains on lists with :func:`diffalign.objectives.rankdpo_loss` (Karthik et al. 2024, arXiv:2410.18013)."""

    method = "rankdpo"
    config_class = RankDPOConfig
    config: RankDPOConfig

    def select_examples(self) -> tuple[list[Example], dict[str, int]]:
        return select_lists(self.dataset, list_size=self.config.list_size, min_margin=self.config.min_margin)

    def compute(self, policy_error: Tensor, reference_error: Tensor | None, batch: Batch) -> LossOutput:
        config = self.config
        assert reference_error is not None
        out = rankdpo_loss(
            policy_error,
            reference_error,
            batch.preference,
            beta=config.beta,
            weighting=config.weighting,
            gain=config.gain,
            log_base=config.log_base,
            rank_source=config.rank_source,
        )
        if not config.sft_weight:
            return out
        return with_sft(out, policy_error, config.sft_weight, preference=batch.preference)
