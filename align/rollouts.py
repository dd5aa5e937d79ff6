"""Pictures drawn by the policy under training, and what training on them needs to know.

:func:`draw` is the one way in which online objectives sample: it runs :func:`align.sampling.sample`, has the rewards
scored meanwhile, and keeps the states around the steps to be trained, each state once. :func:`transition` is the one
way in which they ask the policy about those steps again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from align import draws
from align.data import PromptBatch
from align.diversity import pairwise, thumbnails
from align.errors import UserError
from align.families import Cond, Family
from align.objectives import Context
from align.process import FlowSDE, Gaussian, Grid, Kernel, Prediction, Within
from align.sampling import sample
from align.table import Column


@dataclass
class Window:
    """The steps that are drawn stochastically and trained; elsewhere the sampler is deterministic.

    Args:
        size: how many steps.
        until: the window lies before this step; default the first half, as in Flow-GRPO-Fast.
        start: and not before this one (the two are Flow-GRPO's ``sde_window_range``).
        every: null draws the window's place anew for each rollout (Flow-GRPO-Fast); a number moves it on by
            ``stride`` after so many rollouts, from noise to data (MixGRPO: 25).
        stride: by how many steps it moves.
    """

    size: int = 2
    until: int | None = None
    every: int | None = None
    stride: int = 1
    start: int = 0

    def steps(self, total: int, seed: int, rollout: int) -> range:
        """The window of this rollout, of a sampler of ``total`` steps."""
        last = (self.until if self.until is not None else total if self.every else -(-total // 2)) - self.size
        if not 0 <= self.start <= last or last + self.size > total:
            after = f"from step {self.start} on and " if self.start else ""
            raise ValueError(
                f"a window of {self.size} steps does not fit {after}before step {last + self.size} of {total}"
            )
        if self.every:
            first = min(self.start + rollout // self.every * self.stride, last)
        else:
            places = last + 1 - self.start
            first = self.start + int(draws.uniform([draws.generator(seed, "window", rollout)]) * places)
        return range(first, first + self.size)


def count_trained(sampler: Sampler, window: Window | None, timestep_fraction: float) -> int:
    """Steps of each picture that train: those of the window, or this fraction of all.

    Raises ValueError for a fraction outside (0, 1], for both at once, and for a window that does not fit."""
    if not 0 < timestep_fraction <= 1:
        raise ValueError(f"timestep_fraction must be in (0, 1], got {timestep_fraction}")
    if window is None:
        return max(1, int(sampler.steps * timestep_fraction))
    if timestep_fraction < 1:
        raise ValueError("window and timestep_fraction both choose the trained steps: give one of them")
    window.steps(sampler.steps, 0, 0)
    return window.size


@dataclass
class Sampler:
    """How an online objective draws its pictures.

    Args:
        steps: sampler steps; fewer than for evaluation will do (Flow-GRPO: 10 against 40).
        guidance: guidance scale, the same in rollout and training; null is the pipeline's own.
        kernel: the stochastic step; null is the family's: DDIM with eta 1, or FlowSDE with noise 0.7 on a flow.
        batch_size: pictures drawn at once.
        keep_on: where latents wait for training: the ``device``, or the ``cpu``.
    """

    steps: int = 10
    guidance: float | None = None
    kernel: Kernel | None = None
    batch_size: int = 32
    keep_on: Literal["device", "cpu"] = "device"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            got = f"{self.steps} and {self.batch_size}"
            raise ValueError(f"sampler: steps and batch_size must be at least 1, got {got}")

    def kernel_of(self, family: Family) -> Kernel:
        if isinstance(self.kernel, FlowSDE) and family.kind != "flow":
            raise UserError(
                f"sampler.kernel: FlowSDE draws from flow models, and {family.source} predicts {family.kind}; use DDIM "
                "with an eta above 0, or leave the kernel out"
            )
        return self.kernel or family.kernel

    def guidance_of(self, family: Family) -> float:
        return family.default_guidance if self.guidance is None else self.guidance

    def evaluations(self, family: Family) -> int:
        """Network evaluations of one guided prediction: 2, or 1 without guidance."""
        return 1 if self.guidance_of(family) == 1.0 else 2


@dataclass(frozen=True)
class Rollout:
    """N pictures of this process.

    ``columns`` go into a :class:`Table` as image columns: ``latents`` (N, K+1, C, h, w), the states before the K kept
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
        return draws.normal(shape, [draws.generator(ctx.seed, purpose, ctx.step, number, i) for number in numbers])

    return noise


def initial(ctx: Context, numbers: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """(N, *shape) starting noise; equal numbers give equal noise, which is how pictures come to share it."""
    return draws.normal(shape, [draws.generator(ctx.seed, "initial", ctx.step, number) for number in numbers])


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
    """Draw, decode and score the pictures at ``ctx.positions``, ``group`` of them for every prompt.

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
    grid, guidance = family.grid(sampler.steps), sampler.guidance_of(family)
    kernel = sampler.kernel_of(family)
    if stochastic is not None:
        kernel = Within(kernel, list(stochastic))
    groups = torch.tensor([position // group for position in ctx.positions])
    prompt = groups - groups[0]
    cond = batch.cond.to(family.device)
    keep_on = family.device if sampler.keep_on == "device" else "cpu"
    origins = groups.tolist() if shared_noise else list(ctx.positions)
    latents, log_probs, centres, waiting = [], [], [], []
    seen: dict[str, list[Tensor]] = {}
    whole: list[Tensor] = []
    for part in torch.arange(len(groups)).split(sampler.batch_size):
        numbers = [ctx.positions[k] for k in part.tolist()]
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
            guidance,
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


def transition(
    ctx: Context, sampler: Sampler, images: Mapping[str, Column], picture: Tensor, step: Tensor
) -> tuple[Gaussian, Tensor]:
    """What the policy now says of kept step ``step`` (R,) of ``picture`` (R,): the distribution of the next state, and
    the state that was drawn there; both (R, C, h, w)."""
    family = ctx.policy.family
    latents, steps = images["latents"], images["steps"]
    assert isinstance(latents, Tensor) and isinstance(steps, Tensor)
    y = latents[picture.to(latents.device), step.to(latents.device) + 1].to(family.device)
    prediction = answer(ctx, sampler, images, picture, step)
    return sampler.kernel_of(family)(prediction, grid_of(family, sampler.steps), steps[step]), y


def answer(ctx: Context, sampler: Sampler, images: Mapping[str, Column], picture: Tensor, step: Tensor) -> Prediction:
    """What the policy now says at the state before kept step ``step`` (R,) of ``picture`` (R,)."""
    family = ctx.policy.family
    latents, prompt, steps, cond = (images[name] for name in ("latents", "prompt", "steps", "cond"))
    assert isinstance(latents, Tensor) and isinstance(prompt, Tensor) and isinstance(steps, Tensor)
    assert isinstance(cond, Cond)
    x = latents[picture.to(latents.device), step.to(latents.device)].to(family.device)
    t = grid_of(family, sampler.steps).t[steps[step]].to(family.device)
    bound = cond.take(prompt[picture].to(family.device))
    return ctx.policy.predict(x, t, bound, sampler.guidance_of(family))


def require_on_policy(ratio: Tensor, tolerance: float) -> None:
    """Stop when the weights that drew the pictures do not give their densities again. Costs no evaluation."""
    worst = (ratio.detach() - 1).abs().max().item()
    if not worst <= tolerance:
        raise UserError(
            f"replaying the rollout gives a likelihood ratio off 1 by {worst:.3g} (allowed {tolerance:g}): the forward "
            "pass of training is not the sampler's. Likely causes: half precision (try mixed_precision: no, or fp16 "
            "rather than bf16), dropout in the denoiser, or a compiled or fused kernel that depends on the batch size"
        )


def grid_of(family: Family, steps: int) -> Grid:
    """A grid costs a scheduler call; training asks for the same one thousands of times."""
    grids = _GRIDS.setdefault(family, {})
    if steps not in grids:
        grids[steps] = family.grid(steps)
    return grids[steps]


_GRIDS: WeakKeyDictionary[Family, dict[int, Grid]] = WeakKeyDictionary()


def log_probs(
    ctx: Context, sampler: Sampler, images: Mapping[str, Column], chunk: int, reference: bool = False
) -> Tensor:
    """(N, K) log-probabilities of what was drawn, under the current weights or the reference; without gradient."""
    latents = images["latents"]
    assert isinstance(latents, Tensor)
    pictures, steps = latents.shape[0], latents.shape[1] - 1
    picture = torch.arange(pictures).repeat_interleave(steps)
    step = torch.arange(steps).repeat(pictures)
    found = []
    with torch.no_grad():
        for part in torch.arange(len(picture)).split(chunk):
            if reference:
                with ctx.policy.reference():
                    gaussian, y = transition(ctx, sampler, images, picture[part], step[part])
            else:
                gaussian, y = transition(ctx, sampler, images, picture[part], step[part])
            found.append(gaussian.log_prob(y))
    return torch.cat(found).reshape(pictures, steps)
