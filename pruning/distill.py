"""Healing a pruned denoiser by distillation, as an objective of the one training loop.

HierarchicalPrune (arXiv 2508.04663) trains on task + output + feature terms, freezes the blocks before the first that
was removed (positional weight preservation), and changes blocks the less, the more it costs to lose them
(sensitivity-guided distillation). Their states are noised real images; the student's own trajectories, where it will
be used, are on-policy distillation (:mod:`align.objectives.opd`) with the unpruned model as the teacher.

A student in 4 bit heals too: without a LoRA, what is not packed (biases, the layers that were skipped) learns to make
up for the rounding of the rest, and costs no byte more.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from align.common import rng
from align.common.errors import UserError
from align.common.resolution import Resolution
from align.data.captioned import ImageBatch
from align.data.prompts import PromptBatch
from align.diffusion.process import add_noise, reduce_dims
from align.families import Conditioning, Family
from align.objectives import Context, Cost, Metrics, Needs, Objective
from align.objectives.objective import Prepares, ScalesLearningRates
from align.objectives.online.collect import collect
from align.objectives.online.rewards import Scorer
from align.objectives.rows import SHARED, Rows
from align.objectives.teachers import PipelineTeacher
from align.policy.policy import Policy
from align.sampling.sampler import Sampler, grid_of
from pruning import importance
from pruning.graph import BlockGraph, Streams, follow
from pruning.plan import Plan

Sensitivity = Literal["graded", "binary", "none"]
_INTO = ("pos_embed", "time_text_embed", "context_embedder", "x_embedder", "time_embedding", "add_embedding", "conv_in")


@dataclass(frozen=True, kw_only=True)
class HealRows(Rows):
    """R states that both networks are asked at: ``x_t`` (R, C, h, w) at ``t`` (R,), with the empty prompt where
    ``empty`` (R,); on data also their noise ``eps`` (R, C, h, w), and the images ``x0`` (N, C, h, w)."""

    x_t: Tensor
    t: Tensor
    empty: Tensor
    eps: Tensor | None = None
    cond: Conditioning = field(metadata=SHARED)  # of N captions
    x0: Tensor | None = field(default=None, metadata=SHARED)


@dataclass
class Heal(Objective, Prepares, ScalesLearningRates):
    """Teach a pruned student what the unpruned teacher says and feels.

    Args:
        teacher: the unpruned pipeline.
        plan: the JSON that the student was pruned by.
        profile: the measured importance of blocks; only ``sensitivity`` needs it.
        sampler: how the student draws the states that it learns at, from prompts; deterministic without a kernel.
            Training itself is without guidance, on the caption or the empty prompt, which are the two that guidance
            mixes.
        draws_per_image: states of each image that are trained on; null is every step of the sampler.
        task_weight: of the error to the true target, which only data has, not the student's own images.
        output_weight: of the squared difference of the outputs.
        feature_weight: of the squared difference of the features behind every block that stays and heals, summed over
            blocks (official: 1e-4).
        relative_features: divide each block's by the mean square of the teacher's features of that state (LAPTOP-Diff).
        preservation: freeze what runs before the first removed block.
        sensitivity: ``graded`` multiplies a block's learning rate by m / (m + dP), dP being what its loss costs and m
            the median of those; ``binary`` freezes the blocks of above median dP (the official form); ``none``.
        measure: which dP of the profile.
        proportion_empty_prompts: the share of states that are seen with the empty prompt.
    """

    teacher: PipelineTeacher
    plan_path: Path
    profile: Path | None = None
    sampler: Sampler = field(default_factory=Sampler)
    draws_per_image: int | None = None
    task_weight: float = 0.0
    output_weight: float = 1.0
    feature_weight: float = 1e-4
    relative_features: bool = False
    preservation: bool = True
    sensitivity: Sensitivity = "graded"
    measure: importance.Measure = "mse"
    proportion_empty_prompts: float = 0.2

    around_packed = True

    def __post_init__(self) -> None:
        weights, steps = (self.task_weight, self.output_weight, self.feature_weight), self.sampler.num_inference_steps
        if not all(0 <= weight < math.inf for weight in weights) or not 0 <= self.proportion_empty_prompts < 1:
            raise ValueError("weights must be finite and at least 0, and proportion_empty_prompts in [0, 1)")
        if not 1 <= self.count <= steps:
            raise ValueError(f"draws_per_image must be between 1 and the sampler's {steps} steps")
        if self.sensitivity != "none" and self.profile is None:
            raise ValueError("sensitivity grades by measured importance: set profile, or sensitivity: none")

    @property
    def needs(self) -> Needs:
        return Needs((PromptBatch, ImageBatch), False, online=True)

    @property
    def count(self) -> int:
        """Rows of an image."""
        return self.sampler.num_inference_steps if self.draws_per_image is None else self.draws_per_image

    def prepare(self, policy: Policy, scorer: Scorer | None) -> None:
        self.teacher.open(policy)
        self._plan = Plan.load(self.plan_path)
        whole = BlockGraph.of(self.teacher.family.denoiser)
        self._plan.fits(whole)
        self._moved, renamed = whole.moved(self._plan.dropped), whole.renamed(self._plan.dropped)
        student = BlockGraph.of(policy.denoiser)
        if student.parameters() != self._plan.after and not policy.lora:
            raise UserError(
                f"the student has {student.parameters():,} parameters, {self.plan_path} leaves {self._plan.after:,}: "
                "train the folder that this plan was applied to"
            )
        self._pairs = {renamed[name]: name for name in self._plan.healing}
        self._graphs = whole, student
        self._rates = self._lr_scales(whole)

    def _lr_scales(self, whole: BlockGraph) -> dict[str, float]:
        """The learning rate's factor for everything under each path of the student."""
        early = 0.0 if self.preservation else 1.0
        by_block = dict.fromkeys(self._plan.frozen, early) | dict.fromkeys(self._plan.healing, 1.0)
        if self.sensitivity != "none" and self.profile is not None:
            costs = importance.scores(importance.read(self.profile), self.measure)
            by_block |= sensitivity(costs, self._plan.healing, self.sensitivity)
        paths = {follow(path, self._moved): name for name in by_block for path in whole[name].modules}
        return dict.fromkeys(_INTO, early) | {path: by_block[name] for path, name in paths.items() if path is not None}

    def lr_scale(self, name: str) -> float:
        """That of the longest path that the parameter ``name`` lies under."""
        parts = name.split(".")
        paths = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
        return next((self._rates[path] for path in paths if path in self._rates), 1.0)

    def cost(self, family: Family, resolution: Resolution) -> Cost:
        sampling = self.sampler.num_inference_steps * self.sampler.evaluations(family)
        return Cost(self.count, self.count + sampling, self.count, sampling=sampling)

    def rollout(self, ctx: Context, batch: PromptBatch | ImageBatch) -> HealRows:
        family, generators, steps = ctx.policy.family, ctx.generators("heal"), self.sampler.num_inference_steps
        cond = batch.cond.to(family.device)
        uniform = torch.stack([rng.uniform(generators) for _ in range(self.count)], 1).flatten()
        empty = uniform < self.proportion_empty_prompts
        image = torch.arange(len(ctx.sample_indices)).repeat_interleave(self.count)
        if isinstance(batch, ImageBatch):
            x0 = batch.latents.float()
            t = family.sample_timesteps(rng.strata(generators, self.count).flatten())
            eps = rng.normal((self.count, *x0.shape[1:]), generators).flatten(0, 1)
            x_t = add_noise(x0[image], eps, *family.path(t))
            return HealRows(image=image, x_t=x_t, t=t, empty=empty, eps=eps, cond=cond, x0=x0)
        if self.task_weight:
            raise UserError("task_weight needs data with images (Images); the student's own are no target")
        stochastic = None if self.sampler.kernel else ()
        rollout = collect(ctx, self.sampler, batch, 1, range(steps), stochastic, likelihood=False)
        order = rng.normal((steps,), generators).argsort(1)[:, : self.count].sort(1).values.flatten()
        latents = rollout.trajectories.latents.cpu()
        t = grid_of(family, steps, latents).t[order].float()
        x_t = latents[image, order].float()
        return HealRows(image=image, x_t=x_t, t=t, empty=empty, cond=cond, metrics=rollout.metrics)

    def loss(self, ctx: Context, rows: HealRows) -> tuple[Tensor, Metrics]:
        family, (whole, student) = ctx.policy.family, self._graphs
        x_t, t = rows.x_t.to(family.device), rows.t.to(family.device)
        cond = family.drop_prompts(rows.cond.take(rows.image), rows.empty)
        tapped, scale = self.feature_weight > 0, self.sampler.embedded_scale_of(family)
        with torch.no_grad(), whole.tap(list(self._pairs.values()) if tapped else []) as teacher_features:
            target = self.teacher.predict(ctx.policy, x_t, t, cond, scale)  # one pipeline's text encoders serve both
        with student.tap(list(self._pairs) if tapped else []) as student_features:
            answer = ctx.policy.predict(x_t, t, cond, scale)
        terms = {"output": F.mse_loss(answer.raw.float(), target.raw.float())}
        if tapped:
            apart = [self._feature(student_features[new], teacher_features[old]) for new, old in self._pairs.items()]
            terms["feature"] = torch.stack(apart).sum() if apart else torch.zeros_like(terms["output"])
        if self.task_weight and rows.x0 is not None and rows.eps is not None:
            x0, eps = rows.x0[rows.image].to(family.device), rows.eps.to(family.device)
            terms["task"] = F.mse_loss(answer.raw.float(), answer.target(x0, eps))
        weights = {"output": self.output_weight, "feature": self.feature_weight, "task": self.task_weight}
        loss = sum((weights[name] * term for name, term in terms.items()), torch.zeros_like(terms["output"]))
        return loss, {name: term.detach() for name, term in terms.items()}

    def _feature(self, student: Streams, teacher: Streams) -> Tensor:
        """How far one block's streams are apart, a mean over elements, summed over streams; of each state by itself, so
        that it is the same however the rows are cut into batches."""
        apart = []
        for name, target in teacher.items():
            error = reduce_dims((student[name].float() - target.float()).square(), "mean")
            scale = reduce_dims(target.float().square(), "mean").clamp(min=1e-8) if self.relative_features else 1.0
            apart.append((error / scale).mean())
        return torch.stack(apart).sum()


def sensitivity(importance: Mapping[str, float], blocks: Sequence[str], form: Sensitivity) -> dict[str, float]:
    """The learning rate's factor of each of ``blocks``, from what it costs to lose it; 1 where that is unknown.

    A block of several units counts as its dearest.
    """
    cost = {
        block: max(max(value, 0.0) for unit, value in importance.items() if block in unit.split("+"))
        for block in blocks
        if any(block in unit.split("+") for unit in importance)
    }
    middle = statistics.median(cost.values()) if cost else 0.0
    if form == "binary":
        return {b: float(cost.get(b, 0.0) <= middle) for b in blocks}
    return {b: middle / (middle + cost[b]) if b in cost and middle + cost[b] else 1.0 for b in blocks}
