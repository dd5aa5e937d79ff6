"""The layouts in which people keep preference pairs: which one a path holds, and its rows. Nothing is decoded here."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rewards.common.errors import DataError
from rewards.data.formats import mention_columns
from rewards.data.images import IMAGE_SUFFIXES
from rewards.data.records import RECORD_SUFFIXES, caption_column, caption_of, read_records
from rewards.data.tables import LazyImage, ParquetTable, Table, hub_table, is_hub_id, is_saved, saved_table

logger = logging.getLogger(__name__)

LAYOUTS = """\
  Pick-a-Pic       columns caption, jpg_0, jpg_1, label_0 in a .parquet file, a folder of them, a `save_to_disk`
                   folder (dataset_info.json or dataset_dict.json) or a hub id; label_0 = 1, 0, or 0.5 for a tie
  columns          caption or prompt, chosen, rejected (pictures) in any of the same
  HPDv2            .json: [{"prompt", "image_path" or "file_path": [..], "human_preference" or "rank": [..]}]
  pairs            .jsonl, .json or .csv: {"prompt", "chosen", "rejected"}; HPDv3's path1, path2 too
  imagefolder      metadata.jsonl or metadata.csv: {"file_name", "rejected_file_name", "text"}
  sibling folders  chosen/ and rejected/, or w/ and l/, with the same stems; captions as .txt beside the winners
  votes, if any    votes or HPDv3's choice_dist: [for the first, for the second picture]; HPDv2's raw_annotations"""
SIDES = (("chosen", "rejected"), ("chosen_file_name", "rejected_file_name"), ("file_name", "rejected_file_name"))
RANKED = (("image_path", "file_path"), ("human_preference", "rank"))
VOTES = ("votes", "choice_dist")
FOLDERS = (("chosen", "rejected"), ("w", "l"))
SPLITS = frozenset(
    {"train", "val", "valid", "validation", "validation_unique", "eval", "test", "test_unique", "heldout"}
)


@dataclass(frozen=True)
class PairRow:
    """One row as a reader found it, winner first; without sides it is a tie, or bad when it has a ``problem``.

    ``votes`` is how many annotators were for the winner and for the loser, where the data says so.
    """

    source: str
    caption: object = None
    sides: tuple[LazyImage, LazyImage] | None = None
    votes: tuple[float, float] | None = None
    problem: str = ""

    def fault(self) -> str:
        """Why the row cannot be used; empty where it can."""
        if self.problem or self.sides is None:
            return self.problem
        if not isinstance(self.caption, str) or not self.caption.strip():
            return f"empty caption: {self.caption!r}"
        missing = [str(side) for side in self.sides if side.table is None and not side.file.is_file()]
        return f"no such file: {', '.join(missing)}" if missing else ""


# Finding the layout. Each reader gives (layout, files read, rows).
Layout = tuple[str, list[Path], Iterable[PairRow]]


def recognise(path: str, split: str | None, caption: str | None, root: Path | None) -> Layout:
    """What ``path`` (file, folder or hub id) holds. Raises :class:`DataError` for no layout, or more than one."""
    place = Path(path).expanduser()
    if not place.exists():
        return _hub(path, split or "train", caption)
    if place.is_dir() and split is not None:
        for suffix in (".parquet", ".jsonl", ".json", ".csv", ""):
            if (place / f"{split}{suffix}").exists():
                return recognise(str(place / f"{split}{suffix}"), None, caption, root)
    if place.is_dir():
        return _folder(place, split, caption, root)
    if split is not None:
        raise DataError(f"{place} is one file and has no split {split!r}; leave split out")
    if place.suffix == ".parquet":
        return _parquet([place], caption)
    if place.suffix in RECORD_SUFFIXES:
        return _records(place, caption, root)
    raise DataError(f"{place} is not a preference file that is understood. What is:\n{LAYOUTS}")


def _folder(folder: Path, split: str | None, caption: str | None, root: Path | None) -> Layout:
    if is_saved(folder):
        table = saved_table(folder, split)
        return _table(f"save_to_disk folder, split {table.split}", table, folder, caption)
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


@dataclass(frozen=True)
class Columns:
    """The names of caption, winner, loser (``jpg_0``, ``jpg_1`` for Pick-a-Pic), and votes where there are any."""

    text: str
    first: str
    second: str
    votes: str | None

    def __str__(self) -> str:
        return f"({self.text}, {self.first}, {self.second})"


def _columns(path: object, names: Sequence[str], caption: str | None) -> Columns:
    sides = next((s for s in (("jpg_0", "jpg_1"), *SIDES, ("path1", "path2")) if set(s) <= set(names)), None)
    text = caption_column(names, caption)
    if sides is None or text is None or ("jpg_0" in sides and "label_0" not in names):
        wanted = f" (caption_column {caption!r})" if caption else ""
        raise DataError(
            f"{path} has {sorted(names)}, which is no layout that is understood{wanted}. What is:\n{LAYOUTS}"
        )
    return Columns(text, *sides, next((name for name in VOTES if name in names), None))


# Tables: parquet shards, Arrow data sets on disk, the hub.
def _parquet(files: list[Path], caption: str | None) -> Layout:
    return _table(f"{len(files)} parquet file{'s' if len(files) > 1 else ''}", ParquetTable(files), files[0], caption)


def _hub(name: str, split: str, caption: str | None) -> Layout:
    if not is_hub_id(name):
        raise DataError(f"there is no file or folder {name}, and it is not a hub id of the form owner/name")
    return _table(f"hub data set, split {split}", hub_table(name, split), name, caption)


def _table(what: str, table: Table, source: object, caption: str | None) -> Layout:
    columns = _columns(source, sorted(table.names), caption)
    labelled = columns.first == "jpg_0"
    if caption is None:
        mention_columns(table, columns.text)
    table.select([columns.first, columns.second], others=False)

    def rows() -> Iterator[PairRow]:
        captions = table.column(columns.text)
        labels = table.column("label_0") if labelled else [1] * len(captions)
        votes = table.column(columns.votes) if columns.votes else [None] * len(captions)
        for row, (caption, label, counts) in enumerate(zip(captions, labels, votes, strict=True)):
            file = table.home(row)
            sides = (LazyImage(file, row, columns.first, table), LazyImage(file, row, columns.second, table))
            yield _labelled(f"{file} row {row}", caption, label, sides, _counts(counts))

    if labelled:
        return f"Pick-a-Pic ({columns.text}, jpg_0, jpg_1, label_0), {what}", table.files, rows()
    return f"columns {columns}, {what}", table.files, rows()


def _labelled(
    source: str, caption: object, label: object, sides: tuple[LazyImage, LazyImage], votes: tuple[float, float] | None
) -> PairRow:
    """Pick-a-Pic's rule: ``label_0`` is 1 when the first picture won, 0 when the second did, 0.5 for a tie."""
    if label == 0.5:
        return PairRow(source, caption)
    if label == 1:
        return PairRow(source, caption, sides, votes)
    if label == 0:
        return PairRow(source, caption, sides[::-1], votes and votes[::-1])
    return PairRow(source, problem=f"label_0 is {label!r}, expected 1, 0 or 0.5")


