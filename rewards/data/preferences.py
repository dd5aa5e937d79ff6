"""The layouts in which people keep preference pairs: which one a path holds, and its rows. Nothing is decoded here.

What a row says is used as it is, or refused: a soft label is no winner, labels have to add up, and rows that nobody
labelled are neither pairs nor ties.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewards.common.errors import DataError
from rewards.data.formats import mention_columns
from rewards.data.images import IMAGE_SUFFIXES
from rewards.data.paths import locate_file, no_such_file, visible
from rewards.data.records import RECORD_SUFFIXES, caption_column, read_records
from rewards.data.tables import (
    Cells,
    LazyImage,
    ParquetTable,
    RecordTable,
    Spread,
    Table,
    hub_table,
    is_hub_id,
    is_saved,
    names_file,
    saved_table,
)
from rewards.data.text import brief, caption_fault, read_text
from rewards.data.verdicts import counts_from_one, number, verdict

LAYOUTS = """\
  Pick-a-Pic       columns caption, jpg_0, jpg_1, label_0 in a .parquet file, a folder of them, a `save_to_disk`
                   folder (dataset_info.json or dataset_dict.json), a hub id, .jsonl, .json, .csv or .tsv; label_0 = 1,
                   0, or 0.5 for a tie; image_0, image_1 too
  MJ-Bench         columns caption, image0, image1, label = 0 or 1, the number of the better image, in any of the same
  answers          columns prompt, image_a, image_b, label = a, b or tie, in any of the same
  columns          caption or prompt, chosen, rejected (images or paths) in any of the same; HPDv3's path1, path2 too
  HPDv2            {"prompt", "image_path" or "file_path": [..], "human_preference" or "rank": [..]} in any of the same
  ImageReward      {"prompt", "generations": [..], "ranking": [..]}, 1 the best, in any of the same
  best of a list   {"prompt", "images": [..], "best": number of the best, from 0} in any of the same
  ImageRewardDB    one row an image: {"prompt_id", "prompt", "image_path" or "image", "rank"} in any of the same
  imagefolder      metadata.jsonl or metadata.csv: {"file_name", "rejected_file_name", "text"}
  sibling folders  chosen/ and rejected/, or w/ and l/, with the same stems; captions as .txt beside the winners
  votes, if any    votes or HPDv3's choice_dist: [for the first, for the second image]; HPDv2's raw_annotations
  no label, if so  has_label or are_different = false, as in Pick-a-Pic v2: such rows are counted and left out"""
SIDES = (
    *(("jpg_0", "jpg_1"), ("chosen", "rejected"), ("chosen_file_name", "rejected_file_name")),
    *(("file_name", "rejected_file_name"), ("path1", "path2")),
    *(("image0", "image1"), ("image_0", "image_1"), ("image_a", "image_b")),
)
UNORDERED = (("jpg_0", "jpg_1"), ("image0", "image1"), ("image_0", "image_1"), ("image_a", "image_b"))
LISTS = ("image_path", "file_path", "generations", "images", "image_paths", "image")
MARKS = {"human_preference": 1, "rank": -1, "ranking": -1, "best": 1}  # what a higher one is worth; of best, the index
Sides = tuple[LazyImage, LazyImage]
VOTES = ("votes", "choice_dist")
FOLDERS = (("chosen", "rejected"), ("w", "l"))
SPLITS = frozenset(
    {"train", "val", "valid", "validation", "validation_unique", "eval", "test", "test_unique", "heldout"}
)


@dataclass(frozen=True)
class PairRow:
    """One row as a reader found it, winner first; without sides it is a tie, ``unlabelled`` (why nobody could choose),
    or bad when it has a ``problem``.

    ``votes`` is how many annotators were for the winner and for the loser, where the data says so. ``root`` is where
    its paths start.
    """

    source: str
    caption: object = None
    sides: Sides | None = None
    votes: tuple[float, float] | None = None
    problem: str = ""
    unlabelled: str = ""
    root: Path = Path()

    def fault(self) -> str:
        """Why the row cannot be used; empty where it can."""
        if self.problem or self.sides is None:
            return self.problem
        if fault := caption_fault(self.caption):
            return fault
        for side in self.sides:
            if side.table is None and not os.path.isfile(side.file):
                told = no_such_file(side.file, self.root)
                return f"{told}; relative paths start from {self.root}, image_root names another folder"
        return "both images are the same" if self.sides[0] == self.sides[1] else ""


# Finding the layout. Each reader gives (layout, files read, rows).
Layout = tuple[str, list[Path], Iterable[PairRow]]


def recognise(path: str, split: str | None, caption: str | None, root: Path | None) -> Layout:
    """What ``path`` (file, folder or hub id) holds; relative paths in it start from ``root``, or from the file that has
    them. Raises :class:`DataError` for no layout, or more than one."""
    place = Path(path).expanduser()
    if place.exists() and not place.is_dir() and not place.is_file():
        raise DataError(f"{place} is a pipe or a device; expected a file or a folder of preferences")
    if not place.exists():
        return _hub(path, split or "train", caption, root)
    if place.is_dir() and split is not None:
        for suffix in (".parquet", *RECORD_SUFFIXES, ""):
            if (place / f"{split}{suffix}").exists():
                return recognise(str(place / f"{split}{suffix}"), None, caption, root)
    if place.is_dir():
        return _folder(place, split, caption, root)
    if split is not None:
        raise DataError(f"{place} is one file and has no split {split!r}; leave split out")
    if place.suffix.lower() == ".parquet":
        return _parquet([place], caption, root)
    if place.suffix.lower() in RECORD_SUFFIXES:
        return _records(place, caption, root)
    raise DataError(f"{place} is not a preference file that is understood. What is:\n{LAYOUTS}")


def _folder(folder: Path, split: str | None, caption: str | None, root: Path | None) -> Layout:
    if is_saved(folder):
        table = saved_table(folder, split)
        return _table(f"save_to_disk folder, split {table.split}", table, folder, caption, root)
    shards = [(file, _split_of(file)) for file in sorted(visible(folder, "*.parquet"))]
    if split is not None:
        chosen = [file for file, label in shards if label == split or file.parent.name == split]
        if chosen:
            return _parquet(chosen, caption, root)
        labels = sorted({label for _, label in shards})
        raise DataError(f"{folder} has no split {split!r}" + (f"; its parquet files are {labels}" if labels else ""))
    names = sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in RECORD_SUFFIXES and file.is_file() and not file.name.startswith(".")
    )
    metadata = [file for file in names if file.stem == "metadata"]
    siblings = [pair for pair in FOLDERS if all((folder / name).is_dir() for name in pair)]
    if metadata:
        return _records(metadata[0], caption, root)
    if siblings and any(file.suffix in (".txt", ".caption") for file in visible(folder / siblings[0][0])):
        return _siblings(folder, *siblings[0])
    if shards:
        labels = sorted({label for _, label in shards})
        if len(labels) > 1 and SPLITS & set(labels):  # training on the held-out file must not happen by accident
            raise DataError(f"{folder} holds parquet files of {labels}; say which with split")
        return _parquet([file for file, _ in shards], caption, root)
    if len(names) == 1:
        return _records(names[0], caption, root)
    seen = ", ".join(sorted(file.name for file in folder.iterdir())[:8]) or "nothing"
    raise DataError(f"{folder} holds {seen}: not a layout that is understood, or more than one. What is:\n{LAYOUTS}")


def _split_of(file: Path) -> str:
    """``train-00000-of-00003-ab12.parquet`` -> ``train``."""
    return re.sub(r"[-_.]?\d+(-of-\d+)?(-[0-9a-f]+)?$", "", file.stem)


def _parquet(files: list[Path], caption: str | None, root: Path | None) -> Layout:
    what = f"{len(files)} parquet file{'s' if len(files) > 1 else ''}"
    return _table(what, ParquetTable(files), files[0], caption, root)


def _hub(name: str, split: str, caption: str | None, root: Path | None) -> Layout:
    if not is_hub_id(name):
        raise DataError(f"there is no file or folder {name}, and it is not a hub id of the form owner/name")
    return _table(f"hub data set, split {split}", hub_table(name, split), name, caption, root)


def _records(file: Path, caption: str | None, root: Path | None) -> Layout:
    table = RecordTable(file, read_records(file))
    if not table.names and table.problems:
        row, reason = next(iter(table.problems.items()))
        raise DataError(f"{table.where(row)}: {reason}")
    return _table(file.name, table, file, caption, root)


def _table(what: str, table: Table, source: object, caption: str | None, root: Path | None) -> Layout:
    """The layout by the columns' names and, where an image has a rank, by whether its column holds lists."""
    names, records = set(table.names), isinstance(table, RecordTable)
    text = caption_column(table.names, caption)
    label = next((name for name in ("label_0", "label") if name in names), None)
    pairs = [pair for pair in SIDES if names.issuperset(pair) and (label or pair not in UNORDERED)]
    inside = [name for name in LISTS if name in names and name not in table.texts]
    images = [*inside, *(name for name in LISTS if name in names)]
    mark = next((name for name in MARKS if name in names), None)
    if text and not caption:
        mention_columns(table, text)
    if text and pairs:
        told = label if pairs[0] in UNORDERED else None
        columns = ", ".join((text, *pairs[0], *([told] if told else [])))
        kind = "pairs" if records else "columns"
        kind = "Pick-a-Pic" if told == "label_0" else "imagefolder" if Path(what).stem == "metadata" else kind
        return f"{kind} ({columns}), {what}", table.files, _pairs(table, root, text, pairs[0], told)
    if text and images and mark:
        columns = f"({text}, {images[0]}, {mark}), {what}"
        if mark == "best" or any(isinstance(value, list) for value in table.column(mark, 100)):
            kind = {"ranking": "ImageReward", "best": "best of a list"}.get(mark, "HPDv2")
            return f"{kind} {columns}", table.files, _lists(table, root, text, images[0], mark)
        group = "prompt_id" if "prompt_id" in names else text
        rows = _one_image_a_row(table, root, text, images[0], mark, group)
        return f"one row an image, grouped by {group} {columns}", table.files, rows
    wanted = f" (caption_column {caption!r})" if caption else ""
    raise DataError(f"{source} has {sorted(names)}, which is no layout that is understood{wanted}. What is:\n{LAYOUTS}")


