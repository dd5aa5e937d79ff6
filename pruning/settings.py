"""What :mod:`pruning.compress` is told."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from align import families
from align.common.assets import TakesPaths
from align.common.command import parse
from align.common.errors import UserError
from align.common.hub import Publishing
from align.data.prompts import read_prompt_rows
from align.families import LORA_FILE, lora_path
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
class Compress(Publishing, TakesPaths):
    """Prune, heal and quantize a diffusers pipeline.

    Args:
        pretrained_model_name_or_path: diffusers folder, hub id, ``shapes-sd`` or ``shapes-sd3``.
        weights: a LoRA, merged first, in full precision: a run's folder, or a .safetensors file of any tool.
        output_dir: where every stage leaves its result.
        overwrite_output_dir: make results of other settings in ``output_dir`` anew, and what follows from them; else
            they are refused.
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
    overwrite_output_dir: bool = False
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
        super().__post_init__()
        self.reward = parse_rewards(self.reward)

    def check(self) -> None:
        """Everything that can be known to be wrong before a weight is loaded, at once."""
        wrong = [] if self.stages else [f"stages is empty; give some of {', '.join(STAGES)}"]
        if (self.budget is None) == (self.blocks is None):
            wrong.append("give either a budget or blocks by hand")
        wrong += self.budget.check() if self.budget else []
        if self.measure == "drop" and not self.reward and self.blocks is None:
            wrong.append("measure: drop needs a reward")
        sampling = {"num_inference_steps": (1, 1000), "guidance_scale": (0, 1000), "seed": (0, 2**63 - 1)}
        wrong += _outside(self, calibration_prompts=(1, 2**31), batch_size=(1, 2**31), **sampling)
        for name, file in self.healing().items():
            wrong += self._check_run(name) if file.is_file() else [f"{name}: no config {file}"]
        if "report" in self.stages:
            counts = dict.fromkeys(("samples_per_prompt", "batch_size", "max_prompts", "repeats"), (1, 2**31))
            wrong += [f"report: {text}" for text in _outside(self.report, **counts, **sampling)]
            wrong += _refusal("report", self._check_report)
        wrong += _refusal("weights", self._check_weights)
        if wrong:
            raise UserError("; ".join(wrong))
        families.find(self.pretrained_model_name_or_path)

    def _check_weights(self) -> None:
        if self.weights is not None and lora_path(self.weights) is None:
            raise UserError(f"no LoRA at {self.weights}; expected a file or a folder with {LORA_FILE}")

    def _check_report(self) -> None:
        if self.report.prompts != "shapes":
            read_prompt_rows(self.report.prompts)

    def _check_run(self, name: str) -> list[str]:
        runs: list[TrainConfig] = []
        if wrong := _refusal(name, lambda: runs.append(self.run(name)[0])):
            return wrong
        if {name, "analyze"} & set(self.stages):
            wrong = _refusal(name, runs[0].check)
        if name == "tune" and runs[0].lora is not None:
            wrong.append(f"tune: {self.tune} trains a LoRA, which cannot be merged into 4 bit; set lora: null")
        return wrong

    def at(self, name: str) -> Path:
        return self.output_dir / name

    def healing(self) -> dict[str, Path]:
        """The runs that heal, with their configs."""
        return {run: file for run, file in (("heal", self.heal), ("tune", self.tune)) if file is not None}

    def heals_by_profile(self) -> bool:
        """Whether healing wants the profile, though blocks are given by hand."""
        from pruning.distill import Heal

        objectives = (self.run(run)[0].objective for run in self.healing())
        return any(isinstance(objective, Heal) and objective.sensitivity != "none" for objective in objectives)

    @property
    def source(self) -> str:
        """The original: the model's name, or the folder where the LoRA is merged into it."""
        return self.pretrained_model_name_or_path if self.weights is None else str(self.at("merged"))

    @property
    def smallest(self) -> str:
        """What is quantised."""
        return "pruned" if self.heal is None else "healed"

    def run(self, name: str, student: str | None = None) -> tuple[TrainConfig, str]:
        """The settings of a run that heals, with what this command knows filled in, and their YAML; until there is a
        ``student`` the original stands in."""
        filled = {
            "pretrained_model_name_or_path": student or self.pretrained_model_name_or_path,
            "objective.init_args.teacher.path": self.source,
            "objective.init_args.plan_path": self.at("plan.json"),
            "objective.init_args.profile": self.at("profile.json"),
            "output_dir": self.at(name),
            "resume_from_checkpoint": "latest",
            "dry_run": False,
            "push_to_hub": False,  # what it healed goes, not its run
        }
        file = self.healing()[name]
        words = ["--config", str(file), *(word for key, value in filled.items() for word in (f"--{key}", str(value)))]
        if student is None:  # to be looked at, as it is many times, and not to be run
            return _looked_at(tuple(words), file.read_bytes())
        return parse(TrainConfig, "align.train", None, words, leaves=False)


@functools.lru_cache(maxsize=4)
def _looked_at(words: tuple[str, ...], _content: bytes) -> tuple[TrainConfig, str]:
    return parse(TrainConfig, "align.train", None, words, leaves=False)


def _refusal(name: str, check: Callable[[], object]) -> list[str]:
    """What ``check`` has against the setting ``name``."""
    try:
        check()
    except UserError as error:
        return [f"{name}: {error}"]
    return []


def _outside(settings: object, **bounds: tuple[int, int]) -> list[str]:
    """The numbers that do not lie between their bounds, in words; NaN does not, and None is no number."""
    return [
        f"{name} is {value}; expected {low} to {high}"
        for name, (low, high) in bounds.items()
        if (value := getattr(settings, name)) is not None and not (math.isfinite(value) and low <= value <= high)
    ]
