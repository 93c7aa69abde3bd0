"""Errors a user can cause: each says what was expected, what came, and what to do. The CLI prints it as one line."""

from __future__ import annotations

import errno

# torch's and safetensors' writers report a full disk in words, not as an OSError.
_FULL_DISK_WORDS = (
    "No space left on device",
    "Disk quota exceeded",
    "PytorchStreamWriter failed writing",
    "inline_container.cc",  # torch.save: "[enforce fail at inline_container.cc:671] . unexpected pos 704 vs 598"
)


class DiffalignError(Exception):
    """Base of all errors that are the input's fault, not the library's."""


class ConfigError(DiffalignError, ValueError):
    """A setting is unknown, of the wrong type, or contradicts another."""


class DataError(DiffalignError, ValueError):
    """A preference table or image cannot be used."""


class CheckpointError(DiffalignError, RuntimeError):
    """A checkpoint is unusable or belongs to another run."""


class DivergenceError(DiffalignError, RuntimeError):
    """Training produced a non-finite loss or weight."""


class RewardError(DiffalignError, RuntimeError):
    """A reward model stopped answering, so that training had to pause."""


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an exception, or what caused it, is a full disk or an exhausted quota."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(words in str(error) for words in _FULL_DISK_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False
