"""Preference tables: reading, writing and checking them, choosing pairs, and encoding them for training."""

from .check import CheckReport, check_preferences
from .encoded import EncodedPreferences
from .pairs import Example, select_pairs
from .pickapic import write_pickapic
from .preferences import LoadReport, PreferenceDataset, load_preferences
from .schema import FEATURES, PreferenceRow, row_id_of, write_preferences, write_shard

__all__ = [
    "FEATURES",
    "CheckReport",
    "EncodedPreferences",
    "Example",
    "LoadReport",
    "PreferenceDataset",
    "PreferenceRow",
    "check_preferences",
    "load_preferences",
    "row_id_of",
    "select_pairs",
    "write_pickapic",
    "write_preferences",
    "write_shard",
]
