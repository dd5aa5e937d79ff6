"""The settings of quantization, in a file of their own: reading them does not import bitsandbytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from align.common.errors import UserError
from align.common.patterns import is_bounded

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
        names = () if self.skip is None else self.skip  # also of a stranger's config.json; transformers reads patterns
        if not isinstance(names, list | tuple) or (bad := [name for name in names if not is_bounded(name)]):
            what = repr(names if not isinstance(names, list | tuple) else bad[0])[:80]
            raise UserError(f"skip: {what} is no name of modules; expected a list of names, without groups or brackets")
