"""What a picture looks like, in four numbers that no network and no prompt is needed for. They are to be watched, at
weight 0: a policy that hacks its reward tends to darken, blur, flatten or fill its pictures before anybody sees why
it scores.

Of a picture of H x W pixels in [0, 1], with Y = 0.299 R + 0.587 G + 0.114 B (Rec. 601), edge pixels repeated beyond
the edge:

    DarkShare      the share of pixels with Y < 0.1
    EdgeDensity    the share of pixels where |grad Y| > 0.1, with Sobel's kernels over 8 (a ramp has its slope)
    ColorEntropy   -sum p log2 p over the 8 x 8 x 8 equal boxes of RGB, in bits: 0 of one colour, at most 9
    Sharpness      the variance over pixels of Y(left) + Y(right) + Y(above) + Y(below) - 4 Y

EdgeDensity and Sharpness change with a picture's size: compare pictures of one size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

DARK = 0.1  # of Y
EDGE = 0.1  # of Y, per pixel
LEVELS = 8  # of a channel
_SOBEL = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
_LAPLACE = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])


def luma(images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1, H, W), float32."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device).view(1, 3, 1, 1)
    return (images.detach().float() * weights).sum(1, keepdim=True)


def _filtered(y: Tensor, *kernels: Tensor) -> Tensor:
    """(B, 1, H, W) -> (B, K, H, W)."""
    stack = torch.stack(kernels)[:, None].to(y.device)
    return F.conv2d(F.pad(y, (1, 1, 1, 1), mode="replicate"), stack)


class _Statistic:
    """A statistic; no checkpoint, not differentiable, the prompt is not read, any size."""

    differentiable: ClassVar[bool] = False
    needs_prompt: ClassVar[bool] = False

    def _of(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        """(B, 3, H, W) float in [0, 1] -> (B,) float32; the prompts are not read."""
        return self._of(images)


class DarkShare(_Statistic):
    """The share of pixels that are dark, in [0, 1]."""

    def _of(self, images: Tensor) -> Tensor:
        return (luma(images) < DARK).float().mean((1, 2, 3))


class EdgeDensity(_Statistic):
    """The share of pixels on an edge, in [0, 1]: 0 of one colour, high of noise."""

    def _of(self, images: Tensor) -> Tensor:
        slope = _filtered(luma(images), _SOBEL, _SOBEL.T)
        return (slope.norm(dim=1) > EDGE).float().mean((1, 2))


class ColorEntropy(_Statistic):
    """How many colours there are, in bits, in [0, 9]."""

    def _of(self, images: Tensor) -> Tensor:
        level = (images.detach().float() * LEVELS).long().clamp(0, LEVELS - 1)
        box = ((level[:, 0] * LEVELS + level[:, 1]) * LEVELS + level[:, 2]).flatten(1)
        counts = torch.zeros(len(images), LEVELS**3, device=images.device).scatter_add_(
            1, box, torch.ones_like(box, dtype=torch.float32)
        )
        share = counts / box.shape[1]
        return -torch.xlogy(share, share).sum(1) / math.log(2)


class Sharpness(_Statistic):
    """The variance of the Laplacian, from 0: low of what is blurred, high of noise."""

    def _of(self, images: Tensor) -> Tensor:
        return _filtered(luma(images), _LAPLACE).flatten(1).var(1, correction=0)
