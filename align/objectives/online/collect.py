"""Pictures drawn by the policy under training, and what training on them needs to know.

:func:`draw` is the one way in which online objectives sample: it runs the reverse loop, has the rewards
scored meanwhile, and keeps the states around the steps to be trained, each state once. :func:`replay_step` is the one
way in which they ask the policy about those steps again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from align.common import rng
from align.common.errors import UserError
from align.data.prompts import PromptBatch
from align.diffusion.kernels import Gaussian, WindowedKernel
from align.families.family import Column
from align.objectives.objective import Context
from align.sampling.diversity import pairwise, thumbnails
from align.sampling.loop import sample
from align.sampling.sampler import Sampler


@dataclass(frozen=True)
class Rollout:
    """N pictures of this process.

    ``columns`` go into a :class:`Rows` as image columns: ``latents`` (N, K+1, C, h, w), the states before the K kept
    steps and after the last; ``log_probs`` (N, K), if asked for; ``steps`` (K,), the grid's numbers of the kept steps;
    ``prompt`` (N,), the row of ``cond`` that belongs to each picture.
    """

    columns: dict[str, Column]
    scores: dict[str, Tensor]
    prompts: list[str]
    groups: Tensor
    metrics: dict[str, float]
    pictures: Tensor | None = None

    @property
    def kept(self) -> Tensor:
        steps = self.columns["steps"]
        assert isinstance(steps, Tensor)
        return steps


@dataclass(frozen=True)
class Start:
    """Where a trajectory begins: at the state ``x`` (N, C, h, w) before step ``step``."""

    x: Tensor
    step: int = 0


def noise_of(ctx: Context, numbers: Sequence[int], purpose: str, shape: tuple[int, ...]) -> Callable[[int], Tensor]:
    """The draws of the reverse process: step i of picture ``numbers[k]``, whatever batch it is drawn in."""

    def noise(i: int) -> Tensor:
        return rng.normal(shape, [rng.generator(ctx.seed, purpose, ctx.step, number, i) for number in numbers])

    return noise


def initial(ctx: Context, numbers: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """(N, *shape) starting noise; equal numbers give equal noise, which is how pictures come to share it."""
    return rng.normal(shape, [rng.generator(ctx.seed, "initial", ctx.step, number) for number in numbers])


def draw(
    ctx: Context,
    sampler: Sampler,
    batch: PromptBatch,
    group: int,
    keep: Sequence[int],
    stochastic: Sequence[int] | None = None,
    shared_noise: bool = False,
    start: Start | None = None,
    means: bool = False,
    pictures: bool = False,
    likelihood: bool = True,
) -> Rollout:
    """Draw, decode and score the pictures at ``ctx.sample_indices``, ``group`` of them for every prompt.

    Args:
        ctx: where and for which pictures.
        sampler: how.
        batch: the prompts of these pictures, in order.
        group: pictures a prompt over all processes; picture p is of prompt ``p // group``.
        keep: consecutive steps whose states and log-probabilities are kept for training; may be empty.
        stochastic: the steps that are drawn from the kernel; default all.
        shared_noise: the pictures of a prompt start from one noise (D3PO, DanceGRPO).
        start: begin at these states instead of at noise.
        means: keep the means of the kept steps too, as ``means`` (N, K, C, h, w).
        pictures: keep the pictures (N, 3, H, W), on the CPU.
        likelihood: keep log-probabilities; without, a kept step may be deterministic.

    Raises :class:`UserError` where a kept step has no noise, and so no likelihood to train on.
    """
    family = ctx.policy.family
    shape = family.latent_shape(ctx.resolution)
    grid, guidance_scale = family.grid(sampler.num_inference_steps), sampler.guidance_scale_of(family)
    kernel = sampler.kernel_of(family)
    if stochastic is not None:
        kernel = WindowedKernel(kernel, list(stochastic))
    groups = torch.tensor([position // group for position in ctx.sample_indices])
    prompt = groups - groups[0]
    cond = batch.cond.to(family.device)
    keep_on = family.device if sampler.keep_on == "device" else "cpu"
    origins = groups.tolist() if shared_noise else list(ctx.sample_indices)
    latents, log_probs, centres, waiting = [], [], [], []
    seen: dict[str, list[Tensor]] = {}
    whole: list[Tensor] = []
    for part in torch.arange(len(groups)).split(sampler.batch_size):
        numbers = [ctx.sample_indices[k] for k in part.tolist()]
        x = start.x[part] if start else initial(ctx, [origins[k] for k in part.tolist()], shape)
        states: list[Tensor] = []
        steps: list[tuple[Gaussian, Tensor]] = []

        def remember(i: int, x: Tensor, step: Gaussian, y: Tensor, states=states, steps=steps) -> None:  # type: ignore[no-untyped-def]
            if i in keep:
                if likelihood and not bool((step.std > 0).all()):
                    raise UserError(
                        f"{kernel} draws step {i} without noise, so it has no likelihood to train on; set eta or noise "
                        "of objective.sampler.kernel above 0"
                    )
                states.extend([x, y] if not states else [y])
                steps.append((step, y))

        x0 = sample(
            ctx.policy.predict,
            grid,
            cond.take(prompt[part].to(family.device)),
            x.to(family.device),
            guidance_scale,
            kernel,
            noise_of(ctx, numbers, "step", shape),
            remember,
            range(start.step if start else 0, len(grid)),
        )
        images = family.to_image(x0)
        rows = prompt[part].tolist()
        if ctx.scorer is not None:
            texts, metadata = [batch.prompts[k] for k in rows], batch.metadata
            waiting.append(ctx.scorer.submit(images, texts, [metadata[k] for k in rows] if metadata else None))
        for name, values in {"latents": x0.cpu(), "pixels": thumbnails(images)}.items():
            seen.setdefault(name, []).append(values)
        if pictures:
            whole.append(images.cpu())
        if ctx.features is not None:
            seen.setdefault("features", []).append(ctx.features(images))
        if states:
            latents.append(torch.stack(states, 1).to(keep_on))
            if likelihood:
                log_probs.append(torch.stack([step.log_prob(y) for step, y in steps], 1))
            if means:
                centres.append(torch.stack([step.mean for step, _ in steps], 1).to(keep_on))
        if ctx.progress:
            ctx.progress(len(part))
    found = [wait() for wait in waiting]
    scores = {name: torch.cat([part[name] for part in found]) for name in (found[0] if found else {})}
    columns: dict[str, Column] = {"cond": cond, "prompt": prompt, "steps": torch.tensor(list(keep))}
    if latents:
        columns["latents"] = torch.cat(latents)
    if log_probs:
        columns["log_probs"] = torch.cat(log_probs)
    if centres:
        columns["means"] = torch.cat(centres)
    metrics = _metrics(ctx, scores, groups, {name: torch.cat(values) for name, values in seen.items()})
    texts = [batch.prompts[k] for k in prompt.tolist()]
    return Rollout(columns, scores, texts, groups, metrics, torch.cat(whole) if whole else None)


def _metrics(ctx: Context, scores: dict[str, Tensor], groups: Tensor, spread: dict[str, Tensor]) -> dict[str, float]:
    """Mean of every reward and the diversity of the rollout, over all processes."""
    everyone = ctx.gather(groups)
    found = {"pictures": float(len(everyone))}
    found |= {f"reward/{name}": ctx.gather(values).mean().item() for name, values in scores.items()}
    for name, values in spread.items():
        power = ctx.features.power if ctx.features is not None and name == "features" else 1
        distances = pairwise(ctx.gather(values), everyone, power)
        if len(distances):
            found[f"diversity/{name}"] = distances.mean().item()
    return found
