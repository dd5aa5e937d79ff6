"""Rows of a table as pairs of images: labels, votes, rankings and lists, read as what they are."""

from __future__ import annotations

import ast
import contextlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rewards.data.arrow_tables import Spread
from rewards.data.paths import locate_file, no_such_file
from rewards.data.tables import Cells, LazyImage, Table, names_file
from rewards.data.text import brief, caption_fault
from rewards.data.verdicts import counts_from_one, number, verdict

MARKS = {"human_preference": 1, "rank": -1, "ranking": -1, "best": 1}  # what a higher one is worth; of best, the index
Sides = tuple[LazyImage, LazyImage]
VOTES = ("votes", "choice_dist")
FLAGS = ("has_label", "are_different")


@dataclass(frozen=True)
class PairRow:
    """One row as a reader found it, winner first; without sides it is a tie, ``unlabelled`` (why nobody could choose),
    or bad when it has a ``problem``.

    ``votes`` is how many annotators were for the winner and for the loser, where the data says so; ``tied`` are the
    sides of a tie. ``root`` is where its paths start. A ``soft`` row's problem is that its label is a share of votes,
    which its sides and votes say.
    """

    source: str
    caption: object = None
    sides: Sides | None = None
    votes: tuple[float, float] | None = None
    tied: Sides | None = None
    problem: str = ""
    unlabelled: str = ""
    root: Path = Path()
    soft: bool = False

    @property
    def share(self) -> float | None:
        """The winner's share of the votes; None where nobody counted them."""
        return self.votes[0] / sum(self.votes) if self.votes and sum(self.votes) else None

    def fault(self) -> str:
        """Why the row cannot be used; empty where it can."""
        if self.problem or self.sides is None:
            return self.problem
        if fault := caption_fault(self.caption):
            return fault
        for side in self.sides:
            if side.table is None and not os.path.isfile(side.file):
                told = no_such_file(side.file, self.root)
                return f"{told}; relative paths start from {self.root}, image_root names another folder"
        return "both images are the same" if self.sides[0] == self.sides[1] else ""


# Rows of tables
def column_of(table: Table, name: str | None) -> Iterator[Any]:
    return table.values(name) if name is not None and name in table.names else itertools.repeat(None, len(table))


def cells_of(table: Table, name: str) -> Iterator[Any]:
    """An image column's texts; None where the images are inside, which are read when somebody looks."""
    return column_of(table, name if name in table.texts else None)


@dataclass(frozen=True)
class _Source:
    """A table, and where paths in it start."""

    table: Table
    root: Path | None

    def home(self, row: int) -> Path:
        return self.root or self.table.home(row).parent

    def image(self, row: int, column: str, cell: object, cells: Cells | None = None) -> LazyImage:
        """The image of a cell: the file that it names, or what is inside it."""
        if names_file(cell):
            return LazyImage(locate_file(self.home(row), cell))
        return LazyImage(self.table.home(row), row, column, cells or self.table)

    def problem(self, row: int, reason: str) -> PairRow:
        return PairRow(self.table.where(row), problem=reason)

    def soft(self, row: int, caption: object, share: float, sides: Sides, problem: str) -> PairRow:
        """The row whose label is the first side's ``share`` of the votes, which is a ``problem`` unless one may be."""
        found = self.labelled(row, caption, float(share > 0.5), sides, (share, 1 - share))
        return replace(found, problem=problem, soft=True)

    def labelled(
        self, row: int, caption: object, share: float, sides: Sides, votes: tuple[float, float] | None = None
    ) -> PairRow:
        """The row whose first side is better at ``share`` 1, whose second is at 0; at 0.5 they tie."""
        where = self.table.where(row)
        if share == 0.5:
            return PairRow(where, caption, tied=sides, root=self.home(row))
        if share:
            return PairRow(where, caption, sides, votes, root=self.home(row))
        return PairRow(where, caption, sides[::-1], votes and votes[::-1], root=self.home(row))


