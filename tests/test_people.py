"""The scripted person of ``tests/benchmarks/people.py``, and the whole of it in small."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from align import load_family
from align.sampling.sampler import Sampler
from align.shapes.world import render
from tests.benchmarks.people import EarlyDDIM, Person

ROOT = Path(__file__).parents[1]


def png(caption: str, number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(render(np.random.default_rng(number), caption)).save(file, "PNG")
    return file.getvalue()


def test_a_person_is_right_as_often_as_said_and_says_the_same_again() -> None:
    asked, other = "a red circle left of a blue square", "a red circle right of a blue square"
    pictures = [[png(asked, 0), png(other, 0)], [png(other, 1), png(asked, 1)]]
    person, again = Person("pair", 0), Person("pair", 0)
    said = [person.choose(str(item), asked, pictures[item % 2]) for item in range(100)]
    assert said == [again.choose(str(item), asked, pictures[item % 2]) for item in range(100)]
    assert 0.8 < np.mean(person.right) < 0.9
    assert person.right == [choice == 1 + item % 2 for item, choice in enumerate(said)]
    thumbs = Person("thumbs", 0)
    said = [thumbs.choose(str(item), asked, [png((asked, other)[item % 2], item)]) for item in range(40)]
    assert thumbs.right == [(choice == "good") == (item % 2 == 0) for item, choice in enumerate(said)]


def test_an_order_is_the_right_one_or_its_reverse() -> None:
    asked = "a red circle left of a blue square"
    pictures = [png(caption, 0) for caption in ("a green star", asked, "a red circle right of a blue square")]
    person = Person("best", 0)
    said = [person.choose(str(item), asked, pictures) for item in range(60)]
    assert 0.75 < np.mean(person.right) < 0.95
    assert said == [[2, 3, 1] if right else [1, 3, 2] for right in person.right]
    alike = [Person("best", 0).choose(str(item), asked, pictures[:1] * 2) for item in range(40)]
    assert {tuple(one) for one in alike if isinstance(one, list)} == {(1, 2), (2, 1)}  # chance, not the place


def test_noise_is_in_the_first_steps_alone() -> None:
    family = load_family("shapes-sd")
    assert list(Sampler(10, kernel=EarlyDDIM()).with_noise(family, range(10))) == [0, 1]


@pytest.mark.slow
def test_all_of_it_in_small(tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    words, where = [sys.executable, str(ROOT / "tests/benchmarks/people.py"), "--quick"], {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, env=os.environ | where, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert [run["method"] for run in figures["runs"]] == ["DPO", "KTO", "D3PO"]
    assert all(run["asked"]["answers"] == 12 for run in figures["runs"])