# Rows of tables
def _column(table: Table, name: str | None) -> Sequence[Any]:
    return table.column(name) if name is not None and name in table.names else [None] * len(table)


def _cells(table: Table, name: str) -> Sequence[Any]:
    """An image column's texts; None where the images are inside, which are read when somebody looks."""
    return _column(table, name if name in table.texts else None)


@dataclass(frozen=True)
class _Source:
    """A table, and where paths in it start."""

    table: Table
    root: Path | None

    def home(self, row: int) -> Path:
        return self.root or self.table.home(row).parent

    def image(self, row: int, column: str, cell: object, cells: Cells | None = None) -> LazyImage:
        """The image of a cell: the file that it names, or what is inside it."""
        if names_file(cell):
            return LazyImage(locate_file(self.home(row), cell))
        return LazyImage(self.table.home(row), row, column, cells or self.table)

    def problem(self, row: int, reason: str) -> PairRow:
        return PairRow(self.table.where(row), problem=reason)

    def labelled(
        self, row: int, caption: object, share: float, sides: Sides, votes: tuple[float, float] | None = None
    ) -> PairRow:
        """The row whose first side is better at ``share`` 1, whose second is at 0; at 0.5 they tie."""
        where = self.table.where(row)
        if share == 0.5:
            return PairRow(where, caption)
        if share:
            return PairRow(where, caption, sides, votes, root=self.home(row))
        return PairRow(where, caption, sides[::-1], votes and votes[::-1], root=self.home(row))


