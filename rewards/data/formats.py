"""The layouts people keep images and prompts in, each read into an :class:`~rewards.data.images.ImageSource`.

Nothing is decoded, unpacked to disk or unpickled here.
"""

from __future__ import annotations

import itertools
import logging
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from rewards.common.errors import DataError
from rewards.data.answers import standing
from rewards.data.arrow_tables import WHOLE, ArrowTable, hub_table, is_hub_id, is_saved, saved_table
from rewards.data.hub_files import file_state, hub_files, hub_folder
from rewards.data.image_folder import IMAGES, folder, listed, text_of
from rewards.data.images import IMAGE_SUFFIXES, ImageRow, ImageSource, UnreadableError
from rewards.data.paths import left_out, locate_file, visible
from rewards.data.records import (
    CAPTIONS,
    RECORD_SUFFIXES,
    caption_column,
    mention_others,
    objects_of,
    read_records,
)
from rewards.data.tables import ParquetTable, Table, content, names_file
from rewards.data.text import MAX_CAPTION, brief, caption_fault, text_fault
from rewards.data.webdataset import tars

logger = logging.getLogger(__name__)

ROLLOUT = ("manifest.jsonl", "rollout.json")  # what align.rollout leaves
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
    elif place.is_dir() and split and (place / split).is_dir():
        return open_input(str(place / split), prompts, caption, image_column)
    elif all((place / name).is_file() for name in ROLLOUT):  # beside its images lie contact sheets
        rows = records(place / ROLLOUT[0], caption, image_column)
    elif place.is_dir():
        files = sorted((path.relative_to(place).as_posix() for path in visible(place)), key=natural)
        images, archives, shards = (
            [file for file in files if file.lower().endswith(ends)] for ends in (IMAGE_SUFFIXES, TARS, ".parquet")
        )
        images = [file for file in images if not _is_overview(file, files)]
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


def _is_overview(file: str, files: Sequence[str]) -> bool:
    """Whether an image is what align.evaluate shows beside its page, and no picture that a model drew."""
    return PurePosixPath(file).name == "gallery.png" and file.removesuffix("png") + "html" in files


def natural(text: str) -> list[tuple[bool, int, str]]:
    """Sort key under which ``2.png`` comes before ``10.png``, and both before ``a.png``."""
    parts = re.findall(r"[0-9]+|[^0-9]+", text)
    return [(False, int(part), "") if part.isdigit() else (True, 0, part.lower()) for part in parts]


def records(path: Path, caption: str | None, image_column: str | None) -> ImageSource:
    """A .jsonl, .json or .csv file with the path of an image, relative to it, in every row."""
    rows = []
    for where, record in objects_of(standing(read_records(path))):
        image, prompt = _columns(where, list(record), caption, image_column)
        cell = record[image]
        if not isinstance(cell, str | Mapping | list):
            raise DataError(f"{where}: {image!r} is {brief(cell)}; expected the path of an image")
        text = text_of(path, where, record, caption) if prompt else None
        if names_file(cell):
            rows.append(ImageRow(cell, text, locate_file(path.parent, cell), record))
        else:  # what an image is in base64 is neither its name nor metadata
            others = {name: value for name, value in record.items() if name != image}
            rows.append(_row(where, text, cell, path.parent, others))
    if not rows:
        raise DataError(f"{path} has no rows; expected one per image")
    return listed("records", rows)


def _row(name: str, text: str | None, cell: object, home: Path, record: Mapping[str, Any]) -> ImageRow:
    try:
        image = content(cell, home)
    except UnreadableError as error:
        return ImageRow(name, problem=str(error))
    return ImageRow(name, text, image, record)


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

    states = [[name, n, *file_state(file)] for name, n, file in zip(names, table.counts, files, strict=True)]
    identity = {"layout": "parquet", "files": states, "image_column": image, "prompt_column": prompt}
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
