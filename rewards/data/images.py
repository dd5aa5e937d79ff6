"""Images: the one decoder, the suffixes of their files, and rows of images with their texts.

Training, scoring, agreement and the server all decode here, so that a file is the same pixels to each. The rule, by the
mode that Pillow reports:

    RGB, opaque                     as it is
    RGB, P, L, 1 with a colour key,
    RGBA, LA, PA                    composited on white
    1, L, P, CMYK, YCbCr            Pillow's conversion to RGB
    I;16, I;16B, I;16L              16-bit grey: divided by 257 and rounded; a colour key becomes white
    I                               the same where all values lie in 0 .. 65535 and some above 255, as they do in 16-bit
                                    files that Pillow opens so; other values have no scale that a file tells, and are
                                    refused
    F                               times 255 where all values lie in [0, 1], as it is where they lie in [0, 255] and
                                    reach 16; these are the two conventions in use, and any other range is refused

The orientation in EXIF is applied. Of an animation the first frame is taken, which is logged once in a process.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import logging
import stat
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from rewards.common.errors import DataError
from rewards.data.hub_files import file_size

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".avif", ".apng"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".tga"),
)
# what Pillow raises on damaged files
BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


class UnreadableError(DataError):
    """One image that cannot be read."""


@dataclass(frozen=True)
class ImageRow:
    """One image to score: where it lies, or its encoded bytes. One with a ``problem`` cannot be read."""

    file: str
    prompt: str | None = None
    image: Path | bytes | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""

    def read(self) -> Tensor:
        """:func:`decode_tensor` of its image. ``UnreadableError`` also where there is a ``problem``."""
        if self.problem or self.image is None:
            raise UnreadableError(self.problem or "there is no image in this row")
        return decode_tensor(self.image)


def digest_of(rows: Iterable[ImageRow]) -> str:
    """What tells the pictures of ``rows`` from others under the same names; of files their sizes."""
    images = (row.image for row in rows if row.image is not None)
    told = [hashlib.sha256(one).hexdigest() if isinstance(one, bytes) else file_size(one) for one in images]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


@dataclass(frozen=True)
class ImageSource:
    """Rows in a fixed order.

    ``rows(wanted)`` gives one item per row, the row where ``wanted(number)`` and None elsewhere, so that skipping is
    cheap. ``identity`` is JSON and the same for the same rows. ``total`` is None where only reading tells;
    ``listed`` holds the rows where all of them are known beforehand.
    """

    identity: dict[str, Any]
    total: int | None
    rows: Callable[[Callable[[int], bool]], Iterator[ImageRow | None]]
    listed: Sequence[ImageRow] = ()


def decode(source: Path | bytes, formats: tuple[str, ...] | None = None, max_pixels: int | None = None) -> Image.Image:
    """A file, or its bytes, to an upright 8-bit RGB image by the rule above.

    ``UnreadableError`` where it cannot be opened or read, is not among Pillow's ``formats``, or has more than
    ``max_pixels``, which is looked at before any pixel is decoded.
    """
    if isinstance(source, Path):
        require_plain(source)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats) as opened:
            if max_pixels is not None and opened.width * opened.height > max_pixels:
                raise UnreadableError(f"{opened.width} x {opened.height} pixels; at most {max_pixels} are taken")
            _turn_upright(opened)
            image = _rgb(opened)
            if opened.format != "MPO":  # a camera's JPEG with previews behind it
                _mention_animation(opened)
            return image
    except UnreadableError:
        raise
    except UnidentifiedImageError as error:  # whose own words for bytes are an address in memory
        named = f" {str(source)!r}" if isinstance(source, Path) else ""
        raise UnreadableError(f"not a readable image: cannot identify image file{named}") from error
    except BROKEN as error:
        raise UnreadableError(f"not a readable image: {error}") from error


def decode_tensor(
    source: Path | bytes, formats: tuple[str, ...] | None = None, max_pixels: int | None = None
) -> Tensor:
    """:func:`decode`, as (3, H, W) uint8."""
    pixels = np.array(decode(source, formats, max_pixels))
    # by numpy: in every one of the decoding threads torch would start a pool of threads of its own
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def require_plain(file: Path) -> None:
    """``UnreadableError`` where there is no such file, or it is a pipe or a device, which may never end."""
    try:
        plain = stat.S_ISREG(file.stat().st_mode)
    except (OSError, ValueError) as error:  # ValueError: NUL in its name
        raise UnreadableError(f"cannot be opened: {str(error)[:300]}") from error
    if not plain:
        raise UnreadableError(f"cannot be opened: {file} is no plain file")


def _turn_upright(image: Image.Image) -> None:
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except SyntaxError as error:  # of EXIF that is none, which nobody else minds
        if not str(error).startswith("not a TIFF file"):
            raise


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_grey(image)).convert("RGB")
    # most images are opaque, and to lay them on white would take longer than to decode them
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _grey(image: Image.Image) -> np.ndarray:
    """Pixels of 16 bits and more, (H, W) uint8."""
    levels = np.asarray(image)
    low, high = levels.min(), levels.max()
    if image.mode == "F":
        if not (low >= 0 and high <= 255):  # written so that NaN is outside
            raise UnreadableError(f"float pixels from {low:g} to {high:g}; expected [0, 1] or [0, 255]: rescale them")
        if 1 < high < 16:  # [0, 1] that resizing sharpened, or a brighter light, rather than 255 shades of black
            raise UnreadableError(f"float pixels up to {high:g}, above [0, 1] and no [0, 255]; clip or rescale them")
        return (levels * (255 if high <= 1 else 1)).round().astype("u1")
    if low < 0 or high > 65535:
        raise UnreadableError(f"integer pixels from {low} to {high}; expected 0 to 65535: rescale them")
    if image.mode == "I" and 0 < high < 256:
        raise UnreadableError(
            f"integer pixels from {low} to {high}, which may be all of 8 bits or the darkest of 16; save them in 8"
        )
    grey = (levels.astype(np.int64) / 257).round().astype("u1")
    key = image.info.get("transparency")
    return np.where(levels == key, np.uint8(255), grey) if isinstance(key, int) else grey


def _mention_animation(image: Image.Image) -> None:
    with contextlib.suppress(*BROKEN):  # a damaged later frame is nobody's loss
        if getattr(image, "is_animated", False):  # Pillow gives it to the formats that can have frames
            _mention_once()


@functools.cache
def _mention_once() -> None:
    logger.warning("an animated image is among the data; of these the first frame is taken")


class InOrder:
    """Rows whose images are inside larger files, read forward: asking for them in order costs one pass."""

    def __init__(self, source: ImageSource) -> None:
        self.source = source
        self._next = 0
        self._rows: Iterator[ImageRow | None] = iter(())

    def record(self, number: int) -> dict[str, object]:
        """{"": the image of row ``number``}."""
        if number < self._next or not self._next:
            self._next, self._rows = 0, self.source.rows(lambda row: row >= number)
        row = None
        while self._next <= number:
            row, self._next = next(self._rows), self._next + 1
        assert row is not None
        return {"": row.image}
