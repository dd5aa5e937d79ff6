"""The settings of a training run: what ``--config`` files and the command line fill in."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

import align.objectives.dpo  # noqa: F401  so that `--objective DPO` needs no import path
from align import families
from align.encoded import PairBatch, PreferencePairs
from align.errors import UserError
from align.objectives import Objective
from align.policy import LoRA


@dataclass
class Samples:
    """The grid of fixed prompts and seeds drawn while training. ``steps``, ``guidance`` None: the pipeline's own."""

    prompts: list[str] = field(default_factory=list)
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0


@dataclass
class Train:
    """Fine-tune a diffusers pipeline through an objective.

    Args:
        data: what to train on.
        objective: how: a class of ``align.objectives`` or anyone's import path, with its arguments.
        validation_data: held-out pairs; the objective's metrics on them are logged and put into the model card.
        pretrained_model_name_or_path: diffusers folder, hub id, ``shapes-sd`` or ``shapes-sd3``.
        revision: hub revision.
        variant: weight variant, such as ``fp16``.
        output_dir: the run folder.
        seed: names every random draw.
        lora: rank, alpha and targets; ``null`` trains every weight of the denoiser.
        train_batch_size: items a process passes through the network at once.
        gradient_accumulation_steps: such chunks per optimiser step.
        max_train_steps: optimiser steps.
        learning_rate: peak learning rate.
        scale_lr: multiply it by processes x accumulation x batch size.
        lr_scheduler: a name that ``diffusers.optimization.get_scheduler`` knows.
        lr_warmup_steps: optimiser steps of warm-up.
        adam_beta1: AdamW.
        adam_beta2: AdamW.
        adam_weight_decay: AdamW.
        adam_epsilon: AdamW.
        use_8bit_adam: bitsandbytes' AdamW; needs a GPU.
        max_grad_norm: gradients are clipped to this norm.
        ema_decay: keep a moving average of the trained weights and save that; 0 keeps none.
        gradient_checkpointing: recompute activations in backward; less memory, more time.
        mixed_precision: autocast; frozen weights are kept in this precision too.
        allow_tf32: TF32 matrix products on Ampere and later.
        attention_backend: a diffusers attention backend (``native``, ``xformers``, ``flash``, ...); null leaves it.
        checkpointing_steps: optimiser steps between checkpoints; 0 writes none.
        checkpoints_total_limit: how many checkpoints to keep; null keeps all.
        resume_from_checkpoint: ``latest`` or a ``checkpoint-N`` folder; ``latest`` starts anew where there is none.
        samples: the sample grid.
        validation_steps: optimiser steps between sample grids and held-out metrics; 0 only at start and end.
        logging_steps: optimiser steps between lines of ``metrics.jsonl``.
        report_to: trackers.
        dry_run: print the plan and stop.
    """

    data: PreferencePairs
    objective: Objective
    validation_data: PreferencePairs | None = None
    pretrained_model_name_or_path: str = "shapes-sd"
    revision: str | None = None
    variant: str | None = None
    output_dir: Path = Path("outputs/run")
    seed: int = 0
    lora: LoRA | None = field(default_factory=LoRA)
    train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    max_train_steps: int = 1000
    learning_rate: float = 1e-5
    scale_lr: bool = False
    lr_scheduler: str = "constant_with_warmup"
    lr_warmup_steps: int = 0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 1e-2
    adam_epsilon: float = 1e-8
    use_8bit_adam: bool = False
    max_grad_norm: float = 1.0
    ema_decay: float = 0.0
    gradient_checkpointing: bool = False
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    allow_tf32: bool = False
    attention_backend: str | None = None
    checkpointing_steps: int = 500
    checkpoints_total_limit: int | None = None
    resume_from_checkpoint: str | None = None
    samples: Samples = field(default_factory=Samples)
    validation_steps: int = 0
    logging_steps: int = 1
    report_to: Literal["tensorboard", "wandb", "all", "none"] = "tensorboard"
    dry_run: bool = False

    def check(self) -> None:
        """Everything that can be known to be wrong before a weight is loaded."""
        for name in ("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "logging_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.learning_rate <= 0:
            raise UserError(f"learning_rate must be positive, got {self.learning_rate}")
        if self.use_8bit_adam and not torch.cuda.is_available():
            raise UserError("use_8bit_adam needs a CUDA GPU here; set use_8bit_adam: false")
        if self.objective.batch_type is not PairBatch:
            raise UserError(f"{type(self.objective).__name__} does not train on preference pairs")
        families.find(self.pretrained_model_name_or_path, self.revision)
        for data in (self.data, self.validation_data):
            if data is not None:
                data.read()
