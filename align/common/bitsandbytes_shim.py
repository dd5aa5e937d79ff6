"""Imports bitsandbytes without torch's compiler.

diffusers imports bitsandbytes wherever it is installed, which hands functions of its CPU backend to ``torch.compile``
as it is imported: a second of CPU and 50 MB for what hardly a run calls. Here each is compiled when it is called first.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch


def ensure() -> None:
    """Import bitsandbytes where it is installed and nobody has; to be called before diffusers' models are imported."""
    if "bitsandbytes" in sys.modules or importlib.util.find_spec("bitsandbytes") is None:
        return
    compiler = torch.compile
    torch.compile = functools.partial(_when_called, compiler)
    try:
        import bitsandbytes  # noqa: F401
    except Exception:  # one that does not load here: diffusers says so where it is needed
        pass
    finally:
        torch.compile = compiler


def _when_called(compiler: Callable[..., Any], function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    compiled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not compiled:
            compiled.append(compiler(function, **options))
        return compiled[0](*args, **kwargs)

    return call
