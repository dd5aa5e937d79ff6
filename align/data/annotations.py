"""People's labels on pictures that ``align.rollout`` drew, joined with the trajectories that made them.

Label files, recognised by what is in them; several files and several annotators may say something of one picture:

- pairwise, JSONL or CSV: ``image_a, image_b, label`` (``a``, ``b`` or ``tie``), and perhaps ``prompt, annotator,
  weight``; the votes on a pair are summed;
- scores, CSV or JSONL: ``image, score``, and perhaps ``annotator``; a picture's scores are averaged;
- D3PO's own JSON: a list of N lists, one a prompt, of k numbers, one a picture; averaged over files too.

Of two pictures of one prompt the one with more votes, or with the strictly higher mean score, is the winner. Where
votes and scores contradict each other, or nothing decides, it is a tie and no pair. A picture is named by its path in
the rollout folder (``images/00003.png``), its file name or its trajectory (``00003``).
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from align.common.errors import DataError
from align.data.dataset import Data
from align.data.trajectories import ManifestLine, RolloutFolder, RolloutRecord, TrajectoryBatch, TrajectoryPairs
from align.families import Family
from rewards.data.records import read_records

logger = logging.getLogger(__name__)

VALUES = {"a": 1.0, "b": -1.0, "tie": 0.0}


@dataclass(frozen=True)
class Vote:
    """What an annotator said, at ``source``. Pictures by their number in the manifest: the score ``value`` of ``a``
    where ``b`` is None; else ``value`` above 0 where ``a`` is better than ``b``, below where worse, 0 for a tie, its
    size the vote's weight."""

    annotator: str
    source: str
    a: int
    b: int | None
    value: float


@dataclass(frozen=True)
class Labels:
    """Pairs of picture numbers, winner first, in the order of the manifest; the number of ties; every single vote."""

    pairs: list[tuple[int, int]]
    ties: int
    votes: list[Vote]


class Reader:
    """Reads label files on the pictures of one rollout; whatever it refuses is a :class:`DataError`."""

    def __init__(self, folder: RolloutFolder, record: RolloutRecord, drawn: Sequence[ManifestLine]) -> None:
        self.folder, self.record, self.drawn = folder, record, drawn
        self.numbers = {
            name: number
            for number, line in enumerate(drawn)
            for name in (line.image, Path(line.image).name, line.trajectory)
        }

    def read(self, file: Path) -> list[Vote]:
        if not file.is_file():
            raise DataError(f"there is no label file {file}; expected JSONL, CSV or D3PO's JSON")
        entries = read_records(file) if file.suffix in (".json", ".jsonl", ".csv") else []
        first = entries[0][1] if entries else None
        if isinstance(first, list):
            return self._matrix(file, entries)
        if isinstance(first, dict) and first.keys() >= {"image_a", "image_b", "label"}:
            return [self._choice(file, where, entry) for where, entry in entries]
        if isinstance(first, dict) and first.keys() >= {"image", "score"}:
            return [self._score(file, where, entry) for where, entry in entries]
        raise DataError(
            f"{file} begins with {first!r}; expected .jsonl or .csv with image_a, image_b, label or with image, score, "
            "or .json with a list of lists of numbers"
        )

    def _matrix(self, file: Path, entries: Sequence[tuple[str, Any]]) -> list[Vote]:
        count, each = self.record.prompts, self.record.images_per_prompt
        asked = f"one for each of the {count} prompts, each of {each} numbers, one a picture, as drawn into"
        if len(entries) != count:
            raise DataError(f"{file} holds {len(entries)} lists; expected {count}, {asked} {self.folder.path}")
        votes: list[Vote] = []
        for where, row in entries:
            if not isinstance(row, list) or len(row) != each:
                found = f"{len(row)} numbers" if isinstance(row, list) else repr(row)
                raise DataError(f"{where} holds {found}; expected a list of {each}, {asked} {self.folder.path}")
            for value in row:
                votes.append(Vote(file.name, where, len(votes), None, _number(value, where, "a score")))
        return votes

    def _choice(self, file: Path, where: str, entry: Any) -> Vote:
        entry = _object(entry, where, ("image_a", "image_b", "label"))
        a, b = (self._picture(entry[name], where) for name in ("image_a", "image_b"))
        prompts = [self.drawn[number].prompt for number in (a, b)]
        if a == b or self.drawn[a].prompt_index != self.drawn[b].prompt_index:
            both = "twice" if a == b else f"and {entry['image_b']!r} of two prompts, {prompts[0]!r} and {prompts[1]!r}"
            raise DataError(f"{where} compares {entry['image_a']!r} {both}; expected two pictures of one prompt")
        if entry.get("prompt") and entry["prompt"] != prompts[0]:
            raise DataError(
                f"{where} says the prompt {entry['prompt']!r}, but {entry['image_a']!r} was drawn for {prompts[0]!r}; "
                f"give the rollout folder that these labels are on, this is {self.folder.path}"
            )
        if not isinstance(entry["label"], str) or entry["label"] not in VALUES:
            raise DataError(f"{where}: label is {entry['label']!r}; expected a, b or tie")
        weight = entry.get("weight")
        factor = 1.0 if weight is None or weight == "" else _number(weight, where, "weight")
        if factor < 0:
            raise DataError(f"{where}: weight is {factor:g}; expected 0 or more, swap the label instead")
        return Vote(str(entry.get("annotator") or file.name), where, a, b, factor * VALUES[entry["label"]])

    def _score(self, file: Path, where: str, entry: Any) -> Vote:
        entry = _object(entry, where, ("image", "score"))
        value = _number(entry["score"], where, "score")
        return Vote(str(entry.get("annotator") or file.name), where, self._picture(entry["image"], where), None, value)

    def _picture(self, name: object, where: str) -> int:
        """The number of the picture that a label calls ``name``."""
        inside = str(name)
        if inside not in self.numbers and Path(inside).resolve().parent == (self.folder.path / "images").resolve():
            inside = Path(inside).name
        if inside not in self.numbers:
            raise DataError(
                f"{where}: the image {name!r} is unknown to {self.folder.manifest}, so it has no trajectory to train "
                "on; label what align.rollout drew, or train pictures of other origin by the objective DPO on "
                "PreferencePairs"
            )
        return self.numbers[inside]


