"""Reward back-propagation by the small network, beside the exact reward, which is only watched.

    python tests/benchmarks/direct_reward.py DRTune --seeds 0    # an arm; configs/draft_shapes_sd3.yaml

Held out: every prompt of the embedded world's held-out set once, by the base and by what was trained, from the
same noise in the ten steps of training at its guidance: what the ``ShapesNet`` of the config says, whose gradient an
arm follows, and what ``Shapes`` says, graded and strict. Where the former rises and the latter falls, the reward was
hacked. Of a run that its rule has stopped, the last good checkpoint is judged. Beside that the same of the pictures
that the run draws to train on, means of the first and the last eight updates. Figures of arms and seeds are added to
what is recorded; finished runs are kept in ``outputs/`` and not run again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import yaml

from align.evaluation.compare import STRICT
from tests.benchmarks import RESULTS, command, finished, metrics, record, runs_folder

GUIDED, UNGUIDED, STOP = (f"configs/draft_{kind}shapes_sd3.yaml" for kind in ("", "unguided_", "stop_"))
SOFT = "configs/draft_stop_shapes.yaml"


class Arm(NamedTuple):
    config: str
    options: Sequence[str] = ()


ARMS = {
    "DRTune": Arm(GUIDED),
    "DRTune, unguided": Arm(UNGUIDED),
    "DRTune, unguided, early stop, at 1e-3": Arm(
        UNGUIDED, ("--learning_rate", "1e-3", "--max_grad_norm", "1.0", "--objective.early_stop", "6")
    ),
    "DRaFT-1, unguided": Arm(STOP),
    "DRaFT-2, unguided, at 1e-2": Arm(
        STOP,
        (
            *("--learning_rate", "1e-2", "--max_grad_norm", "1.0", "--objective.last_steps", "2"),
            *("--rollout_batch_size", "16", "--train_batch_size", "16"),
        ),
    ),
    "DRaFT-3, a soft eye, nothing stops it": Arm(SOFT, ("--stop", "null")),
    "DRaFT-3, a soft eye": Arm(SOFT),
}
REWARDS = {"net": "ShapesNet", "graded": "Shapes", "strict": STRICT}
UPDATES = 8  # at either end
HELD_OUT = ("--num_inference_steps", "10", "--samples_per_prompt", "1")


def run(arm: str, seed: int) -> dict[str, Any]:
    """Train one seed, unless that was done, and look at the held-out prompts."""
    config, options = ARMS[arm]
    folder = runs_folder(False) / f"direct_reward-{arm.replace(', ', '-').replace(' ', '_')}-{seed}"
    scores = folder / "scores.json"
    words = ["--config", config, "--seed", str(seed), "--overwrite_output_dir", "true", *options]
    stopped = finished(folder, *words).stopped
    if not scores.exists():
        settings = yaml.safe_load(Path(config).read_text())
        base = settings["pretrained_model_name_or_path"]
        scale = settings["objective"]["init_args"]["sampler"].get("guidance_scale")
        net = next(reward for reward in settings["rewards"] if reward["name"] == "ShapesNet")
        shared = runs_folder(False) / f"direct_reward-{base}-{scale}"  # the base's pictures stay there
        how = ["--reward", json.dumps([{"name": "Shapes"}, net]), *HELD_OUT]
        how += [] if scale is None else ["--guidance_scale", str(scale)]
        tuned = folder / f"checkpoint-{last_good(folder)}" if stopped else folder
        where = ["--tuned", str(tuned), "--base", base, "--output_dir", str(shared)]
        command("align.evaluate", "--config", "configs/evaluate_shapes.yaml", *where, *how)
        shutil.copy(shared / "scores.json", scores)
    return figures(metrics(folder), json.loads(scores.read_text())) | {
        "seed": seed,
        "config": config,
        "options": list(options),
        "stopped": stopped,
    }


def last_good(folder: Path) -> int:
    """The step of the checkpoint that a stopped run names: what the last one of all keeps of the rule."""
    states = [json.loads(file.read_text()) for file in folder.glob("checkpoint-*/state.json")]
    good: int = max(states, key=lambda state: state["step"])["stop"]["good"]
    return good


def figures(lines: Sequence[Mapping[str, float]], report: Mapping[str, Any]) -> dict[str, Any]:
    """Of a run's log and of its evaluation."""
    lines = [line for line in lines if "reward/ShapesNet" in line]
    labels = REWARDS | {"strict": "strict"}
    entries = {name: report["rewards"][title] for name, title in REWARDS.items()}
    counted = lines[-1]["evaluations/trained"] + lines[-1]["evaluations/frozen"]  # before the last update
    return {
        "updates": len(lines),
        "pictures": sum(line["rollout/pictures"] for line in lines),
        "evaluations": round(counted * len(lines) / (len(lines) - 1)),
        "minutes": (lines[-1]["time"] - lines[0]["time"]) / 60,
        "ends": {
            name: [fmean(line[f"reward/{label}"] for line in part) for part in (lines[:UPDATES], lines[-UPDATES:])]
            for name, label in labels.items()
        },
        "held_out": {
            name: {key: entry[key] for key in ("base_overall", "tuned_overall", "difference_ci", "win_rate")}
            for name, entry in entries.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="+", choices=sorted(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    file = RESULTS / "direct_reward.json"
    known = json.loads(file.read_text()).get("arms", {}) if file.exists() else {}
    for arm in args.arms:
        for seed in args.seeds:
            found = {one["seed"]: one for one in known.get(arm, [])}
            found[seed] = run(arm, seed) | {"date": time.strftime("%Y-%m-%d")}
            known[arm] = [found[number] for number in sorted(found)]
            record("direct_reward", {"arms": known})
            print(arm, json.dumps(found[seed]))


if __name__ == "__main__":
    main()
