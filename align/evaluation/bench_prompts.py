"""The prompts of a bench: the user's copy of its files, in their own layout, and how they are not the official ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from align.common.errors import DataError
from align.evaluation.bench_spec import BenchSpec
from align.shapes.world import held_out_prompts
from rewards.data.arrow_tables import hub_table
from rewards.data.records import RECORD_SUFFIXES, Broken, read_objects, read_records
from rewards.data.text import brief, caption_fault, clean, parse_json, read_text
from rewards.models.shapes import parse as parse_caption

ONEIG = {"Anime_Stylization": "anime", "Portrait": "human", "General_Object": "object"}  # whose alignment is scored
ONEIG_CSV, ONEIG_QUESTIONS = "OneIG-Bench.csv", "scripts/alignment/Q_D"


def read_rows(spec: BenchSpec, path: str | None) -> tuple[list[dict[str, Any]], list[str]]:
    """The prompts, each a row with ``prompt`` and what else its file says, and how they differ from the official ones.

    ``path`` is a file, or a folder of which every file is a task by its name; without one the bench's hub id is asked.
    Where the bench's ``layout`` has several files for a prompt, its questions become ``questions``, a list of
    ``{number, question, parents}``. Raises :class:`DataError`.
    """
    told = spec.prompts
    if path is None and told.where == "shapes":
        return [{"prompt": text, "task": parse_caption(text).task} for text in held_out_prompts()], []
    if path is None:
        if told.hub is None:
            raise DataError(f"{spec.title}: give its prompts, {told.where}, by --prompts")
        table = hub_table(told.hub, told.split)
        rows = [_row(spec, f"{told.hub} row {k}", table.record(k)) for k in range(len(table))]
        return rows, _count(spec, rows)
    place = Path(path).expanduser()
    if not place.exists():
        raise DataError(f"there is no {place}; expected {told.where}")
    if told.layout is not None:
        rows = LAYOUTS[told.layout](spec, place)
    elif place.is_dir():
        parts = [place / name for name in told.files if (place / name).is_file()]
        parts = parts or sorted(file for file in place.iterdir() if file.suffix in (*RECORD_SUFFIXES, ".txt"))
        if not parts:
            raise DataError(f"{place} holds no {', '.join(RECORD_SUFFIXES)} or .txt file; expected {told.where}")
        rows = [{"task": part.stem} | row for part in parts for row in _rows(spec, part)]
    else:
        rows = _rows(spec, place)
    return rows, _count(spec, rows) + _unlike(spec, place)


def _unlike(spec: BenchSpec, place: Path) -> list[str]:
    """How the files at ``place`` differ from the official ones, of which size and SHA-256 are known."""
    told = spec.prompts
    if place.is_dir():
        there = {name: place / name for name in told.files if (place / name).is_file()}
        lacking = [name for name in told.files if name not in there]
        other = [name for name, file in there.items() if _sha256(file.read_bytes()) != told.files[name]]
        words = {"is not there": lacking, "has another SHA-256 than the official one": other}
        return [f"{', '.join(names)} {what}" for what, names in words.items() if names]
    raw = place.read_bytes()
    if told.bytes is not None and len(raw) != told.bytes:
        return [f"the prompt file has {len(raw)} bytes, the official one {told.bytes}"]
    if told.sha256 is not None and _sha256(raw) != told.sha256:
        return ["the prompt file has another SHA-256 than the official one"]
    if told.files and _sha256(raw) not in told.files.values():
        return [f"the prompt file is none of the official {', '.join(told.files)}"]
    return []


def _sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def _rows(spec: BenchSpec, file: Path) -> list[dict[str, Any]]:
    rows = [_row(spec, where, entry) for where, entry in read_records(file)]
    if not rows:
        raise DataError(f"{file} holds no prompt")
    return rows


def _row(spec: BenchSpec, where: str, entry: object) -> dict[str, Any]:
    if isinstance(entry, Broken):
        raise DataError(f"{where}: {entry.reason}")
    column = spec.prompts.column
    words = entry.get(column, entry.get("prompt")) if isinstance(entry, Mapping) else entry
    if not isinstance(words, str) or not clean(words) or caption_fault(words):
        raise DataError(f"{where}: expected a text or an object with {column!r}, found {brief(entry)}")
    others = {k: v for k, v in entry.items() if k != column} if isinstance(entry, Mapping) else {}
    return others | {"prompt": clean(words)}


def _count(spec: BenchSpec, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if spec.prompts.rows in (None, len(rows)):
        return []
    return [f"{len(rows)} prompts, {spec.prompts.rows} in the bench"]


# layouts
def _dpg(spec: BenchSpec, place: Path) -> list[dict[str, Any]]:
    """``dpg_bench.csv``: a row for each question, of which those of one ``item_id`` have one prompt."""
    items: dict[str, dict[str, Any]] = {}
    for where, entry in read_objects(place / "dpg_bench.csv" if place.is_dir() else place):
        try:
            numbers = [int(part) for part in entry["dependency"].split(",")]
            asked = {"number": int(entry["proposition_id"]), "question": entry["question_natural_language"]}
            name = entry["item_id"]
        except (LookupError, ValueError, AttributeError) as error:
            wanted = "item_id, text, proposition_id, dependency and question_natural_language"
            raise DataError(f"{where}: expected {wanted}, found {brief(entry)}") from error
        row = items.get(name) or _row(spec, where, {spec.prompts.column: entry.get(spec.prompts.column)})
        items[name] = row | {"item_id": name, "questions": [*row.get("questions", []), asked | {"parents": numbers}]}
    if not items:
        raise DataError(f"{place} holds no question")
    return list(items.values())


def _oneig(spec: BenchSpec, place: Path) -> list[dict[str, Any]]:
    """A checkout of OneIG-Benchmark: prompts in its CSV file, questions and dependencies, by class and id, beside."""
    if not (place / ONEIG_CSV).is_file():
        raise DataError(f"{place} has no {ONEIG_CSV}; expected {spec.prompts.where}")
    questions: dict[str, Any] = {}
    for category, name in ONEIG.items():
        file = place / ONEIG_QUESTIONS / f"{name}.json"
        if not file.is_file():
            raise DataError(f"there is no {file}; expected {spec.prompts.where}")
        try:
            questions[category] = parse_json(read_text(file))
        except ValueError as error:
            raise DataError(f"{file} is no JSON: {error}") from error
    rows = []
    for where, entry in read_objects(place / ONEIG_CSV):
        category = str(entry.get("category"))
        if category not in ONEIG:
            continue  # text and reasoning have scorers of their own
        try:
            asked, parents = (_numbered(questions[category][entry["id"]][key]) for key in ("question", "dependency"))
            found = [{"number": n, "question": text, "parents": parents[n]} for n, text in asked.items()]
        except (LookupError, ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{where}: no questions and dependencies of {category} {entry.get('id')!r}") from error
        rows.append(_row(spec, where, entry) | {"questions": found})
    if not rows:
        raise DataError(f"{place / ONEIG_CSV} holds no prompt of {', '.join(ONEIG)}")
    return rows


def _numbered(values: str | Mapping[str, Any]) -> dict[int, Any]:
    """A mapping by number, which the official files hold as the text of a JSON object."""
    return {int(number): value for number, value in (json.loads(values) if isinstance(values, str) else values).items()}


LAYOUTS: dict[str, Callable[[BenchSpec, Path], list[dict[str, Any]]]] = {"dpg": _dpg, "oneig": _oneig}