def _counts(value: object) -> tuple[float, float] | None:
    """Votes for the first and the second picture; what is no two numbers has another meaning."""
    counts = _numbers(value, 2)
    return (counts[0], counts[1]) if counts else None


def _numbers(value: object, count: int) -> list[float] | None:
    if isinstance(value, list) and len(value) == count and all(isinstance(n, int | float) and n >= 0 for n in value):
        return value
    return None


# Files of records and folders of files.
def _records(file: Path, caption: str | None, root: Path | None) -> Layout:
    records = read_records(file)
    root = root or file.parent
    names = sorted({str(key) for _, record in records[:100] if isinstance(record, dict) for key in record})
    images, scores = (next((name for name in group if name in names), None) for group in RANKED)
    if images and scores:
        text = caption_column(names, caption) or caption or "prompt"
        rows = (row for where, record in records for row in _ranked(where, record, text, images, scores, root))
        return f"HPDv2 ({text}, {images}, {scores}), {file.name}", [file], rows
    columns = _columns(file, names, caption)
    for _, record in records[:100]:
        if isinstance(record, dict) and not caption:
            caption_of(record, None, file)  # says where captions differ
    kind = "imagefolder" if file.stem == "metadata" else "pairs"
    rows = (_paired(where, record, columns, root) for where, record in records)
    return f"{kind} {columns}, {file.name}", [file], rows


