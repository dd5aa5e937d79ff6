"""People's labels on images that ``align.rollout`` drew, joined with the trajectories that made them.

Label files, recognised by what is in them; several files and several annotators may say something of one image:

- pairwise, JSONL or CSV: ``image_a, image_b, label`` (``a``, ``b`` or ``tie``, or another of the words that
  :mod:`rewards.data.verdicts` knows; 1 and 2 where both are there), and perhaps ``prompt, annotator, weight``; the
  votes on a pair are summed;
- scores, CSV or JSONL: ``image, score``, and perhaps ``annotator``; an image's scores are averaged;
- rankings, JSONL: ``images, ranking``, 1 the best, and perhaps ``annotator``; of every two that rank differently one is
  preferred, those of one rank were not compared;
- D3PO's own JSON: a list of N lists, one a prompt, of k numbers, one an image; averaged over files too.

The file of ``align.label`` is one of these; what was taken back, skipped or asked twice there counts for nothing.

Of two images of one prompt the one with more votes, or with the strictly higher mean score, is the winner. Where
votes and scores contradict each other, or nothing decides, it is a tie and no pair. An image is named by its path in
the rollout folder (``images/00003.png``), its file name or its trajectory (``00003``). A path of another machine has to
end as in the rollout folder, that folder's name with it; back-slashes, another suffix (a re-saved JPEG) and what Label
Studio makes of an uploaded name are understood.
"""

from __future__ import annotations

import logging
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby
from pathlib import Path, PurePosixPath
from statistics import fmean
from typing import Any, ClassVar
from urllib.parse import unquote

from align.common.errors import DataError, require_at_least
from align.common.resolution import Resolution
from align.data.dataset import Data, Setup
from align.data.trajectories import Rollout, RolloutFolder, TrajectoryBatch, TrajectoryPairs
from rewards.data.answers import standing
from rewards.data.images import IMAGE_SUFFIXES
from rewards.data.records import RECORD_SUFFIXES, Broken, read_records
from rewards.data.text import brief
from rewards.data.verdicts import counts_from_one, number, verdict

logger = logging.getLogger(__name__)

UPLOAD = re.compile(r".*/data/upload/\d+/[0-9a-f]{8}-([^/]+)")  # Label Studio's name of an uploaded file
SERVED = re.compile(r".*/data/local-files/\?d=(.+)")  # and of one that it reads from a folder
OTHER_SUFFIX = re.compile("({})$".format("|".join(map(re.escape, IMAGE_SUFFIXES))), re.IGNORECASE)


@dataclass(frozen=True)
class Vote:
    """What an annotator said, at ``source``. Images by their number in the manifest: the score ``value`` of ``a``
    where ``b`` is None; else ``value`` above 0 where ``a`` is better than ``b``, below where worse, 0 for a tie, its
    size the vote's weight."""

    annotator: str
    source: str
    a: int
    b: int | None
    value: float


@dataclass(frozen=True)
class Labels:
    """Pairs of image numbers, winner first, in the order of the manifest; the number of ties; every single vote."""

    pairs: list[tuple[int, int]]
    ties: int
    votes: list[Vote]


