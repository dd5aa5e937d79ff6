"""Online objectives on the embedded world at equal generated pictures; seeds 0, 1, 2.

    python tests/benchmarks/online.py ddpo             # configs/ddpo_shapes.yaml, shapes-sd
    python tests/benchmarks/online.py ddpo_unguided    # configs/ddpo_unguided_shapes.yaml, shapes-sd
    python tests/benchmarks/online.py flow_grpo        # configs/flow_grpo_shapes_sd3.yaml, shapes-sd3
    python tests/benchmarks/online.py flow_grpo_unguided   # configs/flow_grpo_unguided_shapes_sd3.yaml, shapes-sd3
    python tests/benchmarks/online.py d3po             # configs/d3po_shapes.yaml, shapes-sd
    python tests/benchmarks/online.py d3po_unguided    # configs/d3po_unguided_shapes.yaml, shapes-sd
    python tests/benchmarks/online.py awm_unguided     # configs/awm_shapes_sd3.yaml, a ninth of the pictures
    python tests/benchmarks/online.py dgpo_unguided    # configs/dgpo_shapes_sd3.yaml, the same
    python tests/benchmarks/online.py opd_unguided     # configs/opd_unguided_shapes_sd3.yaml, shapes-sd3: no reward

Each run trains on captions of seen combinations, is looked at on the held-out prompts as it goes (the curve), and is
compared with its base on them at the end, two pictures a prompt: strict and graded score, diversity; at the guidance
of the config's samples. ddpo_unguided, flow_grpo_unguided and d3po_unguided draw as many pictures as each other and
are shown together. ``--quick`` runs one seed for six rollouts and records nothing. Finished seeds are kept in
``outputs/`` and not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from align.evaluation.compare import STRICT, summary
from tests.benchmarks import QUICK, RESULTS, curves, looks, mean_curve, record, runs_folder, trained
from tests.benchmarks.table import EQUAL, load

CONFIGS = {
    "ddpo": "configs/ddpo_shapes.yaml",
    "ddpo_unguided": "configs/ddpo_unguided_shapes.yaml",
    "flow_grpo": "configs/flow_grpo_shapes_sd3.yaml",
    "flow_grpo_unguided": "configs/flow_grpo_unguided_shapes_sd3.yaml",
    "d3po": "configs/d3po_shapes.yaml",
    "d3po_unguided": "configs/d3po_unguided_shapes.yaml",
    "awm_unguided": "configs/awm_shapes_sd3.yaml",
    "dgpo_unguided": "configs/dgpo_shapes_sd3.yaml",
    "opd_unguided": "configs/opd_unguided_shapes_sd3.yaml",
}


def run(config: str, seed: int, folder: Path, quick: bool) -> dict[str, Any]:
    """One seed: train, evaluate, and the figures of both."""
    options = ["--max_rollouts", "6"] if quick else []
    report, lines = trained(config, seed, folder, *options, evaluate=QUICK if quick else ())
    rollouts = [line for line in lines if "rollout/pictures" in line]
    strict = report["rewards"][STRICT]
    return {
        "seed": seed,
        **{name: value for name, value in summary(report).items() if name != "gallery"},
        "graded_base": report["rewards"]["Shapes"]["base_overall"],
        "graded_tuned": report["rewards"]["Shapes"]["tuned_overall"],
        "diversity": report["diversity"],
        "tasks": strict["tasks"],
        "pictures": sum(line["rollout/pictures"] for line in rollouts),
        "updates": lines[-1]["step"],
        "curve": looks(lines),
    }


def together() -> None:
    """``results/online_equal.png``: how far each method of EQUAL, as recorded, rose above its base on the way."""
    rises = {}
    for name, title in EQUAL.items():
        points = mean_curve([run["curve"] for run in load(name)["seeds"]], "pictures")
        rises[title] = [(pictures, strict - points[0][1]) for pictures, strict in points]
    title = "without guidance, held-out prompts: means of the seeds"
    curves(RESULTS / "online_equal.png", rises, title, "pictures generated", "rise of strict ShapesEval")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=sorted(CONFIGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    name, config = f"online_{args.method}", CONFIGS[args.method]
    seeds = args.seeds[:1] if args.quick else args.seeds
    runs = [run(config, seed, runs_folder(args.quick) / f"{name}-{seed}", args.quick) for seed in seeds]
    figures = {"config": config, "seeds": runs}
    if not args.quick:
        record(name, figures)
        curves(
            RESULTS / f"{name}.png",
            {f"seed {r['seed']}": [(p["pictures"], p["strict"]) for p in r["curve"]] for r in runs},
            f"{config.removeprefix('configs/')}: held-out prompts",
            "pictures generated",
            "strict ShapesEval",
        )
        if name in EQUAL:
            together()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
