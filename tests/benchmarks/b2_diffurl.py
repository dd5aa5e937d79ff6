"""B²-DiffuRL's claim on the embedded world: DDPO and D3PO, each with backward progressive training, with branches,
with both, and with neither.

    python tests/benchmarks/b2_diffurl.py            # eight arms, as many seeds as --seeds names
    python tests/benchmarks/b2_diffurl.py --quick    # two arms, an eighth of the pictures, nothing recorded

Every arm draws the same number of pictures from ``shapes-sd`` (the config says how many); arms differ in network
evaluations, because branches share a prefix and selection drops pictures. Strict score and diversity on held-out
prompts are therefore given at equal pictures (the end of each run) and at equal evaluations (read off each curve at the
total of the cheapest arm). Finished arms are kept in ``outputs/`` and not run again; those that
``results/b2_diffurl.json`` holds from an earlier day, of the same configs, stay there, unless they are run anew.
The quick run shows what branches save in evaluations; on 768 pictures an arm the scores differ by chance only.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from align.evaluation.compare import STRICT, summary
from tests.benchmarks import (
    QUICK,
    RESULTS,
    curves,
    day,
    earlier,
    looks,
    mean_curve,
    record,
    runs_folder,
    settings_of,
    span,
    trained,
)

CONFIGS = {"DDPO": "configs/b2_ddpo_shapes.yaml", "D3PO": "configs/b2_d3po_shapes.yaml"}
# six rollouts of half the prompts, an eighth of the pictures
SHORT = ["--max_rollouts", "6", "--rollout_batch_size", "16", "--gradient_accumulation_steps", "10"]
PARTS = {"alone": (False, False), "+ progressive": (True, False), "+ branches": (False, True), "+ both": (True, True)}


def place(rule: str, part: str, seed: int, root: Path) -> Path:
    """The run folder of an arm."""
    progressive, branches = PARTS[part]
    return root / f"{rule}-{progressive:d}{branches:d}-{seed}"


def run(rule: str, part: str, seed: int, root: Path, quick: bool) -> dict[str, Any]:
    """One arm with one seed."""
    progressive, branches = PARTS[part]
    folder = place(rule, part, seed, root)
    more = [f"--objective.progressive={progressive}".lower(), f"--objective.branches={branches}".lower()]
    more += SHORT if quick else []
    report, lines = trained(CONFIGS[rule], seed, folder, *more, evaluate=QUICK if quick else ())
    rollouts = [line for line in lines if "rollout/pictures" in line]
    curve = looks(lines)
    return {
        "rule": rule,
        "part": part,
        "seed": seed,
        "date": day(folder / "evaluation/scores.json"),
        **{name: value for name, value in summary(report).items() if name != "gallery"},
        "diversity": report["diversity"],
        "guidance": report["guidance_scale"],
        "tasks": report["rewards"][STRICT]["tasks"],
        "pictures": sum(line["rollout/pictures"] for line in rollouts),
        "evaluations": curve[-1]["evaluations"],
        "updates": lines[-1]["step"],
        "curve": curve,
    }


def at(run: dict[str, Any], evaluations: float) -> float:
    """The strict score of a run's curve at so many evaluations, between its points by straight lines."""
    points = run["curve"]
    return float(np.interp(evaluations, [p["evaluations"] for p in points], [p["strict"] for p in points]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rules", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--finished", action="store_true", help="only put down what has been run already")
    args = parser.parse_args()
    root = runs_folder(args.quick) / "b2"
    rules, parts, seeds = args.rules, list(PARTS), args.seeds
    if args.quick:
        rules, parts, seeds = rules[:1], ["alone", "+ both"], seeds[:1]
    wanted = [(rule, part, seed) for seed in seeds for rule in rules for part in parts]
    if args.finished:
        wanted = [arm for arm in wanted if (place(*arm, root) / "evaluation/scores.json").exists()]
    runs = [run(*arm, root, args.quick) for arm in wanted]
    digest = settings_of(CONFIGS.values())
    if not args.quick and (before := earlier("b2_diffurl", digest)):
        known = [{"date": before["date"], **r} for r in before["runs"]]
        runs += [r for r in known if (r["rule"], r["part"], r["seed"]) not in wanted]
        runs.sort(key=lambda r: (r["seed"], list(CONFIGS).index(r["rule"]), list(PARTS).index(r["part"])))
    for rule in dict.fromkeys(r["rule"] for r in runs):
        same = [r for r in runs if r["rule"] == rule]
        least = min(r["evaluations"] for r in same)
        for r in same:
            r["least_evaluations"], r["strict_at_least"] = least, at(r, least)
        if not args.quick:
            series = {
                part: mean_curve([r["curve"] for r in same if r["part"] == part], "evaluations")
                for part in dict.fromkeys(r["part"] for r in same)
            }
            curves(
                RESULTS / f"b2_{rule.lower()}.png",
                series,
                f"B²-DiffuRL over {rule}: held-out prompts, mean of {len({r['seed'] for r in same})} seed(s)",
                "network evaluations",
                "strict ShapesEval",
            )
    figures = {"date": span(r["date"] for r in runs), "configs": CONFIGS, "settings": digest, "runs": runs}
    record("b2_diffurl", figures, args.quick)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
