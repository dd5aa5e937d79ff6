"""What :mod:`pruning.compress` is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from align import families
from align.common.command import parse
from align.common.errors import UserError
from align.families import LORA_FILE
from align.training.config import TrainConfig
from pruning import importance
from pruning.nf4 import NF4
from pruning.plan import Budget
from pruning.report import Reporting
from rewards import RewardConfig, parse_rewards

Stage = Literal["analyze", "plan", "remove", "heal", "quantize", "tune", "report"]
STAGES: tuple[Stage, ...] = ("analyze", "plan", "remove", "heal", "quantize", "tune", "report")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class Compress:
    """Prune, heal and quantize a diffusers pipeline.

    Args:
        pretrained_model_name_or_path: diffusers folder, hub id, ``shapes-sd`` or ``shapes-sd3``.
        weights: a LoRA run's folder, merged first, in full precision.
        output_dir: where every stage leaves its result.
        stages: which to run.
        prompts: a prompt file or ``shapes-prompts``, to measure importance on; the first ``calibration_prompts``.
        calibration_prompts: how many.
        num_inference_steps: sampler steps of calibration; null is the pipeline's own default.
        guidance_scale: guidance scale of calibration; null is the pipeline's own default.
        seed: of calibration's noise.
        batch_size: calibration images at once.
        reward: rewards whose weighted sum is measured for its drop, where ``measure`` is ``drop``.
        measure: what decides: the ``drop`` of the reward, the ``mse`` of the output, or the ``cosine`` of what goes in
            and out of a block.
        components: choose among parts of blocks too; such a plan loads with pruning.load only.
        budget: how small the denoiser has to become.
        blocks: by hand instead, such as ``25-28,31-34``; closed ranges of positions from 0, where HierarchicalPrune's
            own code has half-open ones.
        position_weighting: protect early blocks.
        heal: a config of align.train with the objective pruning.distill.Heal; student, teacher, plan, profile and
            output_dir are filled in. null heals nothing.
        quantize: NF4 settings; an entry of ``skip`` has to name a Linear of the denoiser or of a text encoder.
        text_encoders: quantize those too.
        tune: a second such config, for what is not packed of the quantised pipeline: biases and skipped layers make up
            for the rounding. null leaves them as they are.
        dtype: of the saved pipelines.
        report: what the pipelines are compared by.
        device: where to run; null takes a GPU where there is one.
    """

    pretrained_model_name_or_path: str = "shapes-sd3"
    weights: Path | None = None
    output_dir: Path = Path("outputs/compress")
    stages: list[Stage] = field(default_factory=lambda: list(STAGES))
    prompts: str = "shapes-prompts"
    calibration_prompts: int = 32
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0
    batch_size: int = 16
    reward: list[RewardConfig] = field(default_factory=list)
    measure: importance.Measure = "mse"
    components: bool = False
    budget: Budget | None = None
    blocks: str | None = None
    position_weighting: bool = True
    heal: Path | None = None
    quantize: NF4 = field(default_factory=NF4)
    text_encoders: bool = True
    tune: Path | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16"
    report: Reporting = field(default_factory=Reporting)
    device: str | None = None

    def __post_init__(self) -> None:
        self.reward = parse_rewards(self.reward)

    def check(self) -> None:
        """Everything that can be known to be wrong before a weight is loaded, at once."""
        wrong = []
        if (self.budget is None) == (self.blocks is None):
            wrong.append("give either a budget or blocks by hand")
        wrong += self.budget.check() if self.budget else []
        if self.measure == "drop" and not self.reward and self.blocks is None:
            wrong.append("measure: drop needs a reward")
        if self.calibration_prompts < 1:
            wrong.append(f"calibration_prompts must be at least 1, got {self.calibration_prompts}")
        for name, file in self.healing().items():
            if not file.is_file():
                wrong.append(f"{name}: no config {file}")
            elif {name, "analyze"} & set(self.stages):
                wrong += self._check_run(name)
        if self.weights is not None and not (self.weights / LORA_FILE).is_file():
            wrong.append(f"weights: no {LORA_FILE} in {self.weights}")
        if wrong:
            raise UserError("; ".join(wrong))
        families.find(self.pretrained_model_name_or_path)

    def _check_run(self, name: str) -> list[str]:
        try:
            settings, _ = self.run(name)
            settings.check()
        except UserError as error:
            return [f"{name}: {error}"]
        if name == "tune" and settings.lora is not None:
            return [f"tune: {self.tune} trains a LoRA, which cannot be merged into 4 bit; set lora: null"]
        return []

    def at(self, name: str) -> Path:
        return self.output_dir / name

    def healing(self) -> dict[str, Path]:
        """The runs that heal, with their configs."""
        return {run: file for run, file in (("heal", self.heal), ("tune", self.tune)) if file is not None}

    @property
    def source(self) -> str:
        """The original: the model's name, or the folder where the LoRA is merged into it."""
        return self.pretrained_model_name_or_path if self.weights is None else str(self.at("merged"))

    def run(self, name: str, student: str | None = None) -> tuple[TrainConfig, str]:
        """The settings of a run that heals, with what this command knows filled in, and their YAML; until there is a
        ``student`` the original stands in."""
        filled = {
            "pretrained_model_name_or_path": student or self.pretrained_model_name_or_path,
            "objective.init_args.teacher.path": self.source,
            "objective.init_args.plan_path": self.at("plan.json"),
            "output_dir": self.at(name),
            "resume_from_checkpoint": "latest",
        }
        if "analyze" in self.stages or self.at("profile.json").is_file():
            filled["objective.init_args.profile"] = self.at("profile.json")
        words = [word for key, value in filled.items() for word in (f"--{key}", str(value))]
        return parse(TrainConfig, "align.train", None, ["--config", str(self.healing()[name]), *words], leaves=False)
