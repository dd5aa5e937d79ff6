"""Prompts, and preference pairs in the layouts that people have. Nothing is decoded here: pictures are lazy.

:func:`read_pairs` finds out which layout a path holds, says so, and gives the pairs in file order.
:mod:`align.encoded` turns them into cached latents and text embeddings.
"""

from __future__ import annotations

import csv
import functools
import io
import itertools
import json
import logging
import os
import re
import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from align.errors import UserError
from align.shapes import locate

logger = logging.getLogger(__name__)

LAYOUTS = """\
  Pick-a-Pic       columns caption, jpg_0, jpg_1, label_0 in a .parquet file, a folder of them, a `save_to_disk`
                   folder (dataset_info.json or dataset_dict.json) or a hub id; label_0 = 1, 0, or 0.5 for a tie
  columns          caption or prompt, chosen, rejected (pictures) in any of the same
  HPDv2            .json: [{"prompt", "image_path" or "file_path": [..], "human_preference" or "rank": [..]}]
  pairs            .jsonl, .json or .csv: {"prompt", "chosen", "rejected"}; HPDv3's path1, path2 too
  imagefolder      metadata.jsonl or metadata.csv: {"file_name", "rejected_file_name", "text"}
  sibling folders  chosen/ and rejected/, or w/ and l/, with the same stems; captions as .txt beside the winners"""
CAPTIONS = ("caption", "prompt", "text")
SIDES = (("chosen", "rejected"), ("chosen_file_name", "rejected_file_name"), ("file_name", "rejected_file_name"))
RANKED = (("image_path", "file_path"), ("human_preference", "rank"))
FOLDERS = (("chosen", "rejected"), ("w", "l"))
PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif"})
SPLITS = frozenset(
    {"train", "val", "valid", "validation", "validation_unique", "eval", "test", "test_unique", "heldout"}
)
BROKEN = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


class DataError(UserError):
    """A data set that cannot be used as it stands; the message says what was found and what to do."""


class UnreadableError(DataError):
    """One picture that cannot be read."""


class Table(Protocol):
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
    table: Table | None = None

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


@dataclass(frozen=True, slots=True)
class Pair:
    """Two pictures for one caption, the first preferred. ``id`` counts the source's pairs, ties and bad rows too."""

    id: int
    source: str
    caption: str
    chosen: Picture
    rejected: Picture


@dataclass(frozen=True)
class Bad:
    """A row that cannot be used."""

    row: int
    source: str
    reason: str


@dataclass(frozen=True)
class PairSet:
    """The usable pairs in file order, and what was left out of ``total``."""

    layout: str
    pairs: list[Pair]
    bad: list[Bad]
    ties: int
    total: int
    files: list[Path]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Pair:
        return self.pairs[index]


@dataclass(frozen=True)
class Row:
    """One row as a reader found it; without sides it is a tie, or bad when it has a ``problem``."""

    source: str
    caption: object = None
    sides: tuple[Picture, Picture] | None = None
    problem: str = ""

    def fault(self) -> str:
        if self.problem or self.sides is None:
            return self.problem
        if not isinstance(self.caption, str) or not self.caption.strip():
            return f"empty caption: {self.caption!r}"
        missing = [str(side) for side in self.sides if side.table is None and not side.file.is_file()]
        return f"no such file: {', '.join(missing)}" if missing else ""


def read_pairs(
    path: str | Path,
    split: str | None = None,
    ties: Literal["drop", "error"] = "drop",
    max_bad_share: float = 0.01,
    report: Path | None = None,
    caption_column: str | None = None,
    image_root: str | Path | None = None,
) -> PairSet:
    """The preference pairs at ``path``: a file, a folder or a hub id, in one of :data:`LAYOUTS`.

    Args:
        path: what to read.
        split: which split of a hub id (default ``train``) or of a folder that holds several.
        ties: leave out rows without a winner, or stop at them.
        max_bad_share: stop when more of the rows than this are unusable.
        report: JSONL file that gets a line for each unusable row.
        caption_column: the caption's name where it is not one of :data:`CAPTIONS`.
        image_root: folder that relative picture paths start from; default the folder of the file that names them.

    Raises:
        DataError: nothing at ``path``, no known layout, ties where refused, or too many bad rows.
    """
    layout, files, rows = _recognise(str(path), split, caption_column, Path(image_root) if image_root else None)
    logger.info("%s: %s", path, layout)
    pairs, bad, tied, total = list[Pair](), list[Bad](), 0, 0
    for total, row in enumerate(rows, 1):
        fault = row.fault()
        if fault:
            bad.append(Bad(total - 1, row.source, fault))
        elif row.sides is None:
            if ties == "error":
                raise DataError(f"{row.source} is a tie; remove it, or drop ties with ties: drop")
            tied += 1
        else:
            pairs.append(Pair(total - 1, row.source, str(row.caption).strip(), *row.sides))
    logger.info("%s: %d pairs, %d ties left out, %d bad rows", path, len(pairs), tied, len(bad))
    check_bad(bad, total, max_bad_share, report)
    if not pairs:
        raise DataError(f"{path} ({layout}) holds no usable pair: {total} rows, {tied} ties, {len(bad)} bad")
    return PairSet(layout, pairs, bad, tied, total, files)


