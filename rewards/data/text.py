"""The one reader of text files that people bring: prompts, captions, JSON and CSV. It never guesses at bytes.

- UTF-8, and UTF-16 or UTF-32 with their byte order mark, are read; anything else is refused with its line.
- Byte order marks go, wherever files were joined; no caption holds one.
- Binary files (parquet, images, Office) are refused, so are texts that are something else (RTF, HTML, a pointer of Git
  LFS), and so is what is no plain file: a pipe would never end.
- JSON is refused where no later step could hold it: nesting beyond 64, integers of hundreds of digits, lone surrogates,
  NUL.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from rewards.common.errors import DataError, one_line, shortened

MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins as UTF-16's does
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
BINARY = {
    b"PAR1": "a parquet file",
    b"ARROW1": "an Arrow file",
    b"PK\x03\x04": "a zip or Office file",
    b"\x1f\x8b": "a gzip file",
    b"%PDF-": "a PDF file",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
}
OTHER_TEXT = {  # what would be read line by line without a word
    re.compile(r"\s*\{\\rtf"): "an RTF document; save it as plain text",
    re.compile(r"\s*<(!doctype\s+html|html)\b", re.IGNORECASE): "an HTML page; download the file itself",
    re.compile(r"version https://git-lfs\.github\.com/spec/"): "a pointer of Git LFS; fetch the file by git lfs pull",
}
SPACE = re.compile(r"\s*")
UNSAFE = re.compile(r"\\u(?:0000|[dD][89a-fA-F])")  # how JSON spells NUL and halves of a character
MAX_CAPTION = 2**17  # characters; where Python's csv stops too
MAX_DEPTH = 64
MAX_DIGITS = 300  # a float holds them
MAX_VALUES = 10**6  # of a YAML file

_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = 80
_brief.maxlist = _brief.maxdict = 10


def brief(value: object) -> str:
    """``repr``, cut where it is long: an error is a line, whatever a cell holds."""
    return _brief.repr(value)


def read_text(file: Path) -> str:
    """What a text file says. :class:`DataError` names the file, and the line where there is one."""
    if not os.path.isfile(file):
        raise DataError(f"{file} is no plain file; expected a text file")
    try:
        return decode_text(file.read_bytes(), file)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error


def decode_text(raw: bytes, where: object) -> str:
    """:func:`read_text` of bytes that lie at ``where``."""
    for magic, kind in BINARY.items():
        if raw.startswith(magic):
            raise DataError(f"{where} is {kind}; expected text in UTF-8")
    encoding = next((name for mark, name in MARKS if raw.startswith(mark)), "utf-8")
    nul = "holds NUL, as binary files do, and UTF-16 without its byte order mark; save it as UTF-8"
    if encoding == "utf-8" and (place := raw.find(b"\0")) >= 0:  # before a byte that is not UTF-8 gives other advice
        line = raw.count(b"\n", 0, place) + 1
        raise DataError(f"{where}:{line} {nul}")
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw[: error.start].decode(encoding, "ignore").count("\n") + 1
        raise DataError(
            f"{where}:{line} is not {encoding.upper()} (byte 0x{raw[error.start]:02x}); save the file as UTF-8, from "
            "Windows' own encoding by iconv -f cp1252 -t utf-8"
        ) from error
    if (place := text.find("\0")) >= 0:
        raise DataError(f"{where}:{text.count(chr(10), 0, place) + 1} {nul}")
    text = text.replace("\ufeff", "")
    for begin, kind in OTHER_TEXT.items():
        if begin.match(text):
            raise DataError(f"{where} is {kind}")
    return text


def parse_json(text: str) -> object:
    """A JSON value. ``ValueError`` says in words why there is none, or :func:`json_fault` finds one in it."""
    value = loads(text)
    if fault := json_fault(value, text):
        raise ValueError(fault)
    return value


def loads(text: str) -> object:
    """``json.loads``, whose every failure is a ``ValueError`` with one line of words."""
    try:
        return json.loads(text, parse_int=_integer)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from None


def load_yaml(text: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """``yaml.load``, whose every failure is a ``ValueError`` with one line of words; so are aliases that contain
    themselves, or make more than :data:`MAX_VALUES` of a few lines."""
    try:
        value = yaml.load(text, loader)
    except RecursionError:
        raise ValueError("nested too deep") from None
    except Exception as error:  # constructors raise what int(), dates and dictionaries do
        raise ValueError(
            shortened(str(error), 600) if isinstance(error, yaml.YAMLError) else one_line(error)
        ) from error
    stack, count = [value], 0
    while stack and count <= MAX_VALUES:
        item = stack.pop()
        inside = [*item, *item.values()] if isinstance(item, dict) else item if isinstance(item, list) else []
        stack += inside
        count += len(inside)
    if stack:
        raise ValueError(f"more than {MAX_VALUES} values, by aliases of aliases or one that contains itself")
    return value


def loads_all(text: str) -> list[tuple[int, object]]:
    """(line, value) of JSON values that follow each other, each on as many lines as it likes; raises as loads."""
    decoder, values, place, line = json.JSONDecoder(parse_int=_integer), list[tuple[int, object]](), 0, 1
    try:
        while rest := SPACE.match(text, place):
            line, place = line + text.count("\n", place, rest.end()), rest.end()
            if place == len(text):
                break
            value, end = decoder.raw_decode(text, place)
            values.append((line, value))
            line, place = line + text.count("\n", place, end), end
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from None
    return values


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits; at most {MAX_DIGITS} are read")
    return int(text)


def json_fault(value: object, text: str) -> str:
    """What makes a value that was read from ``text`` unusable; empty where nothing does."""
    return json_faults([value], text)[0]


def json_faults(values: Sequence[object], text: str) -> list[str]:
    """:func:`json_fault` of each of the values that were read from one ``text``, which is searched once."""
    strings = UNSAFE.search(text) is not None
    if not strings and text.count("[") + text.count("{") <= MAX_DEPTH:
        return [""] * len(values)  # most rows, for little
    return [_fault(value, strings) for value in values]


def _fault(value: object, strings: bool) -> str:
    stack = [(value, 0)]
    while stack:
        item, depth = stack.pop()
        if depth > MAX_DEPTH:
            return f"nested deeper than {MAX_DEPTH}"
        if isinstance(item, str):
            if strings and (fault := text_fault(item)):
                return fault
        elif isinstance(item, dict):
            stack += [(part, depth + 1) for pair in item.items() for part in pair]
        elif isinstance(item, list):
            stack += [(part, depth + 1) for part in item]
    return ""


def text_fault(text: str) -> str:
    """What makes a string unusable; empty where nothing does."""
    if "\0" in text:
        return "a text with NUL in it"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"a text with the lone surrogate \\u{ord(text[error.start]):04x} in it"
    return ""


def caption_fault(value: object) -> str:
    """Why ``value`` is no caption; empty where it is one."""
    if not isinstance(value, str) or not clean(value):
        return f"empty caption: {brief(value)}"
    if len(value) > MAX_CAPTION:
        return f"a caption of {len(value)} characters; at most {MAX_CAPTION} are taken"
    return text_fault(value)


def clean(caption: str) -> str:
    """A caption without byte order marks and the space around it."""
    return caption.replace("\ufeff", "").strip()
