"""The layouts people keep images and prompts in, each read into an :class:`~rewards.data.images.ImageSource`.

Nothing is decoded, unpacked to disk or unpickled here.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from rewards.common.errors import DataError
from rewards.data.answers import standing
from rewards.data.arrow_tables import WHOLE, ArrowTable, hub_table, is_hub_id, is_saved, saved_table
from rewards.data.hub_files import file_size, hub_files, hub_folder
from rewards.data.images import IMAGE_SUFFIXES, ImageRow, ImageSource, UnreadableError
from rewards.data.paths import left_out, locate_file, no_such_file, visible
from rewards.data.records import (
    CAPTIONS,
    RECORD_SUFFIXES,
    caption_column,
    caption_of,
    mention_others,
    objects_of,
    read_objects,
    read_records,
)
from rewards.data.tables import ParquetTable, Table, content, names_file
from rewards.data.text import MAX_CAPTION, brief, caption_fault, clean, read_text, text_fault
from rewards.data.webdataset import tars

logger = logging.getLogger(__name__)

IMAGES = ("image", "picture", "jpg", "png", "webp", "file_name", "image_path", "file_path", "path", "file")
METADATA = ("metadata.jsonl", "metadata.csv")
TARS = (".tar", ".tar.gz", ".tgz")
LAYOUTS = (
    "a folder of images, a .parquet file or folder of them, .jsonl, .json or .csv, webdataset .tar files, "
    "a save_to_disk folder, or a hub id owner/name"
)


def open_input(
    source: str,
    prompts: str | None = None,
    caption: str | None = None,
    image_column: str | None = None,
    split: str | None = None,
    streaming: bool = False,
) -> ImageSource:
    """Find out which layout ``source`` has. In a folder that has several, images go before tar files and parquet.

    ``prompts`` names a file for a folder of images; ``caption`` and ``image_column`` default to the first of
    :data:`~rewards.data.records.CAPTIONS` and :data:`IMAGES` that is there; ``streaming`` downloads nothing of a hub id
    but what is read. ``DataError`` says what arrived and what is understood.
    """
    place = Path(source).expanduser()
    if place.is_file():
        if place.suffix.lower() in RECORD_SUFFIXES:
            rows = records(place, caption, image_column)
        elif place.suffix.lower() == ".parquet":
            rows = parquet(place.parent, [place], caption, image_column)
        elif place.name.lower().endswith(TARS):
            rows = tars(place.parent, [place], caption, image_column)
        else:
            raise DataError(f"{place} is no input that is understood; expected {LAYOUTS}")
    elif is_saved(place):  # the one, with the hub, that has splits
        table = saved_table(place, split)
        return _dataset(f"{place.name}/{table.split}", table, caption, image_column)
    elif place.is_dir():
        files = sorted((path.relative_to(place).as_posix() for path in visible(place)), key=natural)
        images, archives, shards = (
            [file for file in files if file.lower().endswith(ends)] for ends in (IMAGE_SUFFIXES, TARS, ".parquet")
        )
        taken = images or archives or shards
        others = left_out(place, sorted(set(files) - set(taken)))
        if not taken:
            holds = f", which holds {others}" if others else ""
            raise DataError(f"no images ({', '.join(IMAGE_SUFFIXES)}) in {place}{holds}; expected {LAYOUTS}")
        if others:
            logger.warning("%s: %d files are read; left out are %s", place, len(taken), others)
        if images:
            rows = folder(place, images, files, prompts, caption)
        elif archives:
            rows = tars(place, [place / file for file in archives], caption, image_column)
        else:
            rows = parquet(place, [place / file for file in shards], caption, image_column)
    elif is_hub_id(source) and streaming:
        shards_there = hub_files(source, split or WHOLE)
        return parquet(hub_folder(shards_there[0]), shards_there, caption, image_column)
    elif is_hub_id(source):
        table = hub_table(source, split)
        return _dataset(f"{source}/{table.split}", table, caption, image_column)
    else:
        raise DataError(f"no such folder or file: {place}; expected {LAYOUTS}")
    if split not in (None, WHOLE):
        raise DataError(f"{place} has no splits, but --split {split} is given; leave it out")
    if prompts is not None and rows.identity["layout"] != "folder":
        raise DataError(f"--prompts is for a folder of images; {place} brings its own, see --caption_column")
    return rows


def natural(text: str) -> list[tuple[bool, int, str]]:
    """Sort key under which ``2.png`` comes before ``10.png``, and both before ``a.png``."""
    parts = re.findall(r"[0-9]+|[^0-9]+", text)
    return [(False, int(part), "") if part.isdigit() else (True, 0, part.lower()) for part in parts]


# Rows that are all known beforehand: folders and lists of records.
def _listed(layout: str, rows: Sequence[ImageRow]) -> ImageSource:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.file, row.prompt, row.metadata], default=str, sort_keys=True).encode())
    return ImageSource(
        {"layout": layout, "rows": len(rows), "digest": digest.hexdigest()},
        len(rows),
        lambda wanted: (row if wanted(number) else None for number, row in enumerate(rows)),
        rows,
    )


Text = tuple[str, Mapping[str, Any]]  # a prompt and the record that it comes from


def folder(
    place: Path, images: Sequence[str], files: Sequence[str], prompts: str | None, caption: str | None
) -> ImageSource:
    """The ``images`` below ``place``; prompts from the file named, or from what lies among its ``files``."""
    texts = _folder_prompts(place, images, files, Path(prompts) if prompts else None, caption)
    rows = [ImageRow(file, texts.get(file, (None,))[0], place / file, *texts.get(file, ())[1:]) for file in images]
    known = set(images)
    for name, (text, record) in texts.items():
        if name not in known:  # what a table names is read wherever it lies
            there = os.path.isfile(place / name)
            problem = "" if there else no_such_file(place / name, place)
            rows.append(ImageRow(name, text, place / name if there else None, record, problem))
    unnamed = [file for file in images if file not in texts]
    if texts and unnamed:
        logger.warning(
            "%s: %d of %d images have no prompt, the first is %s", place, len(unnamed), len(images), unnamed[0]
        )
    return _listed("folder", rows)


def _folder_prompts(
    folder: Path, images: Sequence[str], files: Sequence[str], source: Path | None, column: str | None
) -> dict[str, Text]:
    """Prompt and record of each image that has them; ``source`` is what the user named, if anything."""
    if source is None:
        if tables := [file for file in files if Path(file).name in METADATA]:  # imagefolder: names are relative to each
            pairs = [_by_name(folder / table, Path(table).parent, column, folder) for table in tables]
            return {file: text for texts in pairs for file, text in texts.items()}
        there = set(files)
        sidecars = {file: PurePosixPath(file).with_suffix(".txt").as_posix() for file in images}
        return {file: (clean(read_text(folder / text)), {}) for file, text in sidecars.items() if text in there}
    if not source.is_file():
        raise DataError(f"no such prompts file: {source}")
    texts: list[Text]
    if source.suffix.lower() not in RECORD_SUFFIXES:
        texts = [(str(line), {}) for _, line in read_records(source)]
    elif all("file_name" in record for _, record in read_objects(source)):
        return _by_name(source, Path(), column, folder)
    else:
        texts = [(_text(source, where, record, column), record) for where, record in read_objects(source)]
    if len(texts) != len(images):
        raise DataError(f"{source} has {len(texts)} prompts for {len(images)} images; expected one per image, in order")
    return dict(zip(images, texts, strict=True))


def _by_name(path: Path, below: Path, column: str | None, folder: Path) -> dict[str, Text]:
    texts: dict[str, Text] = {}
    for where, record in read_objects(path):
        name = record.get("file_name")
        if not isinstance(name, str):
            raise DataError(f"{where} has no string 'file_name'; it has {_keys(record)}")
        file = Path(os.path.normpath(locate_file(folder / below, name)))
        named = file.relative_to(folder) if file.is_relative_to(folder) else file
        texts[named.as_posix()] = (_text(path, where, record, column), record)
    return texts


def records(path: Path, caption: str | None, image_column: str | None) -> ImageSource:
    """A .jsonl, .json or .csv file with the path of an image, relative to it, in every row."""
    rows = []
    for where, record in objects_of(standing(read_records(path))):
        image, prompt = _columns(where, list(record), caption, image_column)
        cell = record[image]
        if not isinstance(cell, str):
            raise DataError(f"{where}: {image!r} is {brief(cell)}; expected the path of an image")
        text = _text(path, where, record, caption) if prompt else None
        if names_file(cell):
            rows.append(ImageRow(cell, text, locate_file(path.parent, cell), record))
        else:  # what an image is in base64 is neither its name nor metadata
            others = {name: value for name, value in record.items() if name != image}
            rows.append(_row(where, text, cell, path.parent, others))
    if not rows:
        raise DataError(f"{path} has no rows; expected one per image")
    return _listed("records", rows)


def _row(name: str, text: str | None, cell: object, home: Path, record: Mapping[str, Any]) -> ImageRow:
    try:
        image = content(cell, home)
    except UnreadableError as error:
        return ImageRow(name, problem=str(error))
    return ImageRow(name, text, image, record)


def _keys(record: Mapping[str, Any]) -> str:
    return ", ".join(map(str, record)) or "nothing"


def _text(path: Path, where: str, record: Mapping[str, Any], column: str | None) -> str:
    text = caption_of(record, column, path)
    if not isinstance(text, str):
        name = caption_column(list(record), column) or column or "text"
        raise DataError(f"{where} has no string {name!r}; it has {_keys(record)}")
    if len(text) > MAX_CAPTION:
        raise DataError(f"{where}: {caption_fault(text)}")
    return text.replace("\ufeff", "")


# Tables: parquet, and what `datasets` reads.
def _columns(where: str, names: Sequence[str], caption: str | None, image: str | None) -> tuple[str, str | None]:
    """The columns of image and prompt; the latter None where there is none and nobody named one."""
    images = [name for name in ((image,) if image else IMAGES) if name in names]
    text = caption_column(names, caption)
    if not images:
        wanted = f"{image!r}" if image else f"one of {', '.join(IMAGES)}; name it with --image_column"
        raise DataError(f"{where} has the columns {', '.join(names)}; expected for the image {wanted}")
    if caption and not text:
        raise DataError(f"{where} has the columns {', '.join(names)}; expected for the prompt {caption!r}")
    return images[0], text


def parquet(home: Path, files: Sequence[Path], caption: str | None, image_column: str | None) -> ImageSource:
    """The rows of parquet ``files`` below ``home``; row groups of which nothing is wanted are not read."""
    table = ParquetTable(files)
    image, prompt = _columns(str(files[0]), table.names, caption, image_column)
    names = [file.relative_to(home).as_posix() for file in files]
    ends = list(itertools.accumulate(table.counts))

    def place(number: int) -> str:
        file = bisect_right(ends, number)
        return f"{names[file]}#{number - (ends[file] - table.counts[file])}"

    sizes = [[name, n, file_size(file)] for name, n, file in zip(names, table.counts, files, strict=True)]
    identity = {"layout": "parquet", "files": sizes, "image_column": image, "prompt_column": prompt}
    return _rows_of(identity, table, place, image, prompt, caption)


def _dataset(name: str, table: ArrowTable, caption: str | None, image_column: str | None) -> ImageSource:
    image, prompt = _columns(name, table.names, caption, image_column)
    identity = {"layout": "datasets", "name": name, "rows": len(table), "fingerprint": table.fingerprint}
    identity |= {"image_column": image, "prompt_column": prompt}
    return _rows_of(identity, table, lambda number: f"{name}#{number}", image, prompt, caption)


def _rows_of(
    identity: dict[str, Any],
    table: Table,
    place: Callable[[int], str],
    image: str,
    prompt: str | None,
    caption: str | None,
) -> ImageSource:
    if prompt and not caption:
        mention_columns(table, prompt)
    table.select([image], others=True)

    def rows(wanted: Callable[[int], bool]) -> Iterator[ImageRow | None]:
        for number in range(len(table)):
            if not wanted(number):
                yield None
                continue
            record = dict(table.record(number))
            cell, text = record.pop(image), record.get(prompt) if prompt else None
            if text is not None and not isinstance(text, str):
                problem = f"column {prompt!r} holds {type(text).__name__}; expected a string"
                yield ImageRow(place(number), problem=problem)
            elif text and (len(text) > MAX_CAPTION or text_fault(text)):
                yield ImageRow(place(number), problem=f"column {prompt!r}: {caption_fault(text)}")
            else:
                text = text and text.replace("\ufeff", "")
                yield _row(place(number), text, cell, table.home(number).parent, record)

    return ImageSource(identity, len(table), rows)


def mention_columns(table: Table, taken: str) -> None:
    """Log where the first rows of ``table`` have other captions beside the column that is ``taken``."""
    columns = {name: table.column(name, 100) for name in CAPTIONS if name in table.names}
    mention_others(table.home(0) if len(table) else "the table", taken, columns)
