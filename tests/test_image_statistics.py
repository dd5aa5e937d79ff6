"""Image statistics against plain loops over pixels, and pictures whose statistics are known."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from rewards import load

ROOT = Path(__file__).parents[1]
NAMES = ("DarkShare", "EdgeDensity", "ColorEntropy", "Sharpness")


def scored(images: Tensor) -> dict[str, list[float]]:
    return {name: load(name).score(images=images, prompts=[""] * len(images)).tolist() for name in NAMES}


def by_hand(image: np.ndarray) -> dict[str, float]:
    """(3, H, W) float64: the four, pixel by pixel."""
    y = np.tensordot([0.299, 0.587, 0.114], image, 1)
    height, width = y.shape

    def at(i: int, j: int) -> float:
        return float(y[min(max(i, 0), height - 1), min(max(j, 0), width - 1)])

    edges, laplace, boxes = 0, [], Counter()
    for i in range(height):
        for j in range(width):
            across = sum(w * (at(i + d, j + 1) - at(i + d, j - 1)) for d, w in ((-1, 1), (0, 2), (1, 1))) / 8
            down = sum(w * (at(i + 1, j + d) - at(i - 1, j + d)) for d, w in ((-1, 1), (0, 2), (1, 1))) / 8
            edges += math.hypot(across, down) > 0.1
            laplace.append(at(i, j - 1) + at(i, j + 1) + at(i - 1, j) + at(i + 1, j) - 4 * at(i, j))
            boxes[tuple(min(int(v * 8), 7) for v in image[:, i, j])] += 1
    shares = [count / (height * width) for count in boxes.values()]
    return {
        "DarkShare": float((y < 0.1).mean()),
        "EdgeDensity": edges / (height * width),
        "ColorEntropy": -sum(p * math.log2(p) for p in shares),
        "Sharpness": float(np.var(laplace)),
    }


def test_statistics_are_the_formulas() -> None:
    rng = np.random.default_rng(0)
    images = rng.random((2, 3, 7, 9)) ** 3
    images[1] *= np.linspace(0, 1, 9)
    found = scored(torch.from_numpy(images).float())
    for k in range(2):
        for name, wanted in by_hand(images[k]).items():
            assert found[name][k] == pytest.approx(wanted, abs=1e-5), name
    assert all(found["DarkShare"]) and all(found["EdgeDensity"])


def test_what_a_hacked_picture_does_to_them() -> None:
    flat, ramp = torch.full((3, 16, 16), 0.5), torch.linspace(0, 1, 16).expand(3, 16, 16)
    noise = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = scored(torch.stack([flat, torch.zeros_like(flat), ramp, noise]))
    assert found["DarkShare"][:2] == [0.0, 1.0]
    assert found["EdgeDensity"][:3] == [0.0, 0.0, 0.0] and found["EdgeDensity"][3] > 0.5  # the ramp's slope is 1/15
    assert found["ColorEntropy"][:3] == [0.0, 0.0, pytest.approx(3.0)] and 5 < found["ColorEntropy"][3] <= 8
    assert found["Sharpness"][:2] == [0.0, 0.0] and found["Sharpness"][3] > 100 * found["Sharpness"][2] > 0


@pytest.mark.parametrize("name", NAMES)
def test_of_any_size_and_number(name: str) -> None:
    reward = load(name)
    assert not reward.differentiable and not reward.needs_prompt  # type: ignore[attr-defined]
    images = torch.rand(3, 3, 1, 2)
    scores = reward.score(images=images, prompts=["", "", ""])
    assert scores.shape == (3,) and scores.dtype == torch.float32
    alone = reward.score(images=images[1:2], prompts=[""])
    torch.testing.assert_close(alone, scores[1:2])


def test_every_recipe_that_draws_for_a_reward_watches_them() -> None:
    watched = set()
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        config = yaml.safe_load(path.read_text())
        if (
            path.stem.endswith("_smoke")
            or path.stem.startswith(("find_", "reno_", "draft_stop_"))
            or "rewards" not in config
        ):
            continue  # parts that fit, noise alone, what watches the exact reward
        weights = {reward["name"]: reward.get("weight") for reward in config["rewards"]}
        assert {name: weights.get(name) for name in NAMES} == dict.fromkeys(NAMES, 0.0), path.stem
        watched.add(config["objective"]["class_path"])
    assert {"PolicyGradient", "D3PO", "NFT", "AWM", "DGPO", "DirectReward", "B2DiffuRL"} <= watched
