"""Preference tables: reading, writing and checking them, choosing pairs, and encoding them for training."""

from .check import CheckReport, check_preferences
from .encoded import EncodedPreferences
from .pairs import Example, curriculum, select_lists, select_pairs
from .pickapic import write_pickapic
from .preferences import LoadReport, PreferenceDataset, load_preferences, store_score_ranges
from .schema import FEATURES, PreferenceRow, row_id_of, write_preferences, write_shard
from .soft_labels import soften

__all__ = [
    "FEATURES",
    "CheckReport",
    "EncodedPreferences",
    "Example",
    "LoadReport",
    "PreferenceDataset",
    "PreferenceRow",
    "check_preferences",
    "curriculum",
    "load_preferences",
    "row_id_of",
    "select_lists",
    "select_pairs",
    "soften",
    "store_score_ranges",
    "write_pickapic",
    "write_preferences",
    "write_shard",
]
