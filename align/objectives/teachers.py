"""Teachers of on-policy distillation: whoever answers at the student's states. A provider is a class of this kind.
:func:`ask` routes every state to the one teacher of its task, :func:`average` merges LoRA teachers for a cold start.

A teacher's weights are never in the student's optimiser, average or saves: adapters are frozen beside the student's
own on one backbone, and pipelines are models of their own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align import families
from align.common.errors import UserError
from align.data.prompts import PromptBatch, PromptSet
from align.diffusion.process import Prediction
from align.families import LORA_FILE, Conditioning, Family
from align.policy.policy import Policy
from align.sampling.sampler import Sampler, grid_of
from align.sampling.trajectory import Trajectories


@dataclass
class Teacher(ABC):
    """One expert.

    Args:
        task: the prompts whose ``task`` this is are its own; ``*`` takes every prompt.
        guidance_scale: its guidance scale; null is the sampler's (DiffusionOPD's GenEval teacher: 1).
    """

    task: str = "*"
    guidance_scale: float | None = None

    def scale(self, sampler: Sampler, family: Family) -> float:
        """The guidance scale at which it is asked."""
        return sampler.guidance_scale_of(family) if self.guidance_scale is None else self.guidance_scale

    @abstractmethod
    def open(self, policy: Policy) -> None:
        """Load it beside ``policy``. Raises :class:`UserError` where it cannot teach that student."""

    @abstractmethod
    def conditions(self, policy: Policy, batch: PromptBatch) -> Conditioning:
        """What the prompts of ``batch`` are to this teacher."""

    @abstractmethod
    def predict(self, policy: Policy, x_t: Tensor, t: Tensor, cond: Conditioning, guidance_scale: float) -> Prediction:
        """Its answer at ``x_t`` (B, C, h, w) and ``t`` (B,); called under ``no_grad``."""


@dataclass
class LoRATeacher(Teacher):
    """A LoRA of the student's own base model, as a second adapter on the student's backbone.

    Args:
        path: a run or LoRA folder.
    """

    path: Path = Path()

    def open(self, policy: Policy) -> None:
        if not (self.path / LORA_FILE).is_file():
            raise UserError(f"teacher of {self.task!r}: no {LORA_FILE} in {self.path}; expected a LoRA run's folder")
        if not policy.lora:
            raise UserError(
                f"teacher of {self.task!r}: a LoRA teaches a LoRA student, which leaves the backbone as both know it; "
                "set lora, or give the teacher as a PipelineTeacher"
            )
        policy.add_adapter(self.name, self.path)

    @property
    def name(self) -> str:
        if self.task == "*":
            return "teacher_all"
        # torch allows no dot in a module's name; any other name is kept apart by its bytes
        return f"teacher_{self.task if self.task.isidentifier() else self.task.encode().hex()}"

    def conditions(self, policy: Policy, batch: PromptBatch) -> Conditioning:
        return batch.cond

    def predict(self, policy: Policy, x_t: Tensor, t: Tensor, cond: Conditioning, guidance_scale: float) -> Prediction:
        with policy.adapter(self.name):
            return policy.predict(x_t, t, cond, guidance_scale)


@dataclass
class PipelineTeacher(Teacher):
    """A pipeline of its own, with its own text encoders: a larger model, or the unpruned one.

    Args:
        path: diffusers folder or hub id; one that was saved in 4 bit loads as such.
        weights: a run folder whose LoRA or denoiser is put in.
    """

    path: str = ""
    weights: Path | None = None

    def load(self, policy: Policy) -> Family:
        family = families.load(self.path, policy.family.dtype, policy.family.device)
        return family if self.weights is None else families.tuned(family, str(self.weights))

    def open(self, policy: Policy) -> None:
        self.family, student = self.load(policy), policy.family
        self.family.denoiser.requires_grad_(False)
        if (
            self.family.prediction_type != student.prediction_type
            or self.family.latent_shape() != student.latent_shape()
        ):
            raise UserError(
                f"teacher {self.path!r} predicts {self.family.prediction_type} on latents "
                f"{self.family.latent_shape()}, the student {student.prediction_type} on {student.latent_shape()}: "
                "they have to share both, and the latent space"
            )
        self._prompts = PromptSet(self.family, [])

    def conditions(self, policy: Policy, batch: PromptBatch) -> Conditioning:
        return self._prompts.encode(batch.prompts)

    def predict(self, policy: Policy, x_t: Tensor, t: Tensor, cond: Conditioning, guidance_scale: float) -> Prediction:
        policy.evaluations["frozen"] += len(x_t) * (1 if guidance_scale == 1.0 else 2)
        return self.family.predict(x_t, t, cond, guidance_scale)


def teacher_of(teachers: Sequence[Teacher], row: Mapping[str, Any]) -> int:
    """The number of the teacher of a prompt's task. Raises :class:`UserError` where there is none."""
    tasks = [teacher.task for teacher in teachers]
    if tasks == ["*"]:
        return 0
    if row.get("task") not in tasks:
        raise UserError(
            f"prompt {row['prompt']!r} has task {row.get('task')!r}, and there are teachers of {', '.join(tasks)}; "
            "give every prompt the task of a teacher (data: TaskPrompts does)"
        )
    return tasks.index(row["task"])