def _pairs(table: Table, root: Path | None, text: str, names: tuple[str, str], told: str | None) -> Iterator[PairRow]:
    """Two columns of images; the first is the winner, or column ``told`` says which is."""
    source = _Source(table, root)
    table.select(names, others=False)
    votes = next((name for name in VOTES if name in table.names), None)
    labels, others = _column(table, told), _column(table, "label_1" if told == "label_0" else None)
    counted = counts_from_one(labels) if names == ("image_a", "image_b") else False
    columns = [_column(table, name) for name in (text, votes, "has_label", "are_different")]
    sides = [_cells(table, name) for name in names]
    for row, (caption, counts, has_label, differ) in enumerate(zip(*columns, strict=True)):
        if row in table.problems:
            yield source.problem(row, table.problems[row])
        elif _is_false(has_label) or _is_false(differ):
            reason = "has_label is false" if _is_false(has_label) else "are_different is false"
            yield PairRow(table.where(row), caption, unlabelled=reason)
        else:
            share = _share(labels[row], others[row], told, names, counted) if told else 1.0
            both = [cells[row] for cells in sides]
            empty = any(name in table.texts and not cell for name, cell in zip(names, both, strict=True))
            if isinstance(share, str):
                yield source.problem(row, share)
            elif empty or not all(_is_image(cell) for cell in both):
                yield source.problem(row, f"{names[0]} and {names[1]} must be paths, found {brief(both)}")
            else:
                first, second = (source.image(row, name, cell) for name, cell in zip(names, both, strict=True))
                yield source.labelled(row, caption, share, (first, second), _counts(counts))


