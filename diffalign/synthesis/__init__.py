"""From prompts to ranked pictures: sampling, scoring, ranking, and the preference table made of them."""

from .build import BuildReport, build_preferences
from .config import GenerationConfig, PipelineSpec, RerankConfig, RewardSpec, load_generation
from .ranking import Ranking, Voter, rank_candidates
from .rerank import rerank
from .run import generate
from .sampling import generate_images, iterate_images, picture_seed

__all__ = [
    "BuildReport",
    "GenerationConfig",
    "PipelineSpec",
    "Ranking",
    "RerankConfig",
    "RewardSpec",
    "Voter",
    "build_preferences",
    "generate",
    "generate_images",
    "iterate_images",
    "load_generation",
    "picture_seed",
    "rank_candidates",
    "rerank",
]
