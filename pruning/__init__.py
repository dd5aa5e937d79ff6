"""Small pipelines: blocks removed and healed (:mod:`pruning.compress`), weights in 4 bit (:mod:`pruning.quantize`).

>>> import pruning
>>> pipe = pruning.load("outputs/compress/int4")  # a stock diffusers pipeline, also where there is no GPU
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rewards  # noqa: F401  first: it makes torchvision importable beside a CPU torch

__all__ = ["load"]


def load(folder: Path | str, dtype: Any = None) -> Any:
    """The pipeline in ``folder``, or a single denoiser or text encoder: whole, pruned, in 4 bit, or both; what is not
    packed in ``dtype``, or as it was saved. See :func:`pruning.quantize.load`."""
    from pruning.quantize import load as load_any  # bitsandbytes takes a second to import

    return load_any(folder, dtype)
