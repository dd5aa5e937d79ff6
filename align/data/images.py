"""Pictures that lie in files or in tables and are read when somebody looks at them."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps

from align.common.errors import DataError
from rewards.data import tables

BROKEN = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


class UnreadableError(DataError):
    """One picture that cannot be read."""


class Readable(Protocol):
    """A picture that is read when somebody looks at it; ``file``, ``row`` and ``column`` tell it from all others."""

    @property
    def file(self) -> Path: ...
    @property
    def row(self) -> int: ...
    @property
    def column(self) -> str: ...
    def data(self) -> bytes: ...


class Picture(tables.Picture):
    """Where a picture lies: a file of its own, or a cell of a table; with this package's errors."""

    def data(self) -> bytes:
        """The encoded bytes. Raises :class:`UnreadableError`."""
        try:
            found = super().data()
        except OSError as error:
            raise UnreadableError(str(error)) from error
        try:
            return found if isinstance(found, bytes) else found.read_bytes()
        except OSError as error:
            raise UnreadableError(f"cannot be opened: {error}") from error

    def read(self) -> Image.Image:
        """The picture, upright RGB. Raises :class:`UnreadableError`."""
        return decode(self.data())


def decode(data: bytes) -> Image.Image:
    """Image bytes to upright 8-bit RGB: EXIF orientation applied, transparency on white, 16-bit greys rescaled."""
    try:
        with Image.open(io.BytesIO(data)) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # Pillow would clip 16-bit values at 255
                image = Image.fromarray((np.asarray(image).astype(np.int64) / 257).round().clip(0, 255).astype("u1"))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except BROKEN as error:  # what Pillow's readers raise on damaged files
        raise UnreadableError(f"not a readable picture: {error}") from error
