"""Pictures to score: one row, a fixed sequence of them, and decoding."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

# what Pillow raises on damaged files
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class Row:
    """One picture to score: where it lies, or its encoded bytes. One with a ``problem`` cannot be read."""

    file: str
    prompt: str | None = None
    picture: Path | bytes | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""

    def read(self) -> Tensor:
        """:func:`decode` of its picture; ``OSError`` also where there is a ``problem``."""
        if self.problem or self.picture is None:
            raise OSError(self.problem or "there is no picture in this row")
        return decode(self.picture)


@dataclass(frozen=True)
class Input:
    """Rows in a fixed order.

    ``rows(wanted)`` gives one item per row, the row where ``wanted(number)`` and None elsewhere, so that skipping is
    cheap. ``identity`` is JSON and the same for the same rows. ``total`` is None where only reading tells;
    ``listed`` holds the rows where all of them are known beforehand.
    """

    identity: dict[str, Any]
    total: int | None
    rows: Callable[[Callable[[int], bool]], Iterator[Row | None]]
    listed: Sequence[Row] = ()


def decode(picture: Path | bytes, formats: tuple[str, ...] | None = None, max_pixels: int | None = None) -> Tensor:
    """One upright picture on white: (3, H, W) uint8. ``OSError`` where it cannot be read, or is not among Pillow's
    ``formats``, or has more than ``max_pixels``, which is looked at before any pixel is decoded."""
    try:
        with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture, formats=formats) as opened:
            if max_pixels is not None and opened.width * opened.height > max_pixels:
                raise OSError(f"{opened.width} x {opened.height} pixels; at most {max_pixels} are taken")
            if opened.mode.startswith(("I", "F")):  # PIL would clip these to white without a word
                raise OSError(f"{opened.mode} pixels; expected 8 bits a channel")
            ImageOps.exif_transpose(opened, in_place=True)
            image: Image.Image = opened
            # most pictures are opaque, and to lay them on white would take longer than to decode them
            if image.mode != "RGB" or image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
            pixels = np.array(image)
    except OSError:
        raise
    except _BROKEN as error:
        raise OSError(str(error)) from error
    # by numpy: in every one of the decoding threads torch would start a pool of threads of its own
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
