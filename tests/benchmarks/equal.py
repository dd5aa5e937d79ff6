"""Every online method at equal network evaluations, on both embedded pipelines, without guidance; seeds 0, 1, 2.

    python tests/benchmarks/equal.py                             # what is not recorded yet; all: three hours
    python tests/benchmarks/equal.py --methods NFT --seeds 0     # this, beside what is recorded

A run has as many rollouts as come nearest to BUDGET network evaluations: in drawing, for old and reference answers, in
training. DRaFT and ReFL follow the gradient of ``ShapesNet``, the others the graded ``Shapes``; nobody
trains on the strict score. Judged are the averaged weights, on the 240 held-out prompts, two pictures each, drawn as in
training: ten steps without guidance. The curve is of what a run drew to train on, the strict score of at most six parts
of its pictures, which ReFL's early stop leaves unfinished. ``--quick`` is one seed of two rollouts and records nothing.
Finished runs are kept in ``outputs/``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

from align.evaluation.compare import STRICT
from tests.benchmarks import RESULTS, command, curves, finished, mean_curve, metrics, record, runs_folder

BUDGET = 36_864
POINTS = 6  # of a curve
HELD_OUT = ("--num_inference_steps", "10", "--guidance_scale", "1", "--samples_per_prompt", "2")
PIPELINES = ("shapes-sd", "shapes-sd3")


class Arm(NamedTuple):
    """A method: its config, of which so many rollouts and updates fit the budget, and what is changed in it."""

    config: str
    rollouts: int
    updates: int
    options: str = ""


FORWARD = "--train_batch_size 64 --gradient_accumulation_steps 4 --lora.rank 16 --learning_rate 3e-3"
DIRECT = (
    "--stop null --ema_decay 0.9 --lr_scheduler cosine --max_grad_norm 1.0 "
    "--rollout_batch_size 128 --train_batch_size 32 --gradient_accumulation_steps 4"
)
ARMS = {
    "policy gradient": Arm("configs/ddpo_unguided_shapes.yaml", 6, 12),
    "D3PO": Arm("configs/d3po_unguided_shapes.yaml", 5, 10),
    "NFT": Arm("configs/nft_shapes_sd3.yaml", 10, 20, f"--objective.sampler.guidance_scale 1.0 {FORWARD}"),
    "AWM": Arm("configs/awm_shapes_sd3.yaml", 10, 20),
    "DGPO": Arm("configs/dgpo_shapes_sd3.yaml", 10, 20),
    "DRaFT": Arm(
        "configs/draft_stop_shapes_sd3.yaml", 28, 28, f"{DIRECT} --objective.last_steps 3 --learning_rate 2e-3"
    ),
    "ReFL": Arm(
        "configs/draft_stop_shapes_sd3.yaml", 44, 44, f"{DIRECT} --objective.early_stop 8 --learning_rate 5e-4"
    ),
}
ONLY = {("policy gradient", "shapes-sd3"): Arm("configs/flow_grpo_unguided_shapes_sd3.yaml", 6, 24)}  # Flow-GRPO


def arm_of(method: str, pipeline: str) -> Arm:
    return ONLY.get((method, pipeline), ARMS[method])


def trained(method: str, pipeline: str, seed: int, quick: bool) -> tuple[Path, int]:
    """The folder of a run, trained unless that is done, and the CPU seconds that this took."""
    arm = arm_of(method, pipeline)
    folder = runs_folder(quick) / "equal" / pipeline / f"{method.replace(' ', '_')}-{seed}"
    short = min(arm.rollouts, 2) if quick else arm.rollouts
    words = ["--config", arm.config, "--pretrained_model_name_or_path", pipeline, *arm.options.split()]
    words += ["--data.path", "shapes-prompts", "--max_rollouts", str(short), "--max_train_steps", str(arm.updates)]
    words += ["--validation_data", "null", "--samples.prompts", "[]", "--checkpointing_steps", "0"]
    words += ["--overwrite_output_dir", "true", "--seed", str(seed)]
    return folder, finished(folder, *words).cpu_seconds


def judged(pipeline: str, run: Path, quick: bool) -> dict[str, Any]:
    """``run`` beside the base, whose pictures stay from one run to the next."""
    folder = runs_folder(quick) / "equal" / pipeline / "evaluation"
    where = ["--base", pipeline, "--tuned", str(run), "--output_dir", str(folder)]
    few = ["--max_prompts", "12"] if quick else []
    command("align.evaluate", "--config", "configs/evaluate_shapes.yaml", *where, *HELD_OUT, *few)
    report = json.loads((folder / "scores.json").read_text())
    found: dict[str, Any] = {"diversity": report["diversity"]}
    for title, reward in (("strict", STRICT), ("graded", "Shapes")):
        entry = report["rewards"][reward]
        found[title] = {key: entry[key] for key in ("base_overall", "tuned_overall", "win_rate", "win_rate_ci")}
    return found


def figures(folder: Path) -> dict[str, Any]:
    """Of a run's log: pictures, evaluations, and the strict score of what it drew, with the evaluations asked by then,
    at POINTS points."""
    lines = metrics(folder)
    drawn = [line for line in lines if "rollout/pictures" in line]
    key = "rollout/reward/strict" if "rollout/reward/strict" in drawn[0] else "reward/strict"
    # a line is written after its update: what a rollout asks is what lies between two rollouts' lines
    asked = [line["evaluations/trained"] + line["evaluations/frozen"] for line in drawn]
    each = (asked[-1] - asked[0]) / (len(asked) - 1)
    size = math.ceil(len(drawn) / POINTS)
    parts = [drawn[k : k + size] for k in range(0, len(drawn), size)]
    ends = [(k * size + len(part) / 2) * each for k, part in enumerate(parts)]
    return {
        "pictures": sum(line["rollout/pictures"] for line in drawn),
        "evaluations": round(len(drawn) * each),
        "updates": lines[-1]["step"],
        "curve": [
            {"evaluations": at, "strict": fmean(line[key] for line in part)}
            for at, part in zip(ends, parts, strict=True)
        ],
    }


def picture(runs: Sequence[Mapping[str, Any]]) -> None:
    """``results/equal_PIPELINE.png``: the curves of the recorded runs, means of the seeds."""
    for pipeline in PIPELINES:
        found = dict[str, list[Any]]()
        for run in runs:
            if run["pipeline"] == pipeline:
                found.setdefault(run["method"], []).append(run["curve"])
        series = {method: mean_curve(each, "evaluations") for method, each in found.items()}
        title = f"{pipeline}, unguided: what each drew to train on"
        curves(RESULTS / f"equal_{pipeline}.png", series, title, "network evaluations", "strict ShapesEval")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipelines", choices=PIPELINES, nargs="+", default=PIPELINES)
    parser.add_argument("--methods", choices=ARMS, nargs="+", default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    file = RESULTS / "equal.json"
    known = json.loads(file.read_text())["runs"] if file.exists() and not args.quick else []
    runs = {(run["pipeline"], run["method"], run["seed"]): run for run in known}
    for seed, pipeline, method in product(args.seeds[:1] if args.quick else args.seeds, args.pipelines, args.methods):
        if (pipeline, method, seed) in runs:
            continue
        folder, seconds = trained(method, pipeline, seed, args.quick)
        run = {"pipeline": pipeline, "method": method, "seed": seed, "date": time.strftime("%Y-%m-%d")}
        run |= {"cpu_seconds": seconds}
        runs[pipeline, method, seed] = run | figures(folder) | judged(pipeline, folder, args.quick)
        print(json.dumps(runs[pipeline, method, seed]), flush=True)
        order = sorted(runs, key=lambda one: (one[0], list(ARMS).index(one[1]), one[2]))
        record("equal", {"budget": BUDGET, "runs": [runs[one] for one in order]}, args.quick)
    if not args.quick:
        picture(list(runs.values()))


if __name__ == "__main__":
    main()
