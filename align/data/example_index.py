"""A data set's examples, read once and kept in files that are mapped: a start reads these, and no row again.

An index is a folder named by all that its rows depend on: the settings by which they are read, the readers' code, and
the names, sizes and times of the files at the path. Images that are files of their own may lie anywhere: a start looks
whether each is still of its size and time (a stat, not a read). Building holds a few thousand rows at a time and, at
its end, of pairs of files, two bytes an example; an open index holds none.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, overload

import numpy as np

import rewards.data
from align.data.dataset import Bad, Example, ExampleSet, Rows, Unlabelled, content_key, image_key, text_key
from align.data.equal_keys import contradictions, first_equal, mapped, number_distinct, parts
from rewards.common.files import atomic, one_at_a_time
from rewards.data.paths import NO_SUCH_FILE
from rewards.data.tables import Cells, LazyImage

ROWS = 2048  # in a batch of the file


class _Opaque(Exception):
    """An image that an index could not give back."""


def indexed(folder: Path, rows: Callable[[], Rows], cells: Callable[[], Cells | None]) -> ExampleSet:
    """The examples of ``rows()`` by way of the index ``folder``, which is made where it is missing or out of date.

    ``cells()`` is what images inside larger files are read from. Images that are no :class:`LazyImage`, or lie where
    ``cells()`` gives nothing, cannot be found again by an index: these examples stay in memory.
    """
    cells = functools.cache(cells)
    with one_at_a_time(folder):  # the processes of a run all come here
        if (found := _open(folder, cells, True)) is not None:
            return found
        try:
            layout, files, stream = rows()
            with atomic(folder) as draft:
                _Writer(draft, cells).write(layout, files, stream)
            found = _open(folder, cells, False)
        except (_Opaque, UnicodeEncodeError):  # a file's name may be no text
            layout, files, stream = rows()
            found = ExampleSet.of(layout, stream, files)
    assert found is not None
    return found


def listing(place: Path, skip: Path) -> str:
    """A digest of the name, size and time of a file, or of every file below a folder, without what is in ``skip``."""
    digest = hashlib.sha256()
    if place.is_file():
        found = place.stat()
        digest.update(f"{found.st_size} {found.st_mtime_ns}".encode())
    for folder, folders, files in os.walk(place, followlinks=True):
        folders[:] = sorted(name for name in folders if Path(folder, name) != skip and not name.startswith("."))
        for name in sorted(files) if Path(folder) != skip else ():
            try:
                found = os.stat(os.path.join(folder, name))
            except OSError:  # a link that leads nowhere, or a file that went
                digest.update(json.dumps([folder, name]).encode())
            else:
                digest.update(json.dumps([folder, name, found.st_size, found.st_mtime_ns]).encode())
    return digest.hexdigest()


def code_of(kind: type) -> str:
    """A digest of the code that reads rows for ``kind``: another reader may read another thing in the same file."""
    folders = [Path(__file__).parent, Path(rewards.data.__file__ or "").parent]
    own = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return _digest((*sorted(file for folder in folders for file in folder.glob("*.py")), *([Path(own)] if own else [])))


@functools.lru_cache(maxsize=8)
def _digest(files: tuple[Path, ...]) -> str:
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


class _Opened:
    """Cells that are opened when the first is asked for."""

    def __init__(self, cells: Callable[[], Cells | None]) -> None:
        self.cells = cells

    def record(self, row: int) -> dict[str, Any]:
        opened = self.cells()
        assert opened is not None  # or the index would not have been made
        return opened.record(row)


class Index(Sequence[Example]):
    """The examples of an index, each made when it is asked for."""

    def __init__(self, file: Path, cells: Callable[[], Cells | None]) -> None:
        import pyarrow as pa

        self.file, self.table = file, _Opened(cells)
        reader = pa.ipc.open_file(pa.memory_map(str(file)))
        self.batches = reader.num_record_batches
        self.batch = functools.lru_cache(maxsize=2)(reader.get_batch)
        self._count = (self.batches - 1) * ROWS + len(self.batch(self.batches - 1)) if self.batches else 0

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        return self._example(self.batch(place // ROWS).slice(place % ROWS, 1).to_pylist()[0])

    def __iter__(self) -> Iterator[Example]:
        for number in range(self.batches):
            yield from map(self._example, self.batch(number).to_pylist())

    def _example(self, row: dict[str, Any]) -> Example:
        images = tuple(
            LazyImage(Path(i["file"]), i["row"], i["column"], self.table if i["inside"] else None)
            for i in row["images"]
        )
        return Example(row["id"], row["source"], row["caption"], images, row["label"])

    def unchanged(self) -> bool:
        """Whether images that are files are still the same."""
        import pyarrow as pa

        reader = pa.ipc.open_file(str(self.file))  # not mapped: what was looked at once need not stay
        for number in range(self.batches):
            images = reader.get_batch(number).column("images").flatten()
            fields = [images.field(name).to_pylist() for name in ("inside", "file", "size", "time")]
            for inside, file, size, time in zip(*fields, strict=True):
                if not inside:
                    try:
                        found = os.stat(file)
                    except OSError:
                        return False
                    if (found.st_size, found.st_mtime_ns) != (size, time):
                        return False
        return True


@dataclass(frozen=True)
class _About:
    """What an index says of its rows, of which it keeps the usable and the bad ones."""

    layout: str
    total: int
    ties: int
    unlabelled: int
    contradicted: int
    digest: str
    caption_digest: str
    content_digest: str
    own_files: bool  # images are files of their own
    lacking: bool  # a row lacks a file, which may be there the next time


def _open(folder: Path, cells: Callable[[], Cells | None], look: bool) -> ExampleSet | None:
    """None where there is no index, or, if one is to ``look``, where an image that is a file has changed."""
    try:
        about = _About(**json.loads((folder / "about.json").read_text(encoding="utf-8")))
        items = Index(folder / "examples.arrow", cells)
        numbers, firsts = (mapped(folder / f"{name}.int32", np.int32) for name in ("numbers", "firsts"))
        if len(numbers) != len(items):
            return None
        with (folder / "bad.jsonl").open(encoding="utf-8") as file:
            bad = [Bad(**json.loads(line)) for line in file]
    except (OSError, ValueError, TypeError):  # not there, or not whole
        return None
    if look and (about.lacking or (about.own_files and not items.unchanged())):
        return None
    return ExampleSet(
        about.layout,
        items,
        bad,
        about.ties,
        about.total,
        about.unlabelled,
        about.contradicted,
        numbers,
        firsts,
        about.digest,
        about.caption_digest,
        about.content_digest,
    )


class _Writer:
    """Writes an index into the folder ``draft``, row by row."""

    def __init__(self, draft: Path, cells: Callable[[], Cells | None]) -> None:
        self.draft = draft
        self.inside = functools.cache(lambda: cells() is not None)  # whether images inside files can be found again
        self.digest, self.contents = hashlib.sha256(), hashlib.sha256()
        self.stats = dict[Path, tuple[str, int, int]]()
        self.total = self.ties = self.unlabelled = 0
        self.own_files = self.lacking = False

    def write(self, layout: str, files: Sequence[Path], rows: Iterable[Example | Bad | Unlabelled | None]) -> None:
        """Raises :class:`_Opaque`."""
        import pyarrow as pa

        self.draft.mkdir()
        self.digest.update(json.dumps([layout, [image_key(file, {}) for file in files]]).encode())
        image = {"file": pa.string(), "row": pa.int64(), "column": pa.string(), "inside": pa.bool_()}
        images = pa.list_(pa.struct(image | {"size": pa.int64(), "time": pa.int64()}))
        texts_of = {"source": pa.string(), "caption": pa.string()}
        schema = pa.schema({"id": pa.int64(), **texts_of, "images": images, "label": pa.float64()})
        files_of = {name: self.draft / f"{name}.tmp" for name in ("captions", "first", "pairs", "upward", "equal")}
        with (
            pa.ipc.new_file(str(self.draft / "examples.arrow"), schema) as table,
            (self.draft / "bad.jsonl").open("w", encoding="utf-8") as bad,
            files_of["captions"].open("wb") as captions,
            files_of["pairs"].open("wb") as pairs,
            files_of["upward"].open("wb") as upward,
        ):
            examples = self._examples(rows, bad)
            while batch := list(itertools.islice(examples, ROWS)):
                table.write_batch(pa.RecordBatch.from_pylist([self._described(row) for row in batch], schema))
                for row in batch:
                    captions.write(key := text_key(row.caption))
                    if len(row.images) == 2:  # the same caption and images, by where these lie
                        won, lost = (text_key(f"{key.hex()} {image}") for image in row.images)
                        pairs.write(bytes(a ^ b for a, b in zip(won, lost, strict=True)))
                        upward.write(bytes([won < lost]))
        keys = mapped(files_of["captions"], np.uint64, 2)
        firsts = self.draft / "firsts.int32"
        number_distinct(first_equal(keys, files_of["first"]), firsts, self.draft / "numbers.int32")
        texts = hashlib.sha256()
        for part in parts(len(mapped(firsts, np.int32))):
            texts.update(keys[mapped(firsts, np.int32)[part]].tobytes())
        contradicted = 0
        if self.own_files:  # what lies inside a file is a row's own
            equal = first_equal(mapped(files_of["pairs"], np.uint64, 2), files_of["equal"])
            contradicted = contradictions(equal, mapped(files_of["upward"], np.bool_))
        for file in files_of.values():
            file.unlink(missing_ok=True)
        counts = self.total, self.ties, self.unlabelled, contradicted
        digests = self.digest.hexdigest(), texts.hexdigest(), self.contents.hexdigest()
        about = _About(layout, *counts, *digests, self.own_files, self.lacking)
        (self.draft / "about.json").write_text(json.dumps(asdict(about)), encoding="utf-8")

    def _examples(self, rows: Iterable[Example | Bad | Unlabelled | None], bad: IO[str]) -> Iterator[Example]:
        """The examples among ``rows``; the others are counted, and ``bad`` ones written down."""
        for row in rows:
            self.total += 1
            if isinstance(row, Example):
                yield row
            elif isinstance(row, Bad):
                self.lacking |= row.reason.startswith(NO_SUCH_FILE)
                bad.write(json.dumps(asdict(row)) + "\n")
            elif isinstance(row, Unlabelled):
                self.unlabelled += 1
            else:
                self.ties += 1

    def _described(self, row: Example) -> dict[str, Any]:
        images, sizes = [], []
        for image in row.images:
            if not isinstance(image, LazyImage) or (image.table is not None and not self.inside()):
                raise _Opaque
            inside = image.table is not None
            self.own_files |= not inside
            name, size, time = image_key(image.file, self.stats if inside else {})
            self.digest.update(json.dumps([row.id, name, size, time, image.row, image.column]).encode())
            where = {"file": str(image.file), "row": image.row, "column": image.column}
            images.append(where | {"inside": inside, "size": size, "time": time})
            sizes.append(size)
        self.contents.update(content_key(row, sizes))
        return {"id": row.id, "source": row.source, "caption": row.caption, "images": images, "label": row.label}
