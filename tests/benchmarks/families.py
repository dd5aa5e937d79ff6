"""Every family against stock diffusers, on tiny pipelines of its class: what :mod:`align.testing` checks, measured.

    python tests/benchmarks/families.py [--quick] [--families sdxl flux-dev]

Differences are the greatest of any number, float32, one thread: latents and images over two sizes (one not square),
guidance off and on; a row alone against the row in its batch; the path against the grid; a LoRA as stock
``load_lora_weights`` has it, and how far it moves the images; the likelihood ratio on replay. Then ``align.train`` by
command: one update each of DPO, a policy gradient and NFT, its loss. And a NF4 copy, saved and read again.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import yaml

import align.train
import pruning
from align.data.prompts import PromptBatch
from align.families import Family
from align.objectives import Context
from align.objectives.online.collect import collect
from align.objectives.online.replay import log_probs
from align.policy.policy import LoRA, Policy
from align.sampling.sampler import Sampler
from align.testing import FamilyCase
from pruning.quantize import quantize
from tests import tiny_families
from tests.benchmarks import record
from tests.test_more_families import Flux2Case, pairs

QUICK = ("sdxl", "flux-schnell", "z-image")
STEPS = 2
OBJECTIVES: dict[str, dict[str, Any]] = {
    "DPO": {"beta": 100.0},
    "PolicyGradient": {"sampler": {"num_inference_steps": 3}, "images_per_prompt": 2},
    "NFT": {"sampler": {"num_inference_steps": STEPS}, "images_per_prompt": 2},
}


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return (ours - theirs).abs().max().item()


@torch.no_grad()
def parity(case: FamilyCase) -> dict[str, float]:
    family = case.load()
    stock, found = case.load_stock(family), {"latents": 0.0, "images": 0.0}
    side = family.resolution
    for size, scale in itertools.product(
        ((side, side), (2 * side, side)), (family.unguided_scale, case.guidance_scale)
    ):
        x = case.noise(family, *size)
        latents = case.sample(family, x, scale)
        theirs = case.draw(family, stock, x, scale, "latent")
        found["latents"] = max(found["latents"], apart(case.given(family, latents), theirs))
        images = case.draw(family, stock, x, scale, "pt")
        found["images"] = max(found["images"], apart(family.to_image(latents), images))
    x, t, cond = case.inputs(family)
    whole = family.forward(x, t, cond, case.guidance_scale)
    alone = [
        family.forward(x[k : k + 1], t[k : k + 1], family.encode([p]), case.guidance_scale)
        for k, p in enumerate(case.prompts)
    ]
    grid = family.grid(7)
    path = max(apart(a, b) for a, b in zip(family.path(grid.t[:-1]), (grid.alpha[:-1], grid.sigma[:-1]), strict=True))
    return found | {"row": apart(torch.cat(alone), whole), "path": path}


@torch.no_grad()
def lora(case: FamilyCase) -> dict[str, float | None]:
    family = case.load()
    if not family.lora_targets:
        return {"lora": None, "lora_moves": None}
    policy = Policy(case.load(), LoRA(3, alpha=6.0), reference=False)
    x = case.noise(family)
    base = family.to_image(case.sample(family, x, case.guidance_scale))
    case.disturb(policy)
    images = family.to_image(case.sample(policy.family, x, case.guidance_scale, policy.predict))
    stock = case.load_stock(family)
    with tempfile.TemporaryDirectory() as folder:
        policy.save(Path(folder))
        stock.load_lora_weights(folder)
    drawn = case.draw(family, stock, x, case.guidance_scale, "pt")
    return {"lora": apart(images, drawn), "lora_moves": apart(images, base)}


@torch.no_grad()
def replay(case: FamilyCase) -> dict[str, float]:
    family = case.load()
    policy = Policy(family, LoRA(2) if family.lora_targets else None, reference=False)
    case.disturb(policy)
    sampler = Sampler(4, case.guidance_scale, batch_size=4)
    ctx = Context(policy, 0, 0, range(2 * len(case.prompts)))
    batch = PromptBatch(list(case.prompts), family.encode(case.prompts), [], list(range(len(case.prompts))))
    drawn = collect(ctx, sampler, batch, 2, range(3)).trajectories
    assert drawn.log_probs is not None
    return {"ratio": ((log_probs(ctx, sampler, drawn, 5) - drawn.log_probs).exp() - 1).abs().max().item()}


@torch.no_grad()
def nf4(case: FamilyCase, root: Path) -> dict[str, float]:
    """How far the packed model is from the whole one, and what is read again from the packed one."""
    family = case.load()
    inputs = case.inputs(family)
    whole = family.forward(*inputs)
    quantize(family.denoiser)
    packed = family.forward(*inputs)
    family.denoiser.save_pretrained(root / "nf4")
    family.pipe.register_modules(**{family.denoiser_name: pruning.load(root / "nf4")})
    return {"nf4": apart(packed, whole), "nf4_reloaded": apart(family.forward(*inputs), packed)}


def trained(case: FamilyCase, root: Path) -> dict[str, float]:
    """The loss of one update of each objective, by command."""
    family: Family = case.load()
    (root / "prompts.txt").write_text("a red circle\ntwo blue stars\n")
    drawn = pairs(root, family.resolution)
    losses = {}
    for name, arguments in OBJECTIVES.items():
        prompts = {"path": str(root / "prompts.txt")}
        data = {"class_path": "PreferencePairs", "init_args": drawn} if name == "DPO" else None
        config = {
            "pretrained_model_name_or_path": str(case.folder),
            "data": data or {"class_path": "Prompts", "init_args": prompts},
            "objective": {"class_path": name, "init_args": arguments},
            "output_dir": str(root / name),
            "lora": {"rank": 2} if family.lora_targets else None,
            "train_batch_size": 2,
            "max_train_steps": 1,
            "learning_rate": 1e-3,
            "checkpointing_steps": 0,
            "report_to": "none",
            "samples": {"prompts": []},
        } | ({} if name == "DPO" else {"rollout_batch_size": 2, "rewards": [{"name": "tests.helpers.Bright"}]})
        (root / f"{name}.yaml").write_text(yaml.safe_dump(config))
        with contextlib.redirect_stdout(io.StringIO()):
            status = align.train.main(["--config", str(root / f"{name}.yaml")])
        if status:
            raise SystemExit(f"{name} on {case.folder.name} ended with {status}")
        lines = [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
        losses[name] = next(line["loss"] for line in lines if "loss" in line)
    return losses


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK)} only, and nothing is written")
    parser.add_argument("--families", nargs="+", choices=[*tiny_families.BUILD])
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    for name in arguments.families or (QUICK if arguments.quick else tiny_families.BUILD):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            kind = Flux2Case if name.startswith("flux2") else FamilyCase
            case = kind(tiny_families.save(name, root / name))
            pipeline = {"pipeline": type(case.load().pipe).__name__}
            measured = parity(case) | lora(case) | replay(case) | nf4(case, root) | {"losses": trained(case, root)}
            figures[name] = pipeline | measured
        print(name, json.dumps(figures[name]), flush=True)
    record("families", {"families": figures}, arguments.quick or bool(arguments.families))
    print(json.dumps({name: entry["images"] for name, entry in figures.items()}))


if __name__ == "__main__":
    main()