class Reader:
    """Reads label files on the images of ``rollout``; whatever it refuses is a :class:`DataError`."""

    def __init__(self, rollout: Rollout) -> None:
        self.rollout = rollout
        self.numbers = {
            name: number
            for number, line in enumerate(rollout.lines)
            for name in (line.image, Path(line.image).name, line.trajectory)
        }

    def read(self, file: Path) -> list[Vote]:
        if not file.is_file():
            raise DataError(f"there is no label file {file}; expected JSONL, CSV or D3PO's JSON")
        lines = read_records(file) if file.suffix.lower() in RECORD_SUFFIXES else []
        entries = standing(lines)
        if lines and not entries:
            return []  # all was skipped, or taken back
        first = entries[0][1] if entries else None
        if broken := next((f"{where}: {entry.reason}" for where, entry in entries if isinstance(entry, Broken)), None):
            raise DataError(broken)
        if isinstance(first, list):
            return self._matrix(file, entries)
        if isinstance(first, dict) and first.keys() >= {"image_a", "image_b", "label"}:
            counted = counts_from_one(entry.get("label") for _, entry in entries if isinstance(entry, dict))
            return [self._choice(file, where, entry, counted) for where, entry in entries]
        if isinstance(first, dict) and first.keys() >= {"images", "ranking"}:
            return [vote for where, entry in entries for vote in self._ranking(file, where, entry)]
        if isinstance(first, dict) and first.keys() >= {"image", "score"}:
            return [self._score(file, where, entry) for where, entry in entries]
        raise DataError(
            f"{file} begins with {brief(first)}; expected .jsonl or .csv with image_a, image_b, label, with images, "
            "ranking or with image, score, or .json with a list of lists of numbers"
        )

    def _matrix(self, file: Path, entries: Sequence[tuple[str, Any]]) -> list[Vote]:
        record = self.rollout.record
        count, each = record.prompts, record.images_per_prompt
        asked = f"one for each of the {count} prompts, each of {each} numbers, one an image, as drawn into"
        asked = f"{asked} {self.rollout.folder.path}"
        if len(entries) != count:
            raise DataError(f"{file} holds {len(entries)} lists; expected {count}, {asked}")
        votes: list[Vote] = []
        for where, row in entries:
            if not isinstance(row, list) or len(row) != each:
                held = f"{len(row)} numbers" if isinstance(row, list) else repr(row)
                raise DataError(f"{where} holds {held}; expected a list of {each}, {asked}")
            for value in row:
                votes.append(Vote(file.name, where, len(votes), None, _number(value, where, "a score")))
        return votes

    def _choice(self, file: Path, where: str, entry: Any, counted: bool) -> Vote:
        entry = _object(entry, where, ("image_a", "image_b", "label"))
        a, b = (self._image(entry[name], where) for name in ("image_a", "image_b"))
        line, other = self.rollout.lines[a], self.rollout.lines[b]
        if a == b or line.prompt_index != other.prompt_index:
            both = f"and {entry['image_b']!r} of two prompts, {line.prompt!r} and {other.prompt!r}"
            both = "twice" if a == b else both
            raise DataError(f"{where} compares {entry['image_a']!r} {both}; expected two images of one prompt")
        if entry.get("prompt") and str(entry["prompt"]).strip() != line.prompt.strip():
            raise DataError(
                f"{where} says the prompt {entry['prompt']!r}, but {entry['image_a']!r} was drawn for {line.prompt!r}; "
                f"give the rollout folder that these labels are on, this is {self.rollout.folder.path}"
            )
        value = verdict(entry["label"], counted=counted, images=(entry["image_a"], entry["image_b"]))
        if value is None:
            one = "; 1 and 2 are understood where both are there" if number(entry["label"]) is not None else ""
            raise DataError(f"{where}: label is {brief(entry['label'])}; expected a, b or tie{one}")
        weight = entry.get("weight")
        factor = 1.0 if weight is None or weight == "" else _number(weight, where, "weight")
        if factor < 0:
            raise DataError(f"{where}: weight is {factor:g}; expected 0 or more, swap the label instead")
        return Vote(str(entry.get("annotator") or file.name), where, a, b, factor * value)

    def _ranking(self, file: Path, where: str, entry: Any) -> list[Vote]:
        entry = _object(entry, where, ("images", "ranking"))
        names, ranks = entry["images"], entry["ranking"]
        if not isinstance(names, list) or not isinstance(ranks, list) or len(names) != len(ranks):
            raise DataError(
                f"{where}: images {brief(names)} and ranking {brief(ranks)}; expected two lists of one length"
            )
        images = [self._image(name, where) for name in names]
        if len({self.rollout.lines[image].prompt_index for image in images}) > 1 or len(set(images)) < len(images):
            raise DataError(f"{where} ranks {brief(names)}; expected distinct images of one prompt")
        values = [_number(rank, where, "a rank") for rank in ranks]
        annotator = str(entry.get("annotator") or file.name)
        return [
            Vote(annotator, where, images[i], images[j], float(_sign(values[j] - values[i])))
            for i, j in combinations(range(len(images)), 2)
            if values[i] != values[j]
        ]

    def _score(self, file: Path, where: str, entry: Any) -> Vote:
        entry = _object(entry, where, ("image", "score"))
        value = _number(entry["score"], where, "score")
        return Vote(str(entry.get("annotator") or file.name), where, self._image(entry["image"], where), None, value)

    def _image(self, name: object, where: str) -> int:
        """The number of the image that a label calls ``name``."""
        folder, text = self.rollout.folder, self._known(str(name))
        if text not in self.numbers:
            raise DataError(
                f"{where}: the image {brief(name)} is unknown to {folder.manifest}, so it has no trajectory to train "
                "on; label what align.rollout drew, or train images of other origin by the objective DPO on "
                "PreferencePairs"
            )
        return self.numbers[text]

    def _known(self, name: str) -> str:
        """The name that the manifest has for what is called ``name``, which stays where nothing tells."""
        name = name.strip().replace("\\", "/")
        if wrapped := UPLOAD.fullmatch(name) or SERVED.fullmatch(name):
            name = unquote(wrapped[1])
        path, stem = PurePosixPath(name), OTHER_SUFFIX.sub("", name.rpartition("/")[2])
        if name in self.numbers or stem not in self.numbers:
            return name
        images = self.rollout.folder.path / "images"
        ours = len(path.parts) == 1 or path.parts[:-1] == ("images",)
        same_folder = path.parts[-3:-1] == (self.rollout.folder.path.name, "images")
        elsewhere = Path(name).exists() and Path(name).resolve().parent != images.resolve()
        here = Path(name).resolve().parent == images.resolve()
        return stem if here or ours or (same_folder and not elsewhere) else name