def check_bad(bad: Sequence[Bad], total: int, max_share: float, report: Path | None) -> None:
    """Report the bad rows; raise :class:`DataError` when they are more than ``max_share`` of ``total``."""
    if not bad:
        return
    if report:
        write_atomic(report, "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in bad))
    first = "".join(f"\n  row {row.row}, {row.source}: {row.reason}" for row in bad[:3])
    message = f"{len(bad)} of {total} rows are unusable{f', listed in {report}' if report else ''}; the first:{first}"
    if len(bad) > max_share * total:
        raise DataError(f"{message}\nrepair them, or allow a larger share than max_bad_share = {max_share}")
    logger.warning(message)


def write_atomic(file: Path, text: str) -> None:
    """Write a whole file or none, under a name of this process until it is complete."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(file)


# Finding the layout. Each reader gives (layout, files read, rows).
Found = tuple[str, list[Path], Iterable[Row]]


def _recognise(path: str, split: str | None, caption: str | None, root: Path | None) -> Found:
    place = Path(locate(path)).expanduser()
    if not place.exists():
        return _hub(path, split or "train", caption)
    if place.is_dir() and split is not None:
        for suffix in (".parquet", ".jsonl", ".json", ".csv", ""):
            if (place / f"{split}{suffix}").exists():
                return _recognise(str(place / f"{split}{suffix}"), None, caption, root)
    if place.is_dir():
        return _folder(place, split, caption, root)
    if split is not None:
        raise DataError(f"{place} is one file and has no split {split!r}; leave split out")
    if place.suffix == ".parquet":
        return _parquet([place], caption)
    if place.suffix in (".json", ".jsonl", ".csv"):
        return _records(place, caption, root)
    raise DataError(f"{place} is not a preference file that is understood. What is:\n{LAYOUTS}")


def _folder(folder: Path, split: str | None, caption: str | None, root: Path | None) -> Found:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return _saved(folder, split, caption)
    shards = [(file, _split_of(file)) for file in sorted(folder.rglob("*.parquet"))]
    if split is not None:
        chosen = [file for file, label in shards if label == split or file.parent.name == split]
        if chosen:
            return _parquet(chosen, caption)
        labels = sorted({label for _, label in shards})
        raise DataError(f"{folder} has no split {split!r}" + (f"; its parquet files are {labels}" if labels else ""))
    names = sorted(file for suffix in ("jsonl", "json", "csv") for file in folder.glob(f"*.{suffix}"))
    metadata = [file for file in names if file.stem == "metadata"]
    siblings = [pair for pair in FOLDERS if all((folder / name).is_dir() for name in pair)]
    if metadata:
        return _records(metadata[0], caption, root)
    if siblings and any(file.suffix in (".txt", ".caption") for file in (folder / siblings[0][0]).rglob("*")):
        return _siblings(folder, *siblings[0])
    if shards:
        labels = sorted({label for _, label in shards})
        if len(labels) > 1 and SPLITS & set(labels):  # training on the held-out file must not happen by accident
            raise DataError(f"{folder} holds parquet files of {labels}; say which with split")
        return _parquet([file for file, _ in shards], caption)
    if len(names) == 1:
        return _records(names[0], caption, root)
    seen = ", ".join(sorted(file.name for file in folder.iterdir())[:8]) or "nothing"
    raise DataError(f"{folder} holds {seen}: not a layout that is understood, or more than one. What is:\n{LAYOUTS}")


def _split_of(file: Path) -> str:
    """``train-00000-of-00003-ab12.parquet`` -> ``train``."""
    return re.sub(r"[-_.]?\d+(-of-\d+)?(-[0-9a-f]+)?$", "", file.stem)


def _columns(path: object, names: Sequence[str], caption: str | None) -> tuple[str, str, str]:
    """The names of caption, winner and loser (``jpg_0``, ``jpg_1`` for Pick-a-Pic) among a table's columns."""
    sides = next((s for s in (("jpg_0", "jpg_1"), *SIDES, ("path1", "path2")) if set(s) <= set(names)), None)
    text = next((name for name in ((caption,) if caption else CAPTIONS) if name in names), None)
    if sides is None or text is None or ("jpg_0" in sides and "label_0" not in names):
        wanted = f" (caption_column {caption!r})" if caption else ""
        raise DataError(
            f"{path} has {sorted(names)}, which is no layout that is understood{wanted}. What is:\n{LAYOUTS}"
        )
    return text, sides[0], sides[1]


# Tables: parquet shards, Arrow data sets on disk, the hub.
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


def _parquet(files: list[Path], caption: str | None) -> Found:
    try:
        names = [pq.read_schema(file).names for file in files]
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise DataError(f"{files[0].parent} has a file that is not parquet: {error}") from error
    text, *sides = _columns(files[0], sorted(set(names[0]).intersection(*names)), caption)
    return _table(
        f"{len(files)} parquet file{'s' if len(files) > 1 else ''}", Shards(files, (sides[0], sides[1])), text, *sides
    )


def _saved(folder: Path, split: str | None, caption: str | None) -> Found:
    from datasets import DatasetDict, load_from_disk

    found = load_from_disk(str(folder))
    splits = dict(found) if isinstance(found, DatasetDict) else {str(found.split or "train"): found}
    if split is None and len(splits) == 1:
        split = next(iter(splits))
    if split not in splits:
        raise DataError(f"{folder} holds the splits {sorted(map(str, splits))}; say which with split, not {split!r}")
    text, *sides = _columns(folder, splits[split].column_names, caption)
    return _table(f"save_to_disk folder, split {split}", Arrow(splits[split], (sides[0], sides[1])), text, *sides)


def _hub(name: str, split: str, caption: str | None) -> Found:
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) or name.endswith(
        (".parquet", ".json", ".jsonl", ".csv", ".txt")
    ):
        raise DataError(f"there is no file or folder {name}, and it is not a hub id of the form owner/name")
    from datasets import load_dataset

    logger.info("%s is no file or folder here; asking the hub for it", name)
    try:
        found = load_dataset(name, split=split)
    except (OSError, ValueError, RuntimeError) as error:  # not found, no network, no such split, needs code to run
        raise DataError(f"{name} is no file or folder here, nor a hub data set with split {split}: {error}") from error
    text, *sides = _columns(name, found.column_names, caption)
    return _table(f"hub data set, split {split}", Arrow(found, (sides[0], sides[1])), text, *sides)


