"""Tables with images inside them, which are read when somebody asks for one: parquet files, and data sets of the
``datasets`` library on disk or on the hub.

``datasets`` is not asked to read the other layouts: its JSON and CSV builders refuse a whole file for one damaged line
and copy everything into a cache, where these name the line and read in place.
"""

from __future__ import annotations

import base64
import logging
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

from PIL import Image

from rewards.common.errors import DataError
from rewards.data.hub_files import address, cannot_be_read, footers, open_parquet
from rewards.data.images import UnreadableError, decode, require_plain
from rewards.data.paths import locate_file
from rewards.data.records import Broken
from rewards.data.text import brief

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

BASE64 = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "Qk0", "Qk1", "SUkq", "TU0AK")  # how encoded images begin
URL = re.compile("(?!file:)[a-z][a-z0-9]+://")
VALUES = 4096  # rows of a column in memory at a time
TEXT = re.compile(r"(large_)?list<\w+: (large_)?string>|(large_)?string")


class Table(Protocol):
    """Rows with images inside them, or with the paths of some. ``names`` are the columns that all files have, ``texts``
    those that hold strings or lists of strings, ``problems`` the rows that cannot be used and why."""

    files: list[Path]
    names: list[str]
    texts: frozenset[str]
    problems: dict[int, str]

    def __len__(self) -> int: ...
    def select(self, images: Sequence[str], others: bool) -> None:
        """Read these columns of images from now on, and with ``others`` every column without bytes in it."""

    def column(self, name: str, limit: int | None = None) -> list[Any]:
        """The values of a column, of the first ``limit`` rows."""

    def values(self, name: str) -> Iterator[Any]:
        """:meth:`column`, a few rows at a time."""

    def record(self, row: int) -> dict[str, Any]:
        """The selected columns of a row; rows in order cost one pass."""

    def home(self, row: int) -> Path:
        """The file that holds the row."""

    def where(self, row: int) -> str:
        """The row, as messages name it."""


class Cells(Protocol):
    """What a :class:`LazyImage` reads from."""

    def record(self, row: int) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class LazyImage:
    """Where an image lies: a file of its own, or a cell of a table that is (in) a file."""

    file: Path
    row: int = 0
    column: str = ""
    table: Cells | None = None

    def __str__(self) -> str:
        return f"{self.file} row {self.row} {self.column}" if self.table else str(self.file)

    def source(self) -> Path | bytes:
        """A file, or encoded bytes. ``UnreadableError`` where the cell holds neither."""
        if self.table is None:
            return self.file
        image = content(self.table.record(self.row)[self.column], self.file.parent)
        if image is None:
            raise UnreadableError("expected image bytes or a path, found nothing")
        return image

    def data(self) -> bytes:
        """The encoded bytes. Raises ``UnreadableError``."""
        image = self.source()
        if isinstance(image, bytes):
            return image
        require_plain(image)
        try:
            return image.read_bytes()
        except OSError as error:
            raise UnreadableError(f"cannot be opened: {error}") from error

    def read(self) -> Image.Image:
        """The image, upright RGB. Raises ``UnreadableError``."""
        return decode(self.data())


def content(cell: object, home: Path) -> Path | bytes | None:
    """What a cell holds: encoded bytes, also as a list of numbers, in base64 or as a ``data:`` URL; a path from
    ``home``; or nothing. ``UnreadableError`` where it holds something else, which is not printed."""
    if isinstance(cell, list) and len(cell) == 1:  # a list of one image
        cell = cell[0]
    if isinstance(cell, Mapping):  # the Image type of `datasets`: {"bytes", "path"}
        cell = cell.get("bytes") if cell.get("bytes") is not None else cell.get("path")
    if cell is None or isinstance(cell, bytes | Path):
        return cell
    if isinstance(cell, list) and all(isinstance(value, int) and 0 <= value < 256 for value in cell):
        return bytes(cell)
    if names_file(cell):
        return locate_file(home, cell)
    if not isinstance(cell, str):
        raise UnreadableError(f"expected image bytes or a path, found {type(cell).__name__}")
    if URL.match(cell):
        raise UnreadableError(f"{brief(cell)} is a URL, which is not fetched; download the images")
    head, comma, code = cell.partition(",") if cell.startswith("data:") else ("", "", cell)
    if comma and not head.endswith(";base64"):
        raise UnreadableError("a data: URL that is not in base64")
    wrong = f"a text of {len(cell)} characters, neither a path nor an image in base64"
    if not comma and not code.startswith(BASE64):
        raise UnreadableError(wrong)
    try:
        return base64.b64decode("".join(code.split()), validate=True)
    except ValueError as error:
        raise UnreadableError(wrong) from error


def names_file(cell: object) -> TypeGuard[str]:
    """Whether a cell is the path of an image, and no image in base64, no URL and no long text."""
    if not isinstance(cell, str) or len(cell) > 4096 or URL.match(cell) or cell.startswith("data:"):
        return False
    return not (len(cell) > 64 and cell.startswith(BASE64))


def columns_of(schema: pa.Schema, names: Sequence[str], images: Sequence[str], others: bool) -> list[str]:
    """The images and every column without bytes in it: another image would be read for nothing."""
    small = [column.name for column in schema if others and "binary" not in str(column.type)]
    return [name for name in names if name in images or name in small]


def text_columns(schema: pa.Schema) -> frozenset[str]:
    return frozenset(column.name for column in schema if TEXT.fullmatch(str(column.type)))


