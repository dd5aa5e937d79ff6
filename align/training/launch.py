"""accelerate for a run: what it was configured with (``accelerate config``) and our settings are one, or it is said."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import AutocastKwargs, set_seed
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import init_device_mesh

from align.common.errors import UserError
from align.policy.sharding import Sharding
from align.training import trackers

if TYPE_CHECKING:
    from align.training.config import TrainConfig


def launch(config: TrainConfig) -> Accelerator:
    """The accelerator of a run, with torch seeded and its switches set. A second run in one process has its own.

    Raises :class:`UserError` for what accelerate was configured with and this loop would not do.
    """
    asked = {
        "dynamo": os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() not in ("no", ""),
        "DeepSpeed": _set("ACCELERATE_USE_DEEPSPEED"),
        "Megatron-LM": _set("ACCELERATE_USE_MEGATRON_LM"),
        "parallelism": _set("ACCELERATE_USE_PARALLELISM_CONFIG"),
    }
    if asked["DeepSpeed"]:
        raise UserError(
            "accelerate is configured for DeepSpeed, which this loop does not drive; configs/accelerate/zero2.yaml and "
            "zero3.yaml are the same stages by torch's FSDP 2"
        )
    if unheard := [name for name, wanted in asked.items() if wanted]:
        raise UserError(
            f"accelerate is configured for {' and '.join(unheard)}, which this loop does not use; launch with "
            "--config_file configs/accelerate/ddp.yaml (data-parallel processes), or fsdp2.yaml (shared weights)"
            f"{'; compile: true in the settings compiles the denoiser' if asked['dynamo'] else ''}"
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
    if _set("ACCELERATE_USE_FSDP"):
        require_shardable(config, precision)
    trackers.require(config.report_to)
    # accelerate keeps the first configuration of a process for good, and a notebook trains more than once in one
    AcceleratorState._reset_state()
    GradientState._reset_state()
    # cached casts of shared weights would leave every process with all of them
    autocast = AutocastKwargs(cache_enabled=not _set("ACCELERATE_USE_FSDP"))
    accelerator = Accelerator(mixed_precision=precision, project_dir=str(config.output_dir), kwargs_handlers=[autocast])
    set_seed(config.seed)  # LoRA's initial weights; every draw after that is keyed
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    return accelerator


def _set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")


def require_shardable(config: TrainConfig, precision: str) -> None:
    """Raise :class:`UserError` for settings of accelerate's FSDP, or of ours beside it, that are not heard."""
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise UserError(f"accelerate is configured for FSDP {version}; this loop shards by FSDP 2: set fsdp_version: 2")
    unheard = {
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "fsdp_cpu_ram_efficient_loading leaves text encoders empty in all processes "
        "but the first; set it to false: networks are divided from the CPU's memory anyway",
        "FSDP_OFFLOAD_PARAMS": "fsdp_offload_params is not supported; set it to false",
        "FSDP_ACTIVATION_CHECKPOINTING": "fsdp_activation_checkpointing is not used; set it to false, and "
        "gradient_checkpointing: true here",
    }
    if wrong := [text for name, text in unheard.items() if _set(name)]:
        raise UserError(f"accelerate: {wrong[0]}")
    if precision == "fp16":
        raise UserError("mixed_precision: fp16 does not scale gradients that processes share (FSDP); take bf16, or no")
    if config.use_8bit_adam:
        raise UserError(
            "use_8bit_adam does not know weights that processes share (FSDP), which need it least; leave it"
        )


def sharding_of(accelerator: Accelerator) -> Sharding | None:
    """How accelerate was configured to divide networks among the processes; None where each has its own."""
    if not _set("ACCELERATE_USE_FSDP") or accelerator.num_processes == 1:  # accelerate itself leaves CPUs out
        return None
    named = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP") or ""
    return Sharding(
        init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        tuple(name.strip() for name in named.split(",") if name.strip()),
        # accelerate's own wrapper, which is not used then, gives float32 whatever autocast computes in
        torch.float32 if accelerator.mixed_precision != "no" else None,
        os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() not in ("false", "0", "shard_grad_op"),
    )


@contextmanager
def leaving(accelerator: Accelerator) -> Iterator[None]:
    """End trackers and connections, those also that are let go of within: the last process first, and each when the one
    after it has gone. Where both ends of a gloo connection close at one moment, torch (2.13) may wait for ever in the
    destructor of what holds it."""
    if accelerator.num_processes == 1:
        yield
        accelerator.end_training()
        return
    accelerator.wait_for_everyone()
    store, rank = distributed_c10d._get_default_store(), accelerator.process_index
    if rank + 1 < accelerator.num_processes:
        with contextlib.suppress(RuntimeError):  # one that died is not waited for longer
            store.wait([f"left {rank + 1}"], timedelta(seconds=60))
    yield
    accelerator.free_memory()
    accelerator.end_training()
    gc.collect()
    store.set(f"left {rank}", "1")


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
