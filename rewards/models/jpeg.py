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
class JPEGIncompressibility:
    """The file size in kB (1000 bytes), at JPEG ``quality`` 1..95: busy, noisy pictures score high.

    No checkpoint; the encoder is Pillow's. Preprocessing: to 8 bits a channel, once; no resize, so that sizes only
    compare between pictures of one size.
    Range: above 0, to some hundreds at 512 x 512.
    Not differentiable; the prompt is not read.
    Caveats: trained on alone, pictures fill up with noise; meant to prove that a loop learns.
    """

    quality: int = 95

    differentiable: ClassVar[bool] = False
    needs_prompt: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 95:
            raise ValueError(f"JPEG quality is {self.quality}; expected 1 to 95")

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        """(B, 3, H, W) float in [0, 1] -> (B,) float32; the prompts are not read."""
        return kilobytes(images, self.quality)


@dataclass
class JPEGCompressibility(JPEGIncompressibility):
    """Minus the size of :class:`JPEGIncompressibility` over 500: smooth, empty pictures score high (towards 0).

    500 is the scale of the DDPO code, for 512 x 512, where the range is about -1 to 0. Trained on alone, pictures lose
    what they show.
    """

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        return -super().score(images=images, prompts=prompts, metadata=metadata) / 500
