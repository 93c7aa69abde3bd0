"""Errors a user can cause: each says what was expected, what came, and what to do. The CLI prints it as one line."""


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