def _object(entry: object, where: str, names: tuple[str, ...]) -> Mapping[str, Any]:
    if not isinstance(entry, dict) or not entry.keys() >= set(names):
        raise DataError(f"{where} is {brief(entry)}; expected {', '.join(names)}, as in the entries before it")
    return entry


def _number(value: object, where: str, what: str) -> float:
    result = None if isinstance(value, bool) else number(value)
    if result is None:
        raise DataError(f"{where}: {what} is {brief(value)}, which is not a number; expected a finite one")
    return result


def tally(votes: Sequence[Vote], images_per_prompt: int) -> Labels:
    """The pairs that ``votes`` decide, by the majority and by the mean scores; both may speak of one pair."""
    choices, scores = defaultdict[tuple[int, int], list[float]](list), defaultdict[int, list[float]](list)
    for vote in votes:
        if vote.b is None:
            scores[vote.a].append(vote.value)
        else:
            low, high = sorted((vote.a, vote.b))
            choices[low, high].append(vote.value if vote.a == low else -vote.value)
    verdicts = {pair: _sign(math.fsum(values)) for pair, values in choices.items()}
    means = {number: fmean(values) for number, values in sorted(scores.items())}
    for _, group in groupby(means, key=lambda number: number // images_per_prompt):
        for low, high in combinations(group, 2):
            verdicts[low, high] = verdicts.get((low, high), 0) + _sign(means[low] - means[high])
    decided = [(pair, value) for pair, value in sorted(verdicts.items()) if value]
    pairs = [(low, high) if value > 0 else (high, low) for (low, high), value in decided]
    return Labels(pairs, len(verdicts) - len(pairs), list(votes))


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


@dataclass
class LabelledRollout(Data):
    """Images that ``align.rollout`` drew and people's preferences among them; an item is a pair.

    Args:
        path: the rollout folder.
        labels: label files, of one kind or several.
        limit: use the first so many pairs.
        resolution: of the sample grid, pixels a side or WIDTHxHEIGHT; the pairs have the rollout's own.
    """

    path: str
    labels: list[str]
    limit: int | None = None
    resolution: Resolution = None

    batch_type: ClassVar[type] = TrajectoryBatch

    def __post_init__(self) -> None:
        require_at_least(1, self, "limit")

    def check(self) -> None:
        self.read()

    def read(self) -> tuple[Rollout, Labels]:
        """The rollout, and what the label files say of it; no trajectory is read yet.

        Raises :class:`DataError` where anything is missing, unknown, or does not fit the manifest.
        """
        if not self.labels:
            raise DataError(f"labels is empty: name the files that say which images of {self.path} are preferred")
        rollout = RolloutFolder(Path(self.path).expanduser().resolve()).read()
        reader = Reader(rollout)
        votes = [vote for file in self.labels for vote in reader.read(Path(file).expanduser())]
        labels = tally(votes, rollout.record.images_per_prompt)
        counts = f"{len(votes)} votes of {len({vote.annotator for vote in votes})} annotators"
        logger.info("%s: %d pairs, %d ties, by %s", self.path, len(labels.pairs), labels.ties, counts)
        if not labels.pairs:
            raise DataError(
                f"{', '.join(self.labels)}: {counts} prefer no image, {labels.ties} ties; label more of them"
            )
        return rollout, labels

    def prepare(self, setup: Setup) -> TrajectoryPairs:
        rollout, labels = self.read()
        drew, trains = rollout.record.model, setup.family.source
        if setup.process_index == 0 and drew != trains:
            logger.warning("%s was drawn by %s, but %s trains on it", self.path, drew, trains)
        return TrajectoryPairs(rollout, labels.pairs[: self.limit], setup.family)
