"""Which of many rows are equal, by digests of 128 bits in a file, in little memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

BUCKET = 1 << 17  # keys that are sorted at a time

Keys = np.ndarray[Any, np.dtype[np.uint64]]
Numbers = np.ndarray[Any, np.dtype[np.int32]]


def read_keys(file: Path, columns: int) -> Keys:
    """(N, columns), mapped."""
    if not file.stat().st_size:
        return np.empty((0, columns), np.uint64)
    return np.memmap(file, np.uint64, "r").reshape(-1, columns)


def first_equal(keys: Keys) -> Numbers:
    """For each of ``keys`` (N, 2) the place of the first that equals it; a part of them is sorted at a time."""
    first = np.empty(len(keys), np.int32)
    parts = np.uint64(max(1, len(keys) // BUCKET))
    for part in range(int(parts)):
        places = np.flatnonzero(keys[:, 0] % parts == part).astype(np.int32)
        one, other = keys[places, 0], keys[places, 1]
        order = np.lexsort((other, one))  # stable: of equals the first stays first
        new = np.ones(len(order), bool)
        new[1:] = (np.diff(one[order]) != 0) | (np.diff(other[order]) != 0)
        first[places[order]] = places[order[new]][np.cumsum(new) - 1]
    return first


def contradictions(sides: Keys) -> int:
    """:func:`rewards.data.verdicts.contradicted` of (N, 4): the winner's digest and the loser's."""
    first = first_equal(sides[:, :2] ^ sides[:, 2:])
    upward = sides[:, 0] < sides[:, 2]
    there = np.zeros((2, len(first)), bool)
    there[upward.astype(int), first] = True
    return int(there[:, first].all(0).sum())
