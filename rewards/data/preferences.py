"""The layouts in which people keep preference pairs: which one a path holds, and its rows. Nothing is decoded here.

What a row says is used as it is, or refused: a soft label is no winner, labels have to add up, and rows that nobody
labelled are neither pairs nor ties. The layouts:

  Pick-a-Pic       columns caption, jpg_0, jpg_1, label_0 in a .parquet file, a folder of them, a `save_to_disk`
                   folder (dataset_info.json or dataset_dict.json), a hub id, .jsonl, .json, .csv or .tsv; label_0 = 1,
                   0, or 0.5 for a tie; image_0, image_1 too
  MJ-Bench         columns caption, image0, image1, label = 0 or 1, the number of the better image, in any of the same
  answers          columns prompt, image_a, image_b, label = a, b or tie, in any of the same; the file of align.label,
                   of which only what stands counts (rewards.data.answers), its grids as images and ranking
  columns          caption or prompt, chosen, rejected (images or paths) in any of the same; HPDv3's path1, path2 too
  HPDv2            {"prompt", "image_path" or "file_path": [..], "human_preference" or "rank": [..]} in any of the same
  ImageReward      {"prompt", "generations": [..], "ranking": [..]}, 1 the best, in any of the same
  best of a list   {"prompt", "images": [..], "best": number of the best, from 0} in any of the same
  ImageRewardDB    one row an image: {"prompt_id", "prompt", "image_path" or "image", "rank"} in any of the same
  imagefolder      metadata.jsonl or metadata.csv: {"file_name", "rejected_file_name", "text"}
  sibling folders  chosen/ and rejected/, or w/ and l/, with the same stems; captions as .txt beside the winners
  votes, if any    votes or HPDv3's choice_dist: [for the first, for the second image]; HPDv2's raw_annotations
  no label, if so  has_label or are_different = false, as in Pick-a-Pic v2: such rows are counted and left out
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from rewards.common.errors import DataError
from rewards.data.answers import standing
from rewards.data.arrow_tables import WHOLE, Spread, hub_table, is_hub_id, is_saved, saved_table
from rewards.data.formats import mention_columns
from rewards.data.hub_files import hub_files
from rewards.data.images import IMAGE_SUFFIXES
from rewards.data.pair_rows import MARKS, PairRow, as_list, one_image_a_row, pairs_of, ranked_lists
from rewards.data.paths import name_fault, printable, visible
from rewards.data.records import RECORD_SUFFIXES, caption_column, read_records
from rewards.data.tables import Cells, LazyImage, ParquetTable, RecordTable, Table
from rewards.data.text import read_text

EXPECTED = (
    "expected caption, chosen, rejected, or the layout of Pick-a-Pic, HPDv2, HPDv3, ImageReward, MJ-Bench, imagefolder "
    "or sibling folders; all are listed by: python -m pydoc rewards.data.preferences"
)
SIDES = (
    *(("jpg_0", "jpg_1"), ("chosen", "rejected"), ("chosen_file_name", "rejected_file_name")),
    *(("file_name", "rejected_file_name"), ("path1", "path2")),
    *(("image0", "image1"), ("image_0", "image_1"), ("image_a", "image_b")),
)
UNORDERED = (("jpg_0", "jpg_1"), ("image0", "image1"), ("image_0", "image_1"), ("image_a", "image_b"))
LISTS = ("image_path", "file_path", "generations", "images", "image_paths", "image")
FOLDERS = (("chosen", "rejected"), ("w", "l"))
SPLITS = frozenset(
    {"train", "val", "valid", "validation", "validation_unique", "eval", "test", "test_unique", "heldout"}
)


# Finding the layout
class Layout(NamedTuple):
    """What a path holds: its layout, the files read, its rows, and what the images of these are read from where they
    lie inside a larger file."""

    name: str
    files: list[Path]
    rows: Iterable[PairRow]
    cells: Cells | None = None


def recognise(path: str, split: str | None, caption: str | None, root: Path | None, streaming: bool = False) -> Layout:
    """What ``path`` (file, folder or hub id) holds; relative paths in it start from ``root``, or from the file that has
    them. ``streaming`` downloads nothing of a hub id but what is read. Raises :class:`DataError` for no layout, or more
    than one."""
    place = Path(path).expanduser()
    if place.exists() and not place.is_dir() and not place.is_file():
        raise DataError(f"{place} is a pipe or a device; expected a file or a folder of preferences")
    if not place.exists():
        return _hub(path, split or WHOLE, caption, root, streaming)
    if place.is_dir() and split is not None:
        for suffix in (".parquet", *RECORD_SUFFIXES, ""):
            if (place / f"{split}{suffix}").exists():
                return recognise(str(place / f"{split}{suffix}"), None, caption, root)
    if place.is_dir():
        return _folder(place, split, caption, root)
    if split is not None and (split != WHOLE or _split_of(place) in SPLITS - {WHOLE}):
        raise DataError(f"{place} is one file and has no split {split!r}; leave split out")
    if place.suffix.lower() == ".parquet":
        return _parquet([place], caption, root)
    if place.suffix.lower() in RECORD_SUFFIXES:
        return _records(place, caption, root)
    raise DataError(f"{place} is not a preference file that is understood; {EXPECTED}")


def _folder(folder: Path, split: str | None, caption: str | None, root: Path | None) -> Layout:
    if is_saved(folder):
        table = saved_table(folder, split)
        return _table(f"save_to_disk folder, split {table.split}", table, folder, caption, root)
    shards = [(file, _split_of(file)) for file in sorted(visible(folder, "*.parquet"))]
    names = sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in RECORD_SUFFIXES and file.is_file() and not file.name.startswith(".")
    )
    if split is not None:
        chosen = [file for file, label in shards if label == split or file.parent.name == split]
        if chosen:
            return _parquet(chosen, caption, root)
        labels = sorted({label for _, label in shards} | {_split_of(file) for file in names})
        if split != WHOLE or SPLITS & set(labels):
            named = f"; its files are {labels}" if labels else ""
            raise DataError(f"{folder} has no split {split!r}{named}")
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
    raise DataError(f"{folder} holds {seen}: not a layout that is understood, or more than one; {EXPECTED}")


def _split_of(file: Path) -> str:
    """``train-00000-of-00003-ab12.parquet`` -> ``train``."""
    return re.sub(r"[-_.]?\d+(-of-\d+)?(-[0-9a-f]+)?$", "", file.stem)


def _parquet(files: list[Path], caption: str | None, root: Path | None) -> Layout:
    what = f"{len(files)} parquet file{'s' if len(files) > 1 else ''}"
    return _table(what, ParquetTable(files), files[0], caption, root)


def _hub(name: str, split: str, caption: str | None, root: Path | None, streaming: bool) -> Layout:
    if not is_hub_id(name):
        raise DataError(f"there is no file or folder {name}, and it is not a hub id of the form owner/name")
    table = ParquetTable(hub_files(name, split)) if streaming else hub_table(name, split)
    return _table(f"hub data set, split {split}", table, name, caption, root)


def _records(file: Path, caption: str | None, root: Path | None) -> Layout:
    table = RecordTable(file, standing(read_records(file)))
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
        table.select(pairs[0], others=False)
        return Layout(f"{kind} ({columns}), {what}", table.files, pairs_of(table, root, text, pairs[0], told), table)
    if text and images and mark:
        columns = f"({text}, {images[0]}, {mark}), {what}"
        table.select(images[:1], others=False)
        if mark == "best" or any(isinstance(as_list(value), list) for value in table.column(mark, 100)):
            kind = {"ranking": "ImageReward", "best": "best of a list"}.get(mark, "HPDv2")
            rows, spread = ranked_lists(table, root, text, images[0], mark), Spread(table, images[0])
            return Layout(f"{kind} {columns}", table.files, rows, spread)
        group = "prompt_id" if "prompt_id" in names else text
        rows = one_image_a_row(table, root, text, images[0], mark, group)
        return Layout(f"one row an image, grouped by {group} {columns}", table.files, rows, table)
    wanted = f" (caption_column {caption!r})" if caption else ""
    raise DataError(f"{source} has {sorted(names)}, which is no layout that is understood{wanted}; {EXPECTED}")


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
            where = f"{folder}: {printable(stem)}"
            if fault := name_fault(stem):
                yield PairRow(where, problem=fault)
            elif wrong:
                yield PairRow(where, problem=f"expected one file of this stem each, found {', '.join(wrong)}")
            else:
                caption = read_text(texts[stem][0])
                yield PairRow(where, caption, (LazyImage(won[stem][0]), LazyImage(lost[stem][0])))

    files = [file for group in texts.values() for file in group]
    return Layout(f"sibling folders {winners}/ {losers}/ with captions as text files", files, rows())
