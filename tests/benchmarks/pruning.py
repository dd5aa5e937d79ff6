"""Pruning, healing and INT4 of shapes-sd3, and what each part of the method contributes; seeds 0, 1, 2.

    python tests/benchmarks/pruning.py

configs/compress_shapes_sd3.yaml as it stands, and changed in one thing: without position weighting (another plan),
positional weight preservation, or sensitivity guidance; healed for longer; or with whole blocks only, as stock
diffusers loads them. Strict ShapesEval on the held-out prompts, two pictures each, for the original, INT4 alone, pruned
and not healed, and every variant after INT4. ``--quick`` heals 40 steps with one seed and records nothing. Finished
variants are kept in ``outputs/`` and not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import yaml

from align.config import parse
from align.files import write
from pruning.compress import Compress, compress
from pruning.plan import Plan
from pruning.report import Reporting, report
from tests.benchmarks import RESULTS, record, runs_folder

CONFIG = "configs/compress_shapes_sd3.yaml"
BLOCKS = {"config": "configs/compress_blocks_shapes_sd3.yaml"}
VARIANTS: dict[str, dict[str, Any]] = {
    "whole method": {},
    "without position weighting": {"position_weighting": False},
    "without preservation": {"preservation": False},
    "without sensitivity guidance": {"sensitivity": "none"},
    "healed four times as long": {"max_train_steps": 1600, "ema_decay": 0.995},
    "whole blocks only": BLOCKS,
    "whole blocks only, without preservation": BLOCKS | {"preservation": False},
    "whole blocks only, without sensitivity guidance": BLOCKS | {"sensitivity": "none"},
    # with the first seed only
    "whole blocks only, healed four times as long": BLOCKS | {"max_train_steps": 1500, "ema_decay": 0.995},
    "whole blocks only, healed fifteen times as long": BLOCKS | {"max_train_steps": 6000, "ema_decay": 0.998},
}
STRICT = "Shapes (strict)"


def settings(folder: Path, seed: int, change: dict[str, Any], quick: bool) -> Compress:
    """The config with one part changed; a healing config of its own lies in ``folder``."""
    config, _ = parse(
        Compress, "benchmark", None, ["--config", change.get("config", CONFIG), "--output_dir", str(folder)]
    )
    assert config.heal is not None
    heal = yaml.safe_load(config.heal.read_text())
    heal["seed"] = seed
    heal["checkpointing_steps"] = 100
    heal["objective"]["init_args"] |= {k: v for k, v in change.items() if k in ("preservation", "sensitivity")}
    heal |= {k: v for k, v in change.items() if k in ("max_train_steps", "ema_decay")}
    if quick:
        heal["max_train_steps"] = 40
    write(folder / "heal.yaml", yaml.safe_dump(heal))
    config.heal = folder / "heal.yaml"
    config.position_weighting = change.get("position_weighting", True)
    config.report = Reporting(samples_per_prompt=1 if quick else 2, max_prompts=48 if quick else None)
    return config


def measured(folders: dict[str, str], config: Compress, where: Path) -> dict[str, Any]:
    """The report on ``folders``, made once."""
    if not (where / "report.json").exists():
        report(folders, config.report, where)
    return json.loads((where / "report.json").read_text())["pipelines"]


def one(root: Path, name: str, seed: int, first: bool, quick: bool, finished: bool) -> dict[str, Any] | None:
    """One variant and seed: what goes and the report; None where it is not there and only ``finished`` is asked for."""
    folder, change = root / name.replace(",", "").replace(" ", "-") / str(seed), VARIANTS[name]
    if finished and "position_weighting" not in change and not (folder / "report.json").exists():
        return None
    folder.mkdir(parents=True, exist_ok=True)
    profile = root / "profile.json"
    if profile.exists():
        shutil.copy(profile, folder / "profile.json")
    config = settings(folder, seed, change, quick)
    config.stages = ["analyse", "plan"]
    compress(config)
    shutil.copy(folder / "profile.json", profile)
    dropped = list(Plan.load(folder / "plan.json").dropped)
    if "position_weighting" in change and dropped == list(Plan.load(root / "whole-method/0/plan.json").dropped):
        return {"seed": seed, "dropped": dropped, "same": True}  # the whole method once more
    if finished and not (folder / "report.json").exists():
        return None
    config.stages = ["remove", "heal", "quantise"]
    compress(config)
    kinds = ["healed", "int4"] if name.startswith(("whole", "healed")) else ["int4"]
    compared = {"original": "shapes-sd3", "pruned": "", "int4-alone": ""} if first else {}
    folders = {kind: str(folder / kind) for kind in [*compared, *kinds]} | {k: v for k, v in compared.items() if v}
    return {"seed": seed, "dropped": dropped, "pipelines": measured(folders, copy.copy(config), folder)}


def run(quick: bool, seeds: list[int], finished: bool) -> dict[str, Any]:
    root = runs_folder(quick) / "pruning"
    figures: dict[str, Any] = {"config": CONFIG, "variants": {}}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    for seed in seeds:
        for name in VARIANTS:
            longer = "max_train_steps" in VARIANTS[name]
            if longer and (quick or ("config" in VARIANTS[name] and seed != seeds[0])):
                continue
            first = name in ("whole method", "whole blocks only") and seed == seeds[0]
            if (row := one(root, name, seed, first, quick, finished)) is not None:
                rows[name].append(row)
    for name, found in rows.items():
        if found:
            same = "same" in found[0]
            kept = rows["whole method"] if same else found
            figures["variants"][name] = {"dropped": found[0]["dropped"], "same_as_whole": same, "seeds": kept}
    original = figures["variants"]["whole method"]["seeds"][0]["pipelines"]["original"]
    figures["summary"] = {
        "parameters": original["parameters"],
        "bytes_bf16": 2 * original["parameters"],
        "strict_original": original["rewards"][STRICT],
        "latency": {
            name: pipelines["pruned"]["latency"] / pipelines["original"]["latency"]
            for name, variant in figures["variants"].items()
            if "pruned" in (pipelines := variant["seeds"][0]["pipelines"])
        },
        "strict": {
            name: {
                kind: [
                    seed["pipelines"][kind]["rewards"][STRICT] for seed in variant["seeds"] if kind in seed["pipelines"]
                ]
                for kind in ("pruned", "healed", "int4", "int4-alone")
            }
            for name, variant in figures["variants"].items()
        },
    }
    if not quick:
        first = root / "whole-method" / str(seeds[0])
        shutil.copy(first / "gallery.png", RESULTS / "pruning.png")
        shutil.copy(first / "plan.png", RESULTS / "pruning_plan.png")
        shutil.copy(first / "profile.png", RESULTS / "pruning_profile.png")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--finished", action="store_true", help="only put down what has been run already")
    args = parser.parse_args()
    figures = run(args.quick, args.seeds[:1] if args.quick else args.seeds, args.finished)
    record("pruning", figures, args.quick)
    print(json.dumps(figures["summary"]))


if __name__ == "__main__":
    main()
