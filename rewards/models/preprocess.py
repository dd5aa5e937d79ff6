"""Pictures as image networks expect them, differentiably: (B, 3, H, W) float in [0, 1] in, normalised pixels out.

The published scorers read 8-bit files and resize them with PIL, which rounds to 8 bits after the horizontal and again
after the vertical pass, and whose weights are fixed-point numbers. Here every value is PIL's to the bit (tested; a
level in one value of 1000 moves a tiny network's score by 1e-3), while gradients pass straight through the rounding,
and stop where PIL clips.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
LARGEST = 2**22  # weights in one matrix
Crop = Literal["transformers", "torchvision"]


def eight_bit(levels: Tensor) -> Tensor:
    """Clip to [0, 255] and round half up, as PIL does; the gradient is that of the clipping alone."""
    clipped = levels.clamp(0, 255)
    return clipped + ((clipped + 0.5).floor() - clipped).detach()


def to_levels(images: Tensor) -> Tensor:
    """[0, 1] -> the levels 0 ... 255 that an 8-bit file of the picture holds; float32, or float64 if images are."""
    # contiguous: torch 2.13 resizes a channels-last picture to a width of 1 wrongly, and decoders give channels last
    return eight_bit(255 * images.to(torch.promote_types(images.dtype, torch.float32))).contiguous()


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) float in [0, 1] -> the pictures as 8-bit files hold them."""
    levels = to_levels(images.detach()).to("cpu", torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(picture) for picture in levels.numpy()]


def resize(levels: Tensor, height: int, width: int, window: tuple[range, range] | None = None) -> Tensor:
    """PIL's antialiased bicubic of an 8-bit picture: levels in, levels out; of a ``window`` (rows, columns) of it alone
    where one is given, at the cost of that.

    Horizontally first, as every Pillow before 13 and so as the published scores; Pillow 13 begins with the vertical
    pass where that is cheaper, for some tall pictures, and a level here and there is another.
    """
    rows, columns = window or (range(height), range(width))
    fine = _resize_width(levels.double(), width, columns)  # 8 bits times 22 are exact in it
    return _resize_width(fine.mT, height, rows).mT.to(levels.dtype)


def _resize_width(levels: Tensor, width: int, columns: range) -> Tensor:
    old = levels.shape[-1]
    if old == width:
        return levels[..., columns.start : columns.stop]
    # each new pixel reads a few old ones: of a long banner one matrix would be gigabytes of zeros
    block = len(columns) if old * len(columns) <= LARGEST else 32
    parts = []
    for start in range(columns.start, columns.stop, block):
        first, matrix = weights(old, width, start, min(start + block, columns.stop), levels.device)
        parts.append(levels[..., first : first + matrix.shape[1]] @ matrix.mT)
    return eight_bit(torch.cat(parts, -1))


@functools.lru_cache(maxsize=64)
def weights(old: int, new: int, start: int, stop: int, device: torch.device) -> tuple[int, Tensor]:
    """What PIL makes the pixels ``start`` to ``stop`` of ``new`` from: the first of ``old`` pixels that counts, and
    what it and those after it are multiplied with, (stop - start, n) float64, multiples of 2 ** -22. Made on the CPU,
    so that they are the same on any device, and kept: a data set has few sizes."""
    step = old / new
    wide = max(step, 1.0)
    centre = (torch.arange(start, stop, dtype=torch.float64)[:, None] + 0.5) * step
    first, end = ((centre + 2 * wide * sign + 0.5).long().clamp(0, old) for sign in (-1, 1))  # that count, and beyond
    pixel = torch.arange(int(first.min()), int(end.max()))
    x = ((pixel - centre + 0.5) * (1 / wide)).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, -0.5 * (((x - 5) * x + 8) * x - 4)
    parts = torch.where(x < 1, near, far) * ((x < 2) & (pixel >= first) & (pixel < end))
    parts = parts / parts.sum(1, keepdim=True) * 2**22
    return int(pixel[0]), (parts.sign() * (parts.abs() + 0.5).floor() / 2**22).to(device)


def square(images: Tensor, side: int, crop: Crop) -> Tensor:
    """Shorter edge to ``side`` and centre crop: (B, 3, side, side) in [0, 1].

    Where the number of surplus pixels is odd, the crops of transformers and torchvision can be a pixel apart.
    """
    levels = to_levels(images)
    height, width = levels.shape[-2:]
    short = min(height, width)
    size = int(side * height / short), int(side * width / short)
    spare = [extent - side for extent in size]
    top, left = (number // 2 if crop == "transformers" else round(number / 2) for number in spare)
    return resize(levels, *size, (range(top, top + side), range(left, left + side))) / 255


def letterbox(images: Tensor, side: int, antialias: bool) -> Tensor:
    """Longer edge to ``side``, black bars around: (B, 3, side, side).

    A bicubic of floats, which nothing rounds or clips, so that values a little outside [0, 1] are right.
    """
    pixels = to_levels(images) / 255
    height, width = pixels.shape[-2:]
    scale = side / max(height, width)
    size = (max(round(height * scale), 1), max(round(width * scale), 1))
    if size != (height, width):
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=antialias)
    down, across = side - size[0], side - size[1]
    return F.pad(pixels, (across // 2, across - across // 2, down // 2, down - down // 2))


def normalise(pixels: Tensor, mean: Sequence[float] = OPENAI_MEAN, std: Sequence[float] = OPENAI_STD) -> Tensor:
    """Subtract the mean of each channel and divide by its deviation."""
    middle, spread = (pixels.new_tensor(values).view(3, 1, 1) for values in (mean, std))
    return (pixels - middle) / spread
