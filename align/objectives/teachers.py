"""Teachers of on-policy distillation: whoever answers at the student's states. A provider is a class of this kind.

A teacher's weights are never in the student's optimiser, average or saves: adapters are frozen beside the student's
own on one backbone, and pipelines are models of their own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from align import families
from align.common.errors import UserError
from align.data.prompts import PromptBatch, PromptSet
from align.diffusion.process import Prediction
from align.families import LORA_FILE, Conditioning, Family
from align.policy.policy import Policy


@dataclass
class Teacher(ABC):
    """One expert.

    Args:
        task: the prompts whose ``task`` this is are its own; ``*`` takes every prompt.
        guidance_scale: its guidance scale; null is the sampler's (DiffusionOPD's GenEval teacher: 1).
    """

    task: str = "*"
    guidance_scale: float | None = None

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


@torch.no_grad()
def average(policy: Policy, names: list[str]) -> None:
    """Start the student's LoRA from the mean of the adapters ``names``: of their products scale · B · A, not of their
    factors, cut to the student's rank by its largest singular values (Flow-OPD's cold start, arXiv 2605.08063).

    Exact where the student's rank is at least the sum of theirs.
    """
    for layer in policy.adapters:
        found = [name for name in names if name in layer.lora_A]
        if not found:
            continue
        if "default" not in layer.lora_A:
            raise UserError(
                "cold_start: a teacher has LoRA on layers that the student lacks; give both one lora.targets"
            )
        parts = [
            layer.scaling[n] * layer.lora_B[n].weight.float().flatten(1) @ layer.lora_A[n].weight.float().flatten(1)
            for n in found
        ]
        if any(layer.lora_A[n].weight.ndim != 2 for n in found):
            raise UserError("cold_start knows linear layers only; leave convolutions out of lora.targets")
        u, s, vh = torch.linalg.svd(sum(parts[1:], parts[0]) / len(names), full_matrices=False)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        rank = min(len(a), len(s))
        root = (s[:rank] / layer.scaling["default"]).sqrt()
        a.zero_()
        b.zero_()
        a[:rank], b[:, :rank] = root[:, None] * vh[:rank], u[:, :rank] * root
