"""The script that made the embedded pipelines, at a size that shows nothing but that it runs to its end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from align import families

STEPS = ("vae", "polish", "sd", "sd3", "sd3_shifted", "sd3_sharp")


def pretrain(folder: Path, *options: str) -> None:
    sizes = ["--scenes", "1024", "--batch", "2", *(word for name in STEPS for word in (f"--{name}_steps", "2"))]
    where = ["--output", str(folder / "made"), "--work", str(folder / "work")]
    subprocess.run([sys.executable, "-m", "align.shapes.scripts.pretrain", *sizes, *where, *options], check=True)


@pytest.mark.slow
def test_both_pipelines_side_by_side_are_those_of_one_after_the_other(tmp_path: Path) -> None:
    together, alone = tmp_path / "together", tmp_path / "alone"
    pretrain(together)
    for name in ("shapes-sd", "shapes-sd3"):
        pretrain(alone, "--only", name)
    for name, part in {"shapes-sd": "unet", "shapes-sd3": "transformer"}.items():
        assert families.load(str(together / "made" / name)).default_num_inference_steps == 20
        file = Path("made") / name / part / "diffusion_pytorch_model.safetensors"
        ours, theirs = load_file(together / file), load_file(alone / file)
        assert ours.keys() == theirs.keys()
        for key, weight in ours.items():
            torch.testing.assert_close(weight, theirs[key], atol=2e-3, rtol=0)


@pytest.mark.slow
def test_a_second_run_trains_nothing_again(tmp_path: Path) -> None:
    pretrain(tmp_path, "--only", "shapes-sd")
    kept = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "work").iterdir()}
    weights = (tmp_path / "made/shapes-sd/unet/diffusion_pytorch_model.safetensors").read_bytes()
    pretrain(tmp_path, "--only", "shapes-sd")
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "work").iterdir()} == kept
    assert (tmp_path / "made/shapes-sd/unet/diffusion_pytorch_model.safetensors").read_bytes() == weights
