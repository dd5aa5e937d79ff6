"""Files of records, and which of a record's columns is the caption.

Everybody who trains, draws, scores or compares takes a caption from the same column: the first of ``caption``,
``prompt`` and ``text`` that a row has (``CAPTIONS``), unless the user names one.
"""

from __future__ import annotations

import csv
import functools
import io
import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rewards.common.errors import DataError
from rewards.data.text import json_fault, loads, parse_json, read_text

logger = logging.getLogger(__name__)

CAPTIONS = ("caption", "prompt", "text")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
RECORD_SUFFIXES = (".jsonl", ".json", *DELIMITERS)


@dataclass(frozen=True)
class Broken:
    """An entry that cannot be read, and why."""

    reason: str


def read_records(file: Path) -> list[tuple[str, object]]:
    """(where, value) of each entry of a JSON list, of JSON lines, of CSV or TSV, or of text lines; a value that cannot
    be read is :class:`Broken`. A TSV file whose quotes are not CSV's is one of plain fields, in which a quote is a
    character (PartiPrompts). Lines end at ``\\n`` alone: U+2028, U+0085 and form feeds are characters of a text.
    ``DataError`` where the file as a whole cannot be read."""
    text, suffix = read_text(file), file.suffix.lower()
    if suffix in DELIMITERS:
        try:
            return list(_csv(file, text, DELIMITERS[suffix]))
        except DataError:
            if suffix != ".tsv":
                raise
            return list(_csv(file, text, DELIMITERS[suffix], csv.QUOTE_NONE))
    lines = [(f"{file}:{line}", words.strip()) for line, words in enumerate(text.split("\n"), 1) if words.strip()]
    if suffix not in RECORD_SUFFIXES:
        return list(_lines(file, lines))
    if not text.lstrip().startswith("["):
        return [(where, _json(words)) for where, words in lines]
    try:
        values = loads(text)
    except ValueError as error:
        raise DataError(f"{file} is not a JSON list: {error}") from error
    assert isinstance(values, list)
    faults = [json_fault(value, text) for value in values]
    return [
        (f"{file}[{index}]", Broken(fault) if fault else value)
        for index, (value, fault) in enumerate(zip(values, faults, strict=True))
    ]


def _lines(file: Path, lines: Sequence[tuple[str, str]]) -> Iterator[tuple[str, object]]:
    if lines and all(words.startswith("{") and words.endswith("}") for _, words in lines):
        raise DataError(f"{file} holds JSON lines; name it .jsonl")
    for where, words in lines:
        if "\r" in words:
            raise DataError(f"{where} has a carriage return inside; end lines with \\n or \\r\\n")
        yield where, words


def _csv(
    file: Path, text: str, delimiter: str, quoting: Literal[0, 3] = csv.QUOTE_MINIMAL
) -> Iterator[tuple[str, object]]:
    reader = csv.reader(io.StringIO(text, newline="\n"), delimiter=delimiter, strict=True, quoting=quoting)
    line = 1
    try:
        names = [name.strip() for name in next(reader, [])]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise DataError(f"{file}:1 names the column {twice[0]!r} twice")
        line = reader.line_num + 1
        for fields in reader:
            if len(fields) > len(names):
                reason = f"{len(fields)} fields for the {len(names)} columns {', '.join(names)}"
                yield f"{file}:{line}", Broken(f"{reason}; put texts with {delimiter!r} inside into double quotes")
            elif fields:
                yield f"{file}:{line}", dict(itertools.zip_longest(names, fields))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{file}:{line} is not CSV: {error}") from error


def read_objects(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """:func:`read_records` where every entry has to be an object. ``DataError`` names one that is not."""
    return objects_of(read_records(file))


def objects_of(entries: Sequence[tuple[str, object]]) -> list[tuple[str, dict[str, Any]]]:
    """``entries``, of which each has to be an object. ``DataError`` names one that is not."""
    objects = []
    for where, value in entries:
        if isinstance(value, Broken):
            raise DataError(f"{where}: {value.reason}")
        if not isinstance(value, dict):
            raise DataError(f"{where} is not a JSON object; expected one in each line, or a list of them")
        objects.append((where, value))
    return objects


def _json(text: str) -> object:
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        return Broken(f"not a JSON object: {error}")
    except ValueError as error:
        return Broken(str(error))


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
