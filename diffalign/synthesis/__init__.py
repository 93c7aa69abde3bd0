"""From prompts to ranked pictures: sampling, ranking, and the preference table made of them."""

from .build import BuildReport, build_preferences
from .ranking import Ranking, rank_candidates
from .sampling import generate_images, iterate_images, picture_seed

__all__ = [
    "BuildReport",
    "Ranking",
    "build_preferences",
    "generate_images",
    "iterate_images",
    "picture_seed",
    "rank_candidates",
]
