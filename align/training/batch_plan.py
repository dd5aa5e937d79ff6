"""How the samples of a rollout are shared by processes and updates, checked and put into words before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from align.common import rng
from align.common.errors import UserError
from align.data.dataset import Dataset, drawn
from align.data.prompts import PromptBatch
from align.families import Family
from align.objectives.objective import Context
from align.policy.policy import Policy
from align.training.config import TrainConfig
from rewards.common.errors import RewardError

BARREN = 20  # rollouts without a row after which a run gives up


def shares(counts: Sequence[int], batch_size: int, accumulation: int, updates: int | None = None) -> list[list[slice]]:
    """For every update, which of its ``counts[p]`` rows each process p trains on: every row of every process, once.

    There are ``updates``, or as many as the process with the most rows fills with about ``accumulation`` batches each.
    They are as equal as they can be, since a short last one would be noisy and Adam would step as far for it as for a
    whole one. The other processes spread their rows alike, and may have none in some.
    """
    most = max(counts)
    batches = -(-most // batch_size)
    parts = max(1, min(most, updates or round(batches / accumulation)))
    edges = [most * k // parts if updates else min(most, batches * k // parts * batch_size) for k in range(parts + 1)]
    return [[slice(n * a // most, n * b // most) for n in counts] for a, b in pairwise(edges)]


def require_rows(found: bool, barren: int) -> int:
    """How many rollouts in a row had no row, where ``barren`` had none before this one, in which some were ``found`` or
    not. Raises ``RewardError`` after too many: such a run would never end."""
    barren = 0 if found else barren + 1
    if barren >= BARREN:
        raise RewardError(
            f"{barren} rollouts in a row gave nothing to train on: the images of every prompt had equal rewards. "
            "Take a reward that tells them apart, more images_per_prompt, or prompts that do not come out alike"
        )
    return barren


@dataclass(frozen=True)
class BatchPlan:
    """The numbers of a run of ``config`` on ``world`` processes."""

    config: TrainConfig
    family: Family
    world: int
    precision: str = "no"  # in words

    @property
    def group(self) -> int:
        """Samples made of one item of the data: pictures of a prompt; a pair is a sample itself."""
        return self.config.objective.needs.group_size if self.config.data.batch_type is PromptBatch else 1

    @property
    def update(self) -> int:
        """Rows of one optimiser step in one process."""
        return self.config.train_batch_size * self.config.gradient_accumulation_steps

    @property
    def samples(self) -> int:
        """Pairs or pictures of one rollout, over all processes."""
        return (self.config.rollout_batch_size or self.update * self.world) * self.group

    def samples_of(self, process: int) -> range:
        """Those of a rollout that are a process's own."""
        share = self.samples // self.world
        return range(share * process, share * (process + 1))

    def batch(self, data: Dataset, ctx: Context) -> Any:
        """The items of a rollout that the samples of ``ctx`` are made of, each in one of its views."""
        chosen = drawn(data, self.samples // self.group, ctx.seed, ctx.step)
        items = range(ctx.sample_indices[0] // self.group, ctx.sample_indices[-1] // self.group + 1)
        views = (rng.uniform(ctx.generators("view")) * self.config.data.variants).long().tolist()[: len(items)]
        return data.batch([chosen[item] for item in items], views)

    @property
    def updates(self) -> int | None:
        """Updates of a rollout, where that is known beforehand: rows that teach nothing make them smaller, no fewer."""
        rows = self.config.objective.cost(self.family, self.config.data.resolution).rows
        return None if rows is None else self.samples // self.world * rows // self.update

    def shares(self, counts: Sequence[int]) -> list[list[slice]]:
        """:func:`shares` of one rollout."""
        return shares(counts, self.config.train_batch_size, self.config.gradient_accumulation_steps, self.updates)

    def check(self) -> None:
        """Refuse a rollout that processes and updates cannot share evenly, and say in one sentence why."""
        objective, world, group = self.config.objective, self.world, self.group
        rows = objective.cost(self.family, self.config.data.resolution).rows
        drawn = f"{self.samples // group} items x {group} samples = {self.samples}"
        if self.samples % world or (objective.needs.whole_groups and self.samples // group % world):
            raise UserError(
                f"rollout_batch_size: {drawn} do not divide among {world} processes"
                + (f" in whole groups of {group}" if objective.needs.whole_groups else "")
            )
        if self.samples // world % (group * self.config.data.multiple) and self.config.data.multiple > 1:
            raise UserError(
                f"rollout_batch_size: {self.samples // group} items / {world} processes do not divide among the "
                f"{self.config.data.multiple} tasks of data"
            )
        if rows is not None and self.samples // world * rows % self.update:
            raise UserError(
                f"{drawn}, x {rows} trained rows each / {world} processes = {self.samples // world * rows} rows, which "
                f"do not divide into updates of train_batch_size x gradient_accumulation_steps = {self.update} rows"
            )

    def describe(self, policy: Policy) -> str:
        """What a rollout and its updates are made of, a line each."""
        config, world, samples, update = self.config, self.world, self.samples, self.update * self.world
        cost = config.objective.cost(self.family, config.data.resolution)
        kind = "initial noise" if policy.trained is not None else "LoRA" if policy.lora else "full"
        trained = sum(p.numel() for p in policy.parameters())
        total = sum(p.numel() for p in self.family.denoiser.parameters())
        weights = sum(p.numel() * p.element_size() for p in self.family.denoiser.parameters())
        copies = 1 if policy.lora or policy.trained or not config.objective.needs.reference else 2
        state = trained * 4 * (2 + 1 + bool(config.ema_decay))  # two AdamW moments, the gradient, the average
        rows = cost.rows * samples * config.inner_epochs if cost.rows is not None else None
        frozen = cost.frozen if config.draws else cost.frozen - cost.sampling
        lines = {
            "model": f"{config.pretrained_model_name_or_path} ({type(self.family).__name__}, "
            f"{self.family.prediction_type})",
            "objective": type(config.objective).__name__,
            "mixed precision": self.precision,
            "samples per rollout": f"{samples // self.group} items x {self.group} = {samples}, over {world} processes",
            "rows per update": f"{config.train_batch_size} x {config.gradient_accumulation_steps} accumulated "
            f"x {world} processes = {update}",
            "updates per rollout": f"{rows / update:g}" if rows is not None else "as many as the selected rows make",
            "evaluations per rollout": f"{cost.trained * samples * config.inner_epochs} trained + "
            f"{frozen * samples} frozen",
            "trainable parameters": f"{trained:,} of {total:,} ({kind})",
            "estimated memory": f"{(weights * copies + state) / policy.shards / 2**20:,.0f} MiB for denoiser, "
            "gradients and optimiser, activations not counted: `--dry_run --memory 24GB` traces the peak",
            **cost.notes,
        }
        width = max(map(len, lines))
        return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())
