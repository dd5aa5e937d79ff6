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
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from align.common.errors import UserError
from align.data.prompts import PromptBatch
from align.diffusion.kernels import DDIM, Kernel, Step
from align.diffusion.process import Grid, Prediction, reduce_dims
from align.families import Family
from align.objectives.objective import Context, Metrics, Objective, Plan
from align.objectives.online.collect import draw
from align.objectives.online.replay import predict_at
from align.objectives.online.rewards import Scorer
from align.objectives.rows import Rows
from align.objectives.teachers import LoRATeacher, Teacher, average
from align.policy.policy import Policy
from align.sampling.sampler import Sampler, grid_of

Form = Literal["ode", "sde"]
Normalize = Literal["paper", "code", "velocity"]


def divergence(
    student: Prediction, teacher: Prediction, kernel: Kernel, grid: Grid, i: Step, form: Form, normalize: Normalize
) -> Tensor:
    """(B,) how far two answers at one state are apart at step ``i``, in float32.

    ``paper`` sums over the latent. ``code`` is what DiffusionOPD's, Flow-OPD's and Flow-GRPO's code computes: the mean
    over the latent and, with ``sde``, a variance without the step's length, so ``code`` · d / |dt| = ``paper`` there.
    ``velocity`` is the mean square of what the networks differ by, without any weight (DanceOPD).
    """
    if normalize == "velocity":
        return reduce_dims((student.raw.float() - teacher.raw.float()).square(), "mean")
    reduction: Literal["mean", "sum"] = "sum" if normalize == "paper" else "mean"
    if form == "ode":
        gap = DDIM()(student, grid, i).mean - DDIM()(teacher, grid, i).mean
        return 0.5 * reduce_dims(gap.square(), reduction)
    found = kernel(student, grid, i).kl(kernel(teacher, grid, i), reduction)
    if normalize == "paper":
        return found
    step = torch.as_tensor(i, device=grid.sigma.device)
    return found * (grid.sigma[step] - grid.sigma[step + 1]).abs().to(found.device)