def _table(what: str, table: Table, text: str, first: str, second: str) -> Found:
    labelled = first == "jpg_0"

    def rows() -> Iterator[Row]:
        captions = table.column(text)
        labels = table.column("label_0") if labelled else [1] * len(captions)
        for row, (caption, label) in enumerate(zip(captions, labels, strict=True)):
            file = table.home(row)
            sides = (Picture(file, row, first, table), Picture(file, row, second, table))
            yield _labelled(f"{file} row {row}", caption, label, sides)

    name = f"Pick-a-Pic ({text}, jpg_0, jpg_1, label_0)" if labelled else f"columns ({text}, {first}, {second})"
    return f"{name}, {what}", table.files, rows()


def _labelled(source: str, caption: object, label: object, sides: tuple[Picture, Picture]) -> Row:
    """Pick-a-Pic's rule: ``label_0`` is 1 when the first picture won, 0 when the second did, 0.5 for a tie."""
    if label == 0.5:
        return Row(source, caption)
    if label == 1 or label == 0:
        return Row(source, caption, sides if label == 1 else (sides[1], sides[0]))
    return Row(source, problem=f"label_0 is {label!r}, expected 1, 0 or 0.5")


# Files of records and folders of files.
def _records(file: Path, caption: str | None, root: Path | None) -> Found:
    records = _parse(file)
    root = root or file.parent
    names = sorted({str(key) for _, record in records[:100] if isinstance(record, dict) for key in record})
    images, scores = (next((name for name in group if name in names), None) for group in RANKED)
    if images and scores:
        text = caption or next((name for name in CAPTIONS if name in names), "prompt")
        rows = (row for where, record in records for row in _ranked(where, record, text, images, scores, root))
        return f"HPDv2 ({text}, {images}, {scores}), {file.name}", [file], rows
    text, first, second = _columns(file, names, caption)
    kind = "imagefolder" if file.stem == "metadata" else "pairs"
    rows = (_paired(where, record, text, first, second, root) for where, record in records)
    return f"{kind} ({text}, {first}, {second}), {file.name}", [file], rows


