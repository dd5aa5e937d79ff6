"""A folder of images, and where the prompt of each is found; nothing is decoded here."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from rewards.common.errors import DataError
from rewards.data.images import ImageRow, ImageSource
from rewards.data.paths import locate_file, name_fault, no_such_file, printable
from rewards.data.records import RECORD_SUFFIXES, caption_column, caption_of, read_objects, read_records
from rewards.data.tables import names_file
from rewards.data.text import MAX_CAPTION, caption_fault, clean, read_text

logger = logging.getLogger(__name__)

IMAGES = ("image", "picture", "jpg", "png", "webp", "file_name", "image_path", "file_path", "path", "file")
METADATA = ("metadata.jsonl", "metadata.csv")
SIDECARS = (".txt", ".caption")  # kohya's default is the latter


def listed(layout: str, rows: Sequence[ImageRow]) -> ImageSource:
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
    rows = [
        ImageRow(printable(file), problem=fault)
        if (fault := name_fault(file))
        else ImageRow(file, texts.get(file, (None,))[0], place / file, *texts.get(file, ())[1:])
        for file in images
    ]
    known = set(images)
    for name, (text, record) in texts.items():
        if name not in known:  # what a table names is read wherever it lies
            there = os.path.isfile(place / name)
            problem = "" if there else no_such_file(place / name, place)
            rows.append(ImageRow(name, text, place / name if there else None, record, problem))
    unnamed = [file for file in images if file not in texts]
    if texts and unnamed:
        logger.warning(
            "%s: %d of %d images have no prompt, the first is %s",
            place,
            len(unnamed),
            len(images),
            printable(unnamed[0]),
        )
    return listed("folder", rows)


def _folder_prompts(
    folder: Path, images: Sequence[str], files: Sequence[str], source: Path | None, column: str | None
) -> dict[str, Text]:
    """Prompt and record of each image that has them; ``source`` is what the user named, if anything."""
    if source is None:
        if tables := [file for file in files if Path(file).name.lower() in METADATA]:  # names are relative to each
            return _by_name({folder / table: read_objects(folder / table) for table in tables}, column, folder)
        there = {file.lower(): file for file in files} | {file: file for file in files}  # Windows' A.TXT is A.png's
        sidecars = {file: _sidecar(file, there) for file in images}
        return {file: (clean(read_text(folder / text)), {}) for file, text in sidecars.items() if text}
    if not source.is_file():
        raise DataError(f"no such prompts file: {source}")
    texts: list[Text]
    if source.suffix.lower() not in RECORD_SUFFIXES:
        texts = [(str(line), {}) for _, line in read_records(source)]
    else:
        records = read_objects(source)
        if _name_column(records, (folder, source.parent)):
            return _by_name({source: records}, column, folder, named=True)
        texts = [(text_of(source, where, record, column), record) for where, record in records]
    if len(texts) != len(images):
        raise DataError(f"{source} has {len(texts)} prompts for {len(images)} images; expected one per image, in order")
    return dict(zip(images, texts, strict=True))


def _sidecar(image: str, there: Mapping[str, str]) -> str | None:
    """The caption's file of ``image``, among those that are ``there`` by their names and these in lower case."""
    names = [PurePosixPath(image).with_suffix(suffix).as_posix() for suffix in SIDECARS]
    return next((there[name] for name in (*names, *map(str.lower, names)) if name in there), None)


def _name_column(records: Sequence[tuple[str, dict[str, Any]]], roots: Sequence[Path]) -> str | None:
    """The column that names each record's image: ``file_name``, or another of :data:`IMAGES` by which one is there."""
    for name in ("file_name", *IMAGES):
        cells = [record.get(name) for _, record in records]
        if cells and all(map(names_file, cells)):
            found = (locate_file(root, str(cell)) for cell in cells for root in roots)
            if name == "file_name" or any(map(os.path.isfile, found)):
                return name
    return None


def _by_name(
    tables: Mapping[Path, Sequence[tuple[str, dict[str, Any]]]], column: str | None, folder: Path, named: bool = False
) -> dict[str, Text]:
    """By the images that ``tables`` name, from where each table lies, or, of the one that the user ``named``, rather
    from ``folder``. ``DataError`` where an image has two texts, of which none is the right one."""
    texts: dict[str, Text] = {}
    for table, records in tables.items():
        roots = (folder, table.parent) if named else (table.parent,)
        name_column = _name_column(records, roots) or "file_name"
        for where, record in records:
            if not isinstance(name := record.get(name_column), str):
                raise DataError(f"{where} has no string {name_column!r}; it has {_keys(record)}")
            found = [locate_file(root, name) for root in roots]
            file = Path(os.path.normpath(next(filter(os.path.isfile, found), found[0])))
            key = (file.relative_to(folder) if file.is_relative_to(folder) else file).as_posix()
            text = text_of(table, where, record, column)
            if texts.get(key, (text,))[0] != text:
                told = "keep one, or give the table itself as the input, of which every row counts"
                raise DataError(f"{where} has another text for {key} than a row before it; {told}")
            texts[key] = (text, record)
    return texts


def _keys(record: Mapping[str, Any]) -> str:
    return ", ".join(map(str, record)) or "nothing"


def text_of(path: Path, where: str, record: Mapping[str, Any], column: str | None) -> str:
    text = caption_of(record, column, path)
    if not isinstance(text, str):
        name = caption_column(list(record), column) or column or "text"
        raise DataError(f"{where} has no string {name!r}; it has {_keys(record)}")
    if len(text) > MAX_CAPTION:
        raise DataError(f"{where}: {caption_fault(text)}")
    return text.replace("\ufeff", "")
