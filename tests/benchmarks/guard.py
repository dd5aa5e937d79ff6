"""A reward that is hacked on the embedded world, and what holds against that: small JPEG files on shapes-sd3.

    python tests/benchmarks/guard.py    # configs/gardo_shapes_sd3.yaml, four arms of AWM, DGPO, NFT; seed 0

Nothing in a file's size holds pictures to their prompts. Arms: nothing against it, KL, GARDO's gate on it with the
graded score as auxiliary reward, and the stop rule alone. Looked at is the strict score, which no arm trains on, of
the pictures that the run itself draws: means of the first and the last two rollouts. Finished arms are kept in
``outputs/`` and not run again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks import finished, metrics, record, runs_folder

CONFIG = "configs/gardo_shapes_sd3.yaml"
FREE = ["--objective.gate", "null"]
ARMS = {  # what of the config's three an arm has
    "nothing": ["--stop", "null", *FREE, "--objective.kl_weight", "0"],
    "KL": ["--stop", "null", *FREE],
    "KL behind GARDO's gate": ["--stop", "null"],
    "stop rule": [*FREE, "--objective.kl_weight", "0"],
}
SAMPLER = ["--objective.sampler.num_inference_steps", "10", "--objective.sampler.batch_size", "64"]
SAMPLER += ["--objective.sampler.guidance_scale", "1.0", "--objective.images_per_prompt", "8"]
METHODS = {  # that learn the same, held by nothing, from as many pictures and rows; AWM is the first arm
    "DGPO": [
        *("--stop", "null", "--objective", "DGPO", *SAMPLER, "--objective.anchor", "old"),
        *("--train_batch_size", "8", "--gradient_accumulation_steps", "2"),
    ],
    "NFT": ["--stop", "null", "--objective", "NFT", *SAMPLER],
}
SEEN = {"kilobytes": "reward/JPEGCompressibility", "strict": "reward/strict", "graded": "reward/Shapes"}
SEEN |= {name: f"reward/{name}" for name in ("DarkShare", "EdgeDensity", "ColorEntropy", "Sharpness")}
SEEN |= {"diversity": "diversity/pixels"}
WINDOW = 2  # rollouts in a mean


def run(arm: str, options: Sequence[str], seed: int) -> dict[str, Any]:
    """One run: its first and last means, rollouts, and evaluations."""
    folder = runs_folder(False) / f"guard-{arm.replace(' ', '_')}-{seed}"
    words = ["--config", CONFIG, "--seed", str(seed), "--resume_from_checkpoint", "latest", *options]
    stopped = finished(folder, *words).stopped
    lines = [line for line in metrics(folder) if "rollout/pictures" in line]
    found = {}
    for name, key in SEEN.items():
        values = [line[f"rollout/{key}"] * (-500 if name == "kilobytes" else 1) for line in lines]
        found[name] = [fmean(values[:WINDOW]), fmean(values[-WINDOW:])]
    evaluations = lines[-1]["evaluations/trained"] + lines[-1]["evaluations/frozen"]
    return {"arm": arm, "seed": seed, "rollouts": len(lines), "evaluations": evaluations, "stopped": stopped, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    found = {
        kind: [run(arm, options, seed) for arm, options in runs.items() for seed in args.seeds]
        for kind, runs in {"arms": ARMS, "methods": METHODS}.items()
    }
    record("guard", {"config": CONFIG, **found})


if __name__ == "__main__":
    main()
