"""Images sampled by the policy under training, and what training on them needs to know.

:func:`collect` is the one way in which online objectives sample: it runs the reverse loop, has the rewards
scored meanwhile, and keeps the states around the steps to be trained, each state once.
:func:`align.objectives.online.replay.replay_step` is the one way in which they ask the policy about those steps again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from align.common import rng
from align.common.resolution import sides
from align.data.prompts import PromptBatch
from align.diffusion.kernels import Gaussian, WindowedKernel
from align.objectives.objective import Context
from align.sampling.diversity import pairwise, thumbnails
from align.sampling.loop import sample
from align.sampling.sampler import Sampler
from align.sampling.trajectory import Trajectories

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rollout:
    """N images of this process.

    Attributes:
        trajectories: the states around the kept steps.
        scores: (N,) of every reward, by its name.
        prompts: N texts.
        groups: (N,) the number of each image's prompt, over all processes.
        metrics: what was measured, over all processes.
        images: (N, 3, H, W) on the CPU, where they were asked for.
    """

    trajectories: Trajectories
    scores: dict[str, Tensor]
    prompts: list[str]
    groups: Tensor
    metrics: dict[str, float]
    images: Tensor | None = None


@dataclass(frozen=True)
class Start:
    """Where a trajectory begins: at the state ``x`` (N, C, h, w) before step ``step``."""

    x: Tensor
    step: int = 0


def noise_of(ctx: Context, numbers: Sequence[int], purpose: str, shape: tuple[int, ...]) -> Callable[[int], Tensor]:
    """The draws of the reverse process: step i of image ``numbers[k]``, whatever batch it is sampled in."""

    def noise(i: int) -> Tensor:
        return rng.normal(shape, [rng.generator(ctx.seed, purpose, ctx.step, number, i) for number in numbers])

    return noise


def initial_noise(ctx: Context, numbers: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """(N, *shape) starting noise; equal numbers give equal noise, which is how images come to share it."""
    return rng.normal(shape, [rng.generator(ctx.seed, "initial", ctx.step, number) for number in numbers])


def collect(
    ctx: Context,
    sampler: Sampler,
    batch: PromptBatch,
    group_size: int,
    keep: Sequence[int],
    stochastic: Sequence[int] | None = None,
    shared_noise: bool = False,
    start: Start | None = None,
    means: bool = False,
    images: bool = False,
    likelihood: bool = True,
) -> Rollout:
    """Sample, decode and score the images at ``ctx.sample_indices``, ``group_size`` of them for every prompt.

    Args:
        ctx: where and for which images.
        sampler: how.
        batch: the prompts of these images, in order.
        group_size: images a prompt over all processes; image p is of prompt ``p // group_size``.
        keep: consecutive steps whose states and log-probabilities are kept for training; may be empty. Where
            all steps are drawn from the kernel, those at the end that it takes without noise are left out.
        stochastic: the steps that are drawn from the kernel; default all.
        shared_noise: the images of a prompt start from one noise (D3PO, DanceGRPO).
        start: begin at these states instead of at noise.
        means: keep the means of the kept steps too.
        images: keep the images, on the CPU.
        likelihood: keep log-probabilities; without, a kept step may be deterministic.

    Raises :class:`UserError` where a kept step has no noise, and so no likelihood to train on.
    """
    family = ctx.policy.family
    shape = family.latent_shape(*sides(ctx.resolution))
    grid = family.grid(sampler.num_inference_steps, *sides(ctx.resolution))
    guidance_scale = sampler.guidance_scale_of(family)
    kernel = sampler.kernel_of(family)
    if likelihood and stochastic is not None:
        sampler.require_noise(family, keep)
    elif likelihood:
        keep = sampler.with_noise(family, keep)
    if stochastic is not None:
        kernel = WindowedKernel(kernel, list(stochastic))
    groups = torch.tensor([position // group_size for position in ctx.sample_indices])
    prompt_index = groups - groups[0]
    cond = batch.cond.to(family.device)
    keep_on = family.device if sampler.keep_on == "device" else "cpu"
    noise_numbers = groups.tolist() if shared_noise else list(ctx.sample_indices)
    latents, log_probs, step_means, pending_scores, kept_images = [], [], [], [], []
    compared: dict[str, list[Tensor]] = {}  # by what the diversity of the rollout is measured
    for part in torch.arange(len(groups)).split(sampler.batch_size):
        numbers = [ctx.sample_indices[k] for k in part.tolist()]
        x = start.x[part] if start else initial_noise(ctx, [noise_numbers[k] for k in part.tolist()], shape)
        states: list[Tensor] = []
        steps: list[tuple[Gaussian, Tensor]] = []

        def remember(
            i: int,
            x: Tensor,
            step: Gaussian,
            y: Tensor,
            states: list[Tensor] = states,
            steps: list[tuple[Gaussian, Tensor]] = steps,
        ) -> None:
            if i in keep:
                states.extend([x, y] if not states else [y])
                steps.append((step, y))

        x0 = sample(
            ctx.policy.predict,
            grid,
            cond.take(prompt_index[part].to(family.device)),
            x.to(family.device),
            guidance_scale,
            kernel,
            noise_of(ctx, numbers, "step", shape),
            remember,
            range(start.step if start else 0, len(grid)),
        )
        decoded = family.to_image(x0)
        rows = prompt_index[part].tolist()
        if ctx.scorer is not None:
            texts, metadata = [batch.prompts[k] for k in rows], batch.metadata
            pending_scores.append(ctx.scorer.submit(decoded, texts, [metadata[k] for k in rows] if metadata else None))
        for name, values in {"latents": x0.cpu(), "pixels": thumbnails(decoded)}.items():
            compared.setdefault(name, []).append(values)
        if images:
            kept_images.append(decoded.cpu())
        if ctx.features is not None:
            compared.setdefault("features", []).append(ctx.features(decoded))
        if states:
            latents.append(torch.stack(states, 1).to(keep_on))
            if likelihood:
                log_probs.append(torch.stack([step.log_prob(y) for step, y in steps], 1))
            if means:
                step_means.append(torch.stack([step.mean for step, _ in steps], 1).to(keep_on))
        if ctx.progress:
            ctx.progress(len(part))
    parts = [scores_of() for scores_of in pending_scores]
    scores = {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else {})}
    trajectories = Trajectories(
        latents=torch.cat(latents) if latents else torch.empty(len(groups), 0, *shape),
        kept_steps=torch.tensor(list(keep)),
        prompt_index=prompt_index,
        cond=cond,
        log_probs=torch.cat(log_probs) if log_probs else None,
        means=torch.cat(step_means) if step_means else None,
    )
    metrics = _metrics(ctx, scores, groups, {name: torch.cat(values) for name, values in compared.items()})
    texts = [batch.prompts[k] for k in prompt_index.tolist()]
    return Rollout(trajectories, scores, texts, groups, metrics, torch.cat(kept_images) if kept_images else None)


def collect_prefix(ctx: Context, sampler: Sampler, batch: PromptBatch, group_size: int, end: int) -> Start:
    """Every prompt's trajectory up to step ``end``, sampled once, as the start of each of its images."""
    family = ctx.policy.family
    prompts = sorted({position // group_size for position in ctx.sample_indices})
    shape = family.latent_shape(*sides(ctx.resolution))
    grid = family.grid(sampler.num_inference_steps, *sides(ctx.resolution))
    states = []
    for part in torch.arange(len(prompts)).split(sampler.batch_size):
        numbers = [prompts[k] for k in part.tolist()]
        x = sample(
            ctx.policy.predict,
            grid,
            batch.cond.take(part).to(family.device),
            initial_noise(ctx, numbers, shape).to(family.device),
            sampler.guidance_scale_of(family),
            sampler.kernel_of(family),
            noise_of(ctx, numbers, "prefix", shape),
            steps=range(end),
        )
        states.append(x)
    return Start(torch.cat(states).repeat_interleave(group_size, 0), end)


def _metrics(
    ctx: Context, scores: Mapping[str, Tensor], groups: Tensor, compared: Mapping[str, Tensor]
) -> dict[str, float]:
    """Mean of every reward and the diversity of the rollout in each space it is ``compared`` in, over all
    processes."""
    global_groups = ctx.gather(groups)
    metrics = {"pictures": float(len(global_groups))}
    gathered = {name: ctx.gather(values) for name, values in scores.items()}
    metrics |= {f"reward/{name}": values.mean().item() for name, values in gathered.items()}
    trained = [values for name, values in gathered.items() if name in ctx.rewards.weights]
    if ctx.step == 0 and ctx.sample_indices[0] == 0 and trained and all(bool((v == v[0]).all()) for v in trained):
        logger.warning(
            "all %d images of the first rollout have the same reward; while that is so, nothing is learned from it",
            len(global_groups),
        )
    for name, values in compared.items():
        power = ctx.features.power if ctx.features is not None and name == "features" else 1
        distances = pairwise(ctx.gather(values), global_groups, power)
        if len(distances):
            metrics[f"diversity/{name}"] = distances.mean().item()
    return metrics