def _is_image(cell: object) -> bool:
    return cell is None or isinstance(cell, str | bytes | list | dict)


def _is_false(flag: object) -> bool:
    return flag is not None and str(flag).strip().lower() in ("false", "0", "0.0", "no")


def _share(label: object, other: object, told: str, names: tuple[str, str], counted: bool) -> float | str:
    """1.0 where the first image won, 0.0 where the second did, 0.5 for a tie, or what is wrong with the label.

    ``label_0`` is Pick-a-Pic's: the first image's share of 1, and ``label_1``, where there is one, the rest. ``label``
    says it in words, or is the better one's number where the columns are numbered from 0, as MJ-Bench's are.
    """
    value = number(label)
    if told == "label_0":
        if value is not None and 0 < value < 1 and value != 0.5:
            return f"label_0 is the soft label {value:g}; expected 1, 0 or 0.5: round it where that is what you mean"
        if value not in (0, 0.5, 1):
            return f"label_0 is {brief(label)}, expected 1, 0 or 0.5"
        if other is not None and number(other) != 1 - value:
            return f"label_0 is {value:g} and label_1 {brief(other)}, which do not add up to 1"
        return value
    if value is not None and names != ("image_a", "image_b"):
        numbered = {0.0: 1.0, 1.0: 0.0, 0.5: 0.5}.get(value)
        return (
            f"label is {brief(label)}; expected 0 or 1, the number of the better image"
            if numbered is None
            else numbered
        )
    said = verdict(label, names, counted)
    expected = "a, b or tie" if names == ("image_a", "image_b") else f"0, 1, {names[0]}, {names[1]} or tie"
    return f"label is {brief(label)}; expected {expected}" if said is None else (said + 1) / 2


def _counts(value: object) -> tuple[float, float] | None:
    """Votes for the first and the second image; what is no two numbers has another meaning."""
    counts = _numbers(value, 2)
    return (counts[0], counts[1]) if counts else None


def _numbers(value: object, count: int) -> list[float] | None:
    if isinstance(value, list) and len(value) == count and all(isinstance(n, int | float) and n >= 0 for n in value):
        return value
    return None