def pairs_of(table: Table, root: Path | None, text: str, names: tuple[str, str], told: str | None) -> Iterator[PairRow]:
    """Two columns of images; the first is the winner, or column ``told`` says which is."""
    source = _Source(table, root)
    votes = next((name for name in VOTES if name in table.names), None)
    counted = counts_from_one(column_of(table, told)) if names == ("image_a", "image_b") else False
    columns = [column_of(table, name) for name in (text, votes, *FLAGS)]
    marks = [column_of(table, told or "label"), column_of(table, "label_1" if told == "label_0" else None)]
    sides = [cells_of(table, name) for name in names]
    for row, (caption, counts, has_label, differ, label, other, *both) in enumerate(
        zip(*columns, *marks, *sides, strict=True)
    ):
        if row in table.problems:
            yield source.problem(row, table.problems[row])
        elif reason := _unlabelled(has_label, differ):
            yield PairRow(table.where(row), caption, unlabelled=reason)
        else:
            share = _share(label, other, told, names, counted, (both[0], both[1])) if told else _said(label)
            empty = any(name in table.texts and not cell for name, cell in zip(names, both, strict=True))
            soft = isinstance(share, str) and told == "label_0" and 0 < (number(label) or 0) < 1
            if isinstance(share, str) and not soft:
                yield source.problem(row, share)
            elif empty or not all(_is_image(cell) for cell in both):
                yield source.problem(row, f"{names[0]} and {names[1]} must be paths, found {brief(both)}")
            else:
                first, second = (source.image(row, name, cell) for name, cell in zip(names, both, strict=True))
                if isinstance(share, str):
                    yield source.soft(row, caption, float(label), (first, second), share)
                else:
                    yield source.labelled(row, caption, share, (first, second), _counts(as_list(counts)))


def _is_image(cell: object) -> bool:
    return cell is None or isinstance(cell, str | bytes | list | dict)


def is_false(flag: object) -> bool:
    return flag is not None and str(flag).strip().lower() in ("false", "f", "0", "0.0", "no", "n")


def _unlabelled(has_label: object, differ: object) -> str:
    """Why nobody could choose, by the columns :data:`FLAGS`; empty where somebody did."""
    return next(
        (f"{name} is false" for name, flag in zip(FLAGS, (has_label, differ), strict=True) if is_false(flag)), ""
    )


def _said(label: object) -> float:
    """The winner is in a column of its own; what a label says beside it counts where it says a tie."""
    return 0.5 if verdict(label) == 0 else 1.0


def _share(
    label: object, other: object, told: str, names: tuple[str, str], counted: bool, images: tuple[object, object]
) -> float | str:
    """1.0 where the first image won, 0.0 where the second did, 0.5 for a tie, or what is wrong with the label.

    ``label_0`` is Pick-a-Pic's: the first image's share of 1, and ``label_1``, where there is one, the rest. ``label``
    says it in words, or is the better one's number where the columns are numbered from 0, as MJ-Bench's are.
    """
    value = number(label)
    if told == "label_0":
        if value is not None and 0 < value < 1 and value != 0.5:
            return f"label_0 is the soft label {value:g}; expected 1, 0 or 0.5: round it where that is what you mean"
        if value not in (0, 0.5, 1):
            return f"label_0 is {brief(label)}, expected 1, 0 or 0.5"
        if other is not None and number(other) != 1 - value:
            return f"label_0 is {value:g} and label_1 {brief(other)}, which do not add up to 1"
        return value
    if value is not None and names != ("image_a", "image_b"):
        numbered = {0.0: 1.0, 1.0: 0.0, 0.5: 0.5}.get(value)
        return (
            f"label is {brief(label)}; expected 0 or 1, the number of the better image"
            if numbered is None
            else numbered
        )
    said = verdict(label, names, counted, images)
    expected = "a, b or tie" if names == ("image_a", "image_b") else f"0, 1, {names[0]}, {names[1]} or tie"
    return f"label is {brief(label)}; expected {expected}" if said is None else (said + 1) / 2


def _counts(value: object) -> tuple[float, float] | None:
    """Votes for the first and the second image; what is no two numbers has another meaning."""
    counts = _numbers(value, 2)
    return (counts[0], counts[1]) if counts else None


def _numbers(value: object, count: int) -> list[float] | None:
    if isinstance(value, list) and len(value) == count and all(isinstance(n, int | float) and n >= 0 for n in value):
        return value
    return None


