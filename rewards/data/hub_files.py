"""Parquet files of the hub that are read where they lie, by ranges of their bytes: nothing of them is kept on disk.

``datasets`` says which files a split has, at which commit, and has the names for them:
``hf://datasets/owner/name@commit/data/train-00000.parquet``. Their columns are read apart, so captions and labels cost
no image, and any row group can be asked for, so a run that was killed, or one of several processes, begins at its own
rows. ``datasets``' own iterator has neither: it passes whole rows, from the first on.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewards.common.errors import DataError, one_line

if TYPE_CHECKING:
    import pyarrow.parquet as pq

BLOCK = 2**23  # bytes of a column chunk in one request
REQUESTS = 16  # at a time, where many files are asked for their footers
ENDS = 2**16  # bytes at either end of a file that tell it from another one


@functools.lru_cache(maxsize=8)
def hub_files(name: str, split: str) -> tuple[Path, ...]:
    """The parquet files of a split of the hub data set ``name``. ``DataError`` where there is none, or where it is of
    another format, whose rows cannot be asked for one by one."""
    from datasets import load_dataset_builder
    from datasets.packaged_modules.parquet.parquet import ParquetConfig

    try:
        config = load_dataset_builder(name).config
    except (OSError, ValueError, RuntimeError) as error:  # not found, no network, several subsets, needs code to run
        raise not_there(name, "a data set of the hub", error) from error
    files = config.data_files or {}
    if not isinstance(config, ParquetConfig):
        raise DataError(
            f"{name} is no data set of parquet files, which streaming needs; leave streaming out, which downloads it"
        )
    if split not in files:
        raise DataError(f"{name} has no split {split!r}; it has {', '.join(map(str, files)) or 'none'}")
    return tuple(Path(file) for file in files[split])


def not_there(name: str, what: str, error: Exception) -> DataError:
    """For ``name``, of which the hub said ``error`` when it was asked for ``what``."""
    return DataError(f"{name} is no file or folder here, nor {what}: {' '.join(str(error).split())}")


def hub_folder(file: Path) -> Path:
    """The data set, at its commit, that a file of :func:`hub_files` is of."""
    return Path(*file.parts[:4])


def address(file: Path) -> str | None:
    """The URL of a file of the hub, of which a path keeps one slash; None of any other."""
    return "hf://" + file.as_posix().removeprefix("hf:/") if file.parts[:1] == ("hf:",) else None


def hub_size(url: str) -> int:
    """Bytes of a file of the hub, which its listing says; 0 of a folder."""
    try:
        with _told():
            return int(_hub().info(url)["size"] or 0)
    except OSError as error:
        raise DataError(cannot_be_read(Path(url), error)) from error


def file_size(file: Path) -> int:
    url = address(file)
    return hub_size(url) if url else os.stat(file).st_size


def file_state(file: Path) -> list[int | str]:
    """What tells a large file from another one at its place, and is that of its copies: its size, and a digest of its
    two ends, where parquet and tar say what is inside; one of the hub has its commit in its name."""
    if address(file):
        return [file_size(file)]
    with file.open("rb") as stream:
        size, digest = stream.seek(0, os.SEEK_END), hashlib.sha256()
        for start in (0, max(0, size - ENDS)):
            stream.seek(start)
            digest.update(stream.read(ENDS))
    return [size, digest.hexdigest()[:16]]


def open_parquet(file: Path, footer: Any = None, memory_map: bool = False) -> pq.ParquetFile:
    """A file of this machine; or one of the hub, of which a column chunk is read :data:`BLOCK` bytes at a time."""
    import pyarrow.parquet as pq

    if (url := address(file)) is None:
        return pq.ParquetFile(file, memory_map=memory_map)
    return pq.ParquetFile(_HubFile(url), metadata=footer, buffer_size=BLOCK)


def footers(files: Sequence[Path]) -> list[Any]:
    """What the files say of their row groups and columns."""
    import pyarrow.parquet as pq

    there = bool(files) and address(files[0]) is not None
    return _hub_footers(tuple(files)) if there else [pq.read_metadata(file) for file in files]


@functools.lru_cache(maxsize=2)  # rows and, later, images are read by a table each
def _hub_footers(files: tuple[Path, ...]) -> list[Any]:
    with ThreadPoolExecutor(REQUESTS) as pool:
        return list(pool.map(lambda file: open_parquet(file).metadata, files))


def cannot_be_read(file: Path, error: Exception) -> str:
    """What to say of a file of the hub, in one line. pyarrow's own errors, of what is no parquet, are ValueErrors."""
    then = "it is damaged there" if isinstance(error, ValueError) else "the next start goes on from here"
    return f"{address(file)} cannot be read: {' '.join(str(error).split())}; {then}"


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """An ``OSError`` for whatever the hub's client raises: of a connection that is gone these are none."""
    try:
        yield
    except (OSError, ValueError):
        raise
    except Exception as error:
        raise OSError(one_line(error)) from error


class _HubFile:
    """A file of the hub for pyarrow, which reads it and raises ``OSError`` where that fails."""

    def __init__(self, url: str) -> None:
        with _told():
            self._file = _hub().open(url, "rb", cache_type="none")

    def read(self, size: int = -1) -> bytes:
        with _told():
            return bytes(self._file.read(size))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _hub() -> Any:
    from huggingface_hub import HfFileSystem

    return HfFileSystem()
