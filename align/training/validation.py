"""What a run is judged by on the way: held-out pairs, held-out prompts, a grid of pictures to look at."""

from __future__ import annotations

import statistics
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from align.common.errors import UserError
from align.data.dataset import Dataset, batches
from align.data.prompts import PromptSet
from align.evaluation.gallery import save_grid
from align.families import Family
from align.objectives import Context, Objective
from align.objectives.online.rewards import Scorer
from align.policy.policy import Policy
from align.sampling.generate import sample_images
from align.training import trackers
from align.training.config import TrainConfig
from align.training.gather import gather_text_of, merged, numbers


@torch.no_grad()
def look(
    config: TrainConfig,
    policy: Policy,
    scorer: Scorer | None,
    held_out: Dataset | PromptSet | None,
    accelerator: Accelerator,
    step: int,
    grid: Path,
) -> dict[str, float]:
    """Draw the sample grid, for the file ``grid`` and the trackers, and return the :func:`held_out_values`; none of the
    evaluations counts."""
    before = dict(policy.evaluations)  # looking is not training
    with policy.ema_scope(), accelerator.autocast():
        values = held_out_values(config, policy, scorer, held_out, accelerator)
        if config.samples.prompts and accelerator.is_main_process:
            trackers.log_images(accelerator, "samples", sample_grid(config, policy, policy.family, grid), step)
    policy.evaluations = before
    return values


def held_out_values(
    config: TrainConfig,
    policy: Policy,
    scorer: Scorer | None,
    held_out: Dataset | PromptSet | None,
    accelerator: Accelerator,
) -> dict[str, float]:
    """The metrics of held-out pairs, or the mean scores of held-out prompts over all processes; nothing without any."""
    rank, world = accelerator.process_index, accelerator.num_processes
    gather = gather_text_of(accelerator, policy)
    if isinstance(held_out, PromptSet):
        if scorer is None:
            raise UserError("validation_data holds prompts: set rewards, to score their images")
        scores = validation_scores(config, policy, scorer, held_out, rank, world)
        return {name: statistics.fmean(gather(values)) for name, values in scores.items()}
    if held_out is None:
        return {}
    parts = validation_metrics(config.objective, policy, held_out, config.train_batch_size, rank, world)
    return merged(parts, gather)


def validation_metrics(
    objective: Objective, policy: Policy, data: Dataset, batch_size: int, rank: int = 0, world: int = 1
) -> dict[str, float]:
    """This process's part of the objective's loss and metrics over ``data``, from every ``world``-th batch, so that
    batches are those of one process; each item has draws of its own that are the same at every call. Of means over
    items, but for what is called a maximum, the parts add up."""
    sums: dict[str, float] = {}
    for index in islice(batches(data, batch_size), rank, None, world):
        ctx = Context(policy, 0, -1, index, chunk=batch_size)
        table = objective.rollout(ctx, data.batch(index))
        for chunk in table.chunks(batch_size):
            loss, metrics = objective.loss(ctx, chunk)
            for name, value in numbers({"loss": loss, **metrics}).items():
                if name.endswith("_max"):
                    sums[name] = max(sums.get(name, value), value)
                else:
                    sums[name] = sums.get(name, 0.0) + value * len(index) * len(chunk) / len(table)
    return {name: value if name.endswith("_max") else value / len(data) for name, value in sums.items()}


def validation_scores(
    config: TrainConfig, policy: Policy, scorer: Scorer, held_out: PromptSet, rank: int, world: int
) -> dict[str, list[float]]:
    """Every reward's scores of this process's share of the held-out prompts, a picture each, of seeds that never
    change; also those of weight 0, which nothing trains on: where they fall while the others rise, the policy hacks
    its reward."""
    own = range(rank, len(held_out), world)
    if not own:  # more processes than prompts
        return {name: [] for name in scorer.rewards}
    rows = [held_out.rows[k] for k in own]
    texts = [row["prompt"] for row in rows]
    images = sample_images(
        policy.predict,
        policy.family,
        texts,
        [config.samples.seed + k for k in own],
        config.samples.num_inference_steps,
        config.samples.guidance_scale,
        config.train_batch_size,
        config.data.resolution,
        initial=policy.initial,
    )
    return {name: values.tolist() for name, values in scorer.score(images, texts, rows).items()}


def sample_grid(config: TrainConfig, policy: Policy, family: Family, path: Path) -> Tensor:
    """Draw the fixed prompts with their fixed seeds, save the grid at ``path``, and return the pictures."""
    images = sample_images(
        policy.predict,
        family,
        config.samples.prompts,
        [config.samples.seed + k for k in range(len(config.samples.prompts))],
        config.samples.num_inference_steps,
        config.samples.guidance_scale,
        config.train_batch_size,
        config.data.resolution,
        initial=policy.initial,
    )
    save_grid(images, config.samples.prompts, path)
    return images
