"""Randomness keyed by what it is for, never drawn from a running stream.

Every draw comes from a generator seeded by its key, for example ``(run seed, epoch, row id, "noise")``. Batch size,
gradient accumulation, the number of processes and a restart therefore never change what a row sees.
"""

from __future__ import annotations

import hashlib

import torch

Key = str | int


def keyed_seed(*key: Key) -> int:
    """A 63-bit seed that depends on every part of ``key``, its type and its place."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def keyed_generator(*key: Key) -> torch.Generator:
    """A CPU generator seeded by ``key``: the same on every device and process."""
    return torch.Generator("cpu").manual_seed(keyed_seed(*key))


def keyed_normal(shape: tuple[int, ...], *key: Key) -> torch.Tensor:
    """Standard normal noise of ``shape``, fp32 on the CPU."""
    return torch.randn(shape, generator=keyed_generator(*key), dtype=torch.float32)


def keyed_uniform(*key: Key) -> float:
    """One number in [0, 1)."""
    return keyed_seed(*key) / 2**63


def keyed_permutation(count: int, *key: Key) -> list[int]:
    """A random order of ``range(count)``."""
    return torch.randperm(count, generator=keyed_generator(*key)).tolist()
