"""What is seen of an image: at which size, cut where, mirrored or not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from align.common.errors import UserError
from align.common.resolution import sides

Size = tuple[int, int]  # height, width


def cut(image: Image.Image, size: int | Size, x: float, y: float, flip: bool) -> Tensor:
    """A rectangle of an RGB image as (3, H, W) uint8: the image is scaled (bilinear, antialiased) until it just covers
    ``size``, (height, width) or a square's side, then the window at the fraction (x, y) of the free way is cut and
    perhaps mirrored."""
    high, wide = (size, size) if isinstance(size, int) else size
    scale = max(wide / image.width, high / image.height)
    width, height = max(wide, round(image.width * scale)), max(high, round(image.height * scale))
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    x0, y0 = round(x * (width - wide)), round(y * (height - high))
    image = image.crop((x0, y0, x0 + wide, y0 + high))
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def buckets_of(size: Size, chosen: bool | Sequence[str], step: int) -> tuple[Size, ...]:
    """The sizes, (height, width), that images are put into: ``size`` alone; those ``chosen``; or, of True, of every
    width that is a multiple of ``step`` the largest such height of no more pixels than ``size``, and the other way
    round, from half its side to twice that (kohya's ``make_bucket_resolutions``). Raises :class:`UserError`."""
    if chosen is False:
        return (size,)
    if chosen is not True:
        found = [(int(high or 0), int(wide or 0)) for high, wide in map(sides, chosen)]
        if not found:
            raise UserError(
                "aspect_ratio_buckets is empty; expected sizes such as [1024x1024, 768x1344], true or false"
            )
        return tuple(dict.fromkeys(found))
    area, side = math.prod(size), math.sqrt(math.prod(size))
    square = int(side) // step * step
    found = [(square, square)]
    for width in range(math.ceil(side / 2 / step) * step, int(2 * side) + 1, step):
        height = min(int(2 * side), area // width) // step * step
        found += [(height, width), (width, height)] if height >= side / 2 else []
    if not square or len(set(found)) == 1:
        raise UserError(
            f"aspect_ratio_buckets: multiples of bucket_reso_steps = {step} make no other bucket of "
            f"{size[1]}x{size[0]} pixels than a square; take smaller steps"
        )
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class Views:
    """Which rectangles of an image are seen, each as large as one of ``sizes``."""

    sizes: tuple[Size, ...]
    center_crop: bool
    random_flip: bool
    variants: int
    seed: int

    def bucket(self, images: Sequence[Image.Image]) -> int:
        """Which of ``sizes`` has the aspect ratio that is nearest to that of the images of an example, by the ratio of
        the two; the images of a pair go into one, by their ratios' geometric mean."""
        ratio = sum(math.log(image.width / image.height) for image in images) / len(images)
        return min(range(len(self.sizes)), key=lambda k: abs(math.log(self.sizes[k][1] / self.sizes[k][0]) - ratio))

    def of(self, example: int) -> Iterator[tuple[float, float, bool]]:
        """(x, y, flip) of each variant: where the cut lies on the free way from 0 to 1, and whether mirrored."""
        for variant in range(self.variants):
            x, y, coin = np.random.default_rng([self.seed, example, variant]).random(3)
            yield (*((0.5, 0.5) if self.center_crop else (x, y)), self.random_flip and coin < 0.5)

    def key(self) -> dict[str, object]:
        """Without randomness the seed does not matter, and runs of different seeds share a cache."""
        return asdict(self) | ({} if self.random_flip or not self.center_crop else {"seed": None})
