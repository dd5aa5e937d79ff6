"""Peak memory: traced without a weight against measured, then at full size, and of the recipes that fit small GPUs.

    python tests/benchmarks/memory.py [--quick] [--parts measured gpu full_size recipes] [--only flux]

*Measured* is what torch's own CPU allocator says (every allocation and release that the profiler saw, on top of
networks and optimizer's state) while ``align.train``'s loop rolls out and updates a second time, and for cached data
in a call of the VAE and of the text encoders as encoding makes them, on tiny pipelines of real classes at 64 pixels,
float32. *Traced* is :func:`align.training.memory.trace` of the same config from the JSON files of the same folder.
*gpu* sets it beside what ``gpu_online.py`` measured on an H200. *Full size* are the published architectures from config
files (:mod:`tests.benchmarks.config_folders`), bf16, LoRA 16, gradient checkpointing, one row at once, 1024 pixels
(SD1.5: 512); *recipes* the configs that say what they take.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import yaml
from PIL import Image
from torch import nn
from torch.profiler import ProfilerActivity, profile

from align.common.command import dumped, parse
from align.data.latent_cache import TEXTS
from align.training import advice
from align.training.config import TrainConfig
from align.training.ledger import Part
from align.training.memory import trace
from align.training.trainer import Trainer
from tests import tiny_families
from tests.benchmarks import RESULTS, config_folders, record

FAMILIES = ("sdxl", "flux-dev", "sana")
SIDE = 64
PAIRS = 4
OBJECTIVES: dict[str, dict[str, Any]] = {
    "DPO": {"beta": 100.0},
    "NFT": {"sampler": {"num_inference_steps": 3}, "images_per_prompt": 2},
    "PolicyGradient": {"sampler": {"num_inference_steps": 3}, "images_per_prompt": 2},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "LoRA, checkpointing": {"gradient_checkpointing": True},
    "full": {"lora": None},
    "full, checkpointing": {"lora": None, "gradient_checkpointing": True},
}
QLORA = {"quantize": "nf4", "offload_idle": True, "vae_slicing": True, "use_8bit_adam": True}
FULL_SIZE: dict[str, tuple[str, dict[str, Any]]] = {
    "DPO": ("DPO", {}),
    "policy gradient": ("PolicyGradient", {}),
    "DPO, QLoRA": ("DPO", QLORA),
}
HUB = {
    "CompVis/stable-diffusion-v1-4": "SD1.5",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "SD1.5",
    "stabilityai/stable-diffusion-xl-base-1.0": "SDXL",
    "stabilityai/stable-diffusion-3.5-large": "SD3.5 large",
    "black-forest-labs/FLUX.1-dev": "FLUX.1 dev",
}
CONFIGS = Path(__file__).parents[2] / "configs"
BACKPROPAGATION = ("alignprop_sd15.yaml", "refl_sd14.yaml")  # through sampler and autoencoder
RECIPES = sorted([*CONFIGS.glob("qlora_*.yaml"), *(CONFIGS / name for name in BACKPROPAGATION)])


def config_of(model: Path, objective: str, root: Path, **settings: Any) -> TrainConfig:
    """A run of ``objective`` on ``model``, two rows at once unless told otherwise."""
    side = settings.pop("resolution")
    pairs = {"path": str(root / "pairs.jsonl"), "cache_dir": str(root / "cache"), "resolution": side}
    data = pairs if objective == "DPO" else {"path": "shapes-prompts", "resolution": side}
    content: dict[str, Any] = {
        "pretrained_model_name_or_path": str(model),
        "data": {"class_path": "PreferencePairs" if objective == "DPO" else "Prompts", "init_args": data},
        "objective": {"class_path": objective, "init_args": OBJECTIVES[objective]},
        "output_dir": str(root / "run"),
        "overwrite_output_dir": True,
        "train_batch_size": 2,
        "checkpointing_steps": 0,
        "report_to": "none",
        "samples": {"prompts": []},
        **({} if objective == "DPO" else {"rollout_batch_size": 2, "rewards": [{"name": "tests.helpers.Bright"}]}),
        **settings,
    }
    (root / "run.yaml").write_text(yaml.safe_dump(content))
    options = [
        "--config",
        str(root / "run.yaml"),
        *(["--dry_run", "--memory", "24GB"] if "quantize" in settings else []),
    ]
    return parse(TrainConfig, "align.train", "", options)[0]


def write_pairs(root: Path) -> None:
    """Pairs of pictures that differ, each with its own caption."""
    for k in range(PAIRS + 1):
        pixels = torch.randint(0, 256, (SIDE, SIDE, 3), generator=torch.Generator().manual_seed(k), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(root / f"{k}.png")
    rows = [{"caption": f"a picture {k}", "chosen": f"{k}.png", "rejected": f"{k + 1}.png"} for k in range(PAIRS)]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def resident(loop: Trainer) -> int:
    """Bytes that a GPU would hold between updates: the networks, what trains, the optimizer's state."""
    networks = [*loop.family.pipe.components.values(), loop.policy.weights.frozen]
    tensors = [x for part in networks if isinstance(part, nn.Module) for x in (*part.parameters(), *part.buffers())]
    if hasattr(loop, "optimizer"):
        tensors += [x for state in loop.optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}.values())


def measured_peak(loop: Trainer, run: Callable[[], object]) -> int:
    """The most bytes at once while ``run`` runs, by the allocator's events, on top of what is :func:`resident`."""
    gc.collect()
    before = resident(loop)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return before + most


@torch.no_grad()
def encode(loop: Trainer) -> None:
    """What encoding a data set asks of the device, a call each."""
    family, count = loop.family, loop.config.data.vae_batch
    family.to_latent(torch.zeros(1, 3, SIDE, SIDE).expand(count, -1, -1, -1))
    family.encode([f"a picture {k}" for k in range(TEXTS)])


