"""Checkpoints: what a resumed run needs, the trained weights and no frozen one, as JSON and safetensors. Nothing in one
is unpickled, and every number in it comes back to the bit.

| file | holds |
|---|---|
| ``state.json`` | step, rollouts, the settings of the run, what an objective remembers, the optimizer's plain numbers |
| ``pytorch_lora_weights.safetensors``, ``unet/`` … | what the finished run writes, for stock diffusers |
| ``trained.safetensors`` | the trained parameters; ``ema-`` and ``reference-`` before it: their average and anchor |
| ``optimizer.safetensors`` | the moments, as ``PARAMETER.NAME`` |
| ``objective.safetensors`` | tensors that an objective remembers |

There is no state of random generators: every draw is keyed by (seed, purpose, step, position).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from align.common.errors import UserError
from align.objectives.objective import KeepsState, Objective
from align.policy.sharding import part, whole
from rewards.common.errors import shortened
from rewards.common.files import write_text

if TYPE_CHECKING:
    from align.policy.policy import Policy

STATE, WEIGHTS = "state.json", "trained.safetensors"
OPTIMIZER, MEMORY = "optimizer.safetensors", "objective.safetensors"
OLD_OPTIMIZER, OLD_SCHEDULER, OLD_SCALER = "optimizer.bin", "custom_checkpoint_0.pkl", "scaler.pt"  # of version 0.1


# settings that a resumed run may have otherwise: where it writes, how long it goes on, what it shows, how it computes
MAY_CHANGE = frozenset(
    [
        "output_dir",
        "overwrite_output_dir",
        "max_train_steps",
        "max_rollouts",
        "stop",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "resume_from_checkpoint",
        "samples",
        "validation_data",
        "validation_steps",
        "logging_steps",
        "report_to",
        "push_to_hub",
        "hub_model_id",
        "hub_private",
        "dry_run",
        "gradient_checkpointing",
        "offload_idle",
        "vae_slicing",
        "allow_tf32",
        "attention_backend",
        "compile",
        "train_batch_size",
        "gradient_accumulation_steps",
        "data.init_args.cache_dir",
        "data.init_args.text_cache",
    ]
)


MADE_OF = {"rows of an update": " (train_batch_size x gradient_accumulation_steps x processes)"}


def differences(before: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> list[str]:
    """What two settings of a run differ in but for :data:`MAY_CHANGE`: ``learning_rate: 0.001, was 0.0001``. A setting
    that only one of them knows is of another version: a run that did not know it had its default."""
    lines = _new(before, now) if before and not path else []
    for name in before.keys() & now.keys():
        key, old, new = path + name, before[name], now[name]
        if key in MAY_CHANGE:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, f"{key}.")
        elif old != new:
            lines.append(f"{key}: {new}, was {old}{MADE_OF.get(key, '')}")
    return sorted(lines)


def _new(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Settings that ``before`` did not know and that are not at their defaults ``now``."""
    from align.training.config import TrainConfig

    defaults = {each.name: each.default for each in fields(TrainConfig) if each.default is not MISSING}
    unknown = (now.keys() & defaults.keys()) - before.keys() - MAY_CHANGE
    return [f"{name}: {now[name]}, was {defaults[name]}" for name in unknown if now[name] != defaults[name]]


@dataclass(frozen=True)
class Parts:
    """What has a state of its own, as accelerate has prepared it."""

    policy: Policy
    optimizer: Any
    scheduler: Any
    scaler: Any  # fp16's; None elsewhere
    objective: Objective

    def beside(self) -> dict[str, list[Tensor]]:
        """Other values of the trained parameters, by the file that keeps them."""
        average = self.policy.ema.shadow_params if self.policy.ema is not None else None
        values = (("ema", average), ("reference", self.policy.ref_params))
        return {f"{name}-{WEIGHTS}": tensors for name, tensors in values if tensors is not None}


def write(folder: Path, parts: Parts, state: Mapping[str, Any], writes: bool = True) -> None:
    """Write the files of a checkpoint into ``folder``, which is there and empty. Where processes share the weights, all
    of them call this, and those that do not write (``writes``) help to gather."""

    def save(tensors: Mapping[str, Tensor], name: str) -> None:
        gathered = whole(tensors)
        if writes:
            save_file(gathered, folder / name)

    save(parts.policy.weights.named(), WEIGHTS)
    parts.policy.save(folder)  # for stock diffusers: a checkpoint is a LoRA, or a denoiser, as well
    for name, values in parts.beside().items():
        save({str(k): p for k, p in enumerate(values)}, name)
    optimizer = parts.optimizer.state_dict()
    moments: dict[str, Any] = {}
    numbers: dict[str, Any] = {}
    for k, entries in optimizer["state"].items():
        for name, value in entries.items():
            (moments if isinstance(value, Tensor) else numbers)[f"{k}.{name}"] = value
    save(moments, OPTIMIZER)
    if not writes:
        return
    memory = {k: v.cpu().contiguous() for k, v in state["objective"].items() if isinstance(v, Tensor)}
    if memory:
        save_file(memory, folder / MEMORY)
    plain = {
        **state,
        "objective": {k: v for k, v in state["objective"].items() if k not in memory},
        "optimizer": {"groups": optimizer["param_groups"], "numbers": numbers},
        "scheduler": parts.scheduler.state_dict(),
        "scaler": parts.scaler.state_dict() if parts.scaler is not None else {},
    }
    write_text(folder / STATE, json.dumps(plain))


