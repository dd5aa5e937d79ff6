"""Pictures that lie in files or in tables and are read when somebody looks at them."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps

from align.errors import DataError

BROKEN = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


class UnreadableError(DataError):
    """One picture that cannot be read."""


class Source(Protocol):
    """Rows with pictures inside them."""

    files: list[Path]

    def column(self, name: str) -> list[Any]: ...
    def cell(self, row: int, name: str) -> Any: ...
    def home(self, row: int) -> Path: ...


class Readable(Protocol):
    """A picture that is read when somebody looks at it; ``file``, ``row`` and ``column`` tell it from all others."""

    @property
    def file(self) -> Path: ...
    @property
    def row(self) -> int: ...
    @property
    def column(self) -> str: ...
    def data(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Picture:
    """Where a picture lies: a file of its own, or a cell of a table."""

    file: Path
    row: int = 0
    column: str = ""
    table: Source | None = None

    def __str__(self) -> str:
        return f"{self.file} row {self.row} {self.column}" if self.table else str(self.file)

    def data(self) -> bytes:
        """The encoded bytes. Raises :class:`UnreadableError`."""
        cell = self.table.cell(self.row, self.column) if self.table else str(self.file)
        if isinstance(cell, Mapping):  # the Image type of `datasets`: {"bytes", "path"}
            cell = cell["bytes"] if cell["bytes"] is not None else cell["path"]
        if isinstance(cell, bytes):
            return cell
        if not isinstance(cell, str):
            raise UnreadableError(f"expected picture bytes or a path, found {type(cell).__name__}")
        try:
            return (self.file.parent / cell).read_bytes()
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
