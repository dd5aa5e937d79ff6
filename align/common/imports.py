"""Imports of a command without the garbage collector, a fifth of their time: what modules make is looked through again
and again, and nearly all of it stays."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_young = False  # a command's own process, in which no model has been looked for yet


def own_process() -> None:
    """This process is a command's and nothing else: what it imports stays to its end."""
    global _young
    _young = True


@contextmanager
def uncollected(last: bool = False) -> Iterator[None]:
    """For imports of diffusers, transformers and what needs them. In a command's :func:`own_process` nothing that they
    make is looked through for garbage, now or later; elsewhere nothing is changed. ``last`` ends that: after it come
    models, which are garbage some day."""
    global _young
    if not _young:
        yield
        return
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()
        _young = not last