@dataclass
class OPD(Objective):
    """Distil one or several teachers into the student, on the student's own trajectories.

    Args:
        teachers: who teaches which task.
        sampler: how the student draws; its kernel is used by ``form: sde``.
        images_per_prompt: pictures of each prompt in a rollout.
        form: ``ode`` draws deterministically and matches means; ``sde`` draws with noise and takes the KL.
        normalize: see :func:`divergence`; the learning rate and ``anchor`` go with it.
        step_weights: a factor for each trained step; null is 1.
        skip_last: leave out the step to the clean picture, as the official code does (N - 1 of N steps train).
        target: ``same`` compares both at their own guidance; ``guided_to_conditional`` has the student without guidance
            learn the guided teacher (GFD-OPD, for small students: sample them with guidance 1 to 2 afterwards);
            ``extrapolated`` goes beyond the teacher, away from the base model, by ``extrapolation``.
        extrapolation: lambda of v* = lambda v_T + (1 - lambda) v_ref (GFD-OPD: 1.25; 1 is plain OPD).
        cold_start: begin at the average of the teachers' LoRAs.
        anchor: weight of the same divergence to the base model.
    """

    teachers: list[Teacher]
    sampler: Sampler = field(default_factory=Sampler)
    images_per_prompt: int = 1
    form: Form = "ode"
    normalize: Normalize = "code"
    step_weights: list[float] | None = None
    skip_last: bool = True
    target: Literal["same", "guided_to_conditional", "extrapolated"] = "same"
    extrapolation: float = 1.25
    cold_start: bool = False
    anchor: float = 0.0

    batch_types: ClassVar[tuple[type, ...]] = (PromptBatch,)
    online: ClassVar[bool] = True
    scored: ClassVar[bool] = False

    def __post_init__(self) -> None:
        tasks = [teacher.task for teacher in self.teachers]
        if not tasks or len(set(tasks)) < len(tasks) or ("*" in tasks and len(tasks) > 1):
            raise ValueError(f"teachers: expected one for each task, or one of '*'; got tasks {tasks}")
        if self.images_per_prompt < 1 or self.anchor < 0 or self.trained_steps < 1:
            raise ValueError("images_per_prompt must be at least 1, anchor at least 0, and a step has to be trained")
        if self.step_weights is not None and len(self.step_weights) != self.trained_steps:
            raise ValueError(
                f"step_weights has {len(self.step_weights)} factors for {self.trained_steps} trained steps"
            )
        if self.cold_start and not all(isinstance(teacher, LoRATeacher) for teacher in self.teachers):
            raise ValueError("cold_start averages LoRAs: every teacher has to be a LoRATeacher")

    @property
    def trained_steps(self) -> int:
        return self.sampler.num_inference_steps - self.skip_last

    @property
    def needs_reference(self) -> bool:
        return self.anchor > 0 or self.target == "extrapolated"

    @property
    def group(self) -> int:
        return self.images_per_prompt

    def prepare(self, policy: Policy, scorer: Scorer | None) -> None:
        if self.form == "sde" and self.normalize != "velocity":
            self._require_noise(policy.family)
        for teacher in self.teachers:
            teacher.open(policy)
        if self.cold_start:
            average(policy, [teacher.name for teacher in self.teachers if isinstance(teacher, LoRATeacher)])

    def _require_noise(self, family: Family) -> None:
        """Every trained step needs a variance to have a KL."""
        grid, kernel = grid_of(family, self.sampler.num_inference_steps), self.sampler.kernel_of(family)
        x = torch.zeros(1, 1, 1, 1)
        for i in range(self.trained_steps):
            prediction = Prediction(x, x, grid.alpha[i], grid.sigma[i], family.prediction_type)
            if not bool((kernel(prediction, grid, i).std > 0).all()):
                raise UserError(
                    f"form: sde: {kernel} takes step {i} of {self.sampler.num_inference_steps} without noise, so it "
                    "has no KL; set eta or noise above 0, skip_last: true, or form: ode"
                )

    def plan(self, family: Family, resolution: int | None) -> Plan:
        scale = self._guidance(family)
        own = 1 if scale == 1.0 else 2
        asked = [self._asked(family, teacher) for teacher in self.teachers]
        theirs = math.ceil(sum(1 if g == 1.0 else 2 for g in asked) / len(asked))
        steps = self.trained_steps
        frozen = self.sampler.num_inference_steps * own + steps * (theirs + (own if self.needs_reference else 0))
        kernel = self.sampler.kernel_of(family) if self.form == "sde" else DDIM()
        notes = {
            "sampler": f"{self.sampler.num_inference_steps} steps of {kernel}, {steps} trained, guidance {scale:g}",
            "teachers": ", ".join(f"{t.task} (guidance {g:g})" for t, g in zip(self.teachers, asked, strict=True)),
        }
        return Plan(steps * own, frozen, steps, notes)

    def rollout(self, ctx: Context, batch: PromptBatch) -> Rows:
        count = self.trained_steps
        drawn = draw(
            ctx,
            self._own(ctx.policy.family),
            batch,
            self.group,
            range(count),
            None if self.form == "sde" else (),
            likelihood=False,
        )
        columns, prompt = drawn.columns, drawn.columns["prompt"]
        assert isinstance(prompt, Tensor)
        for name, parts in self._targets(ctx, columns, batch).items():
            columns[name] = parts
        image = torch.arange(len(prompt)).repeat_interleave(count)
        step = torch.arange(count).repeat(len(prompt))
        return Rows({"step": step}, columns, image, drawn.metrics)

    def _targets(self, ctx: Context, columns: dict[str, Any], batch: PromptBatch) -> dict[str, Tensor]:
        """What is to be matched at every kept state, (N, K, C, h, w): each picture's one teacher is asked once."""
        policy, family = ctx.policy, ctx.policy.family
        states = columns["latents"][:, : self.trained_steps]
        targets = torch.empty_like(states, device="cpu", dtype=torch.float32)
        found = {"target": targets}
        if self.anchor:
            found["base"] = torch.empty_like(targets)
        tasks = [self._teacher_of(row) for row in batch.metadata]
        for number, teacher in enumerate(self.teachers):
            rows = torch.tensor([k for k, p in enumerate(columns["prompt"].tolist()) if tasks[p] == number])
            if not len(rows):
                continue
            cond = teacher.conditions(policy, batch).to(family.device)
            scale = self._asked(family, teacher)
            for part in rows.split(self.sampler.batch_size):
                for j in range(self.trained_steps):
                    x = states[part.to(states.device), j].to(family.device)
                    t = grid_of(family, self.sampler.num_inference_steps).t[j].to(family.device).expand(len(x))
                    which = columns["prompt"][part].to(family.device)
                    answer = teacher.predict(policy, x, t, cond.take(which), scale).raw.float()
                    if self.needs_reference:
                        with policy.reference():
                            bound = columns["cond"].take(which)
                            base = policy.predict(x, t, bound, self._guidance(family)).raw.float()
                        if self.target == "extrapolated":
                            answer = self.extrapolation * answer + (1 - self.extrapolation) * base
                        if self.anchor:
                            found["base"][part, j] = base.cpu()
                    targets[part, j] = answer.cpu()
        return found

    def _teacher_of(self, row: Any) -> int:
        tasks = [teacher.task for teacher in self.teachers]
        if tasks == ["*"]:
            return 0
        if row.get("task") not in tasks:
            raise UserError(
                f"prompt {row['prompt']!r} has task {row.get('task')!r}, and there are teachers of {', '.join(tasks)}; "
                "give every prompt the task of a teacher (data: TaskPrompts does)"
            )
        return tasks.index(row["task"])

    def loss(self, ctx: Context, rows: Rows) -> tuple[Tensor, Metrics]:
        family, step, picture = ctx.policy.family, rows.tensor("step"), rows.image
        grid, device = grid_of(family, self.sampler.num_inference_steps), family.device
        student = predict_at(ctx, self._own(family), rows.images, picture, step)
        apart = self._apart(student, rows.images["target"][picture, step].to(device), grid, step, family)  # type: ignore[index]
        weight = torch.tensor(self.step_weights)[step].to(device) if self.step_weights else torch.ones_like(apart)
        loss = (weight * apart).mean()
        metrics: Metrics = {"divergence": apart.mean().detach()}
        if self.anchor:
            base = rows.images["base"][picture, step].to(device)  # type: ignore[index]
            away = (weight * self._apart(student, base, grid, step, family)).mean()
            loss = loss + self.anchor * away
            metrics["from_base"] = away.detach()
        return loss, metrics

    def _apart(self, student: Prediction, target: Tensor, grid: Grid, step: Step, family: Family) -> Tensor:
        teacher = replace(student, raw=target)
        return divergence(student, teacher, self.sampler.kernel_of(family), grid, step, self.form, self.normalize)

    def _guidance(self, family: Family) -> float:
        """The student's guidance scale, in rollout and training."""
        return 1.0 if self.target == "guided_to_conditional" else self.sampler.guidance_scale_of(family)

    def _own(self, family: Family) -> Sampler:
        """The sampler at the student's guidance."""
        return replace(self.sampler, guidance_scale=self._guidance(family))

    def _asked(self, family: Family, teacher: Teacher) -> float:
        """The guidance scale at which ``teacher`` is asked."""
        return self.sampler.guidance_scale_of(family) if teacher.guidance_scale is None else teacher.guidance_scale
