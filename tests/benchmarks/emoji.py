"""Pictures nobody here made: noto over openmoji, learnt by ``shapes-sd``; implicit accuracy on held-out captions.

    python -m tests.benchmarks.emoji_pairs --output outputs/emoji
    python tests/benchmarks/emoji.py

Implicit-reward accuracy as in Diffusion-DPO's supplement: the mean of the implicit reward over ten noise levels, noise
shared inside the pair; before training it is one half by definition, since policy and reference are the same network.
So "before" is measured for a LoRA that a seed has disturbed but not trained.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[2]))

from align import families
from align.data.dataset import Setup
from align.data.latent_cache import EncodedDataset
from align.data.preferences import PreferencePairs
from align.objectives import Context
from align.objectives.dpo import DPO
from align.policy.policy import LoRA, Policy
from align.training.checkpoint import WEIGHTS
from align.training.run_folder import RunFolder
from tests.benchmarks import record

CONFIG = "configs/dpo_emoji.yaml"
DRAWS = 10


@torch.no_grad()
def accuracy(policy: Policy, pairs: EncodedDataset) -> float:
    """The share of pairs whose winner has the larger implicit reward, ties one half."""
    objective, batch, right = DPO(proportion_empty_prompts=0.0), 32, 0.0
    for start in range(0, len(pairs), batch):
        index = range(start, min(start + batch, len(pairs)))
        margin = torch.zeros(len(index))
        for draw in range(DRAWS):
            ctx = Context(policy, 1, draw, index)
            errors, _ = objective.errors(ctx, objective.rollout(ctx, pairs.batch(index)))
            margin += (errors.loser - errors.ref_loser) - (errors.winner - errors.ref_winner)
        right += float((margin > 0).sum() + 0.5 * (margin == 0).sum())
    return right / len(pairs)


def run(seed: int, folder: Path, data: Path) -> dict[str, Any]:
    if not (folder / "pytorch_lora_weights.safetensors").exists():
        more = ["--output_dir", str(folder), "--seed", str(seed), "--resume_from_checkpoint", "latest"]
        subprocess.run([sys.executable, "-m", "align.train", "--config", CONFIG, *more], check=True)
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    family = families.load(settings["pretrained_model_name_or_path"])
    pairs = PreferencePairs(str(data / "heldout.parquet")).prepare(Setup(family))
    torch.manual_seed(seed)
    policy = Policy(family, LoRA(settings["lora"]["rank"]))
    for parameter in policy.parameters():
        parameter.data += 1e-3 * torch.randn(parameter.shape)
    before = accuracy(policy, pairs)
    checkpoint = RunFolder(folder).latest()
    assert checkpoint is not None, f"{CONFIG} has to write a checkpoint at its last step"
    policy.load_state(load_file(checkpoint / WEIGHTS))
    return {"seed": seed, "before": before, "after": accuracy(policy, pairs), "held_out_pairs": len(pairs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("outputs/emoji"))
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if not (args.data / "heldout.parquet").exists():
        parser.error(
            f"no heldout.parquet in {args.data}: run python -m tests.benchmarks.emoji_pairs --output {args.data}"
        )
    seeds = [0] if args.quick else [0, 1, 2]
    runs = [run(seed, Path(f"outputs/bench/emoji-{seed}"), args.data) for seed in seeds]
    figures = {"config": CONFIG, "seeds": runs}
    record("emoji", figures, args.quick)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
