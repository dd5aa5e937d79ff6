"""What the scheduler config of a pipeline has to say for its family to draw by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align.families.folder import Unsupported

PREDICTION_TYPES = ("epsilon", "v_prediction")


def require_schedule(source: str, config: Mapping[str, Any]) -> None:
    """Raise :class:`Unsupported` for a scheduler config that DDIM cannot be made from."""
    name, predicts = config.get("_class_name", "the scheduler"), config.get("prediction_type", "epsilon")
    if predicts not in PREDICTION_TYPES:
        raise Unsupported(f"{source!r} predicts {predicts!r}; supported: {', '.join(PREDICTION_TYPES)}")
    if config and not {"beta_schedule", "beta_start", "trained_betas"} & config.keys():
        raise Unsupported(
            f"{source}: {name} has no betas, so this is no Stable Diffusion 1.x or 2.x; save it with the scheduler "
            "that the model was trained for, such as DDIMScheduler"
        )


def require_flow(source: str, config: Mapping[str, Any]) -> None:
    """Raise :class:`Unsupported` for a scheduler config that is of no rectified flow from noise to data."""
    name = str(config.get("_class_name", "FlowMatch"))
    flow = name.startswith("FlowMatch") or config.get("use_flow_sigmas") or "flow_shift" in config
    if not flow or config.get("prediction_type", "flow_prediction") != "flow_prediction" or config.get("invert_sigmas"):
        raise Unsupported(
            f"{source}: {name} with prediction_type {config.get('prediction_type')} is no schedule of a rectified "
            "flow; save the pipeline with FlowMatchEulerDiscreteScheduler"
        )
    shift = config.get("flow_shift", config.get("shift", 1.0))
    if not isinstance(shift, int | float) or shift <= 0:
        raise Unsupported(f"{source}: scheduler/scheduler_config.json has shift {shift}; expected a positive number")
