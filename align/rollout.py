"""Draw pictures for people to compare, and keep the trajectories that made them.

    python -m align.rollout --prompts my_prompts.txt --output_dir outputs/round1

writes into ``output_dir``

- ``images/00000.png``: picture i of prompt j has the number k * j + i, with k ``images_per_prompt``;
- ``contact-sheet-00000.png``: the pictures of a shard with their numbers, a prompt a row;
- ``trajectories-00000.safetensors``: ``latents`` (n, T+1, C, h, w), every state once, and ``log_probs`` (n, T);
- ``manifest.jsonl``: a line a picture, see :class:`align.data.trajectories.ManifestLine`; ``rollout.json``: what all
  of that depends on.

Killed and called again it goes on at the first shard that is missing. What people say of the pictures goes into a file
that :class:`align.data.annotations.LabelledRollout` reads; ``align.train`` trains on both.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from align import families
from align.common.command import command, parse
from align.common.errors import require_at_least
from align.data.prompts import Prompts, PromptSet
from align.data.trajectories import RolloutFolder, RolloutRecord, describe
from align.evaluation.rollout_writer import RolloutWriter
from align.families import Family
from align.objectives.online.rewards import RewardConfig, Scorer
from align.policy.policy import Policy
from align.sampling.sampler import Sampler


@dataclass
class RolloutSettings:
    """Draw pictures and keep their trajectories.

    Args:
        prompts: a prompt file (.txt, .jsonl, .json) or ``shapes-prompts``, the embedded world's.
        limit: use the first so many prompts.
        pretrained_model_name_or_path: diffusers folder, hub id, ``shapes-sd`` or ``shapes-sd3``.
        weights: the run or LoRA folder whose weights draw, such as the last round's; null is the pipeline as it is.
        output_dir: the rollout folder; one that was begun with the same settings is finished.
        sampler: how; training has to say the same steps, guidance and kernel.
        images_per_prompt: k, pictures of each prompt (D3PO's human rounds: 7).
        shared_noise: the pictures of a prompt start from one noise, or the preference is mostly about noise.
        seed: names every random draw.
        rewards: what the pictures are scored by, for the manifest; nothing trains on it.
        prompts_per_shard: prompts drawn and written at once; the draws do not depend on it.
        half: keep the states in float16, half the disk; ``log_probs`` are of the states before rounding.
        resolution: side in pixels; null is the model's own.
        mixed_precision: autocast; the weights are kept in this precision too.
        device: where to run; null takes a GPU where there is one.
    """

    prompts: str
    limit: int | None = None
    pretrained_model_name_or_path: str = "shapes-sd"
    weights: Path | None = None
    output_dir: Path = Path("outputs/rollout")
    sampler: Sampler = field(default_factory=Sampler)
    images_per_prompt: int = 7
    shared_noise: bool = True
    seed: int = 0
    rewards: list[RewardConfig] = field(default_factory=list)
    prompts_per_shard: int = 16
    half: bool = False
    resolution: int | None = None
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    device: str | None = None


def rollout(config: RolloutSettings) -> Path:
    """Draw what ``config`` says and ``output_dir`` lacks; returns the folder."""
    require_at_least(2, config, "images_per_prompt")
    require_at_least(1, config, "prompts_per_shard")
    rows = Prompts(config.prompts, config.limit).read()
    scorer = Scorer.of(config.rewards) if config.rewards else None
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    family = families.load(config.pretrained_model_name_or_path, families.DTYPES[config.mixed_precision], device)
    if config.weights is not None:
        family = families.tuned(family, str(config.weights))
    policy = Policy(family, None, reference=False)
    policy.denoiser.requires_grad_(False).to(family.dtype)  # nothing trains here, so nothing has to be float32
    folder, record = RolloutFolder(config.output_dir), _record(config, rows, family)
    RolloutWriter(folder, record, policy, PromptSet(family, rows), config.sampler, scorer).write()
    print(f"{record.images} pictures of {record.prompts} prompts in {folder.path}")
    return folder.path


def _record(config: RolloutSettings, rows: Sequence[Mapping[str, Any]], family: Family) -> RolloutRecord:
    weights = hashlib.blake2b(digest_size=8)  # by their bytes: others may come to lie at the same path
    for parameter in family.denoiser.parameters():
        weights.update(parameter.detach().cpu().flatten().view(torch.uint8).numpy())
    text = json.dumps(rows, sort_keys=True)
    return RolloutRecord(
        model=config.pretrained_model_name_or_path,
        weights=str(config.weights) if config.weights else None,
        digest=weights.hexdigest(),
        mixed_precision=config.mixed_precision,
        seed=config.seed,
        sampler=describe(config.sampler, family),
        shared_noise=config.shared_noise,
        resolution=config.resolution,
        latent_shape=list(family.latent_shape(config.resolution)),
        prompts=len(rows),
        prompts_digest=hashlib.sha256(text.encode()).hexdigest()[:16],
        images_per_prompt=config.images_per_prompt,
        prompts_per_shard=config.prompts_per_shard,
        images=len(rows) * config.images_per_prompt,
        shards=-(-len(rows) // config.prompts_per_shard),
        half=config.half,
        rewards=[asdict(reward) for reward in config.rewards],
    )


def main(argv: Sequence[str] | None = None) -> int:
    config, _ = parse(RolloutSettings, "align.rollout", __doc__, argv)
    return command(lambda: rollout(config))


if __name__ == "__main__":
    sys.exit(main())
