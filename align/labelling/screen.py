"""Pictures as the page shows them: decoded by the one decoder, no larger than a screen, and whole when asked for."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from align.labelling.items import Item
from rewards.data.images import UnreadableError, decode

SIDE = 1280  # pixels of the longer edge on the page
LOSSLESS = 1 << 20  # pixels up to which nothing is lost: PNG; JPEG of quality 95 beyond
MOST_PIXELS = 128_000_000
CACHE = 192 << 20  # bytes


@dataclass(frozen=True)
class Shown:
    """An encoded picture."""

    data: bytes
    media_type: str


def encode(image: Image.Image, full: bool) -> Shown:
    """``image`` scaled down to :data:`SIDE`, or as large as it is."""
    if not full and max(image.size) > SIDE:
        image = image.copy()
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0)
    buffer = io.BytesIO()
    if image.width * image.height <= LOSSLESS:
        image.save(buffer, "PNG", compress_level=1)
        return Shown(buffer.getvalue(), "image/png")
    image.save(buffer, "JPEG", quality=95, subsampling=0)
    return Shown(buffer.getvalue(), "image/jpeg")


class Screen:
    """Pictures of ``items`` by number: nothing else can be asked for. Those shown last are kept, :data:`CACHE` bytes of
    them; large ones are decoded one at a time."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items
        self._kept: OrderedDict[tuple[int, int, bool], Shown] = OrderedDict()
        self._bytes = 0
        self._lock, self._decoding = threading.Lock(), threading.Semaphore(2)

    def picture(self, item: int, place: int, full: bool = False) -> Shown:
        """Picture number ``place``, in the source's order, of an item. ``UnreadableError`` where it cannot be decoded,
        and ``LookupError`` where there is none."""
        key = (item, place, full)
        if item < 0 or place < 0:
            raise LookupError(key)
        picture = self.items[item].pictures[place]
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        with self._decoding:
            try:
                shown = encode(decode(picture.data(), max_pixels=MOST_PIXELS), full)
            except MemoryError as error:
                raise UnreadableError("too large for this machine's memory") from error
        with self._lock:
            if key not in self._kept and len(shown.data) <= CACHE // 4:
                self._kept[key] = shown
                self._bytes += len(shown.data)
                while self._bytes > CACHE:
                    self._bytes -= len(self._kept.popitem(last=False)[1].data)
        return shown