class RecordTable:
    """The entries of a JSON or CSV file, which :func:`rewards.data.records.read_records` gave, as a table."""

    def __init__(self, file: Path, entries: Sequence[tuple[str, object]]) -> None:
        self.files, self.entries = [file], entries
        self.rows = [entry if isinstance(entry, dict) else {} for _, entry in entries]
        self.names = sorted({str(name) for row in self.rows[:100] for name in row})
        self.texts = frozenset(self.names)
        self.problems = {
            row: entry.reason if isinstance(entry, Broken) else "not a JSON object"
            for row, (_, entry) in enumerate(entries)
            if not isinstance(entry, dict)
        }

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, images: Sequence[str], others: bool) -> None:
        """All of it is in memory."""

    def column(self, name: str, limit: int | None = None) -> list[Any]:
        return [row.get(name) for row in self.rows[:limit]]

    def values(self, name: str) -> Iterator[Any]:
        return (row.get(name) for row in self.rows)

    def home(self, row: int) -> Path:
        return self.files[0]

    def where(self, row: int) -> str:
        return self.entries[row][0]

    def record(self, row: int) -> dict[str, Any]:
        return self.rows[row]


class ParquetTable:
    """Parquet files, of this machine or of the hub, as one table. Rows are read 32 at a time and only the last batch is
    kept, so going through the rows in order costs one pass, and memory for one page of each column, not for a row
    group; row groups of which nothing is asked are not read."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)
        self.groups: list[tuple[Path, int]] = []
        self.starts: list[int] = []  # the first row of each row group, counted over all files
        self.counts: list[int] = []
        schemas, start = [], 0
        try:
            self._footers = dict(zip(self.files, footers(self.files), strict=True))
            for file, metadata in self._footers.items():
                schemas.append(metadata.schema.to_arrow_schema())
                self.counts.append(metadata.num_rows)
                for group in range(metadata.num_row_groups):
                    self.groups.append((file, group))
                    self.starts.append(start)
                    start += metadata.row_group(group).num_rows
        except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
            if address(self.files[0]):
                raise DataError(cannot_be_read(self.files[0].parent, error)) from error
            raise DataError(f"{self.files[0].parent} has a file that is not parquet: {error}") from error
        self.schema = schemas[0]
        self.names = [name for name in self.schema.names if all(name in schema.names for schema in schemas)]
        self.texts, self.problems = text_columns(self.schema), dict[int, str]()
        self.columns = self.names
        self._group, self._first = -1, 0
        self._batch: Any = ()
        self._batches: Iterator[Any] = iter(())
        self._last: tuple[int, dict[str, Any]] = (-1, {})

    def __len__(self) -> int:
        return sum(self.counts)

    def select(self, images: Sequence[str], others: bool) -> None:
        self.columns = columns_of(self.schema, self.names, images, others)
        self._group, self._last = -1, (-1, {})

    def column(self, name: str, limit: int | None = None) -> list[Any]:
        if limit is not None:
            batch = next(self._read(self.files[0], limit, [name]), None)
            return [] if batch is None else _values(self.files[0], name, batch.column(0))
        return list(self.values(name))

    def values(self, name: str) -> Iterator[Any]:
        for file in self.files:
            start = 0
            for batch in self._read(file, VALUES, [name]):
                yield from _values(file, name, batch.column(0), start)
                start += len(batch)

    def home(self, row: int) -> Path:
        return self.groups[bisect_right(self.starts, row) - 1][0]

    def record(self, row: int) -> dict[str, Any]:
        group = bisect_right(self.starts, row) - 1
        file, index = self.groups[group]
        if group != self._group or row < self._first:
            self._batches = self._read(file, 32, self.columns, index, self.starts[group])
            self._first, self._batch = self.starts[group], ()
        self._group = -1  # where reading fails, the next row begins anew
        while row >= self._first + len(self._batch):
            if (batch := next(self._batches, None)) is None:
                raise DataError(f"{file} ends before row {row}, which it says that it has")
            self._first, self._batch = self._first + len(self._batch), batch
        self._group = group
        if self._last[0] != row:  # a pair asks twice
            try:
                self._last = (row, self._batch.slice(row - self._first, 1).to_pylist()[0])
            except ValueError as error:  # text that is not UTF-8
                raise DataError(f"{file} is damaged near row {row}: {error}") from error
        return self._last[1]

    def where(self, row: int) -> str:
        return f"{self.home(row)} row {row}"

    def _read(
        self, file: Path, rows: int, columns: list[str], group: int | None = None, start: int = 0
    ) -> Iterator[Any]:
        """Columns of a file, or of its row group ``group``, from row ``start`` on, so many ``rows`` at a time. Raises
        :class:`DataError`, which names the file: pyarrow names none."""
        try:
            opened = open_parquet(file, self._footers[file], memory_map=group is not None)
            for batch in opened.iter_batches(rows, None if group is None else [group], columns):
                yield batch
                start += len(batch)
        except (OSError, ValueError) as error:
            if address(file):
                raise DataError(cannot_be_read(file, error)) from error
            raise DataError(f"{file} is damaged near row {start}: {' '.join(str(error).split())}") from error


def _values(file: Path, name: str, column: Any, start: int = 0) -> list[Any]:
    """A column's values from row ``start``; ``DataError`` names the row that is not UTF-8, which pyarrow does not."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        for row, value in enumerate(column, start):
            try:
                value.as_py()
            except UnicodeDecodeError as error:
                raise DataError(f"{file} row {row}: {name!r} is not UTF-8 ({error.reason})") from error
        raise
