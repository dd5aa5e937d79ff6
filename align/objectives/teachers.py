"""Teachers of on-policy distillation: whoever answers at the student's states. A provider is a class of this kind.
:func:`ask` routes every state to the one teacher of its task.

A teacher's weights are never in the student's optimiser, average or saves: adapters are frozen beside the student's
own on one backbone, and pipelines are models of their own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align import families
from align.common.errors import UserError
from align.data.prompts import PromptBatch, PromptSet
from align.diffusion.process import Prediction
from align.families import LORA_FILE, Conditioning, Family, Scale, lora_path
from align.families.identity import meaning
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

    def conditions(self, policy: Policy, batch: PromptBatch) -> Conditioning:
        """What the prompts of ``batch`` are to this teacher: by default, what they are to the student."""
        return batch.cond

    @abstractmethod
    def predict(self, policy: Policy, x_t: Tensor, t: Tensor, cond: Conditioning, guidance_scale: Scale) -> Prediction:
        """Its answer at ``x_t`` (B, C, h, w) and ``t`` (B,); called under ``no_grad``."""


@dataclass
class LoRATeacher(Teacher):
    """A LoRA of the student's own base model, as a second adapter on the student's backbone.

    Args:
        path: a run folder, or a LoRA file.
    """

    path: Path = Path()

    def open(self, policy: Policy) -> None:
        if lora_path(self.path) is None:
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

    def predict(self, policy: Policy, x_t: Tensor, t: Tensor, cond: Conditioning, guidance_scale: Scale) -> Prediction:
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
        theirs, ours = meaning(self.family), meaning(student)
        if differ := [name for name in ours if theirs[name] != ours[name]]:
            said = "; ".join(f"{name} {theirs[name]}, the student's {ours[name]}" for name in differ)
            raise UserError(f"teacher {self.path!r} cannot be asked about the student's states: its {said}")
        self._prompts = PromptSet(self.family, [])

    def conditions(self, policy: Policy, batch: PromptBatch) -> Conditioning:
        return self._prompts.encode(batch.prompts)

    def predict(self, policy: Policy, x_t: Tensor, t: Tensor, cond: Conditioning, guidance_scale: Scale) -> Prediction:
        policy.evaluations["frozen"] += len(x_t) * self.family.evaluations(guidance_scale)
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
    base_guidance_scale: float | None,
) -> tuple[Tensor, Tensor | None]:
    """What the teachers' networks predict at every kept state but the last, (N, K, C, h, w): each image's one teacher
    is asked once. Also what the reference predicts there, at ``base_guidance_scale``; None does not ask it.
    """
    family, count = policy.family, trajectories.latents.shape[1] - 1
    states = trajectories.latents[:, :count]
    targets = torch.empty_like(states, device="cpu", dtype=torch.float32)
    bases = torch.empty_like(targets) if base_guidance_scale is not None else None
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
                t = grid_of(family, sampler.num_inference_steps, x).t[j].to(family.device).expand(len(x))
                prompt_index = trajectories.prompt_index[part].to(family.device)
                targets[part, j] = teacher.predict(policy, x, t, cond.take(prompt_index), scale).raw.float().cpu()
                if bases is not None and base_guidance_scale is not None:
                    with policy.reference():
                        base = policy.predict(x, t, trajectories.cond_of(part), base_guidance_scale)
                    bases[part, j] = base.raw.float().cpu()
    return targets, bases
