"""The rollout folder being written: images for people to compare, and the trajectories that made them.

:class:`align.data.trajectories.RolloutFolder` says what lies where and reads it again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from align.common.errors import NonFinite
from align.data.prompts import PromptSet
from align.data.trajectories import ManifestLine, RolloutFolder, RolloutRecord
from align.evaluation import gallery
from align.objectives import Context
from align.objectives.online.collect import collect
from align.objectives.online.rewards import Scorer
from align.policy.policy import Policy
from align.sampling.sampler import Sampler
from rewards.common.files import atomic, write_text


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
            rollout = collect(
                ctx,
                self.sampler,
                self.prompts.batch(prompts),
                k,
                steps,
                shared_noise=self.record.shared_noise,
                images=True,
            )
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
            gallery.save_image(image, folder.path / line.image)
        captions = [f"{line.trajectory} {line.prompt}" for line in lines]
        gallery.save_grid(images, captions, folder.path / f"contact-sheet-{shard:05d}.png", k)
        kept = {"latents": latents.half() if self.record.half else latents, "log_probs": log_probs}
        with atomic(folder.shard(shard)) as draft:
            save_file({name: tensor.cpu().contiguous() for name, tensor in kept.items()}, draft)
        return lines
