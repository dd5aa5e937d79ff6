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
from rewards.data.text import json_faults, loads, loads_all, parse_json, read_text

logger = logging.getLogger(__name__)

CARRIAGE_RETURN = "has a carriage return inside; end lines with \\n or \\r\\n"
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
    if "\r" in text and "\n" not in text:
        raise DataError(f"{file}:1 {CARRIAGE_RETURN}")
    if suffix in DELIMITERS:
        delimiter = _delimiter(text, DELIMITERS[suffix])
        try:
            return list(_csv(file, text, delimiter))
        except DataError:
            if suffix != ".tsv":
                raise
            return list(_csv(file, text, delimiter, csv.QUOTE_NONE))
    lines = [(line, words.strip()) for line, words in enumerate(text.split("\n"), 1) if words.strip()]
    if suffix not in RECORD_SUFFIXES:
        return list(_lines(file, text, lines))
    if not text.lstrip().startswith("["):
        entries = [(f"{file}:{line}", _json(words)) for line, words in lines]
        broken = bool(entries) and isinstance(entries[0][1], Broken)
        return (_spread(file, text) if broken else []) or entries
    try:
        values = loads(text)
    except ValueError as error:
        raise DataError(f"{file} is not a JSON list: {error}") from error
    assert isinstance(values, list)
    faults = enumerate(zip(values, json_faults(values, text), strict=True))
    return [(f"{file}[{index}]", Broken(fault) if fault else value) for index, (value, fault) in faults]


def _spread(file: Path, text: str) -> list[tuple[str, object]]:
    """JSON values that take several lines each, as ``indent`` and jq write them; nothing where ``text`` is not that."""
    try:
        values = loads_all(text)
    except ValueError:
        return []
    faults = json_faults([value for _, value in values], text)
    return [
        (f"{file}:{line}", Broken(fault) if fault else value)
        for (line, value), fault in zip(values, faults, strict=True)
    ]


def _lines(file: Path, text: str, lines: Sequence[tuple[int, str]]) -> Iterator[tuple[str, object]]:
    if lines and all(words.startswith("{") and words.endswith("}") for _, words in lines):
        raise DataError(f"{file} holds JSON lines; name it .jsonl")
    if _is_json(text):
        raise DataError(f"{file} holds JSON; name it .json")
    if file.suffix.lower() in (".yaml", ".yml"):
        raise DataError(f"{file} is YAML; expected one text a line, or {', '.join(RECORD_SUFFIXES)}")
    for line, words in lines:
        if "\r" in words:
            raise DataError(f"{file}:{line} {CARRIAGE_RETURN}")
        yield f"{file}:{line}", words


def _is_json(text: str) -> bool:
    """Whether all of ``text`` is a JSON list or object, and no prompts such as ``[cat|dog]``."""
    if not text.lstrip().startswith(("[", "{")):
        return False
    try:
        return isinstance(loads(text), list | dict)
    except ValueError:
        return False


def _delimiter(text: str, usual: str) -> str:
    """What stands between the fields of a table: what Excel's first line ``sep=;`` says; or, where the header has none
    of the ``usual``, the semicolons that Excel writes in much of Europe, or tabs."""
    header = text.lstrip().partition("\n")[0].rstrip("\r")
    if header.lower().startswith("sep=") and len(header) == 5:
        return header[-1]
    return next((mark for mark in (usual, ";", "\t") if mark in header), usual)


def _csv(
    file: Path, text: str, delimiter: str, quoting: Literal[0, 3] = csv.QUOTE_MINIMAL
) -> Iterator[tuple[str, object]]:
    reader = csv.reader(io.StringIO(text, newline="\n"), delimiter=delimiter, strict=True, quoting=quoting)
    line = 1
    try:
        header = next(filter(any, reader), [])
        if header[:1] == ["sep="]:
            header = next(filter(any, reader), [])
        names = [name.strip() for name in header]
        if twice := sorted({name for name in names if name and names.count(name) > 1}):
            raise DataError(f"{file}:{reader.line_num} names the column {twice[0]!r} twice")
        line = reader.line_num + 1
        for fields in reader:
            if len(fields) > len(names):
                reason = f"{len(fields)} fields for the {len(names)} columns {', '.join(names)}"
                yield f"{file}:{line}", Broken(f"{reason}; put texts with {delimiter!r} inside into double quotes")
            elif any(fields):  # no row: an empty line, or the delimiters alone that Excel writes of cleared rows
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
    wanted = (chosen,) if chosen else CAPTIONS
    exact = (name for name in wanted if name in names)
    other_case = (name for known in wanted for name in names if name.lower() == known.lower())  # PartiPrompts' Prompt
    return next(exact, None) or next(other_case, None)


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
