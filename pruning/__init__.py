"""Small pipelines: blocks removed and healed (:mod:`pruning.compress`), weights in 4 bit (:mod:`pruning.quantize`).

>>> import pruning
>>> pipe = pruning.load("outputs/compress/int4")  # a stock diffusers pipeline, also where there is no GPU
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import rewards  # noqa: F401  first: it makes torchvision importable beside a CPU torch

__all__ = ["load", "pack", "reads"]


def load(folder: Path | str, dtype: Any = None) -> Any:
    """The pipeline in ``folder``, or a single denoiser or text encoder: whole, pruned, in 4 bit, or both; what is not
    packed in ``dtype`` (``"float32"`` or torch's), or as it was saved. See :func:`pruning.loading.load`."""
    from pruning.loading import load as load_any  # bitsandbytes takes a second to import

    return load_any(folder, dtype)


def pack(module: Any) -> None:
    """Pack the Linears of a denoiser in NF4, in place, the blocks' scales in 8 bit, as QLoRA has it (Dettmers et al.
    2023); multiplied in what is not packed. See :func:`pruning.quantize.quantize`."""
    from pruning.nf4 import NF4
    from pruning.quantize import quantize  # bitsandbytes, as above

    quantize(module, NF4(double_quant=True, compute_dtype=str(module.dtype).removeprefix("torch.")))  # type: ignore[arg-type]


def reads(folder: Path | str) -> bool:
    """Whether ``folder``, a pipeline or one component, is of the kind that :func:`load` reads here and stock diffusers
    does not: a denoiser that lost parts of blocks, or 4 bit without a GPU. Looks at each ``config.json``."""
    folder = Path(folder)
    for path in filter(Path.is_file, (folder / "config.json", *folder.glob("*/config.json"))):
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            return False  # stock diffusers will say so
        if isinstance(config, dict) and ("pruning" in config or "quantization_config" in config):
            from pruning.loading import stock_reads  # bitsandbytes, as above

            if not stock_reads(config):
                return True
    return False
