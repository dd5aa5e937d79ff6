"""Checkpoints of the trained parameters alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

    from align.policy.policy import Policy

WEIGHTS = "trained.safetensors"
STATE = "state.json"
MEMORY = "objective.safetensors"


def slim_checkpoints(accelerator: Accelerator, policy: Policy) -> None:
    """Have ``accelerator.save_state`` keep the trained parameters only, as safetensors, and no frozen weight."""

    def beside() -> dict[str, list[Tensor]]:
        """Other values of the trained parameters, by the file that keeps them."""
        average = policy.ema.shadow_params if policy.ema is not None else None
        return {f"{n}-{WEIGHTS}": v for n, v in (("ema", average), ("reference", policy.ref_params)) if v is not None}

    def save(models: list[Any], weights: list[Any], folder: str) -> None:
        weights.clear()
        if accelerator.is_main_process:
            save_file(policy.state(), Path(folder) / WEIGHTS)
            for name, values in beside().items():
                save_file({str(k): p.cpu().contiguous() for k, p in enumerate(values)}, Path(folder) / name)

    def load(models: list[Any], folder: str) -> None:
        models.clear()
        policy.load_state(load_file(Path(folder) / WEIGHTS))
        for name, values in beside().items():
            saved = load_file(Path(folder) / name)
            for k, parameter in enumerate(values):
                parameter.copy_(saved[str(k)])
        if policy.ema is not None:
            policy.ema.optimization_step = json.loads((Path(folder) / STATE).read_text())["step"]

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
