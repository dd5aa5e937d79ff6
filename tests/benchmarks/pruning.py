"""Pruning, healing and INT4 of shapes-sd3, and what each part of the method contributes; seeds 0, 1, 2.

    python tests/benchmarks/pruning.py

configs/compress_shapes_sd3.yaml as it stands, and with one part left out: healing, position weighting (another plan),
positional weight preservation, sensitivity guidance. Strict ShapesEval on the held-out prompts, two pictures each, for
the original, INT4 alone, and every variant after INT4. ``--quick`` heals 40 steps with one seed and records nothing.
Finished variants are kept in ``outputs/`` and not run again.
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
from tests.benchmarks import RESULTS, record

CONFIG = "configs/compress_shapes_sd3.yaml"
VARIANTS: dict[str, dict[str, Any]] = {
    "whole method": {},
    "without position weighting": {"position_weighting": False},
    "without preservation": {"preservation": False},
    "without sensitivity guidance": {"sensitivity": "none"},
}
STRICT = "Shapes (strict)"


def settings(folder: Path, seed: int, change: dict[str, Any], quick: bool) -> Compress:
    """The config with one part changed; a healing config of its own lies in ``folder``."""
    config, _ = parse(Compress, "benchmark", None, ["--config", CONFIG, "--output_dir", str(folder)])
    assert config.heal is not None
    heal = yaml.safe_load(config.heal.read_text())
    heal["seed"] = seed
    heal["checkpointing_steps"] = 100
    arguments = {name: value for name, value in change.items() if name != "position_weighting"}
    heal["objective"]["init_args"] |= arguments
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


def run(quick: bool, seeds: list[int]) -> dict[str, Any]:
    root = Path(f"outputs/{'quick' if quick else 'bench'}/pruning")
    figures: dict[str, Any] = {"config": CONFIG, "variants": {}}
    plans: dict[str, Any] = {}
    for name, change in VARIANTS.items():
        rows = []
        for seed in seeds:
            folder = root / name.replace(" ", "-") / str(seed)
            folder.mkdir(parents=True, exist_ok=True)
            profile = root / "profile.json"
            if profile.exists():
                shutil.copy(profile, folder / "profile.json")
            config = settings(folder, seed, change, quick)
            config.stages = ["analyse", "plan"]
            compress(config)
            shutil.copy(folder / "profile.json", profile)
            plans[name] = list(Plan.load(folder / "plan.json").dropped)
            if "position_weighting" in change and plans[name] == plans["whole method"]:
                break  # the same run once more
            config.stages = ["remove", "heal", "quantise"]
            compress(config)
            kinds = ["int4"]
            if name == "whole method":
                kinds = ["pruned", "healed", "int4-alone", "int4"] if seed == seeds[0] else ["healed", "int4"]
            compared = {kind: str(folder / kind) for kind in kinds}
            if "pruned" in kinds:
                compared = {"original": "shapes-sd3"} | compared
            rows.append({"seed": seed, "pipelines": measured(compared, copy.copy(config), folder)})
        same = not rows  # as the whole method
        rows = rows or figures["variants"]["whole method"]["seeds"]
        figures["variants"][name] = {"dropped": plans[name], "same_as_whole": same, "seeds": rows}
    whole = figures["variants"]["whole method"]["seeds"]
    original, small = (whole[0]["pipelines"][who] for who in ("original", "int4"))
    bf16 = 2 * original["parameters"]
    figures["summary"] = {
        "removed_share": 1 - small["parameters"] / original["parameters"],
        "bytes_bf16": bf16,
        "bytes_int4": small["denoiser_bytes"],
        "bytes_saved": 1 - small["denoiser_bytes"] / bf16,
        "blocks_left": 1 - len(plans["whole method"]) / 12,
        "latency_ratio": whole[0]["pipelines"]["pruned"]["latency"] / original["latency"],
        "strict_original": original["rewards"][STRICT],
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
    args = parser.parse_args()
    figures = run(args.quick, args.seeds[:1] if args.quick else args.seeds)
    record("pruning", figures, args.quick)
    print(json.dumps(figures["summary"]))


if __name__ == "__main__":
    main()
