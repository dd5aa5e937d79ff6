"""Encoding images and captions for the latent cache: cut, decode in parallel, through the VAE and text encoders."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from align.common.errors import DataError
from align.data.dataset import Item
from align.data.latent_cache import Encoder, Views
from align.families import Conditioning
from rewards.data.images import UnreadableError, decode

TEXTS = 64  # captions in one call of the text encoders
DECODE = 8  # items whose pictures are in memory at a time


def cut(image: Image.Image, resolution: int, x: float, y: float, flip: bool) -> Tensor:
    """A square of an RGB picture as (3, H, W) uint8: the shorter edge becomes ``resolution`` (bilinear, antialiased),
    then the window at the fraction (x, y) of the free way is cut and perhaps mirrored."""
    scale = resolution / min(image.size)
    width, height = (max(resolution, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round(x * (width - resolution)), round(y * (height - resolution))
    image = image.crop((left, top, left + resolution, top + resolution))
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def latents_of(
    family: Encoder,
    items: Sequence[Item],
    views: Views,
    vae_batch: int,
    shape: tuple[int, ...],
    pool: Executor,
    done: Callable[[int], object],
) -> tuple[Tensor, list[int], list[tuple[int, str]]]:
    """Latents (n, variants, pictures, C, h, w) of the readable items, their places in ``items``, the others' faults."""
    latents, kept, bad = list[Tensor](), list[int](), list[tuple[int, str]]()
    for start in range(0, len(items), DECODE):
        some = items[start : start + DECODE]
        # bytes in order, by one thread, as tables are read forward; decoding in parallel
        seen = list(pool.map(lambda item, data: _see(item, data, views), some, [_bytes(item) for item in some]))
        good = [view for view in seen if isinstance(view, Tensor)]
        kept += [start + k for k, view in enumerate(seen) if isinstance(view, Tensor)]
        bad += [(start + k, view) for k, view in enumerate(seen) if isinstance(view, str)]
        if good:
            images = torch.stack(good).flatten(0, 2)
            with torch.no_grad():
                parts = [family.to_latent(part.float() / 255) for part in torch.split(images, vae_batch)]
            whole = torch.cat(parts)
            latents.append(whole.reshape(len(good), *shape[:2], *whole.shape[1:]).cpu())
        done(len(some))
    found = torch.cat(latents) if latents else torch.empty(0, *shape)
    if found.shape[1:] != shape:
        raise DataError(
            f"expected latents of shape {shape} (variants, pictures, C, h, w), the VAE gave {found.shape[1:]}"
        )
    wrong = (~found.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if wrong:
        raise DataError(
            f"the VAE's latents of {items[kept[wrong[0]]].source} are not finite; SDXL's own VAE overflows in float16: "
            "use float32 or bfloat16, or madebyollin/sdxl-vae-fp16-fix"
        )
    half = family.dtype in (torch.float16, torch.bfloat16)
    return found.to(family.dtype if half else torch.float32), kept, bad


def _bytes(item: Item) -> list[bytes] | str:
    """The pictures' bytes, or why they cannot be had."""
    found = []
    for picture in item.pictures:
        try:
            found.append(picture.data())
        except UnreadableError as error:
            return f"{picture}: {error}"
    return found


def _see(item: Item, data: list[bytes] | str, views: Views) -> Tensor | str:
    """The item's views (variants, pictures, 3, H, W) uint8, or why there are none."""
    if isinstance(data, str):
        return data
    images = []
    for picture, code in zip(item.pictures, data, strict=True):
        try:
            images.append(decode(code))
        except UnreadableError as error:
            return f"{picture}: {error}"
    first, *others = zip(data, images, strict=True)
    if any(code == first[0] or (i.size == first[1].size and i.tobytes() == first[1].tobytes()) for code, i in others):
        return "both pictures are the same"
    return torch.stack(
        [torch.stack([cut(image, views.resolution, *view) for image in images]) for view in views.of(item.id)]
    )


def conds_of(family: Encoder, captions: Sequence[str], done: Callable[[int], object]) -> dict[str, Tensor]:
    parts = []
    for start in range(0, len(captions), TEXTS):
        with torch.no_grad():
            parts.append(family.encode(captions[start : start + TEXTS]))
        done(len(parts[-1]))
    return {name: tensor.cpu().contiguous() for name, tensor in Conditioning.cat(parts).tensors.items()}


def threads() -> int:
    return min(8, os.cpu_count() or 1)