def _paired(where: str, record: object, columns: Columns, root: Path) -> PairRow:
    if not isinstance(record, dict):
        return PairRow(where, problem="not a JSON object")
    paths = [record.get(columns.first), record.get(columns.second)]
    if not all(isinstance(path, str) and path for path in paths):
        return PairRow(where, problem=f"{columns.first} and {columns.second} must be paths, found {paths}")
    sides = (LazyImage(root / str(paths[0])), LazyImage(root / str(paths[1])))
    label = record.get("label_0") if columns.first == "jpg_0" else 1
    return _labelled(where, record.get(columns.text), label, sides, _counts(record.get(columns.votes)))


def _ranked(where: str, record: object, text: str, images: str, scores: str, root: Path) -> Iterator[PairRow]:
    """Every two pictures of a record are a pair; a higher ``human_preference`` wins, and so does a lower ``rank``."""
    paths, marks = (record.get(images), record.get(scores)) if isinstance(record, dict) else (None, None)
    if not (isinstance(record, dict) and isinstance(paths, list) and isinstance(marks, list)):
        yield PairRow(where, problem=f"expected lists {images} and {scores}")
    elif len(paths) != len(marks) or len(paths) < 2 or not all(isinstance(mark, int | float) for mark in marks):
        yield PairRow(where, problem=f"{len(paths)} pictures with {scores} {marks}")
    else:
        gains = [-mark for mark in marks] if scores == "rank" else marks
        ranks = _rankings(record.get("raw_annotations"), len(paths))
        for i, j in itertools.combinations(range(len(paths)), 2):
            label = 0.5 if gains[i] == gains[j] else float(gains[i] > gains[j])
            sides = (LazyImage(root / str(paths[i])), LazyImage(root / str(paths[j])))
            votes = (sum(rank[i] < rank[j] for rank in ranks), sum(rank[i] > rank[j] for rank in ranks))
            yield _labelled(where, record.get(text), label, sides, votes if ranks else None)


def _rankings(annotations: object, count: int) -> list[list[float]]:
    """HPDv2's raw annotations: each annotator's rank of each picture, 1 the best."""
    entries = annotations if isinstance(annotations, list) else []
    return [rank for one in entries if isinstance(one, dict) and (rank := _numbers(one.get("rank"), count))]


def _siblings(folder: Path, winners: str, losers: str) -> Layout:
    def stems(side: str, suffixes: tuple[str, ...]) -> dict[str, list[Path]]:
        files: dict[str, list[Path]] = {}
        for file in sorted((folder / side).rglob("*")):
            if file.suffix.lower() in suffixes:
                files.setdefault(str(file.relative_to(folder / side).with_suffix("")), []).append(file)
        return files

    won, lost, texts = (
        stems(winners, IMAGE_SUFFIXES),
        stems(losers, IMAGE_SUFFIXES),
        stems(winners, (".txt", ".caption")),
    )

    def rows() -> Iterator[PairRow]:
        for stem in sorted(won.keys() | lost.keys()):
            counts = {winners: won.get(stem, []), losers: lost.get(stem, []), "captions": texts.get(stem, [])}
            wrong = [f"{len(files)} in {name}" for name, files in counts.items() if len(files) != 1]
            if wrong:
                yield PairRow(
                    f"{folder}: {stem}", problem=f"expected one file of this stem each, found {', '.join(wrong)}"
                )
            else:
                caption = texts[stem][0].read_text(encoding="utf-8-sig", errors="replace")
                yield PairRow(f"{folder}: {stem}", caption, (LazyImage(won[stem][0]), LazyImage(lost[stem][0])))

    files = [file for group in texts.values() for file in group]
    return f"sibling folders {winners}/ {losers}/ with captions as text files", files, rows()