def ask(
    teachers: Sequence[Teacher],
    policy: Policy,
    sampler: Sampler,
    trajectories: Trajectories,
    batch: PromptBatch,
    change: Callable[[Tensor, Tensor], Tensor] | None,
    keep_base: bool,
    student_guidance_scale: float,
) -> tuple[Tensor, Tensor | None]:
    """What the teachers' networks predict at every kept state but the last, (N, K, C, h, w): each image's one teacher
    is asked once. Also what the reference's does, where ``keep_base``.

    ``change(answer, base)`` makes the target of the teacher's and the reference's answers; null takes the teacher's.
    The reference is asked at the student's guidance, and not at all where nothing wants it.
    """
    family, count = policy.family, trajectories.latents.shape[1] - 1
    states = trajectories.latents[:, :count]
    targets = torch.empty_like(states, device="cpu", dtype=torch.float32)
    bases = torch.empty_like(targets) if keep_base else None
    numbers = [teacher_of(teachers, row) for row in batch.metadata]
    for number, teacher in enumerate(teachers):
        rows = torch.tensor([k for k, p in enumerate(trajectories.prompt_index.tolist()) if numbers[p] == number])
        if not len(rows):
            continue
        cond = teacher.conditions(policy, batch).to(family.device)
        scale = teacher.scale(sampler, family)
        for part in rows.split(sampler.batch_size):
            for j in range(count):
                x = states[part.to(states.device), j].to(family.device)
                t = grid_of(family, sampler.num_inference_steps).t[j].to(family.device).expand(len(x))
                prompt_index = trajectories.prompt_index[part].to(family.device)
                answer = teacher.predict(policy, x, t, cond.take(prompt_index), scale).raw.float()
                if change is not None or bases is not None:
                    with policy.reference():
                        prediction = policy.predict(x, t, trajectories.cond_of(part), student_guidance_scale)
                    base = prediction.raw.float()
                    if change is not None:
                        answer = change(answer, base)
                    if bases is not None:
                        bases[part, j] = base.cpu()
                targets[part, j] = answer.cpu()
    return targets, bases


@torch.no_grad()
def average(policy: Policy, names: list[str]) -> None:
    """Start the student's LoRA from the mean of the adapters ``names``: of their products scale · B · A, not of their
    factors, cut to the student's rank by its largest singular values (Flow-OPD's cold start, arXiv 2605.08063).

    Exact where the student's rank is at least the sum of theirs.
    """
    for layer in policy.adapters:
        present = [name for name in names if name in layer.lora_A]
        if not present:
            continue
        if "default" not in layer.lora_A:
            raise UserError(
                "cold_start: a teacher has LoRA on layers that the student lacks; give both one lora.targets"
            )
        parts = [
            layer.scaling[n] * layer.lora_B[n].weight.float().flatten(1) @ layer.lora_A[n].weight.float().flatten(1)
            for n in present
        ]
        if any(layer.lora_A[n].weight.ndim != 2 for n in present):
            raise UserError("cold_start knows linear layers only; leave convolutions out of lora.targets")
        u, s, vh = torch.linalg.svd(sum(parts[1:], parts[0]) / len(names), full_matrices=False)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        rank = min(len(a), len(s))
        root = (s[:rank] / layer.scaling["default"]).sqrt()
        a.zero_()
        b.zero_()
        a[:rank], b[:, :rank] = root[:, None] * vh[:rank], u[:, :rank] * root
