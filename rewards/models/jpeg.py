"""How large a picture is as a JPEG file: the two task-free rewards of DDPO (Black et al. 2023, arXiv 2305.13301)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor


def kilobytes(images: Tensor, quality: int) -> Tensor:
    """Size of each picture as a JPEG file in units of 1000 bytes: (B, 3, H, W) float in [0, 1] -> (B,) float32."""
    # The one place where [0, 1] becomes [0, 255]; anything already there would have been refused by `checked`.
    pixels = (images.detach().float() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    sizes = []
    for picture in pixels:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, format="JPEG", quality=quality)
        sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes, dtype=torch.float32, device=images.device)


@dataclass
class JPEGCompressibility:
    """Minus the file size in kB over 500, at JPEG ``quality`` 1..95: smooth, empty pictures score high (towards 0).

    No checkpoint; the encoder is Pillow's. Preprocessing: to 8 bits a channel, once; no resize, so that sizes only
    compare between pictures of one size.
    Formula: ``-kB / 500``, kB in units of 1000 bytes; 500 is the scale of the DDPO code, for 512 x 512.
    Range: below 0, about -1 to 0 at 512 x 512.
    Not differentiable; the prompt is not read.
    Caveats: trained on alone, pictures lose what they show; meant to prove that a loop learns.
    """

    quality: int = 95

    differentiable: ClassVar[bool] = False
    needs_prompt: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_quality(self.quality)

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        """(B, 3, H, W) float in [0, 1] -> (B,) float32; the prompts are not read."""
        return -kilobytes(images, self.quality) / 500


@dataclass
class JPEGIncompressibility:
    """The file size in kB, at JPEG ``quality`` 1..95: busy, noisy pictures score high.

    Everything else is as in :class:`JPEGCompressibility`, but that the size is not divided and so runs to some hundreds
    at 512 x 512.
    """

    quality: int = 95

    differentiable: ClassVar[bool] = False
    needs_prompt: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_quality(self.quality)

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        """(B, 3, H, W) float in [0, 1] -> (B,) float32; the prompts are not read."""
        return kilobytes(images, self.quality)


def _check_quality(quality: int) -> None:
    if not 1 <= quality <= 95:
        raise ValueError(f"JPEG quality is {quality}; expected 1 to 95")
