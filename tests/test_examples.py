"""The examples in ``notebooks/`` run, are short, and write what they say."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import align

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
TINY = {
    "dpo_from_pairs": (["--steps", "1"], "pytorch_lora_weights.safetensors"),
    "grpo_from_a_reward": (["--steps", "2", "--images", "2"], "pytorch_lora_weights.safetensors"),
    "prune_and_heal": (["--steps", "1", "--scenes", "64"], "healed/transformer/config.json"),
}


def test_every_example_is_tried_and_short() -> None:
    scripts = {file.stem: file for file in NOTEBOOKS.glob("*.py")}
    assert scripts.keys() == TINY.keys()
    assert all(len(file.read_text().splitlines()) <= 60 for file in scripts.values())


@pytest.mark.parametrize(
    "name", [name if name == "dpo_from_pairs" else pytest.param(name, marks=pytest.mark.slow) for name in sorted(TINY)]
)
def test_an_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options, written = TINY[name]
    if name == "dpo_from_pairs":  # a few pairs: encoding all that are shipped takes most of the time
        few = pq.read_table(Path(align.__file__).parent / "shapes/shapes-preferences/train.parquet").slice(0, 32)
        pq.write_table(few, tmp_path / "train.parquet")
        options = [*options, "--pairs", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *options, "--output", str(tmp_path / "out")])
    runpy.run_path(str(NOTEBOOKS / f"{name}.py"), run_name="__main__")
    assert (tmp_path / "out" / written).is_file()