def _lists(table: Table, root: Path | None, text: str, images: str, mark: str) -> Iterator[PairRow]:
    """Rows with a list of images and one of marks, of which every two images are a pair, or with the best one's number,
    which wins over each other one."""
    source = _Source(table, root)
    table.select([images], others=False)
    spread = Spread(table, images)
    columns = [_column(table, name) for name in (text, mark, "raw_annotations")]
    for row, (caption, marks, raw), cells in zip(
        range(len(table)), zip(*columns, strict=True), _cells(table, images), strict=True
    ):
        if row in table.problems:
            yield source.problem(row, table.problems[row])
            continue
        if images not in table.texts:
            cells = table.record(row)[images]
        if not isinstance(cells, list) or not (isinstance(marks, list) or mark == "best"):
            yield source.problem(row, f"expected lists {images} and {mark}")
            continue
        gains = _best(marks, cells) if mark == "best" else [number(value) for value in marks]
        if len(cells) != len(gains) or len(cells) < 2 or None in gains or not all(_is_image(cell) for cell in cells):
            yield source.problem(row, f"{len(cells)} images with {mark} {brief(marks)}")
            continue
        pictures = [source.image(row, f"{images}[{k}]", cell, spread) for k, cell in enumerate(cells)]
        worth = [MARKS[mark] * gain for gain in gains if gain is not None]
        ranks = _rankings(raw, len(cells))
        for i, j in itertools.combinations(range(len(cells)), 2):
            if mark == "best" and worth[i] == worth[j]:
                continue  # nobody compared these
            votes = (sum(rank[i] < rank[j] for rank in ranks), sum(rank[i] > rank[j] for rank in ranks))
            yield source.labelled(
                row, caption, _order(worth[i], worth[j]), (pictures[i], pictures[j]), votes if ranks else None
            )


def _order(one: float, other: float) -> float:
    return 0.5 if one == other else float(one > other)


def _best(best: object, images: list[Any]) -> list[float | None]:
    """1 for the best of ``images``, which is named, or numbered from 0, and 0 for the others; nothing for neither."""
    place = images.index(best) if best in images else number(best)
    if isinstance(best, bool) or place not in range(len(images)):
        return []
    return [float(k == place) for k in range(len(images))]


def _rankings(annotations: object, count: int) -> list[list[float]]:
    """HPDv2's raw annotations: each annotator's rank of each image, 1 the best."""
    entries = annotations if isinstance(annotations, list) else []
    return [rank for one in entries if isinstance(one, dict) and (rank := _numbers(one.get("rank"), count))]


def _one_image_a_row(
    table: Table, root: Path | None, text: str, image: str, mark: str, group: str
) -> Iterator[PairRow]:
    """ImageRewardDB's rows: an image, its prompt and its rank among those of the same ``group``, of which every two are
    a pair."""
    source = _Source(table, root)
    table.select([image], others=False)
    captions, cells = _column(table, text), _cells(table, image)
    groups: dict[str, list[tuple[int, float]]] = {}
    for row, (key, value) in enumerate(zip(_column(table, group), _column(table, mark), strict=True)):
        if row in table.problems:
            yield source.problem(row, table.problems[row])
        elif (rank := number(value)) is None or key in (None, ""):
            yield source.problem(
                row, f"{group} is {brief(key)} and {mark} {brief(value)}; expected a name and a number"
            )
        elif image in table.texts and not isinstance(cells[row], str):
            yield source.problem(row, f"{image} is {brief(cells[row])}; expected the path of one image")
        else:
            groups.setdefault(str(key), []).append((row, MARKS[mark] * rank))
    for members in groups.values():
        for (row, one), (other, another) in itertools.combinations(members, 2):
            if captions[row] != captions[other]:
                yield source.problem(other, f"another {text} than {table.where(row)}, which has the same {group}")
                continue
            sides = (source.image(row, image, cells[row]), source.image(other, image, cells[other]))
            yield source.labelled(row, captions[row], _order(one, another), sides)


# Folders of files
def _siblings(folder: Path, winners: str, losers: str) -> Layout:
    def stems(side: str, suffixes: tuple[str, ...]) -> dict[str, list[Path]]:
        files: dict[str, list[Path]] = {}
        for file in sorted(visible(folder / side)):
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
                caption = read_text(texts[stem][0])
                yield PairRow(f"{folder}: {stem}", caption, (LazyImage(won[stem][0]), LazyImage(lost[stem][0])))

    files = [file for group in texts.values() for file in group]
    return f"sibling folders {winners}/ {losers}/ with captions as text files", files, rows()
