"""The embedded pipelines made anew, from nothing: how long it takes, and what they score beside the shipped ones.

    python tests/benchmarks/pretrain.py

``python -m align.shapes.scripts.pretrain`` in an empty folder, then both pipelines on the held-out prompts at the
default guidance, the shipped ones in ``base``. ``--quick`` trains a hundredth of the steps, for its rates alone; the
pictures of such pipelines are noise. A run that was interrupted starts over: its time would be no time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from align.evaluation.compare import STRICT
from align.shapes.scripts.pretrain import PHASES
from tests.benchmarks import QUICK, command, record, runs_folder

QUICK_STEPS = {"vae": 26, "polish": 10, "sd": 50, "sd3": 60, "sd3_shifted": 45, "sd3_sharp": 60}


def score(made: Path, name: str, quick: bool) -> dict[str, Any]:
    """Strict and graded ShapesEval of the shipped pipeline and of the one in ``made``, by task."""
    words = ["--config", "configs/evaluate_shapes.yaml", "--base", name, "--tuned", str(made / name)]
    folder = made.parent / f"{name}-evaluation"
    command("align.evaluate", *words, "--output_dir", str(folder), *(QUICK if quick else ()))
    rewards = json.loads((folder / "scores.json").read_text())["rewards"]

    def side(who: str) -> dict[str, Any]:
        tasks = {task: means[who] for task, means in rewards[STRICT]["tasks"].items()}
        overall = {"strict": rewards[STRICT], "graded": rewards["Shapes"]}
        return {key: entry[f"{who}_overall"] for key, entry in overall.items()} | {"tasks": tasks}

    return {"shipped": side("base"), "made": side("tuned")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    root = runs_folder(args.quick) / "pretrain"
    shutil.rmtree(root, ignore_errors=True)
    steps = [word for name, count in QUICK_STEPS.items() for word in (f"--{name}_steps", str(count))]
    start = time.monotonic()
    command(
        "align.shapes.scripts.pretrain",
        *("--output", str(root / "made"), "--work", str(root / "work"), "--seed", "0"),
        *(steps if args.quick else ()),
    )
    minutes = (time.monotonic() - start) / 60
    print(f"pretraining took {minutes:.1f} minutes", flush=True)
    scores = {name: score(root / "made", name, args.quick) for name in PHASES}
    figures = {"minutes": minutes, "cores": os.cpu_count(), "scores": scores}
    record("pretrain", figures, args.quick)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
