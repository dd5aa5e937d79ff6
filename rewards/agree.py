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
- how alike two rewards order pictures: Kendall's tau-b over the pairs, which compares pictures of one prompt only, and
  Spearman's rank correlation over all pictures, in which prompts differ too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

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
from rewards.data.verdicts import contradicted
from rewards.scoring.engine import score_batch
from rewards.scoring.loader import BadImage, Batch, Decoder, ahead

BadEntries = list[dict[str, str]]


@dataclass(frozen=True)
class Choice:
    """People chose ``pictures[chosen]`` over ``pictures[rejected]``; ``votes`` for each, where known."""

    prompt: str
    chosen: int
    rejected: int
    votes: tuple[float, float] | None = None


@dataclass(frozen=True)
class Choices:
    """What people said of the distinct ``pictures``, each with its prompt; the prompts of the pairs they were tied on;
    the rows that cannot be used, and those that nobody labelled."""

    layout: str
    pictures: list[tuple[LazyImage, str]]
    choices: list[Choice]
    ties: list[str]
    bad: BadEntries
    unlabelled: list[str]


# Reading and scoring
def read(
    path: str, split: str | None, caption_column: str | None, image_root: Path | None, limit: int | None
) -> Choices:
    """The first ``limit`` rows at ``path``. ``RewardError`` where it has no layout that is understood, or no pair."""
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
            continue
        for side in row.sides:
            if numbers.setdefault((str(side), prompt), len(numbers)) == len(pairs.pictures):
                pairs.pictures.append((side, prompt))
        chosen, rejected = (numbers[str(side), prompt] for side in row.sides)
        pairs.choices.append(Choice(prompt, chosen, rejected, row.votes))
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


# Figures
def compare(pairs: Choices, scores: Mapping[str, np.ndarray], human_ties: str, agreement: float) -> dict[str, Any]:
    """What the JSON file holds, less the settings. Pairs with an unreadable picture are left out."""
    readable = np.isfinite(np.stack(list(scores.values()))).all(0)
    choices = [one for one in pairs.choices if readable[one.chosen] and readable[one.rejected]]
    if not choices:
        raise RewardError("no pair is left whose two pictures can be read")
    sides = np.array([(one.chosen, one.rejected) for one in choices])
    agreed = np.array([_agreed(one.votes, agreement) for one in choices])
    ties = pairs.ties if human_ties == "half" else []
    prompts = [one.prompt for one in choices] + ties
    margins = {name: values[sides[:, 0]] - values[sides[:, 1]] for name, values in scores.items()}
    figures: dict[str, Any] = {}
    for name, margin in margins.items():
        points = (margin > 0) + 0.5 * (margin == 0)
        figures[name] = accuracy(np.concatenate([points, np.full(len(ties), 0.5)]), prompts)
        figures[name] |= {"score_ties": int((margin == 0).sum()), "margin": float(margin.mean())}
        chosen = [one.prompt for one, keep in zip(choices, agreed, strict=True) if keep]
        figures[name]["agreed"] = accuracy(points[agreed], chosen) if chosen else None
    return {
        "layout": pairs.layout,
        "pairs": len(choices),
        "prompts": len(set(prompts)),
        "pictures": int(readable.sum()),
        "human_ties": {"found": len(pairs.ties), "counted": human_ties},
        "unlabelled": len(pairs.unlabelled),
        "contradicted": contradicted((one.chosen, one.rejected) for one in choices),
        "agreement": agreement,
        "rewards": figures,
        "between": [
            {
                "rewards": [one, other],
                "kendall": kendall(margins[one], margins[other]),
                "spearman": spearman(scores[one][readable], scores[other][readable]),
            }
            for one, other in itertools.combinations(scores, 2)
        ],
        "bad": pairs.bad,
    }


def _agreed(votes: tuple[float, float] | None, share: float) -> bool:
    return votes is not None and sum(votes) > 0 and votes[0] >= share * sum(votes)


