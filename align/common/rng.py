"""Random numbers that belong to a sample, not to a process.

Every draw comes from a generator keyed by (seed, purpose, step, position in the global batch). So a batch split over
processes, or into micro-batches, or resumed after a kill, sees the very same numbers; and the numbers are the CPU's,
so they do not change with the device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator named by ``key``."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def normal(shape: tuple[int, ...], generators: Sequence[torch.Generator]) -> Tensor:
    """Standard normal (B, *shape), row k from ``generators[k]``."""
    return torch.stack([torch.randn(shape, generator=g) for g in generators])


def uniform(generators: Sequence[torch.Generator]) -> Tensor:
    """Uniform in [0, 1), (B,), row k from ``generators[k]``."""
    return torch.cat([torch.rand(1, generator=g) for g in generators])


def strata(generators: Sequence[torch.Generator], count: int) -> Tensor:
    """Uniform in [0, 1), (B, count), the k-th of a row in the k-th of ``count`` equal shares."""
    return (torch.stack([uniform(generators) for _ in range(count)], 1) + torch.arange(count)) / count
