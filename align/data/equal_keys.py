"""Which of many rows are equal, by digests of 128 bits; what grows with the rows is in files, not in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

PART = 1 << 17  # rows in memory at a time

Keys = np.ndarray[Any, np.dtype[np.uint64]]  # (N, 2)
Numbers = np.ndarray[Any, np.dtype[np.int32]]


def mapped(file: Path, dtype: Any, columns: int = 1) -> np.ndarray[Any, Any]:
    """The numbers in a file: (N,), or (N, ``columns``)."""
    found = np.memmap(file, dtype, "r") if file.stat().st_size else np.empty(0, dtype)
    return found.reshape(-1, columns) if columns > 1 else found


def parts(count: int) -> Iterator[slice]:
    return (slice(start, min(start + PART, count)) for start in range(0, count, PART))


def first_equal(keys: Keys, file: Path) -> Numbers:
    """For each of ``keys`` the place of the first that equals it, int32, kept in ``file``."""
    if not len(keys):
        file.touch()
        return mapped(file, np.int32)
    first = np.memmap(file, np.int32, "w+", shape=len(keys))
    buckets = max(1, len(keys) // PART)  # that can be sorted one by one
    for bucket in range(buckets):
        found = [np.flatnonzero(keys[part, 0] % np.uint64(buckets) == bucket) + part.start for part in parts(len(keys))]
        places = np.concatenate(found).astype(np.int32)
        one, other = keys[places, 0], keys[places, 1]
        order = np.lexsort((other, one))  # stable: of equals the first stays first
        new = np.ones(len(order), bool)
        new[1:] = (np.diff(one[order]) != 0) | (np.diff(other[order]) != 0)
        first[places[order]] = places[order[new]][np.cumsum(new) - 1]
    return first


def number_distinct(first: Numbers, firsts: Path, numbers: Path) -> None:
    """Number the distinct rows by the place where each ``first`` occurs: these places, and each row's number."""
    with firsts.open("wb") as out:
        for part in parts(len(first)):
            places = np.arange(part.start, part.stop, dtype=np.int32)
            out.write(places[first[part] == places].tobytes())
    there = mapped(firsts, np.int32)
    with numbers.open("wb") as out:
        for part in parts(len(first)):
            out.write(np.searchsorted(there, first[part]).astype(np.int32).tobytes())


def contradictions(first: Numbers, upward: np.ndarray[Any, np.dtype[np.bool_]]) -> int:
    """:func:`rewards.data.verdicts.contradicted` of pairs that are the same two images where ``first`` is equal, the
    same one of which won where ``upward`` is."""
    there = np.zeros((2, len(first)), bool)
    for part in parts(len(first)):
        there[upward[part].astype(np.int8), first[part]] = True
    return sum(int(there[:, first[part]].all(0).sum()) for part in parts(len(first)))
