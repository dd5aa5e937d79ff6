"""What preference pairs lie in: tables with pictures inside them (parquet shards, data sets of the `datasets` library),
which are read when somebody asks for one, and files of records."""

from __future__ import annotations

import csv
import io
import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rewards import RewardError


class Table(Protocol):
    """Rows with pictures inside them."""

    files: list[Path]

    def column(self, name: str) -> list[Any]: ...
    def cell(self, row: int, name: str) -> Any: ...
    def home(self, row: int) -> Path: ...


@dataclass(frozen=True, slots=True)
class Picture:
    """Where a picture lies: a file of its own, or a cell of a table that is (in) a file."""

    file: Path
    row: int = 0
    column: str = ""
    table: Table | None = None

    def __str__(self) -> str:
        return f"{self.file} row {self.row} {self.column}" if self.table else str(self.file)

    def data(self) -> Path | bytes:
        """A file, or encoded bytes. ``OSError`` where the cell holds neither."""
        if self.table is None:
            return self.file
        cell = self.table.cell(self.row, self.column)
        if isinstance(cell, Mapping):  # the Image type of `datasets`: {"bytes", "path"}
            cell = cell["bytes"] if cell["bytes"] is not None else cell["path"]
        if isinstance(cell, bytes):
            return cell
        if not isinstance(cell, str):
            raise OSError(f"expected picture bytes or a path, found {type(cell).__name__}")
        return self.file.parent / cell


class Shards:
    """Parquet files as one table. Pictures are read 32 rows at a time and only the last batch is kept, so going
    through the rows in order costs one pass, and memory for one page of each column, not for a row group."""

    def __init__(self, files: list[Path], pictures: tuple[str, str]) -> None:
        import pyarrow.parquet as pq

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
        import pyarrow.parquet as pq

        return [value for file in self.files for value in pq.read_table(file, columns=[name])[name].to_pylist()]

    def home(self, row: int) -> Path:
        return self.groups[bisect_right(self.starts, row) - 1][0]

    def cell(self, row: int, name: str) -> Any:
        import pyarrow.parquet as pq

        group = bisect_right(self.starts, row) - 1
        file, index = self.groups[group]
        try:
            if group != self._group or row < self._first:
                self._batches = pq.ParquetFile(file, memory_map=True).iter_batches(32, [index], list(self.pictures))
                self._group, self._first, self._batch = group, self.starts[group], ()
            while row >= self._first + len(self._batch):
                self._first, self._batch = self._first + len(self._batch), next(self._batches)
        except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
            raise RewardError(f"{file} is damaged near row {row}: {error}") from error
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


def parse(file: Path) -> list[tuple[str, object]]:
    """(where, value) of each entry of a JSON list, of JSON lines (a broken line is None), of CSV, or of text lines."""
    text = file.read_text(encoding="utf-8-sig", errors="replace")
    if file.suffix == ".csv":
        return [(f"{file}:{line}", row) for line, row in enumerate(csv.DictReader(io.StringIO(text)), 2)]
    lines = [(f"{file}:{line}", words.strip()) for line, words in enumerate(text.split("\n"), 1) if words.strip()]
    if file.suffix not in (".json", ".jsonl"):
        return list[tuple[str, object]](lines)
    if not text.lstrip().startswith("["):
        return [(where, _json(words)) for where, words in lines]
    try:
        return [(f"{file}[{index}]", value) for index, value in enumerate(json.loads(text))]
    except json.JSONDecodeError as error:
        raise RewardError(f"{file} is not a JSON list: {error}") from error


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None
