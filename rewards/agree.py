"""How often rewards agree with people: ``python -m rewards.agree --pairs PAIRS --reward PickScore --reward HPSv2``.

``PAIRS`` is a preference set: a file, a folder or a hub id in one of the layouts that :mod:`rewards.data` reads
(Pick-a-Pic's and chosen / rejected columns, HPDv2, HPDv3, JSONL, imagefolder, sibling folders). Every picture is
decoded once for all rewards. Printed, and written as JSON to ``--output``, are

- accuracy: the share of pairs in which the reward gives the picture that people chose the higher score; equal scores
  count one half. Pairs on which people were tied are left out, or count one half with ``--human_ties half``. Its 95 %
  interval is a bootstrap over prompts, since pairs of one prompt are not independent;
- the same where the annotators agree, in data that says how they voted: at least ``--agreement`` of the votes of a pair
  are for its winner;
- margin: the mean of the winner's score less the loser's, in the reward's own unit;
- with ``--preset``, the accuracy as the official code of a published test set counts it, beside what was published
  (:mod:`rewards.presets`);
- how alike two rewards order pictures: Kendall's tau-b over the pairs, which compares pictures of one prompt only, and
  Spearman's rank correlation over all pictures, in which prompts differ too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from rewards.agreement import BadEntries, Choice, Choices, by_preset, compare, table, thresholds_of
from rewards.base import RewardSum
from rewards.common.command import add_reading_options, check_at_least, exit_status, new_parser, status
from rewards.common.device import pick_device
from rewards.common.errors import RewardError
from rewards.common.files import write_text
from rewards.config import parse_rewards
from rewards.data.images import ImageRow, ImageSource, UnreadableError
from rewards.data.preferences import recognise
from rewards.data.tables import LazyImage
from rewards.data.text import clean
from rewards.presets import PRESETS
from rewards.scoring.engine import score_batch
from rewards.scoring.loader import BadImage, Batch, Decoder, ahead


# Reading and scoring
def read(
    path: str,
    split: str | None,
    caption_column: str | None,
    image_root: Path | None,
    limit: int | None,
    with_ties: bool = False,
) -> Choices:
    """The first ``limit`` rows at ``path``, the pictures of ties too where they are asked for. ``RewardError`` where it
    has no layout that is understood, or no pair."""
    layout, _, rows, _ = recognise(path, split, caption_column, image_root)
    numbers: dict[tuple[str, str], int] = {}
    pairs = Choices(layout, [], [], [], [], [])
    for row in itertools.islice(rows, limit):
        if fault := row.fault():
            pairs.bad.append({"source": row.source, "error": fault})
            continue
        if row.unlabelled:
            pairs.unlabelled.append(row.source)
            continue
        prompt = clean(str(row.caption))
        if row.sides is None:
            pairs.ties.append(prompt)
        sides = row.sides or (row.tied if with_ties else None)
        if sides is None:
            continue
        for side in sides:
            if numbers.setdefault((str(side), prompt), len(numbers)) == len(pairs.pictures):
                pairs.pictures.append((side, prompt))
        one, other = (numbers[str(side), prompt] for side in sides)
        (pairs.tied if row.sides is None else pairs.choices).append(Choice(prompt, one, other, row.votes))
    if not pairs.choices:
        first = f", the first: {pairs.bad[0]['source']}: {pairs.bad[0]['error']}" if pairs.bad else ""
        unlabelled = f", {len(pairs.unlabelled)} unlabelled" if pairs.unlabelled else ""
        counts = f"{len(pairs.ties)} ties, {len(pairs.bad)} bad{unlabelled}"
        raise RewardError(f"{path} ({layout}) holds no pair with a winner: {counts}{first}")
    return pairs


def score(
    pairs: Choices, rewards: RewardSum, device: str, batch_size: int, threads: int, max_bad: int
) -> dict[str, np.ndarray]:
    """Scores of ``pairs.pictures`` by reward, (P,) float64 with NaN where the picture cannot be read; ``pairs.bad``
    gets those too. ``RewardError`` where more than ``max_bad`` of rows and pictures cannot be used."""

    def rows(wanted: Callable[[int], bool]) -> Iterator[ImageRow | None]:
        for number, (picture, prompt) in enumerate(pairs.pictures):
            yield _row(picture, prompt) if wanted(number) else None

    _refuse(pairs.bad, max_bad)
    total = len(pairs.pictures)
    decoder = Decoder(ImageSource({"layout": "pairs"}, total, rows), None, total, batch_size, threads)
    scores = {name: np.full(total, np.nan) for name in rewards.rewards}
    with tqdm(total=total, desc="scoring", unit="image") as bar:
        for item in ahead(decoder.work(lambda shard: True), 4):
            if isinstance(item, Batch):
                for name, values in score_batch(rewards, item.on(device)).items():
                    scores[name][list(item.rows)] = values
                bar.update(len(item.rows))
            elif isinstance(item, BadImage):
                pairs.bad.append({"source": item.file, "error": item.error})
                _refuse(pairs.bad, max_bad)
                bar.update()
    return scores


def _row(picture: LazyImage, prompt: str) -> ImageRow:
    try:
        return ImageRow(str(picture), prompt, picture.source())
    except UnreadableError as error:
        return ImageRow(str(picture), prompt, problem=str(error))


def _refuse(bad: BadEntries, max_bad: int) -> None:
    if len(bad) > max_bad:
        raise RewardError(
            f"{len(bad)} rows or pictures cannot be used, the last {bad[-1]['source']}: {bad[-1]['error']}; put them "
            f"right, or allow more with --max_bad (now {max_bad})"
        )


# The command
def run(arguments: argparse.Namespace) -> int:
    """The command; ``RewardError`` where the user has something to put right."""
    check_at_least(arguments, batch_size=1, threads=1, max_bad=0, limit=1)
    if not 0.5 < arguments.agreement <= 1:
        raise RewardError(f"--agreement is {arguments.agreement}; expected more than 0.5 and at most 1")
    output = Path(arguments.output)
    if output.is_dir() or not output.parent.is_dir():
        raise RewardError(f"--output is {output}; expected the name of a file in a folder that is there")
    named = parse_rewards(arguments.reward, weighted=False)
    root = Path(arguments.image_root).expanduser() if arguments.image_root else None
    preset = PRESETS[arguments.preset] if arguments.preset else None
    if arguments.validation and not (preset and preset.ties):
        raise RewardError("--validation picks the threshold of ties, which --preset pickapic has; leave it out")
    how = arguments.split, arguments.caption_column, root, arguments.limit, preset is not None and preset.ties
    pairs = read(arguments.pairs, *how)
    held_out = read(arguments.validation, *how) if arguments.validation else None
    device = pick_device(arguments.device)
    rewards = RewardSum.of(named, device)
    scores = score(pairs, rewards, device, arguments.batch_size, arguments.threads, arguments.max_bad)
    report = compare(pairs, scores, arguments.human_ties, arguments.agreement)
    if preset is not None:
        thresholds = dict.fromkeys(scores, arguments.tie_threshold)
        if held_out is not None:
            settings = device, arguments.batch_size, arguments.threads, arguments.max_bad
            thresholds = thresholds_of(preset, held_out, score(held_out, rewards, *settings))
        counted = by_preset(preset, pairs, scores, thresholds)
        report["preset"] = {"name": arguments.preset, "title": preset.title, "rewards": counted}
        report["preset"] |= {"published": dict(preset.published), "source": preset.source}
    report |= {"source": arguments.pairs, "settings": {one.title: one.settings() for one in named}}
    write_text(output, json.dumps(report, indent=2) + "\n")
    print(table(report))
    return 0


@exit_status
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 where the user has something to put right."""
    parser = new_parser("rewards.agree", __doc__)
    add_reading_options(parser, max_bad=0)
    parser.add_argument("--pairs", required=True, help="file, folder or hub id")
    parser.add_argument("--output", default="agreement.json", help="JSON file (default: %(default)s)")
    parser.add_argument("--image_root", help="where relative paths start; default the folder of the file with them")
    parser.add_argument("--human_ties", choices=("drop", "half"), default="drop", help="(default: %(default)s)")
    parser.add_argument("--agreement", type=float, default=1.0, help="share of votes (default: %(default)s, unanimous)")
    parser.add_argument("--preset", choices=sorted(PRESETS), help="count as this test set's official code does, too")
    parser.add_argument("--tie_threshold", type=float, default=0.0, help="pickapic: see --validation (default: 0)")
    parser.add_argument(
        "--validation", metavar="PAIRS", help="pickapic: pairs on which each reward's threshold is picked"
    )
    arguments = parser.parse_args(argv)
    return status(lambda: run(arguments), argv)


if __name__ == "__main__":
    sys.exit(main())
