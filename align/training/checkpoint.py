"""Checkpoints of the trained parameters alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from accelerate import Accelerator

    from align.policy.policy import Policy

WEIGHTS = "trained.safetensors"
STATE = "state.json"
MEMORY = "objective.safetensors"


def slim_checkpoints(accelerator: Accelerator, policy: Policy) -> None:
    """Have ``accelerator.save_state`` keep the trained parameters only, as safetensors, and no frozen weight."""

    def save(models: list[Any], weights: list[Any], folder: str) -> None:
        weights.clear()
        if accelerator.is_main_process:
            save_file(policy.state(), Path(folder) / WEIGHTS)
            if policy.ema is not None:
                average = {str(k): p.cpu().contiguous() for k, p in enumerate(policy.ema.shadow_params)}
                save_file(average, Path(folder) / f"ema-{WEIGHTS}")
            if policy.ref_params is not None:
                anchor = {str(k): p.cpu().contiguous() for k, p in enumerate(policy.ref_params)}
                save_file(anchor, Path(folder) / f"reference-{WEIGHTS}")

    def load(models: list[Any], folder: str) -> None:
        models.clear()
        policy.load_state(load_file(Path(folder) / WEIGHTS))
        if policy.ema is not None:
            average = load_file(Path(folder) / f"ema-{WEIGHTS}")
            state = json.loads((Path(folder) / STATE).read_text())
            for k, parameter in enumerate(policy.ema.shadow_params):
                parameter.copy_(average[str(k)])
            policy.ema.optimization_step = state["step"]
        if policy.ref_params is not None:
            anchor = load_file(Path(folder) / f"reference-{WEIGHTS}")
            for k, parameter in enumerate(policy.ref_params):
                parameter.copy_(anchor[str(k)])

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
