"""Decoding as many latents at a time as there is memory for: an autoencoder takes far more of it than what samples."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rewards.common.device import is_out_of_memory

if TYPE_CHECKING:
    from align.families.family import Family

logger = logging.getLogger(__name__)


def in_parts(family: Family, z: Tensor) -> Tensor:
    """``family.decode_pixels`` of ``z`` (B, C, h, w), in even parts of at most ``family.decode_batch_size``.

    Where that many do not fit, half as many are tried, and kept to from then on; what was decoded is not decoded again.
    On the CPU parts of two and more give the bits of the whole batch; one alone differs in the last ones, as with any
    batch size.

    With a gradient the whole batch goes through at once, whose activations are kept whatever the parts
    (``decode_batch_size`` of :class:`align.objectives.DirectReward` is for that). Raises the error of a single latent.
    """
    if z.requires_grad and torch.is_grad_enabled():
        return family.decode_pixels(z)
    parts, done = list[Tensor](), 0
    while done < len(z):
        left = len(z) - done
        part = z[done : done + -(-left // -(-left // (family.decode_batch_size or left)))]
        pixels = _tried(family, part)
        if pixels is None:  # the error is gone, and with it what it held
            family.decode_batch_size = -(-len(part) // 2)
            told = "%d latents do not fit through the autoencoder at once; from here on it decodes %d"
            logger.warning(told, len(part), family.decode_batch_size)
        else:
            parts.append(pixels)
            done += len(part)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _tried(family: Family, z: Tensor) -> Tensor | None:
    """None where there is no memory for more than one."""
    try:
        return family.decode_pixels(z)
    except (MemoryError, RuntimeError) as error:  # torch's are RuntimeErrors
        if len(z) == 1 or not is_out_of_memory(error):
            raise
        return None
