"""Files of records, and which of a record's columns is the caption.

Everybody who trains, draws, scores or compares takes a caption from the same column: the first of ``caption``,
``prompt`` and ``text`` that a row has (``CAPTIONS``), unless the user names one.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rewards.common.errors import DataError

logger = logging.getLogger(__name__)

CAPTIONS = ("caption", "prompt", "text")
RECORD_SUFFIXES = (".jsonl", ".json", ".csv")


def read_records(file: Path) -> list[tuple[str, object]]:
    """(where, value) of each entry of a JSON list, of JSON lines (a broken line is None), of CSV, or of text lines."""
    text = file.read_text(encoding="utf-8-sig", errors="replace")
    if file.suffix.lower() == ".csv":
        return [(f"{file}:{line}", row) for line, row in enumerate(csv.DictReader(io.StringIO(text)), 2)]
    lines = [(f"{file}:{line}", words.strip()) for line, words in enumerate(text.split("\n"), 1) if words.strip()]
    if file.suffix.lower() not in RECORD_SUFFIXES:
        return list[tuple[str, object]](lines)
    if not text.lstrip().startswith("["):
        return [(where, _json(words)) for where, words in lines]
    try:
        return [(f"{file}[{index}]", value) for index, value in enumerate(json.loads(text))]
    except json.JSONDecodeError as error:
        raise DataError(f"{file} is not a JSON list: {error}") from error


def read_objects(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """:func:`read_records` where every entry has to be an object. ``DataError`` names one that is not."""
    objects = []
    for where, value in read_records(file):
        if not isinstance(value, dict):
            raise DataError(f"{where} is not a JSON object; expected one in each line, or a list of them")
        objects.append((where, value))
    return objects


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def caption_column(names: Sequence[str], chosen: str | None = None) -> str | None:
    """The column of the caption among ``names``: the one ``chosen``, or the first of :data:`CAPTIONS`."""
    return next((name for name in ((chosen,) if chosen else CAPTIONS) if name in names), None)


def caption_of(record: Mapping[str, Any], chosen: str | None, file: object) -> Any:
    """The caption of a record of ``file``, None where it has none. Where other columns say something else, this is
    logged once for a file."""
    name = caption_column(list(record), chosen)
    if name is None:
        return None
    if chosen is None:
        mention_others(file, name, {other: [record[other]] for other in CAPTIONS if other in record})
    return record[name]


def mention_others(file: object, taken: str, columns: Mapping[str, Sequence[object]]) -> None:
    """Log, once for a file, that of several ``columns`` whose texts differ, ``taken`` is the caption."""
    for other, texts in columns.items():
        if any(text is not None and text != caption for text, caption in zip(texts, columns[taken], strict=True)):
            _mention_once(str(file), taken, other)


@functools.cache
def _mention_once(file: str, taken: str, other: str) -> None:
    logger.warning(
        "%s has %s and %s with different texts; %s is taken, caption_column: %s takes the other",
        file, taken, other, taken, other,
    )  # fmt: skip
