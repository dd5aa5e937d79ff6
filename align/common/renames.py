"""What version 0.1 called otherwise, in one place: config files, command lines and run folders of it still load.

A renamed key, value or class is accepted for one release, and the user is told the new name.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rewards.data.text import load_yaml

_SAMPLING = {"steps": "num_inference_steps", "guidance": "guidance_scale"}

# the nearest enclosing key ("" at the top; lists and init_args do not count) -> old key -> new key
KEYS: Mapping[str, Mapping[str, str]] = {
    "": {**_SAMPLING, "quantise": "quantize"},
    "sampler": _SAMPLING,
    "samples": _SAMPLING,
    "report": _SAMPLING,
    "teacher": {"guidance": "guidance_scale"},
    "teachers": {"guidance": "guidance_scale"},
    "objective": {**_SAMPLING, "spread": "scale_rewards", "normalise": "normalize"},
    "update": {"spread": "scale_rewards"},
    "rewards": {"normalise": "normalize"},
}

# new key -> old value -> new value
VALUES: Mapping[str, Mapping[Any, Any]] = {
    "scale_rewards": {"global": "batch"},
    "reference": {"round_start": "start"},
    "stages": {"analyse": "analyze", "quantise": "quantize"},
}

# settings that nobody was better off with: the value that is what happens now is taken without a word
_GONE = {"tying": "none", "rank": 2, "step_weights": None, "timestep_choice": "first"}
GONE: Mapping[str, Mapping[str, Any]] = {"objective": _GONE, "update": _GONE}

# import paths that configs and rollout folders name
CLASSES: Mapping[str, str] = {
    "align.encoded.PreferencePairs": "align.data.PreferencePairs",
    "align.images.Images": "align.data.Images",
    "align.labels.LabelledRollout": "align.data.LabelledRollout",
    "align.process.DDIM": "align.diffusion.kernels.DDIM",
    "align.process.FlowSDE": "align.diffusion.kernels.FlowSDE",
    "align.teachers.LoRATeacher": "align.objectives.teachers.LoRATeacher",
    "align.teachers.PipelineTeacher": "align.objectives.teachers.PipelineTeacher",
}


def _new_value(key: str, value: Any, told: list[str]) -> Any:
    renamed = VALUES.get(key, {})
    if isinstance(value, list):
        return [_new_value(key, item, told) for item in value]
    if isinstance(value, str) and value in renamed:
        told.append(f"{key}: {value} is now {renamed[value]}")
        return renamed[value]
    return value


def upgrade(config: Any, parent: str = "", told: list[str] | None = None) -> Any:
    """``config``, parsed YAML of version 0.1 or now, in today's names; what was renamed is added to ``told``."""
    told = [] if told is None else told
    if isinstance(config, list):
        return [upgrade(item, parent, told) for item in config]
    if isinstance(config, str):
        return CLASSES.get(config, config)
    if not isinstance(config, dict):
        return config
    new: dict[str, Any] = {}
    for key, value in config.items():
        gone = GONE.get(parent, {})
        if key in gone and value == gone[key]:
            continue
        name = KEYS.get(parent, {}).get(key, key)
        if name != key and name not in config:
            told.append(f"{parent + '.' if parent else ''}{key} is now {name}")
        else:
            name = key
        below = parent if key == "init_args" else str(key)
        new[name] = _new_value(name, upgrade(value, below, told), told)
    return new


def _new_text(parent: str, key: str, text: str, told: list[str]) -> str:
    """What follows ``--PARENT.KEY`` on a command line: a word, or a list or a mapping as YAML has them on one line."""
    if text[:1] not in ("[", "{"):
        return CLASSES.get(text, _new_value(key, text, told))
    try:
        value = load_yaml(text)
    except ValueError:
        return text  # the parser says what is wrong
    new = upgrade({key: value}, parent, told)
    return text if new == {key: value} else json.dumps(new[key], default=str)


def upgrade_arguments(arguments: Sequence[str], told: list[str]) -> list[str]:
    """A command line in today's names: ``--samples.steps 4`` becomes ``--samples.num_inference_steps 4``."""
    new: list[str] = []
    parent = key = ""
    for argument in arguments:
        if not argument.startswith("--"):
            new.append(_new_text(parent, key, argument, told))
            continue
        path, equals, value = argument[2:].partition("=")
        *parents, last = path.split(".")
        parent = next((name for name in reversed(parents) if name != "init_args" and not name.isdigit()), "")
        key = KEYS.get(parent, {}).get(last, last)
        if key != last:
            told.append(f"--{path} is now --{'.'.join([*parents, key])}")
        value = _new_text(parent, key, value, told) if equals else value
        new.append(f"--{'.'.join([*parents, key])}{equals}{value}")
    return new


def tell(told: Sequence[str], where: str) -> None:
    """One line on stderr for each renamed thing."""
    for line in dict.fromkeys(told):
        print(f"warning: {where}: {line}; the old name goes with the next release", file=sys.stderr)
