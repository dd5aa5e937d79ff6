"""How often scores of pictures agree with people's choices between them: figures, and their table."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rewards.common.errors import RewardError
from rewards.data.tables import LazyImage
from rewards.data.verdicts import contradicted
from rewards.presets import Preset, best_threshold, points, points_of_tie

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
    """What people said of the distinct ``pictures``, each with its prompt; the prompts of the pairs they were tied on,
    and, where a preset counts these, the pairs; the rows that cannot be used, and those that nobody labelled."""

    layout: str
    pictures: list[tuple[LazyImage, str]]
    choices: list[Choice]
    ties: list[str]
    bad: BadEntries
    unlabelled: list[str]
    tied: list[Choice] = field(default_factory=list)


def readable_pairs(choices: Sequence[Choice], scores: Mapping[str, np.ndarray]) -> list[Choice]:
    """Those whose two pictures every reward has scored."""
    readable = np.isfinite(np.stack(list(scores.values()))).all(0)
    return [one for one in choices if readable[one.chosen] and readable[one.rejected]]


def margins_of(choices: Sequence[Choice], values: np.ndarray) -> np.ndarray:
    """By how much the first picture of each pair scores above the second, (n,)."""
    sides = np.array([(one.chosen, one.rejected) for one in choices], int).reshape(-1, 2)
    return values[sides[:, 0]] - values[sides[:, 1]]


def thresholds_of(preset: Preset, pairs: Choices, scores: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Each reward's threshold of a tie, by a validation set."""
    choices, ties = readable_pairs(pairs.choices, scores), readable_pairs(pairs.tied, scores)
    return {n: best_threshold(preset, margins_of(choices, v), margins_of(ties, v)) for n, v in scores.items()}


def by_preset(
    preset: Preset, pairs: Choices, scores: Mapping[str, np.ndarray], thresholds: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """Accuracy of each reward as the preset's official code counts it."""
    choices = readable_pairs(pairs.choices, scores)
    ties = readable_pairs(pairs.tied, scores) if preset.ties else []
    prompts, figures = [one.prompt for one in [*choices, *ties]], {}
    for name, values in scores.items():
        threshold = thresholds.get(name, 0.0)
        counted = points(preset, margins_of(choices, values), threshold)
        counted = np.concatenate([counted, points_of_tie(margins_of(ties, values), threshold)])
        if preset.by_prompt:
            of: dict[str, list[float]] = {prompt: [] for prompt in prompts}
            for prompt, value in zip(prompts, counted, strict=True):
                of[prompt].append(value)
            figures[name] = accuracy(np.array([np.mean(each) for each in of.values()]), list(of))
        else:
            figures[name] = accuracy(counted, prompts)
        figures[name] |= {"threshold": threshold} if preset.ties else {}
    return figures


def compare(pairs: Choices, scores: Mapping[str, np.ndarray], human_ties: str, agreement: float) -> dict[str, Any]:
    """What the JSON file holds, less the settings. Pairs with an unreadable picture are left out."""
    readable, choices = np.isfinite(np.stack(list(scores.values()))).all(0), readable_pairs(pairs.choices, scores)
    if not choices:
        raise RewardError("no pair is left whose two pictures can be read")
    agreed = np.array([_agreed(one.votes, agreement) for one in choices])
    ties = pairs.ties if human_ties == "half" else []
    prompts = [one.prompt for one in choices] + ties
    margins = {name: margins_of(choices, values) for name, values in scores.items()}
    figures: dict[str, Any] = {}
    for name, margin in margins.items():
        counted = (margin > 0) + 0.5 * (margin == 0)
        figures[name] = accuracy(np.concatenate([counted, np.full(len(ties), 0.5)]), prompts)
        figures[name] |= {"score_ties": int((margin == 0).sum()), "margin": float(margin.mean())}
        chosen = [one.prompt for one, keep in zip(choices, agreed, strict=True) if keep]
        figures[name]["agreed"] = accuracy(counted[agreed], chosen) if chosen else None
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
    if official := report.get("preset"):
        lines += ["", f"{official['title']}; published: {official['source']}"]
        for name, figures in official["rewards"].items():
            rule = f", ties within {figures['threshold']:g}" if "threshold" in figures else ""
            lines.append(f"{name}: {_figures(figures).strip()}{rule}")
        lines.append(", ".join(f"{name} {value:g} %" for name, value in official["published"].items()))
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
