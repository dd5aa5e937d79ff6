"""accelerate for a run: what it was configured with (``accelerate config``) and our settings are one, or it is said."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import filter_trackers
from accelerate.utils import set_seed

from align.common.errors import UserError

if TYPE_CHECKING:
    from align.training.config import TrainConfig


def launch(config: TrainConfig) -> Accelerator:
    """The accelerator of a run, with torch seeded and its switches set. A second run in one process has its own.

    Raises :class:`UserError` for what accelerate was configured with and this loop would not do.
    """
    asked = {
        "dynamo": os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() not in ("no", ""),
        "FSDP": os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true",
        "DeepSpeed": os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true",
    }
    if unheard := [name for name, wanted in asked.items() if wanted]:
        raise UserError(
            f"accelerate is configured for {' and '.join(unheard)}, which this loop does not use; run `accelerate "
            "config` again without, or launch with --multi_gpu (data-parallel processes)"
        )
    accumulated = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulated not in ("1", "auto", str(config.gradient_accumulation_steps)):
        raise UserError(
            f"accelerate is configured for gradient_accumulation_steps {accumulated}, this run for "
            f"{config.gradient_accumulation_steps}; set gradient_accumulation_steps: {accumulated} here, or leave "
            "accelerate's at 1"
        )
    precision = config.mixed_precision = configured() if config.mixed_precision == "auto" else config.mixed_precision
    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError("mixed_precision: fp16 has no gradients to scale on a CPU; take bf16, or no")
    if config.report_to == "wandb" and importlib.util.find_spec("wandb") is None:
        raise UserError("report_to: wandb is not installed; pip install wandb, or report_to: tensorboard")
    # accelerate keeps the first configuration of a process for good, and a notebook trains more than once in one
    AcceleratorState._reset_state()
    GradientState._reset_state()
    accelerator = Accelerator(mixed_precision=precision, project_dir=str(config.output_dir))
    set_seed(config.seed)  # LoRA's initial weights; every draw after that is keyed
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    return accelerator


def configured() -> Literal["no", "fp16", "bf16"]:
    """The precision that accelerate was configured with. Raises :class:`UserError` for one that is not ours."""
    known: dict[str, Literal["no", "fp16", "bf16"]] = {"no": "no", "fp16": "fp16", "bf16": "bf16"}
    name = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if name not in known:
        raise UserError(f"accelerate is configured for mixed precision {name!r}; expected no, fp16 or bf16")
    return known[name]


def describe_precision(config: TrainConfig) -> str:
    """Which precision runs, and what it overrules; to be asked before :func:`launch`."""
    if config.mixed_precision == "auto":
        return f"{configured()}, as accelerate is configured"
    other = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    return config.mixed_precision + (
        f", not accelerate's {other}" if other not in ("no", config.mixed_precision) else ""
    )


def start_trackers(accelerator: Accelerator, report_to: str) -> None:
    """Those of ``report_to`` that are installed."""
    if report_to != "none":
        accelerator.log_with = filter_trackers(report_to, accelerator.project_configuration.logging_dir)
        accelerator.init_trackers("t2i-align")
