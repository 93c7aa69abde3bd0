"""Base against aligned: pictures from the same noise, paired statistics, and a report a person can judge."""

from .claims import claims_table
from .compare import Comparison, compare, compare_pictures
from .graders import Detection, GenEvalGrader, Grader, UniGenBenchGrader
from .models import ModelSpec, parse_models
from .pictures import SamplingSettings
from .prompt_sets import PromptSet
from .prompts import read_prompt_set
from .report import write_report
from .run import evaluate
from .statistics import Interval, PairedResult, bootstrap_mean, compare_paired, holm, sign_test
from .tasks import summarise

__all__ = [
    "Comparison",
    "Detection",
    "GenEvalGrader",
    "Grader",
    "Interval",
    "ModelSpec",
    "PairedResult",
    "PromptSet",
    "SamplingSettings",
    "UniGenBenchGrader",
    "bootstrap_mean",
    "claims_table",
    "compare",
    "compare_paired",
    "compare_pictures",
    "evaluate",
    "holm",
    "parse_models",
    "read_prompt_set",
    "sign_test",
    "summarise",
    "write_report",
]
