"""Pruning, healing and INT4 of shapes-sd3, and what each part of the method contributes; seeds 0, 1, 2.

    python tests/benchmarks/pruning.py

The method of HierarchicalPrune (arXiv 2508.04663) by configs/compress_shapes_sd3.yaml, with positional weight
preservation, and changed in one thing: without position weighting (another plan), preservation (as the config has it),
or sensitivity guidance; healed for longer, or longer and without preservation and then with its biases tuned, which is
the config but for the number of updates; or with whole blocks only, as stock diffusers loads them. Strict ShapesEval on
the held-out prompts, eight pictures each (with two, chance alone moves it by 0.02), for the original, INT4 alone,
pruned and not healed, and every variant after INT4. ``--quick`` heals two variants for 40 steps and records nothing.
Finished variants are kept in ``outputs/`` and not run again. ``--only VARIANT ...`` runs those alone; of the others it
puts down what was run before, here or for ``results/pruning.json``, as long as configs and plan are still the same.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import yaml

from align.common.command import parse
from align.evaluation.compare import STRICT
from pruning.compress import Compress, compress
from pruning.plan import Plan
from pruning.report import Reporting, report
from rewards.common.files import write_text
from tests.benchmarks import RESULTS, day, earlier, record, runs_folder, settings_of, span

CONFIG = "configs/compress_shapes_sd3.yaml"
PAPER = {"preservation": True}
BLOCKS = PAPER | {"config": "configs/compress_blocks_shapes_sd3.yaml"}
VARIANTS: dict[str, dict[str, Any]] = {
    "whole method": PAPER,
    "without position weighting": PAPER | {"position_weighting": False},
    "without preservation": {},
    "without sensitivity guidance": PAPER | {"sensitivity": "none"},
    "healed eight times as long": PAPER | {"max_train_steps": 3200, "ema_decay": 0.998},
    "without preservation, healed four times as long": {"max_train_steps": 1600, "ema_decay": 0.995, "tune": True},
    "whole blocks only": BLOCKS,
    "whole blocks only, without preservation": BLOCKS | {"preservation": False},
    "whole blocks only, without sensitivity guidance": BLOCKS | {"sensitivity": "none"},
    # with the first seed only
    "whole blocks only, healed four times as long": BLOCKS | {"max_train_steps": 1500, "ema_decay": 0.995},
    "whole blocks only, healed fifteen times as long": BLOCKS | {"max_train_steps": 6000, "ema_decay": 0.998},
}
QUICK = ("whole method", "whole blocks only")
PICTURES = 8


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
    write_text(folder / "heal.yaml", yaml.safe_dump(heal))
    config.heal = folder / "heal.yaml"
    if "tune" in change:
        assert config.tune is not None
        tune = yaml.safe_load(config.tune.read_text()) | {"seed": seed}
        write_text(folder / "tune.yaml", yaml.safe_dump(tune))
        config.tune = folder / "tune.yaml"
    else:
        config.tune = None
    config.position_weighting = change.get("position_weighting", True)
    config.report = Reporting(samples_per_prompt=1 if quick else PICTURES, max_prompts=48 if quick else None)
    return config


def planned(root: Path, name: str, seed: int, quick: bool) -> tuple[Compress, list[str]]:
    """The compression of one variant with one seed, its plan made, and what goes."""
    folder = root / name.replace(",", "").replace(" ", "-") / str(seed)
    folder.mkdir(parents=True, exist_ok=True)
    profile = root / "profile.json"
    if profile.exists():
        shutil.copy(profile, folder / "profile.json")
    config = settings(folder, seed, VARIANTS[name], quick)
    config.stages = ["analyze", "plan"]
    compress(config)
    shutil.copy(folder / "profile.json", profile)
    return config, list(Plan.load(folder / "plan.json").dropped)


def one(config: Compress, name: str, first: bool) -> dict[str, Any]:
    """The other stages of a variant, and what its pipelines are worth; beside the ``first`` of a plan the original."""
    folder = config.output_dir
    config.stages = ["remove", "heal", "quantize", "tune"]
    compress(config)
    kinds = ["healed"] if name.startswith(("whole", "healed")) or config.tune else []
    kinds += ["int4"] if config.tune is None else ["int4", "int4-tuned"]
    if first:
        kinds = ["original", "pruned", *(["int4-alone"] if name == "whole method" else []), *kinds]
    folders = {kind: "shapes-sd3" if kind == "original" else str(folder / kind) for kind in kinds}
    found = folder / "report.json"
    if not found.exists():
        report(folders, config.report, folder)
    return {"date": day(found), "pipelines": json.loads(found.read_text())["pipelines"]}


def run(quick: bool, seeds: list[int], only: list[str]) -> dict[str, Any]:
    root = runs_folder(quick) / "pruning"
    digest = settings_of(
        [CONFIG, BLOCKS["config"], "configs/heal_shapes_sd3.yaml", "configs/tune_shapes_sd3.yaml"], pictures=PICTURES
    )
    before = earlier("pruning", digest)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    plans: dict[str, list[str]] = {}
    for seed in seeds:
        for name, change in VARIANTS.items():
            longer = "max_train_steps" in change
            if (quick and name not in QUICK) or (longer and "config" in change and seed != seeds[0]):
                continue
            config, plans[name] = planned(root, name, seed, quick)
            if "position_weighting" in change and plans[name] == plans["whole method"]:
                continue  # the whole method once more
            if name in only or (config.output_dir / "report.json").exists():
                first = name in ("whole method", "whole blocks only") and seed == seeds[0]
                rows[name].append({"seed": seed, "dropped": plans[name], **one(config, name, first)})
            else:
                known = before.get("variants", {}).get(name, {"seeds": []})["seeds"]
                rows[name] += [row for row in known if row["seed"] == seed and row["dropped"] == plans[name]]
    figures: dict[str, Any] = {"config": CONFIG, "settings": digest, "variants": {}}
    for name, found in rows.items():
        as_whole = "position_weighting" in VARIANTS[name] and plans.get(name) == plans["whole method"]
        if found or as_whole:
            seeds_of = rows["whole method"] if as_whole else found
            figures["variants"][name] = {"dropped": plans[name], "same_as_whole": as_whole, "seeds": seeds_of}
    figures["date"] = span(row["date"] for found in rows.values() for row in found)
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
                for kind in ("pruned", "healed", "int4", "int4-alone", "int4-tuned")
            }
            for name, variant in figures["variants"].items()
        },
    }
    pictures = {"gallery": "pruning", "plan": "pruning_plan", "profile": "pruning_profile"}
    for picture, name in pictures.items() if not quick else ():
        drawn = root / "whole-method" / str(seeds[0]) / f"{picture}.png"
        if drawn.exists():
            shutil.copy(drawn, RESULTS / f"{name}.png")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS), default=list(VARIANTS), metavar="VARIANT")
    args = parser.parse_args()
    figures = run(args.quick, args.seeds[:1] if args.quick else args.seeds, args.only)
    record("pruning", figures, args.quick)
    print(json.dumps(figures["summary"]))


if __name__ == "__main__":
    main()