def read(folder: Path) -> dict[str, Any]:
    """The state in a checkpoint. Raises :class:`UserError` saying what is wrong with the file that holds it."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if not isinstance(state, dict):
            raise ValueError(f"{STATE} holds a {type(state).__name__}, not an object")
        for name in ("step", "rollouts"):
            if type(state.get(name)) is not int or state[name] < 0:
                raise ValueError(f"{STATE}: {name} is {state.get(name)!r}, not a count")
        objects = ["evaluations", "objective", *({"settings", "stop"} & state.keys())]  # 0.1 kept no settings
        if wrong := [name for name in objects if not isinstance(state.get(name), dict)]:
            raise ValueError(f"{STATE}: {wrong[0]} is missing or of another kind")
        for name in ("trained", "frozen"):
            if type(count := state["evaluations"].get(name)) is not int:
                raise ValueError(f"{STATE}: evaluations of {name} weights are {count!r}, not a count")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder} is no whole checkpoint: {error}") from error
    return state


def check(folder: Path) -> None:
    """Raise :class:`UserError` where a checkpoint is not whole; its state and every number in its tensors are read."""
    read(folder)
    try:
        if not (folder / OLD_OPTIMIZER).is_file() and not (folder / OPTIMIZER).is_file():
            raise ValueError(f"there is no {OPTIMIZER}")
        for path in [folder / WEIGHTS, *folder.glob("*.safetensors")]:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  a file is no mapping
                    if not torch.isfinite(file.get_tensor(name)).all():
                        raise ValueError(f"{path.name}: {name} is not finite")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} is no whole checkpoint: {error}") from error


@torch.no_grad()
def load(folder: Path, parts: Parts) -> dict[str, Any]:
    """Give ``parts`` back what :func:`write` kept, and return the state. Raises :class:`UserError`."""
    state = read(folder)
    try:
        parts.policy.load_state(load_file(folder / WEIGHTS))
        for name, values in parts.beside().items():
            saved = load_file(folder / name)
            for k, parameter in enumerate(values):
                parameter.copy_(part(saved[str(k)].reshape(parameter.shape), parameter))
        if parts.policy.ema is not None:
            parts.policy.ema.optimization_step = state["step"]
        old = not (folder / OPTIMIZER).is_file()
        optimizer = _old(folder / OLD_OPTIMIZER) if old else _optimizer(folder, state)
        scheduler = _old(folder / OLD_SCHEDULER) if old else state["scheduler"]
        _require_alike(optimizer["param_groups"], parts.optimizer.state_dict()["param_groups"], "optimizer")
        _require_alike(scheduler, parts.scheduler.state_dict(), "scheduler")
        _take_parts(optimizer["state"], parts.optimizer)
        parts.optimizer.load_state_dict(optimizer)
        parts.scheduler.load_state_dict(scheduler)
        if parts.scaler is not None:
            parts.scaler.load_state_dict(_old(folder / OLD_SCALER) if old else state["scaler"])
        if (folder / MEMORY).is_file():
            state["objective"] |= load_file(folder / MEMORY)
        if isinstance(parts.objective, KeepsState):
            parts.objective.load_state(state["objective"])
        elif state["objective"]:
            name = type(parts.objective).__name__
            raise ValueError(f"{name} keeps no state, but the checkpoint has {sorted(state['objective'])}")
    except UserError:
        raise
    except Exception as error:  # torch's, accelerate's and an objective's for what does not fit
        raise UserError(f"{folder} does not fit this run: {error or type(error).__name__}") from error
    return state


def _optimizer(folder: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    entries: dict[int, dict[str, Any]] = {}
    for key, value in {**load_file(folder / OPTIMIZER), **state["optimizer"]["numbers"]}.items():
        number, _, name = key.partition(".")
        entries.setdefault(int(number), {})[name] = value
    return {"state": entries, "param_groups": state["optimizer"]["groups"]}


def _require_alike(saved: Any, own: Any, name: str) -> None:
    """Raise ValueError where a number of this run's, or a list of them, is no such thing in what was saved: torch takes
    anything, and finds out at the first step."""
    if isinstance(own, Mapping) and isinstance(saved, Mapping):
        for key in own.keys() & saved.keys():  # torch's versions differ in what they keep
            _require_alike(saved[key], own[key], f"{name}.{key}")
    elif isinstance(own, list | tuple) and isinstance(saved, list | tuple) and len(own) == len(saved):
        for number, value in enumerate(own):
            _require_alike(saved[number], value, f"{name}.{number}")
    elif isinstance(own, Mapping | list | tuple):
        raise ValueError(f"{name} is {shortened(repr(saved))}, and {len(own)} values in this run")
    elif type(own) in (float, int) and not (type(saved) in (float, int) and math.isfinite(saved)):
        raise ValueError(f"{name} is {shortened(repr(saved))}, and {own} in this run")


def _take_parts(moments: Mapping[int, dict[str, Any]], optimizer: Any) -> None:
    """Cut moments as their parameters are, where processes share these. Raises ValueError for another shape: torch
    takes any tensor for a parameter's moment, and finds out at the first step."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, entries in moments.items():
        for name in ("exp_avg", "exp_avg_sq", "state1", "state2"):  # torch's and bitsandbytes' names
            if name in entries and entries[name].shape != parameters[number].shape:
                shapes = tuple(entries[name].shape), tuple(parameters[number].shape)
                raise ValueError(f"{name} of parameter {number} is {shapes[0]}, the parameter {shapes[1]}")
        for name, value in entries.items():
            if isinstance(value, Tensor) and value.shape == parameters[number].shape:
                entries[name] = part(value, parameters[number])


def _old(path: Path) -> Any:
    """A file of version 0.1, of which tensors and plain values alone are taken: nothing in it can run."""
    return torch.load(path, map_location="cpu", weights_only=True)