def ranked_lists(table: Table, root: Path | None, text: str, images: str, mark: str) -> Iterator[PairRow]:
    """Rows with a list of images and one of marks, of which every two images are a pair, or with the best one's number,
    which wins over each other one."""
    source, spread = _Source(table, root), Spread(table, images)
    columns = [column_of(table, name) for name in (text, mark, "raw_annotations", *FLAGS)]
    for row, (caption, marks, raw, *flags), cells in zip(
        range(len(table)), zip(*columns, strict=True), cells_of(table, images), strict=True
    ):
        if row in table.problems:
            yield source.problem(row, table.problems[row])
            continue
        if reason := _unlabelled(*flags):
            yield PairRow(table.where(row), caption, unlabelled=reason)
            continue
        if images not in table.texts:
            cells = table.record(row)[images]
        cells, marks = as_list(cells), as_list(marks)
        if not isinstance(cells, list) or not (isinstance(marks, list) or mark == "best"):
            yield source.problem(row, f"expected lists {images} and {mark}")
            continue
        gains = _best(marks, cells) if mark == "best" else [number(value) for value in marks]
        if len(cells) != len(gains) or len(cells) < 2 or None in gains or not all(_is_image(cell) for cell in cells):
            yield source.problem(row, f"{len(cells)} images with {mark} {brief(marks)}")
            continue
        if MARKS[mark] < 0 and (least := min(gain for gain in gains if gain is not None)) < 0:
            yield source.problem(row, f"{mark} is {brief(marks)}; expected ranks, 1 the best, but one is {least:g}")
            continue
        pictures = [source.image(row, f"{images}[{k}]", cell, spread) for k, cell in enumerate(cells)]
        worth = [MARKS[mark] * gain for gain in gains if gain is not None]
        ranks = _rankings(raw, len(cells))
        for i, j in itertools.combinations(range(len(cells)), 2):
            if mark == "best" and worth[i] == worth[j]:
                continue  # nobody compared these
            votes = (sum(rank[i] < rank[j] for rank in ranks), sum(rank[i] > rank[j] for rank in ranks))
            yield source.labelled(
                row, caption, _order(worth[i], worth[j]), (pictures[i], pictures[j]), votes if ranks else None
            )


def as_list(cell: Any) -> Any:
    """A list, also where a CSV file holds one as JSON or Python write it; anything else as it is."""
    if isinstance(cell, str) and cell.strip().startswith("[") and cell.strip().endswith("]"):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return ast.literal_eval(cell.strip())
    return cell


def _order(one: float, other: float) -> float:
    return 0.5 if one == other else float(one > other)


def _best(best: object, images: list[Any]) -> list[float | None]:
    """1 for the best of ``images``, which is named, or numbered from 0, and 0 for the others; nothing for neither."""
    place = images.index(best) if best in images else number(best)
    if isinstance(best, bool) or place not in range(len(images)):
        return []
    return [float(k == place) for k in range(len(images))]


def _rankings(annotations: object, count: int) -> list[list[float]]:
    """HPDv2's raw annotations: each annotator's rank of each image, 1 the best."""
    entries = annotations if isinstance(annotations, list) else []
    return [rank for one in entries if isinstance(one, dict) and (rank := _numbers(one.get("rank"), count))]


def one_image_a_row(table: Table, root: Path | None, text: str, image: str, mark: str, group: str) -> Iterator[PairRow]:
    """ImageRewardDB's rows: an image, its prompt and its rank among those of the same ``group``, of which every two are
    a pair."""
    source = _Source(table, root)
    captions, cells = list(column_of(table, text)), list(cells_of(table, image))
    groups: dict[str, list[tuple[int, float]]] = {}
    columns = [column_of(table, name) for name in (group, mark, *FLAGS)]
    for row, (key, value, *flags) in enumerate(zip(*columns, strict=True)):
        if row in table.problems:
            yield source.problem(row, table.problems[row])
        elif reason := _unlabelled(*flags):
            yield PairRow(table.where(row), captions[row], unlabelled=reason)
        elif (rank := number(value)) is None or key in (None, ""):
            yield source.problem(
                row, f"{group} is {brief(key)} and {mark} {brief(value)}; expected a name and a number"
            )
        elif MARKS[mark] < 0 and rank < 0:
            yield source.problem(row, f"{mark} is {rank:g}; expected a rank, 1 the best")
        elif image in table.texts and not isinstance(cells[row], str):
            yield source.problem(row, f"{image} is {brief(cells[row])}; expected the path of one image")
        else:
            groups.setdefault(str(key), []).append((row, MARKS[mark] * rank))
    for members in groups.values():
        for (row, one), (other, another) in itertools.combinations(members, 2):
            if captions[row] != captions[other]:
                yield source.problem(other, f"another {text} than {table.where(row)}, which has the same {group}")
                continue
            sides = (source.image(row, image, cells[row]), source.image(other, image, cells[other]))
            yield source.labelled(row, captions[row], _order(one, another), sides)