def _paired(where: str, record: object, text: str, first: str, second: str, root: Path) -> Row:
    if not isinstance(record, dict):
        return Row(where, problem="not a JSON object")
    paths = [record.get(first), record.get(second)]
    if not all(isinstance(path, str) and path for path in paths):
        return Row(where, problem=f"{first} and {second} must be paths, found {paths}")
    sides = (Picture(root / str(paths[0])), Picture(root / str(paths[1])))
    return _labelled(where, record.get(text), record.get("label_0") if first == "jpg_0" else 1, sides)


def _ranked(where: str, record: object, text: str, images: str, scores: str, root: Path) -> Iterator[Row]:
    """Every two pictures of a record are a pair; a higher ``human_preference`` wins, and so does a lower ``rank``."""
    paths, marks = (record.get(images), record.get(scores)) if isinstance(record, dict) else (None, None)
    if not (isinstance(record, dict) and isinstance(paths, list) and isinstance(marks, list)):
        yield Row(where, problem=f"expected lists {images} and {scores}")
    elif len(paths) != len(marks) or len(paths) < 2 or not all(isinstance(mark, int | float) for mark in marks):
        yield Row(where, problem=f"{len(paths)} pictures with {scores} {marks}")
    else:
        gains = [-mark for mark in marks] if scores == "rank" else marks
        for i, j in itertools.combinations(range(len(paths)), 2):
            label = 0.5 if gains[i] == gains[j] else float(gains[i] > gains[j])
            sides = (Picture(root / str(paths[i])), Picture(root / str(paths[j])))
            yield _labelled(where, record.get(text), label, sides)


def _siblings(folder: Path, winners: str, losers: str) -> Found:
    def stems(side: str, suffixes: frozenset[str]) -> dict[str, list[Path]]:
        found: dict[str, list[Path]] = {}
        for file in sorted((folder / side).rglob("*")):
            if file.suffix.lower() in suffixes:
                found.setdefault(str(file.relative_to(folder / side).with_suffix("")), []).append(file)
        return found

    won, lost, texts = (
        stems(winners, PICTURES),
        stems(losers, PICTURES),
        stems(winners, frozenset({".txt", ".caption"})),
    )

    def rows() -> Iterator[Row]:
        for stem in sorted(won.keys() | lost.keys()):
            counts = {winners: won.get(stem, []), losers: lost.get(stem, []), "captions": texts.get(stem, [])}
            wrong = [f"{len(files)} in {name}" for name, files in counts.items() if len(files) != 1]
            if wrong:
                yield Row(f"{folder}: {stem}", problem=f"expected one file of this stem each, found {', '.join(wrong)}")
            else:
                caption = texts[stem][0].read_text(encoding="utf-8-sig", errors="replace")
                yield Row(f"{folder}: {stem}", caption, (Picture(won[stem][0]), Picture(lost[stem][0])))

    files = [file for group in texts.values() for file in group]
    return f"sibling folders {winners}/ {losers}/ with captions as text files", files, rows()


def _parse(file: Path) -> list[tuple[str, object]]:
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
        raise DataError(f"{file} is not a JSON list: {error}") from error


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


# Prompts and their order.
def read_prompts(path: str | Path) -> list[str]:
    """Prompts from .jsonl or .json ({"prompt": ..} or strings), or from a text file with one on each line.

    Raises:
        DataError: no such file, an entry without a prompt, or no prompt at all.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f'there is no prompt file {file}; expected .jsonl with {{"prompt": ..}}, or .txt, one a line')
    prompts = []
    for where, entry in _parse(file):
        words = (
            next((entry[n] for n in ("prompt", *CAPTIONS) if n in entry), None) if isinstance(entry, dict) else entry
        )
        if not isinstance(words, str) or not words.strip():
            raise DataError(f'{where}: expected {{"prompt": ".."}} or a string, found {entry!r}')
        prompts.append(words.strip())
    if not prompts:
        raise DataError(f"{file} holds no prompt")
    return prompts


@dataclass
class Prompts:
    """A file of prompts: .jsonl with {"prompt"}, a JSON list, or text with one on each line.

    Args:
        path: the file.
    """

    path: str

    def read(self) -> list[str]:
        return read_prompts(self.path)


def shuffled(count: int, size: int, seed: int, step: int) -> list[int]:
    """The ``size`` indices below ``count`` that step ``step`` trains on: a slice of endless shuffled epochs.

    A pure function, so that any step resumes without replaying the ones before it.
    """
    if count < 1 or size < 1:
        raise ValueError(f"cannot draw batches of {size} from {count} items")
    places = range(step * size, (step + 1) * size)
    return [int(_epoch(count, seed, place // count)[place % count]) for place in places]


@functools.lru_cache(maxsize=4)
def _epoch(count: int, seed: int, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.random.default_rng([seed, epoch]).permutation(count)
