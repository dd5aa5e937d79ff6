"""The settings of quantization, in a file of their own: reading them does not import bitsandbytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from align.common.errors import UserError

COMPUTE = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class NF4:
    """How to quantize.

    Args:
        double_quant: quantize the blocks' scales to 8 bits as well.
        compute_dtype: what the packed weights are unpacked to, and multiplied in.
        skip: modules to keep in full precision, by name, in place of the architecture's own list (``KEPT``).
    """

    double_quant: bool = False
    compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    skip: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.compute_dtype not in COMPUTE:
            raise UserError(f"compute_dtype is {self.compute_dtype!r}, expected {' or '.join(map(repr, COMPUTE))}")
