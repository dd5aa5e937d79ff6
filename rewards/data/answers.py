"""The answers file of ``python -m align.label``, as whoever trains or compares on it reads it: what stands.

A line is an answer (``id``, ``item``, ``annotator``, and what was said of which images) or takes one back
(``{"id": .., "undo": ID}``). Lines of other tools, which have none of these, are left as they are; but Label Studio's
JSON export, a task with what everybody said of it, is taken apart into a row each (its JSON-MIN and CSV are rows).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from rewards.data.records import Broken

logger = logging.getLogger(__name__)
SKIP = "skip"


def standing(entries: Sequence[tuple[str, object]]) -> list[tuple[str, object]]:
    """``entries``, as :func:`rewards.data.records.read_records` gives them, :func:`taken_apart`, without answers that
    were taken back, skipped, or asked again to see whether a person is consistent (``check``), and without a last line
    that a kill cut short."""
    entries = [one for where, entry in entries for one in taken_apart(where, entry)]
    if not any(_of_the_page(entry) for _, entry in entries):
        return entries
    if isinstance(entries[-1][1], Broken):
        logger.warning("%s was cut short by a kill and never confirmed; it is left out", entries[-1][0])
        entries = entries[:-1]
    undone = {str(entry["undo"]) for _, entry in entries if isinstance(entry, dict) and "undo" in entry}
    return [(where, entry) for where, entry in entries if not _of_the_page(entry) or _counts(entry, undone)]


def _of_the_page(entry: object) -> bool:
    return isinstance(entry, dict) and "id" in entry and ("undo" in entry or "item" in entry)


def _counts(entry: object, undone: set[str]) -> bool:
    assert isinstance(entry, dict)
    dropped = "undo" in entry or str(entry["id"]) in undone or entry.get("check") or entry.get("label") == SKIP
    return not dropped


def taken_apart(where: str, entry: object) -> list[tuple[str, object]]:
    """A task of Label Studio's JSON export as rows of its data with ``label`` and ``annotator``, one an annotation that
    was neither cancelled nor left empty; anything else as it is."""
    if not isinstance(entry, dict) or not isinstance(entry.get("data"), dict):
        return [(where, entry)]
    said = entry.get("annotations")
    if not isinstance(said, list) or not all(isinstance(one, dict) and "result" in one for one in said):
        return [(where, entry)]
    rows = list[tuple[str, object]]()
    for one in said:
        results = [part["value"] for part in one["result"] or () if isinstance(part, dict) and "value" in part]
        if results and not one.get("was_cancelled"):
            label = results[0] if len(results) == 1 else results  # several answers to a task say no one thing
            rows.append((where, {**entry["data"], "label": label, "annotator": str(one.get("completed_by", ""))}))
    return rows
