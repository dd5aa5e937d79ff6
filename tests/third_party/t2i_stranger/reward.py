"""Colourfulness as a reward (Hasler & Süsstrunk 2003, "Measuring colourfulness in natural images", eq. 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


class Colorfulness:
    """``|std of (rg, yb)| + 0.3 |mean of (rg, yb)|`` with ``rg = R - G`` and ``yb = (R + G) / 2 - B``, in [0, 255].

    Args:
        scale: what the figure is multiplied by.
    """

    differentiable = True
    needs_prompt = False

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        """images (B, 3, H, W) in [0, 1] -> (B,)"""
        red, green, blue = (255 * images.float()).flatten(2).unbind(1)
        rg, yb = red - green, (red + green) / 2 - blue
        std = (rg.var(1, correction=0) + yb.var(1, correction=0)).sqrt()
        return self.scale * (std + 0.3 * (rg.mean(1).square() + yb.mean(1).square()).sqrt())
