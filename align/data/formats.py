"""The layouts of preference pairs, as :mod:`rewards.data.preferences` reads them, with this package's errors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from align.common.assets import locate
from align.common.errors import DataError
from align.data.images import Picture
from rewards import RewardError
from rewards.data import preferences, tables
from rewards.data.preferences import CAPTIONS, LAYOUTS

__all__ = ["CAPTIONS", "LAYOUTS", "Row", "parse", "recognise"]


@dataclass(frozen=True)
class Row:
    """One row as a reader found it, winner first; without sides it is a tie, or bad when it has a ``problem``."""

    source: str
    caption: object = None
    sides: tuple[Picture, Picture] | None = None
    problem: str = ""

    def fault(self) -> str:
        return self.problem


def recognise(
    path: str, split: str | None, caption: str | None, root: Path | None
) -> tuple[str, list[Path], Iterable[Row]]:
    """What ``path`` (file, folder, hub id or embedded name) holds: its layout, the files read, and the rows.

    Raises :class:`DataError` for no layout, or more than one.
    """
    with _data_errors():
        layout, files, rows = preferences.recognise(locate(path), split, caption, root)
    return layout, files, map(_row, rows)


def parse(file: Path) -> list[tuple[str, object]]:
    """:func:`rewards.data.tables.parse`. Raises :class:`DataError`."""
    with _data_errors():
        return tables.parse(file)


def _row(row: preferences.Row) -> Row:
    if row.sides is None:
        return Row(row.source, row.caption, None, row.fault())
    first, second = (Picture(side.file, side.row, side.column, side.table) for side in row.sides)
    return Row(row.source, row.caption, (first, second), row.fault())


@contextmanager
def _data_errors() -> Iterator[None]:
    try:
        yield
    except RewardError as error:
        raise DataError(str(error)) from error