def compare(name: str, objective: str, variant: str, root: Path) -> dict[str, Any]:
    """Traced and measured peak of one run."""
    config = config_of(root / name, objective, root, resolution=SIDE, **VARIANTS[variant])
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), advice.quiet():
        traced = trace(config)
        loop = Trainer(config, dumped(config))
        loop.start()
        start = measured_peak(loop, lambda: encode(loop)) if objective == "DPO" else 0
        list(loop.rollout())
        update = measured_peak(loop, lambda: list(loop.rollout()))
    measured = max(start, update)
    without = max(phase.total for phase in traced.phases if phase.name != "encoding" or objective != "DPO")
    return {
        "traced": traced.peak.total,
        "measured": measured,
        "off": traced.peak.total / measured - 1,
        "update_traced": without,
        "update_measured": update,
        "update_off": without / update - 1,
        "phase": traced.peak.name,
    }


def full_size(name: str, root: Path) -> dict[str, Any]:
    """Traced peaks of a published architecture."""
    folder, found = config_folders.write(name, root), {}
    for title, (objective, more) in FULL_SIZE.items():
        if objective != "DPO" and name not in HUB.values():
            continue
        if name == "PixArt-Sigma":
            more = {"lora": None} | {key: value for key, value in more.items() if key != "quantize"}
        settings: dict[str, Any] = {"mixed_precision": "bf16", "gradient_checkpointing": True, "train_batch_size": 1}
        side = config_folders.FOLDERS[name].resolution
        config = config_of(
            folder, objective, root, resolution=side, **settings | {"dry_run": True, "memory": "1GB"} | more
        )
        if objective != "DPO":
            config.objective.sampler.batch_size = 1
        else:
            config.data.vae_batch = 1
        with advice.quiet():
            traced = trace(config)
        parts = {part.value: size for part, size in traced.peak.parts.items() if size}
        found[title] = {"peak": traced.peak.total, "phase": traced.peak.name, "parts": parts}
        found[title]["update"] = next(phase.total for phase in traced.phases if phase.name == "update")
    return found


def recipe(path: Path, root: Path) -> dict[str, Any]:
    """The traced peak of a config, its model's files from :mod:`config_folders`."""
    config, _ = parse(TrainConfig, "align.train", "", ["--config", str(path)])
    config.pretrained_model_name_or_path = str(config_folders.write(HUB[config.pretrained_model_name_or_path], root))
    with advice.quiet():
        peak = trace(config).peak
    return {"peak": peak.total, "phase": peak.name}


def gpu(model: str, config_name: str, pictures: int, root: Path) -> dict[str, Any]:
    """What ``gpu_online.py`` measured on an H200, traced: a rollout of one prompt, and rows of the config's batch. Text
    encoders, small there, are left out here and what stood there before is not."""
    config, _ = parse(TrainConfig, "align.train", "", ["--config", str(CONFIGS / f"{config_name}.yaml")])
    config.mixed_precision, config.samples.prompts, config.rollout_batch_size = "bf16", [], 1
    config.objective.images_per_prompt = pictures
    config.pretrained_model_name_or_path = str(config_folders.write(model, root))
    with advice.quiet():
        found = trace(config)
    peaks = {phase.name: (phase.total - phase.parts[Part.TEXT]) / 2**30 for phase in found.phases}
    measured = json.loads((RESULTS / "online_gpu.json").read_text())["measurements"][GPU[model]]
    pairs = {"rollout": "rollout", "training": "update"}
    return {
        key: {"traced_gib": peaks[phase], "measured_gib": measured[key]["peak_gib"]} for key, phase in pairs.items()
    }


GPU = {"SD3.5 medium": "sd35_medium_flow_grpo/eager", "SD1.5": "sd15_ddpo/eager"}
PARTS = ("measured", "gpu", "full_size", "recipes")


def run_part(part: str, quick: bool, root: Path, only: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if part == "measured":
        write_pairs(root)
        for name in FAMILIES[:1] if quick else FAMILIES:
            tiny_families.save(name, root / name)
            for objective in OBJECTIVES:
                for variant in list(VARIANTS)[: 2 if quick else None]:
                    if only in (title := f"{name}, {objective}, {variant}"):
                        yield title, compare(name, objective, variant, root)
    elif part == "gpu":
        yield "SD1.5", gpu("SD1.5", "ddpo_sd15", 8, root)
        if not quick:
            yield "SD3.5 medium", gpu("SD3.5 medium", "flow_grpo_sd35", 9, root)
    elif part == "full_size":
        for name in ("SD1.5",) if quick else config_folders.FOLDERS:
            if only in name:
                yield name, full_size(name, root)
    else:
        for path in RECIPES[: 1 if quick else None]:
            if only in path.name:
                yield path.name, recipe(path, root)


def keep(part: str, figures: dict[str, Any]) -> None:
    """Write ``figures`` of ``part`` and leave the others as they are: together they take half an hour."""
    file = RESULTS / "memory.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    record("memory", {name: found.get(name, {}) | (figures if name == part else {}) for name in PARTS})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one family, one model, and nothing is written")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="the others stay as they were written")
    parser.add_argument("--only", default="", help="runs, models or recipes whose name has this in it")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    worst: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in arguments.parts:
            found: dict[str, Any] = {}
            for title, figures in run_part(part, arguments.quick, Path(folder), arguments.only):
                found[title] = figures
                print(title, json.dumps(figures), flush=True)
                if not arguments.quick:
                    keep(part, found)
            if part == "measured":
                worst = {key: max((e[key] for e in found.values()), key=abs) for key in ("off", "update_off")}
    print(json.dumps({"parts": arguments.parts, **worst}))


if __name__ == "__main__":
    main()
