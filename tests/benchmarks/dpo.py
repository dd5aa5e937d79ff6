"""Diffusion-DPO, and Diffusion-KTO, on the shipped pairs, evaluated on held-out prompts; seeds 0, 1, 2.

    python tests/benchmarks/dpo.py dpo_shapes_sd        # configs/dpo_shapes.yaml
    python tests/benchmarks/dpo.py dpo_shapes_sd3       # configs/dpo_shapes_sd3.yaml
    python tests/benchmarks/dpo.py dpo_safeguard        # configs/dpo_safeguard_shapes.yaml
    python tests/benchmarks/dpo.py kto_shapes_sd        # configs/kto_shapes.yaml

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

CONFIGS = {
    "dpo_shapes_sd": "configs/dpo_shapes.yaml",
    "dpo_shapes_sd3": "configs/dpo_shapes_sd3.yaml",
    "dpo_safeguard": "configs/dpo_safeguard_shapes.yaml",
    "kto_shapes_sd": "configs/kto_shapes.yaml",
}


def run(config: str, seed: int, folder: Path, quick: bool) -> dict[str, Any]:
    """One seed: train, evaluate, and the figures of both."""
    report, lines = trained(config, seed, folder, evaluate=QUICK if quick else ())
    held_out = [line for line in lines if "validation/implicit_acc" in line][-1]
    deltas = {k.removeprefix("validation/"): v for k, v in held_out.items() if k.startswith("validation/delta")}
    figures = {name: value for name, value in summary(report).items() if name != "gallery"}
    graded = {name: report["rewards"]["Shapes"][name] for name in ("win_rate", "win_rate_ci")}
    tasks = report["rewards"][STRICT]["tasks"]
    told = {"held_out_implicit_acc": held_out["validation/implicit_acc"], **deltas}
    return figures | {"seed": seed, "graded": graded, **told, "tasks": tasks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(CONFIGS))
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    seeds = [0] if args.quick else [0, 1, 2]
    root = runs_folder(args.quick)
    runs = [run(CONFIGS[args.name], seed, root / f"{args.name}-{seed}", args.quick) for seed in seeds]
    figures = {"config": CONFIGS[args.name], "seeds": runs}
    record(args.name, figures, args.quick)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
