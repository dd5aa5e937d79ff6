"""Pictures that lie in files or in tables and are read when somebody looks at them."""

from __future__ import annotations

import io
import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow.parquet as pq
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


class Shards:
    """Parquet files as one table. Pictures are read 32 rows at a time and only the last batch is kept, so going
    through the rows in order costs one pass, and memory for one page of each column, not for a row group."""

    def __init__(self, files: list[Path], pictures: tuple[str, str]) -> None:
        self.files, self.pictures = files, pictures
        self.groups: list[tuple[Path, int]] = []
        self.starts: list[int] = []  # the first row of each row group, counted over all files
        start = 0
        for file in files:
            metadata = pq.read_metadata(file)
            for group in range(metadata.num_row_groups):
                self.groups.append((file, group))
                self.starts.append(start)
                start += metadata.row_group(group).num_rows
        self._group, self._first = -1, 0
        self._batch: Any = ()
        self._batches: Iterator[Any] = iter(())

    def column(self, name: str) -> list[Any]:
        return [value for file in self.files for value in pq.read_table(file, columns=[name])[name].to_pylist()]

    def home(self, row: int) -> Path:
        return self.groups[bisect_right(self.starts, row) - 1][0]

    def cell(self, row: int, name: str) -> Any:
        group = bisect_right(self.starts, row) - 1
        file, index = self.groups[group]
        try:
            if group != self._group or row < self._first:
                self._batches = pq.ParquetFile(file, memory_map=True).iter_batches(32, [index], list(self.pictures))
                self._group, self._first, self._batch = group, self.starts[group], ()
            while row >= self._first + len(self._batch):
                self._first, self._batch = self._first + len(self._batch), next(self._batches)
        except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
            raise DataError(f"{file} is damaged near row {row}: {error}") from error
        return self._batch.column(name)[row - self._first].as_py()


class Arrow:
    """A split of a `datasets` data set, memory-mapped by that library; pictures stay undecoded."""

    def __init__(self, dataset: Any, pictures: tuple[str, str]) -> None:
        from datasets import Image as Encoded

        self.dataset = dataset
        self.files = [Path(part["filename"]) for part in dataset.cache_files]
        self.pictures = dataset.select_columns(list(pictures))
        for name in pictures:
            if isinstance(dataset.features[name], Encoded):
                self.pictures = self.pictures.cast_column(name, Encoded(decode=False))

    def column(self, name: str) -> list[Any]:
        return list(self.dataset.select_columns([name])[name])

    def home(self, row: int) -> Path:
        return self.files[0]

    def cell(self, row: int, name: str) -> Any:
        return self.pictures[row][name]
