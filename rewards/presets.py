"""Reward models on the test sets that their papers report: the rule by which a pair counts, and the published figures.

``python -m rewards.agree --preset hpdv2 --pairs test.json`` counts as the official code does, so that a port of a
reward can be held against its paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

THRESHOLDS = np.arange(11) / 10  # among which Pick-a-Pic's code picks the one that is best on the validation set


@dataclass(frozen=True)
class Preset:
    """A test set.

    Attributes:
        title: what it is.
        published: accuracy in per cent, by reward model.
        source: who reports that.
        equal: what a pair counts of which a reward scores both pictures alike.
        by_prompt: the mean of each prompt's pairs, and then over prompts; else over pairs.
        ties: pairs on which people were tied count too, by a threshold (:func:`points_of_tie`).
    """

    title: str
    published: Mapping[str, float]
    source: str
    equal: float
    by_prompt: bool = False
    ties: bool = False


PRESETS = {
    "hpdv2": Preset(
        "HPDv2, test.json: every two of a prompt's pictures, in their order by people",
        {"Aesthetic": 76.8, "ImageReward": 74.0, "HPS": 77.6, "PickScore": 79.8, "HPSv2": 83.3, "HPSv2.1": 84.1}
        | {"people": 78.1},
        "README of tgxs002/HPSv2, whose code counts inversions a prompt",
        equal=0.5,  # there the order of the files decides
        by_prompt=True,
    ),
    "imagereward": Preset(
        "ImageReward, data/test.json: every two of a prompt's pictures with different ranks",
        {"Aesthetic": 57.4, "ImageReward": 65.1, "HPS": 61.2, "PickScore": 62.9, "HPSv2": 65.7, "HPSv2.1": 66.8}
        | {"CLIPScore": 57.1, "people": 65.3},
        "READMEs of THUDM/ImageReward and tgxs002/HPSv2",
        equal=0.0,
    ),
    "pickapic": Preset(
        "Pick-a-Pic, test_unique: the model is tied where the probabilities of a pair differ by at most a threshold",
        {"PickScore": 70.5},
        "eval_preference_predictor.py of yuvalkirstain/PickScore and arXiv 2305.01569",
        equal=0.5,
        ties=True,
    ),
}


def points(preset: Preset, margins: np.ndarray, threshold: float = 0.0) -> np.ndarray:
    """What pairs count whose winner scores ``margins`` (n,) above its loser: 1 where it is above, ``equal`` where it is
    not, 0 below. With ``preset.ties`` one half where the reward is tied: with p the softmax of the two scores,
    |p_0 - p_1| = tanh(|margin| / 2) <= ``threshold``."""
    found = (margins > 0) + preset.equal * (margins == 0)
    return np.where(tied(margins, threshold), 0.5, found) if preset.ties else found


def points_of_tie(margins: np.ndarray, threshold: float) -> np.ndarray:
    """What pairs count on which people were tied: 1 where the reward is, else one half."""
    return np.where(tied(margins, threshold), 1.0, 0.5)


def tied(margins: np.ndarray, threshold: float) -> np.ndarray:
    """Whether a reward whose scores differ by ``margins`` is tied."""
    return np.tanh(np.abs(margins) / 2) <= threshold


def best_threshold(preset: Preset, margins: np.ndarray, ties: np.ndarray) -> float:
    """The first of :data:`THRESHOLDS` that is best on a validation set: the margins of its pairs, and of its ties."""
    counted = [np.concatenate([points(preset, margins, t), points_of_tie(ties, t)]).mean() for t in THRESHOLDS]
    return float(THRESHOLDS[int(np.argmax(counted))])
