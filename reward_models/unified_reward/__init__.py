"""UnifiedReward: vision-language models that score pictures and judge pairs, run here or by a server."""

from .judge import UnifiedReward
from .local import LocalBackend
from .server import ServerBackend
from .statistics import JudgeStatistics

__all__ = ["JudgeStatistics", "LocalBackend", "ServerBackend", "UnifiedReward"]
