"""Base against aligned: pictures from the same noise, paired statistics, and a report a person can judge."""

from .compare import Comparison, SamplingSettings, compare, compare_pictures
from .report import write_report
from .run import evaluate
from .statistics import Interval, PairedResult, bootstrap_mean, compare_paired

__all__ = [
    "Comparison",
    "Interval",
    "PairedResult",
    "SamplingSettings",
    "bootstrap_mean",
    "compare",
    "compare_paired",
    "compare_pictures",
    "evaluate",
    "write_report",
]