def accuracy(points: np.ndarray, prompts: Sequence[str], draws: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Mean of ``points`` (n,) and its 95 % percentile interval, resampling whole prompts: n, accuracy, interval."""
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    group = np.array([numbers[prompt] for prompt in prompts])
    sums, counts = np.bincount(group, points), np.bincount(group)
    rng = np.random.default_rng(seed)
    drawn = np.empty(draws)
    for number in range(draws):
        taken = rng.integers(len(sums), size=len(sums))
        drawn[number] = sums[taken].sum() / counts[taken].sum()
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"n": len(points), "accuracy": float(points.mean()), "interval": [float(low), float(high)]}


def kendall(one: np.ndarray, other: np.ndarray) -> float | None:
    """Tau-b of two scorers over pairs of pictures, by the margins (n,) of each; None where one has no order at all."""
    a, b = np.sign(one), np.sign(other)
    scale = np.sqrt((a != 0).sum() * (b != 0).sum())
    return float((a * b).sum() / scale) if scale else None


def spearman(one: np.ndarray, other: np.ndarray) -> float | None:
    """Rank correlation of two scorers' scores (P,); None where one scores all pictures alike."""
    from scipy.stats import spearmanr

    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    return float(spearmanr(one, other).statistic)


def table(report: Mapping[str, Any]) -> str:
    """The report as text."""
    width = max(len("reward"), *map(len, report["rewards"]))
    head = f"{'reward':{width}}  {'pairs':>7}  {'accuracy, 95 % interval':>25}  {'score ties':>10}  {'mean margin':>12}"
    lines = [f"{head}  {'agreed':>7}  {'accuracy, 95 % interval':>25}"]
    for name, figures in report["rewards"].items():
        row = f"{name:{width}}  {_figures(figures)}  {figures['score_ties']:>10}  {figures['margin']:>+12.4g}"
        lines.append(f"{row}  {_figures(figures['agreed'])}" if figures["agreed"] else f"{row}  {'no votes':>7}")
    if report["between"]:
        entries = {" and ".join(entry["rewards"]): entry for entry in report["between"]}
        width = max(map(len, entries))
        lines += ["", f"{'between rewards':{width}}  {'tau-b, pairs':>14}  {'Spearman, pictures':>18}"]
        for name, entry in entries.items():
            tau, rho = ("–" if entry[k] is None else f"{entry[k]:+.3f}" for k in ("kendall", "spearman"))
            lines.append(f"{name:{width}}  {tau:>14}  {rho:>18}")
    ties = report["human_ties"]
    told = f"{ties['found']} human ties {'left out' if ties['counted'] == 'drop' else 'counted one half'}"
    lines += ["", f"{report['layout']}: {report['pairs']} pairs of {report['prompts']} prompts; {told}"]
    if report["contradicted"]:
        lines.append(f"{report['contradicted']} of these pairs are there with the other winner too")
    if report["unlabelled"]:
        lines.append(f"{report['unlabelled']} rows that nobody labelled left out")
    if report["bad"]:
        lines.append(f"{len(report['bad'])} rows or pictures cannot be used, see the JSON file")
    return "\n".join(lines)


def _figures(figures: Mapping[str, Any]) -> str:
    low, high = figures["interval"]
    known = f"{figures['accuracy']:.3f} ({low:.3f} to {high:.3f})"
    return f"{figures['n']:>7}  {known:>25}"


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
    root = Path(arguments.image_root) if arguments.image_root else None
    pairs = read(arguments.pairs, arguments.split, arguments.caption_column, root, arguments.limit)
    device = pick_device(arguments.device)
    rewards = RewardSum.of(named, device)
    scores = score(pairs, rewards, device, arguments.batch_size, arguments.threads, arguments.max_bad)
    report = compare(pairs, scores, arguments.human_ties, arguments.agreement)
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
    arguments = parser.parse_args(argv)
    return status(lambda: run(arguments), argv)


if __name__ == "__main__":
    sys.exit(main())
