"""The rollout folder being written: images for people to compare, and the trajectories that made them.

:class:`align.data.trajectories.RolloutFolder` says what lies where and reads it again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from align.common.assets import TakesPaths
from align.common.errors import NonFinite
from align.common.resolution import Resolution, sides
from align.data.prompts import PromptSet
from align.data.trajectories import ManifestLine, RolloutFolder, RolloutRecord, describe
from align.evaluation import gallery
from align.families import Family
from align.families.identity import contents_of_model
from align.objectives import Context
from align.objectives.online.collect import collect
from align.objectives.online.rewards import RewardConfig, Scorer
from align.policy.policy import Policy
from align.sampling.sampler import Sampler
from rewards.common.files import atomic, write_text


@dataclass
class RolloutSettings(TakesPaths):
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
        resolution: pixels a side, or WIDTHxHEIGHT; null is the model's own.
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
    resolution: Resolution = None
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    device: str | None = None


def record_of(config: RolloutSettings, rows: Sequence[Mapping[str, Any]], family: Family) -> RolloutRecord:
    """What a rollout of ``rows`` by ``family`` depends on."""
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
        latent_shape=list(family.latent_shape(*sides(config.resolution))),
        prompts=len(rows),
        prompts_digest=hashlib.sha256(text.encode()).hexdigest()[:16],
        images_per_prompt=config.images_per_prompt,
        prompts_per_shard=config.prompts_per_shard,
        images=len(rows) * config.images_per_prompt,
        shards=-(-len(rows) // config.prompts_per_shard),
        half=config.half,
        rewards=[reward.record() for reward in config.rewards],
        contents=contents_of_model(family)
        | {f"{reward.title}'s {key}": file for reward in config.rewards for key, file in reward.files().items()},
    )


@dataclass(frozen=True)
class RolloutWriter:
    """Draws what ``record`` says and ``folder`` lacks, shard by shard."""

    folder: RolloutFolder
    record: RolloutRecord
    policy: Policy
    prompts: PromptSet
    sampler: Sampler
    scorer: Scorer | None = None

    def write(self) -> None:
        """Raises :class:`UserError` where the folder holds the rollout of other settings."""
        record, k = self.record, self.record.images_per_prompt
        self.folder.start(record)
        finished = self.folder.finished(record)
        with tqdm(total=record.images, initial=sum(map(len, finished.values())), desc="draw") as bar:
            for shard in sorted(set(range(record.shards)) - finished.keys()):
                prompts = record.prompts_of(shard)
                numbers = range(prompts.start * k, prompts.stop * k)
                # one rollout whatever the shards: the step stays 0, and images are numbered over the whole folder
                ctx = Context(
                    self.policy, record.seed, 0, numbers, self.scorer, progress=bar.update, resolution=record.resolution
                )
                finished[shard] = self._write_shard(ctx, prompts, shard)
                lines = [line for number in sorted(finished) for line in finished[number]]
                # last of all: a shard that the manifest lists is whole
                text = "".join(json.dumps(asdict(line), ensure_ascii=False) + "\n" for line in lines)
                write_text(self.folder.manifest, text)

    @torch.no_grad()
    def _write_shard(self, ctx: Context, prompts: Sequence[int], shard: int) -> list[ManifestLine]:
        """A shard's trajectories, images and contact sheet, each file whole or absent; returns its manifest lines."""
        folder, k, numbers = self.folder, self.record.images_per_prompt, ctx.sample_indices
        steps = range(self.sampler.num_inference_steps)
        with self.policy.family.autocast():
            batch, shared = self.prompts.batch(prompts), self.record.shared_noise
            rollout = collect(ctx, self.sampler, batch, k, steps, shared_noise=shared, images=True)
        latents, log_probs = rollout.trajectories.latents, rollout.trajectories.log_probs
        images = rollout.images
        assert log_probs is not None and images is not None, "collect was asked for both"
        broken = (~latents.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        if broken:
            raise NonFinite(f"the states of picture {numbers[broken[0]]} are not finite; try mixed_precision: no")
        scores = [{name: float(values[row]) for name, values in rollout.scores.items()} for row in range(len(numbers))]
        lines = [
            ManifestLine(f"images/{number:05d}.png", f"{number:05d}", prompt, number // k, shard, row, scores[row])
            for row, (number, prompt) in enumerate(zip(numbers, rollout.prompts, strict=True))
        ]
        (folder.path / "images").mkdir(exist_ok=True)
        for image, line in zip(images, lines, strict=True):
            gallery.save_png(gallery.to_pil(image), folder.path / line.image)
        captions = [f"{line.trajectory} {line.prompt}" for line in lines]
        gallery.save_grid(images, captions, folder.path / f"contact-sheet-{shard:05d}.png", k)
        kept = {"latents": latents.half() if self.record.half else latents, "log_probs": log_probs}
        with atomic(folder.shard(shard)) as draft:
            save_file({name: tensor.cpu().contiguous() for name, tensor in kept.items()}, draft)
        return lines
