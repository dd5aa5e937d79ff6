"""Diffusion-DPO on the shipped pairs, evaluated on held-out prompts; seeds 0, 1, 2.

    python tests/benchmarks/dpo.py shapes_sd            # configs/dpo_shapes.yaml
    python tests/benchmarks/dpo.py shapes_sd3           # configs/dpo_shapes_sd3.yaml

Judged at the guidance of the config's samples. ``--quick`` runs one seed, evaluated on fewer pictures, and records
nothing. Finished seeds are kept in ``outputs/`` and not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from align.evaluation.compare import STRICT, summary
from tests.benchmarks import QUICK, record, runs_folder, trained

CONFIGS = {"shapes_sd": "configs/dpo_shapes.yaml", "shapes_sd3": "configs/dpo_shapes_sd3.yaml"}


def run(config: str, seed: int, folder: Path, quick: bool) -> dict[str, Any]:
    """One seed: train, evaluate, and the figures of both."""
    report, lines = trained(config, seed, folder, evaluate=QUICK if quick else ())
    held_out = [line["validation/implicit_acc"] for line in lines if "validation/implicit_acc" in line]
    figures = {name: value for name, value in summary(report).items() if name != "gallery"}
    graded = {name: report["rewards"]["Shapes"][name] for name in ("win_rate", "win_rate_ci")}
    tasks = report["rewards"][STRICT]["tasks"]
    return figures | {"seed": seed, "graded": graded, "held_out_implicit_acc": held_out[-1], "tasks": tasks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(CONFIGS))
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    seeds = [0] if args.quick else [0, 1, 2]
    name = f"dpo_{args.model}"
    root = runs_folder(args.quick)
    runs = [run(CONFIGS[args.model], seed, root / f"{name}-{seed}", args.quick) for seed in seeds]
    figures = {"config": CONFIGS[args.model], "seeds": runs}
    record(name, figures, args.quick)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
