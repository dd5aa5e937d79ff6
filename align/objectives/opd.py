"""On-policy distillation (DiffusionOPD, arXiv 2605.15055): teachers answer at the states that the student visits.

Both transitions of a step leave from the same state and have the same covariance, so their divergence is closed form
(their eq. for KL_j): with means m_S and m_T,

    sde: KL_j = |m_S - m_T|^2 / (2 s^2)        ode: L_j = |m_S - m_T|^2 / 2, the paper's default, noise 0

States are given: the loss of step j has no graph to step j - 1. Every prompt is routed to the one teacher of its task;
where all rows of a rollout make one update (rows per update = rows per rollout), that is the paper's round robin with
one optimiser step a round. Flow-OPD's cold start and anchor and GFD-OPD's targets are settings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from align.data.prompts import PromptBatch
from align.diffusion.kernels import DDIM
from align.diffusion.process import Prediction
from align.families import Family, Resolution
from align.objectives.losses import Form, Normalize, divergence
from align.objectives.objective import Context, Cost, Metrics, Needs, Objective, Prepares, Reference
from align.objectives.online.collect import collect
from align.objectives.online.replay import predict_at
from align.objectives.online.rewards import Scorer
from align.objectives.rows import SHARED, Rows
from align.objectives.teachers import LoRATeacher, Teacher, ask
from align.policy.policy import Policy
from align.sampling.sampler import Sampler, grid_of
from align.sampling.trajectory import Trajectories


@dataclass(frozen=True, kw_only=True)
class OPDRows(Rows):
    """R steps of N images: ``step`` (R,) counts the K kept steps of ``trajectories``."""

    step: Tensor
    trajectories: Trajectories = field(metadata=SHARED)
    target: Tensor = field(metadata=SHARED)  # (N, K, C, h, w) what the student's network should predict
    base: Tensor | None = field(default=None, metadata=SHARED)  # (N, K, C, h, w) the reference's, with an anchor


@dataclass
class OPD(Objective, Prepares):
    """Distil one or several teachers into the student, on the student's own trajectories.

    Args:
        teachers: who teaches which task.
        sampler: how the student draws; its kernel is used by ``form: sde``.
        images_per_prompt: images of each prompt in a rollout.
        form: ``ode`` draws deterministically and matches means; ``sde`` draws with noise and takes the KL.
        normalize: see :func:`align.objectives.losses.divergence`; the learning rate and ``anchor`` go with it.
        skip_last: leave out the step to the clean image, as the official code does (N - 1 of N steps train).
        target: ``same`` compares both at their own guidance; ``guided_to_conditional`` has the student without guidance
            learn the guided teacher (GFD-OPD, for small students: sample them with guidance 1 to 2 afterwards);
            ``extrapolated`` goes beyond the teacher, away from the base model, by ``extrapolation``.
        extrapolation: lambda of v* = lambda v_T + (1 - lambda) v_ref (GFD-OPD: 1.25; 1 is plain OPD).
        cold_start: begin at the average of the teachers' LoRAs.
        anchor: weight of the same divergence to the reference.
        reference: ``base``, or ``start``, the ``initial_weights`` of this run: what ``anchor`` and ``extrapolated`` are
            about.
    """

    teachers: list[Teacher]
    sampler: Sampler = field(default_factory=Sampler)
    images_per_prompt: int = 1
    form: Form = "ode"
    normalize: Normalize = "code"
    skip_last: bool = True
    target: Literal["same", "guided_to_conditional", "extrapolated"] = "same"
    extrapolation: float = 1.25
    cold_start: bool = False
    anchor: float = 0.0
    reference: Reference = "base"

    def __post_init__(self) -> None:
        tasks = [teacher.task for teacher in self.teachers]
        if not tasks or len(set(tasks)) < len(tasks) or ("*" in tasks and len(tasks) > 1):
            raise ValueError(f"teachers: expected one for each task, or one of '*'; got tasks {tasks}")
        if self.images_per_prompt < 1 or self.anchor < 0 or self.trained_steps < 1:
            raise ValueError("images_per_prompt must be at least 1, anchor at least 0, and a step has to be trained")
        if self.extrapolation <= 0:
            raise ValueError(f"extrapolation must be positive, got {self.extrapolation}: 1 is the teacher itself")
        if self.cold_start and not all(isinstance(teacher, LoRATeacher) for teacher in self.teachers):
            raise ValueError("cold_start averages LoRAs: every teacher has to be a LoRATeacher")
        if self.cold_start and self.reference == "start":
            raise ValueError("cold_start begins at the teachers' average, which is kept as no reference: set base")

    @property
    def trained_steps(self) -> int:
        return self.sampler.num_inference_steps - self.skip_last

    @property
    def needs(self) -> Needs:
        reference = self.anchor > 0 or self.target == "extrapolated"
        return Needs((PromptBatch,), reference, group_size=self.images_per_prompt, online=True)

    def prepare(self, policy: Policy, scorer: Scorer | None) -> None:
        if self.form == "sde" and self.normalize != "velocity":
            self.sampler.require_noise(policy.family, range(self.trained_steps))
        for teacher in self.teachers:
            teacher.open(policy)
        if self.cold_start:
            policy.average_adapters([teacher.name for teacher in self.teachers if isinstance(teacher, LoRATeacher)])

    def cost(self, family: Family, resolution: Resolution) -> Cost:
        scale, steps = self._guidance(family), self.trained_steps
        each = family.evaluations(scale)
        scales = [teacher.scale(self.sampler, family) for teacher in self.teachers]
        asked = math.ceil(sum(family.evaluations(scale) for scale in scales) / len(scales))
        frozen = self.sampler.num_inference_steps * each + steps * (asked + (each if self.needs.reference else 0))
        kernel = self.sampler.kernel_of(family) if self.form == "sde" else DDIM()
        notes = {
            "sampler": f"{self.sampler.num_inference_steps} steps of {kernel}, {steps} trained, guidance {scale:g}",
            "teachers": ", ".join(f"{t.task} (guidance {g:g})" for t, g in zip(self.teachers, scales, strict=True)),
        }
        return Cost(steps * each, frozen, steps, notes)

    def rollout(self, ctx: Context, batch: PromptBatch) -> OPDRows:
        family, count = ctx.policy.family, self.trained_steps
        stochastic = None if self.form == "sde" else ()
        sampler, group_size = self._student(family), self.images_per_prompt
        rollout = collect(ctx, sampler, batch, group_size, range(count), stochastic, likelihood=False)
        trajectories = rollout.trajectories
        scale = self._guidance(family) if self.needs.reference else None
        target, base = ask(self.teachers, ctx.policy, self.sampler, trajectories, batch, scale)
        if self.target == "extrapolated" and base is not None:
            target = self.extrapolation * target + (1 - self.extrapolation) * base
        return OPDRows(
            image=torch.arange(len(trajectories)).repeat_interleave(count),
            step=torch.arange(count).repeat(len(trajectories)),
            trajectories=trajectories,
            target=target,
            base=base if self.anchor else None,
            metrics=rollout.metrics,
        )

    def loss(self, ctx: Context, rows: OPDRows) -> tuple[Tensor, Metrics]:
        family, step, image = ctx.policy.family, rows.step, rows.image
        student = predict_at(ctx, self._student(family), rows.trajectories, image, step)
        apart = self._apart(student, rows.target[image, step], step, family)
        loss = apart.mean()
        metrics: Metrics = {"divergence": loss.detach()}
        if rows.base is not None:
            away = self._apart(student, rows.base[image, step], step, family).mean()
            loss = loss + self.anchor * away
            metrics["from_base"] = away.detach()
        return loss, metrics

    def _apart(self, student: Prediction, target: Tensor, step: Tensor, family: Family) -> Tensor:
        """(R,) the divergence of the student from a network that predicts ``target`` (R, C, h, w)."""
        teacher, kernel = replace(student, raw=target.to(family.device)), self.sampler.kernel_of(family)
        grid = grid_of(family, self.sampler.num_inference_steps, target)
        return divergence(student, teacher, kernel, grid, step, self.form, self.normalize)

    def _guidance(self, family: Family) -> float:
        """The student's guidance scale, in rollout and training."""
        return (
            family.unguided_scale if self.target == "guided_to_conditional" else self.sampler.guidance_scale_of(family)
        )

    def _student(self, family: Family) -> Sampler:
        """The sampler at the student's guidance."""
        return replace(self.sampler, guidance_scale=self._guidance(family))
