"""The settings of a training run: what ``--config`` files and the command line fill in."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

import align.data
import align.objectives  # noqa: F401  imported, so that `--objective DPO` needs no import path
from align import families
from align.common.assets import TakesPaths
from align.common.errors import UserError, require_at_least
from align.common.hub import Publishing
from align.common.resolution import sides
from align.data.captioned import EncodedData
from align.data.dataset import Data
from align.data.prompts import PromptBatch
from align.families import Family
from align.objectives import Objective
from align.objectives.online.rewards import RewardConfig, Scorer
from align.policy.policy import LoRA
from align.training.stop import StopRule


@dataclass
class Samples:
    """The grid of fixed prompts and seeds drawn while training; None is the pipeline's own."""

    prompts: list[str] = field(default_factory=list)
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require_at_least(1, self, "num_inference_steps", of="samples")
        require_at_least(0, self, "guidance_scale", "seed", of="samples")


@dataclass
class TrainConfig(Publishing, TakesPaths):
    """Fine-tune a diffusers pipeline through an objective.

    Args:
        data: what to train on: PreferencePairs, RatedImages, Images, Prompts, LabelledRollout, or anyone's import path.
        objective: how: a class of ``align.objectives`` or anyone's import path, with its arguments.
        rewards: what online objectives score their pictures by; those of weight 0 are only watched.
        diversity_features: a vision model (DINOv2, CLIP) or ``lpips:FILE`` by whose features the diversity of rollouts
            is measured beside pixels and latents.
        validation_data: held-out pairs, on which the objective's metrics are measured, or held-out prompts, whose
            pictures are scored by the rewards; logged and put into the model card.
        pretrained_model_name_or_path: diffusers folder, hub id, ``shapes-sd`` or ``shapes-sd3``.
        revision: hub revision.
        variant: weight variant, such as ``fp16``.
        output_dir: the run folder.
        overwrite_output_dir: replace what an earlier run left in ``output_dir``.
        seed: names every random draw.
        lora: rank, alpha and targets; ``null`` trains every weight of the denoiser.
        initial_weights: a run or LoRA folder to start from, such as the last round's.
        train_batch_size: rows (pairs, sampler steps of pictures) a process passes through the network at once.
        gradient_accumulation_steps: such chunks per optimiser step; about as many where the number of rows varies.
        rollout_batch_size: pairs or prompts drawn from the data for one rollout, over all processes; null draws as
            many as make one update, one row each.
        inner_epochs: passes over the rows of a rollout.
        max_train_steps: optimiser steps; null is 1000, or as many as ``max_rollouts`` gives.
        max_rollouts: stop after so many rollouts, if that comes first.
        learning_rate: peak learning rate.
        scale_lr: multiply it by processes x accumulation x batch size.
        lr_scheduler: a name that ``diffusers.optimization.get_scheduler`` knows.
        lr_warmup_steps: optimiser steps of warm-up.
        adam_beta1: AdamW.
        adam_beta2: AdamW.
        adam_weight_decay: AdamW.
        adam_epsilon: AdamW.
        use_8bit_adam: bitsandbytes' AdamW; needs a GPU.
        quantize: ``nf4`` packs the frozen denoiser in 4 bit when it is loaded (QLoRA); needs ``lora``.
        sgd_momentum: SGD with this Nesterov momentum instead of AdamW (ReNO: 0.9); null is AdamW.
        max_grad_norm: gradients are clipped to this norm.
        ema_decay: keep a moving average of the trained weights and save that; 0 keeps none.
        gradient_checkpointing: recompute activations in backward; less memory, more time.
        offload_idle: text encoders and VAE wait on the CPU and come to the device when they are called.
        vae_slicing: the VAE takes one picture at a time; less memory, more time.
        mixed_precision: autocast; frozen weights are kept in this precision too; ``auto`` is what accelerate is
            configured with.
        allow_tf32: TF32 matrix products on Ampere and later.
        compile: compile the denoiser's repeated blocks (``torch.compile``): minutes at the first rollout and update,
            less time in each after them, other last bits.
        attention_backend: a diffusers attention backend (``native``, ``xformers``, ``flash``, ...); null leaves it.
        stop: end the run when the trained reward rises while watched ones fall; null never does.
        checkpointing_steps: optimiser steps between checkpoints; 0 writes none.
        checkpoints_total_limit: how many checkpoints to keep; null keeps all.
        resume_from_checkpoint: ``latest`` or a ``checkpoint-N`` folder; ``latest`` starts anew where there is none.
        samples: the sample grid.
        validation_steps: optimiser steps between sample grids and held-out metrics; 0 only at start and end.
        logging_steps: optimiser steps between lines of ``metrics.jsonl``.
        report_to: a tracker that accelerate knows and that is installed (``tensorboard``, ``wandb``, ``mlflow``, ...),
            several (``[tensorboard,wandb]``), ``all`` of those, or ``none``.
        dry_run: print the plan and stop.
        memory: with ``dry_run``, what a GPU has, such as ``24GB``: print what this run would take of it, traced from
            the model's config files, and what to change where that is more. No weight is read, no GPU needed.
    """

    data: Data
    objective: Objective
    rewards: list[RewardConfig] = field(default_factory=list)
    diversity_features: str | None = None
    validation_data: Data | None = None
    pretrained_model_name_or_path: str = "shapes-sd"
    revision: str | None = None
    variant: str | None = None
    output_dir: Path = Path("outputs/run")
    overwrite_output_dir: bool = False
    seed: int = 0
    lora: LoRA | None = field(default_factory=LoRA)
    initial_weights: Path | None = None
    train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    rollout_batch_size: int | None = None
    inner_epochs: int = 1
    max_train_steps: int | None = None
    max_rollouts: int | None = None
    learning_rate: float = 1e-5
    scale_lr: bool = False
    lr_scheduler: str = "constant_with_warmup"
    lr_warmup_steps: int = 0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 1e-2
    adam_epsilon: float = 1e-8
    use_8bit_adam: bool = False
    quantize: Literal["nf4"] | None = None
    sgd_momentum: float | None = None
    max_grad_norm: float = 1.0
    ema_decay: float = 0.0
    gradient_checkpointing: bool = False
    offload_idle: bool = False
    vae_slicing: bool = False
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    allow_tf32: bool = False
    compile: bool = False
    attention_backend: str | None = None
    stop: StopRule | None = None
    checkpointing_steps: int = 500
    checkpoints_total_limit: int | None = None
    resume_from_checkpoint: str | None = None
    samples: Samples = field(default_factory=Samples)
    validation_steps: int = 0
    logging_steps: int = 1
    report_to: list[str] | str = "tensorboard"
    dry_run: bool = False
    memory: str | None = None

    def check(self) -> None:
        """Everything that can be known to be wrong before a weight is loaded."""
        from diffusers.optimization import SchedulerType

        require_at_least(1, self, "train_batch_size", "gradient_accumulation_steps", "max_train_steps", "logging_steps")
        require_at_least(1, self, "inner_epochs", "rollout_batch_size", "max_rollouts", "checkpoints_total_limit")
        require_at_least(0, self, "checkpointing_steps", "validation_steps", "lr_warmup_steps")
        # piecewise_constant needs rules of its own, for which there is no setting
        known = [kind.value for kind in SchedulerType if kind is not SchedulerType.PIECEWISE_CONSTANT]
        if self.lr_scheduler not in known:
            raise UserError(f"unknown lr_scheduler {self.lr_scheduler!r}; known are {', '.join(known)}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed must lie between 0 and 2**32 - 1, got {self.seed}")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay must be at least 0 and below 1, got {self.ema_decay}")
        if self.max_grad_norm <= 0:
            raise UserError(f"max_grad_norm must be positive, got {self.max_grad_norm}")
        if not math.isfinite(self.updates) and not self.lr_scheduler.startswith("constant"):
            raise UserError(f"lr_scheduler {self.lr_scheduler!r} has to know its end: set max_train_steps")
        if self.learning_rate <= 0:
            raise UserError(f"learning_rate must be positive, got {self.learning_rate}")
        for name, least, below in (("adam_beta1", 0, 1), ("adam_beta2", 0, 1), ("adam_weight_decay", 0, math.inf)):
            if not least <= (value := getattr(self, name)) < below:
                raise UserError(f"{name} must be at least {least} and below {below}, got {value}")
        if self.adam_epsilon <= 0:
            raise UserError(f"adam_epsilon must be positive, got {self.adam_epsilon}")
        if self.sgd_momentum is not None and not 0 < self.sgd_momentum < 1:
            raise UserError(f"sgd_momentum must lie between 0 and 1, got {self.sgd_momentum}")
        if self.use_8bit_adam and not torch.cuda.is_available() and self.memory is None:
            raise UserError("use_8bit_adam needs a CUDA GPU here; set use_8bit_adam: false")
        if self.quantize and self.lora is None:
            raise UserError("quantize: nf4 is for a frozen denoiser; set lora, which trains beside it")
        if self.memory is not None and not self.dry_run:
            raise UserError("memory is asked about before a run: set dry_run: true")
        objective, wanted = type(self.objective).__name__, self.objective.needs.batch_types
        if self.data.batch_type not in wanted:
            raise UserError(
                f"{objective} trains on {' or '.join(kind.__name__ for kind in wanted)}, but data: "
                f"{type(self.data).__name__} gives {self.data.batch_type.__name__}"
            )
        scores = self.objective.needs.rewards and (self.draws or not self.objective.needs.online)
        if scores and not any(reward.weight for reward in self.rewards):
            raise UserError(f"{objective} learns from rewards: set rewards to at least one of positive weight")
        if self.draws and self.rollout_batch_size is None:
            raise UserError(f"{objective} draws pictures: set rollout_batch_size, the prompts of a rollout")
        if self.stop is not None:
            self.stop.check([one.title for one in self.rewards], self.draws, self.checkpointing_steps > 0)
        families.find(self.pretrained_model_name_or_path, self.revision)
        for data in (self.data, self.validation_data):
            if data is not None:
                sides(data.resolution)
                if self.memory is None:
                    data.check()
                    if self.objective.needs.labels and isinstance(data, EncodedData) and not data.labelled:
                        raise UserError(
                            f"{objective} uses votes, and no row of {data.path} has any; expected a column votes, [for "
                            "the first, for the second image], or HPDv2's raw_annotations"
                        )

    @property
    def precision(self) -> str:
        """``mixed_precision``, once it is known."""
        return "no" if self.mixed_precision == "auto" else self.mixed_precision

    @property
    def updates(self) -> float:
        """The optimiser steps of the run; infinite where the rollouts decide."""
        if self.max_train_steps is not None:
            return self.max_train_steps
        return math.inf if self.max_rollouts else 1000

    @property
    def rollouts(self) -> float:
        """The rollouts of the run; infinite where the updates decide."""
        return self.max_rollouts or math.inf

    @property
    def tolerance(self) -> float:
        """By how much a replayed likelihood ratio may be off 1 in this precision."""
        return {"no": 1e-3, "fp16": 2e-2, "bf16": 1e-1}[self.precision]

    @property
    def draws(self) -> bool:
        """Whether pictures are drawn: an online objective on prompts."""
        return self.objective.needs.online and self.data.batch_type is PromptBatch

    @property
    def frozen(self) -> torch.dtype:
        """Of weights that do not train, once the precision is known."""
        return families.DTYPES[self.precision] if self.lora else torch.float32

    def family(self, device: torch.device, sharded: bool = False) -> Family:
        """The pipeline, loaded as this run has it. A denoiser that is going to be divided (``sharded``) waits on the
        CPU, since a GPU need not hold it whole."""
        source, first = self.pretrained_model_name_or_path, torch.device("cpu") if sharded else device
        idle = self.offload_idle and not sharded
        family = families.load(source, self.frozen, first, self.revision, self.variant, self.quantize, idle)
        if sharded:
            from align.families.resting import place_around

            place_around(family.pipe, family.denoiser, device, self.offload_idle)
        if self.vae_slicing:
            family.pipe.vae.enable_slicing()
        if self.attention_backend:
            families.set_attention_backend(family, self.attention_backend)
        return family

    def scorer(self) -> Scorer | None:
        """The rewards, loaded; None where there are none."""
        return Scorer.of(self.rewards) if self.rewards else None
