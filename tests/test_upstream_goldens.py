"""Scores are those of the published packages themselves, on the same tiny weights, pictures and prompts.

The numbers, and what they come from, are in ``goldens/upstream_*.json``; ``goldens/make_upstream.py`` made them in an
environment of the packages' own, from files that this test makes again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rewards import load
from tests.goldens.make_upstream import HERE, digest, drawn, new_checkpoints, weighed
from tests.reward_samples import Sample
from tests.test_reward_models import convert

CASES: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {  # our name and arguments for each list of golden scores
    "hpsv2": {
        version: ("HPSv2", {"model": "", "architecture": "tiny-open-clip", "version": version})
        for version in ("2.0", "2.1")
    },
    "image_reward": {"": ("ImageReward", {"model": "", "tokenizer": ""})},
    "aesthetic": {"": ("Aesthetic", {"model": "clip", "head": ""})},
    "clip_score": {"": ("CLIPScore", {"model": ""})},
    "mps": {
        "overall": ("MPS", {"model": "MPS.safetensors", "processor": ""}),
        "none": ("MPS", {"model": "MPS.safetensors", "processor": "", "condition": ""}),
    },
    "vqa_score": {"": ("VQAScore", {"model": "", "dtype": "float32"})},
}
SLOW = (("hpsv2", "2.0"), ("mps", "none"))  # a scorer's second
FILES = ("model", "tokenizer", "processor", "head")
OTHERWISE = {  # samples that ours scores otherwise, by number
    # of a prompt over 77 tokens torchmetrics drops the last token too, whose state is the prompt's; CLIP keeps it
    "clip_score": {2, 12, 21},
    # 101 x 37 is a picture that Pillow 13 resizes in the other order; of 200 x 5, whose height is under half a patch,
    # qwen_vl_utils makes 196 x 28 and transformers' own processor 364 x 28
    "vqa_score": {2, 6},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("upstream")
    new_checkpoints(folder)
    return folder


@pytest.fixture(scope="module")
def weights(root: Path) -> dict[str, dict[str, float]]:
    """What each package's files hold; then what of them are torch files is converted, as users do."""
    found = {name: weighed(root / name) for name in CASES}
    convert(root)
    return found


@pytest.fixture(scope="module")
def samples(root: Path) -> list[Sample]:
    return drawn(root / "modes")


@pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(name, case, marks=pytest.mark.slow if (name, case) in SLOW else [])
        for name in CASES
        for case in CASES[name]
    ],
)
def test_scores_are_the_published_packages(
    name: str, case: str, root: Path, weights: dict[str, dict[str, float]], samples: list[Sample]
) -> None:
    """Each within 1e-4 of its own value, and of the spread of them all, which is less where they lie close together."""
    golden = json.loads((HERE / f"upstream_{name}.json").read_text("utf-8"))
    assert weights[name] == pytest.approx(golden["weights"], rel=1e-6), "the weights are others"
    reward, arguments = CASES[name][case]
    arguments = {key: str(root / name / value) if key in FILES else value for key, value in arguments.items()}
    scorer = load(reward, {"device": "cpu", **arguments})
    # another Pillow can draw or decode a picture a level apart, which is then another picture
    kept = [
        number
        for number, sample in enumerate(samples)
        if digest(sample.picture) == golden["pictures"][number] and number not in OTHERWISE.get(name, ())
    ]
    assert len(kept) >= 8, "this Pillow draws other pictures"
    expected = np.array([golden["scores"][case][number] for number in kept])
    found = [float(scorer.score(images=samples[k].images, prompts=[samples[k].prompt])) for k in kept]
    apart = np.abs(found - expected)
    relative = (apart / np.maximum(np.abs(expected), 1e-9)).max()
    spread = apart.max() / expected.std()
    print(f"\n{name} {case}: {len(kept)} pictures, of each score {relative:.1e}, of their spread {spread:.1e}")
    assert found == pytest.approx(expected.tolist(), rel=1e-4)
    assert spread < 1e-4
