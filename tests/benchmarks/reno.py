"""ReNO beside the best of as many pictures, both by the same small network, judged by the exact reward.

    python tests/benchmarks/reno.py shapes-sd3
    python tests/benchmarks/reno.py shapes-sd

Every fourth held-out prompt. ReNO (configs/reno_shapes_sd3.yaml) has so many iterates of one noise; the best of N has N
pictures from N noises, of which it takes the one that ``ShapesNet`` likes most: as many network evaluations, without
gradients. What the two choose, and the picture that ReNO starts from, is judged by ``Shapes``, which neither was told.
``--quick`` takes 6 prompts and 3 iterates and records nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor

from align import families
from align.evaluation import gallery
from align.objectives.reno import BestNoise
from align.policy.initial_noise import InitialNoise
from align.shapes.world import held_out_prompts
from rewards import load
from rewards.common.files import write_text
from tests.benchmarks import RESULTS, command, metrics, record, runs_folder
from tests.benchmarks.find import STEPS, interval, judged, pictures

CONFIG = "configs/reno_shapes_sd3.yaml"


def run(model: str, quick: bool) -> dict[str, Any]:
    family, folder = families.load(model), runs_folder(quick) / f"reno_{model}"
    everything = list(dict.fromkeys(held_out_prompts()))
    prompts, iterates = (everything[::40], 3) if quick else (everything[::4], 16)
    write_text(folder / "prompts.txt", "\n".join(prompts) + "\n")
    if not (folder / "run/find.safetensors").exists():
        words = ["--pretrained_model_name_or_path", model, "--data.init_args.path", str(folder / "prompts.txt")]
        words += ["--data.init_args.limit", str(len(prompts)), "--rollout_batch_size", str(len(prompts))]
        words += ["--train_batch_size", str(len(prompts) // 3), "--max_rollouts", str(iterates)]
        command("align.train", "--config", CONFIG, "--output_dir", str(folder / "run"), *words)
    lines = [line for line in metrics(folder / "run") if "best_so_far" in line]
    found = InitialNoise.load(folder / "run")
    before = BestNoise(prompts, family.latent_shape(), family.source, family.scheduler_name, 0)
    net = load("ShapesNet")

    def liked(images: Tensor, each: int) -> Tensor:
        """(P, each) by the network."""
        texts = [prompt for prompt in prompts for _ in range(each)]
        return net.score(images=images, prompts=texts).view(len(prompts), each)

    def told(images: Tensor) -> dict[str, float]:
        scores = {"net": liked(images, 1), **{mode: judged(images, prompts, mode) for mode in ("graded", "strict")}}
        return {name: score.mean().item() for name, score in scores.items()}

    with torch.no_grad():
        many = pictures(family, prompts, iterates, 80000).unflatten(0, (len(prompts), iterates))
        picked = many[torch.arange(len(prompts)), liked(many.flatten(0, 1), iterates).argmax(1)]
        learned = pictures(family, prompts, 1, 50000, found)
        start = pictures(family, prompts, 1, 50000, before)
    gain = (judged(learned, prompts) - judged(picked, prompts)).flatten().tolist()
    if not quick:
        both = torch.stack([part[k] for k in range(0, len(prompts), 5) for part in (start, picked, learned)])
        name = RESULTS / f"reno_{model.replace('-', '_')}.png"
        gallery.save_grid(both, prompts[::5], name, 6, ("start", f"best of {iterates}", "ReNO"))
    return {
        "model": model,
        "config": CONFIG,
        "prompts": len(prompts),
        "iterates": iterates,
        "evaluations": iterates * len(prompts) * STEPS * family.evaluations(family.default_guidance_scale),
        "start": told(start),
        "best_of_n": told(picked),
        "reno": told(learned),
        "reno_less_best_of_n_ci": interval(gain),
        "curve": [line["best_so_far"] for line in lines],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("shapes-sd", "shapes-sd3"))
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    figures = run(args.model, args.quick)
    record(f"reno_{args.model.replace('-', '_')}", figures, args.quick)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
