"""Turns exceptions that are not bugs into one line; anything else keeps its traceback."""

from __future__ import annotations

from ..environment import broken_pair_message, is_torch_pair_error
from ..errors import DiffalignError, is_disk_full


def one_line(error: BaseException) -> str | None:
    """What was expected, what came and what to do; None when the error is a bug and deserves its traceback."""
    if isinstance(error, DiffalignError) or type(error).__name__ == "RewardModelError":
        return " ".join(str(error).split())
    if is_torch_pair_error(error):
        return broken_pair_message()
    if is_disk_full(error):
        where = f" while writing {error.filename}" if isinstance(error, OSError) and error.filename else ""
        return (
            f"the disk is full{where}. What was saved before is intact: free space or choose another output folder; "
            "a training run then continues with resume=latest."
        )
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.strerror}: {error.filename}"
    if isinstance(error, RuntimeError) and type(error).__name__ == "OutOfMemoryError":
        return (
            f"{' '.join(str(error).split())[:200]} Lower the batch size. `generate` also has "
            "load_models=one_by_one; a training stays the same when gradient_accumulation_steps rises by the same "
            "factor, and has gradient_checkpointing=true and mixed_precision=bf16."
        )
    return None
