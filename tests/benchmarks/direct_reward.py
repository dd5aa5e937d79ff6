"""Reward back-propagation by the small network, beside the exact reward, which is only watched.

    python tests/benchmarks/direct_reward.py draft_unguided_shapes_sd3 --seeds 0

Of the pictures that a run draws to train on: what ``ShapesNet`` says, whose gradient it follows, and what ``Shapes``
says, in the first eight updates and in the last eight. Where the former rises and the latter falls, the reward was
hacked. Figures of configs and seeds are added to what is recorded; finished runs are kept in ``outputs/``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks import RESULTS, command, metrics, record, runs_folder

CONFIGS = ("draft_unguided_shapes_sd3", "draft_shapes_sd3")
REWARDS = {"net": "ShapesNet", "graded": "Shapes", "strict": "strict"}
UPDATES = 8  # at either end


def run(config: str, seed: int) -> dict[str, Any]:
    """Train one seed, unless that was done, and compare its first updates with its last."""
    folder = runs_folder(False) / f"{config}-{seed}"
    if not (folder / "pytorch_lora_weights.safetensors").exists():
        options = ["--output_dir", str(folder), "--seed", str(seed), "--overwrite_output_dir", "true"]
        command("align.train", "--config", f"configs/{config}.yaml", *options)
    lines = [line for line in metrics(folder) if "reward/ShapesNet" in line]
    ends = {
        name: [fmean(line[f"reward/{label}"] for line in part) for part in (lines[:UPDATES], lines[-UPDATES:])]
        for name, label in REWARDS.items()
    }
    counted = lines[-1]["evaluations/trained"] + lines[-1]["evaluations/frozen"]  # before the last update
    return {
        "seed": seed,
        "updates": len(lines),
        "pictures": sum(line["rollout/pictures"] for line in lines),
        "evaluations": round(counted * len(lines) / (len(lines) - 1)),
        "minutes": (lines[-1]["time"] - lines[0]["time"]) / 60,
        "ends": ends,
        "curve": [{name: line[f"reward/{label}"] for name, label in REWARDS.items()} for line in lines],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", choices=CONFIGS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    file = RESULTS / "direct_reward.json"
    known = json.loads(file.read_text())["configs"] if file.exists() else {}
    seeds = {run["seed"]: run for run in known.get(args.config, {}).get("seeds", [])}
    seeds |= {seed: run(args.config, seed) for seed in args.seeds}
    found = {"date": time.strftime("%Y-%m-%d"), "seeds": [seeds[seed] for seed in sorted(seeds)]}
    record("direct_reward", {"configs": known | {args.config: found}})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
