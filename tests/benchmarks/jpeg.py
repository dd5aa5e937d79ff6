"""The online objectives on DDPO's own first task, pictures that make small JPEG files; seeds 0, 1, 2.

    python tests/benchmarks/jpeg.py

Composition is a reward that thousands of pictures hardly move (``online.py``); file size is one that they do, so this
tells whether the methods learn what they are told. The same configs, ten rollouts, the reward replaced; nothing holds
the pictures to their prompts, so the share of right ones is watched (and falls: that is reward hacking). ``--quick``
runs one seed for three rollouts and records nothing. Finished runs are kept in ``outputs/`` and not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from align.evaluation.compare import STRICT
from tests.benchmarks import QUICK, RESULTS, curves, record, runs_folder, trained

# config, updates in ten rollouts, over which the learning rate decays, and further options; the KL to the reference, at
# the weight of the config, lets file sizes fall by 1 % only
METHODS = {
    "DDPO": ("configs/ddpo_shapes.yaml", 20, []),
    "D3PO": ("configs/d3po_shapes.yaml", 60, []),
    "Flow-GRPO": ("configs/flow_grpo_shapes_sd3.yaml", 20, ["--objective.beta", "0"]),
}
REWARD = "JPEGCompressibility"
KILOBYTES = -500  # by which the reward is a size
REWARDS = [
    {"name": REWARD, "weight": float(-KILOBYTES)},
    {"name": "Shapes", "args": {"mode": "strict"}, "weight": 0.0, "label": "strict"},
]


def run(method: str, seed: int, quick: bool) -> dict[str, Any]:
    """One seed of one method: train, evaluate on the held-out prompts, and the figures of both."""
    config, updates, more = METHODS[method]
    folder = runs_folder(quick) / f"jpeg-{method}-{seed}"
    options = ["--rewards", json.dumps(REWARDS), "--max_train_steps", str(updates)]
    options += ["--max_rollouts", "3" if quick else "10"]
    options += ["--validation_steps", "1000", "--checkpointing_steps", "0", *more]
    shown = QUICK if quick else ("--samples_per_prompt", "1")
    report, lines = trained(config, seed, folder, *options, evaluate=[f"--reward=[{REWARD},Shapes]", *shown])
    drawn = [line for line in lines if "rollout/pictures" in line]
    size, strict = report["rewards"][REWARD], report["rewards"][STRICT]
    return {
        "method": method,
        "config": config,
        "seed": seed,
        "pictures": int(drawn[0]["rollout/pictures"] * len(drawn)),
        "updates": lines[-1]["step"],
        "kilobytes_base": KILOBYTES * size["base_overall"],
        "kilobytes_tuned": KILOBYTES * size["tuned_overall"],
        "smaller": report["win_rate"],
        "smaller_ci": report["win_rate_ci"],
        "strict_base": strict["base_overall"],
        "strict_tuned": strict["tuned_overall"],
        "diversity_first": drawn[0]["rollout/diversity/pixels"],
        "diversity_last": drawn[-1]["rollout/diversity/pixels"],
        "curve": [
            {"pictures": k * line["rollout/pictures"], "kilobytes": KILOBYTES * line[f"rollout/reward/{REWARD}"]}
            for k, line in enumerate(drawn)
        ],
    }


def averaged(drawn: list[list[dict[str, float]]]) -> list[tuple[float, float]]:
    """The mean over seeds of (pictures, kilobytes)."""
    return [
        (points[0]["pictures"], sum(point["kilobytes"] for point in points) / len(points))
        for points in zip(*drawn, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", choices=sorted(METHODS), nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    seeds = args.seeds[:1] if args.quick else args.seeds
    runs = [run(method, seed, args.quick) for method in args.methods for seed in seeds]
    # what a few methods or seeds give is not the table's
    if not args.quick and len(runs) == 3 * len(METHODS):
        record("jpeg", {"runs": runs})
        curves(
            RESULTS / "jpeg.png",
            {method: averaged([r["curve"] for r in runs if r["method"] == method]) for method in METHODS},
            "Pictures of each rollout, mean of three seeds",
            "pictures generated before it",
            "file size, kB",
        )
    print(json.dumps({"runs": runs}))


if __name__ == "__main__":
    main()