def _object(entry: object, where: str, names: tuple[str, ...]) -> Mapping[str, Any]:
    if not isinstance(entry, dict) or not entry.keys() >= set(names):
        raise DataError(f"{where} is {entry!r}; expected {', '.join(names)}, as in the entries before it")
    return entry


def _number(value: object, where: str, what: str) -> float:
    try:
        found = math.nan if isinstance(value, bool) or not isinstance(value, int | float | str) else float(value)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise DataError(f"{where}: {what} is {value!r}, which is not a number; expected a finite one")
    return found


def tally(votes: Sequence[Vote], images_per_prompt: int) -> Labels:
    """The pairs that ``votes`` decide, by the majority and by the mean scores; both may speak of one pair."""
    choices, scores = defaultdict[tuple[int, int], list[float]](list), defaultdict[int, list[float]](list)
    for vote in votes:
        if vote.b is None:
            scores[vote.a].append(vote.value)
        else:
            low, high = sorted((vote.a, vote.b))
            choices[low, high].append(vote.value if vote.a == low else -vote.value)
    said = {pair: _sign(math.fsum(values)) for pair, values in choices.items()}
    means = {number: fmean(values) for number, values in sorted(scores.items())}
    for _, group in groupby(means, key=lambda number: number // images_per_prompt):
        for low, high in combinations(group, 2):
            said[low, high] = said.get((low, high), 0) + _sign(means[low] - means[high])
    decided = {pair: value for pair, value in sorted(said.items()) if value}
    pairs = [(low, high) if value > 0 else (high, low) for (low, high), value in decided.items()]
    return Labels(pairs, len(said) - len(pairs), list(votes))


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


@dataclass
class LabelledRollout(Data):
    """Pictures that ``align.rollout`` drew and people's preferences among them; an item is a pair.

    Args:
        path: the rollout folder.
        labels: label files, of one kind or several.
        limit: use the first so many pairs.
        resolution: side in pixels of the sample grid; the pairs have the rollout's own.
    """

    path: str
    labels: list[str]
    limit: int | None = None
    resolution: int | None = None

    batch_type: ClassVar[type] = TrajectoryBatch

    def check(self) -> None:
        self.read()

    def read(self) -> tuple[RolloutRecord, list[ManifestLine], Labels]:
        """The rollout's record and manifest, and what the label files say; no trajectory is read yet.

        Raises :class:`DataError` where anything is missing, unknown, or does not fit the manifest.
        """
        if not self.labels:
            raise DataError(f"labels is empty: name the files that say which pictures of {self.path} are preferred")
        folder = RolloutFolder(Path(self.path).expanduser())
        record, drawn = folder.read()
        reader = Reader(folder, record, drawn)
        found = tally(
            [vote for file in self.labels for vote in reader.read(Path(file).expanduser())], record.images_per_prompt
        )
        said = f"{len(found.votes)} votes of {len({vote.annotator for vote in found.votes})} annotators"
        logger.info("%s: %d pairs, %d ties, by %s", self.path, len(found.pairs), found.ties, said)
        if not found.pairs:
            raise DataError(
                f"{', '.join(self.labels)}: {said} prefer no picture, {found.ties} ties; label more of them"
            )
        return record, drawn, found

    def prepare(
        self,
        family: Family,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        progress: bool = True,
        barrier: Callable[[], None] = lambda: None,
    ) -> TrajectoryPairs:
        record, drawn, labels = self.read()
        if rank == 0 and family.source != record.model:
            logger.warning("%s was drawn by %s, but %s trains on it", self.path, record.model, family.source)
        folder = RolloutFolder(Path(self.path).expanduser().resolve())
        return TrajectoryPairs(folder, record, drawn, labels.pairs[: self.limit], family)
