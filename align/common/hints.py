"""What a parser leaves to be said of settings: which one is meant by a name that is none, and which may not be null."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any, get_args, get_origin, get_type_hints

from jsonargparse import Namespace

# diffusers' and TRL's training scripts, kohya's and peft's
FOREIGN: Mapping[str, str] = {
    "alpha": "lora.alpha",
    "beta_dpo": "objective.beta",
    "dataset_name": "data.path",
    "enable_xformers_memory_efficient_attention": "attention_backend",
    "hub_private_repo": "hub_private",
    "instance_data_dir": "data.path",
    "lora_alpha": "lora.alpha",
    "lora_r": "lora.rank",
    "lora_rank": "lora.rank",
    "lr": "learning_rate",
    "max_train_samples": "data.limit",
    "max_steps": "max_train_steps",
    "model_id": "pretrained_model_name_or_path",
    "model_name": "pretrained_model_name_or_path",
    "model_name_or_path": "pretrained_model_name_or_path",
    "network_alpha": "lora.alpha",
    "network_dim": "lora.rank",
    "network_weights": "initial_weights",
    "num_epochs": "max_train_steps",
    "num_train_epochs": "max_train_steps",
    "per_device_train_batch_size": "train_batch_size",
    "precision": "mixed_precision",
    "r": "lora.rank",
    "rank": "lora.rank",
    "save_steps": "checkpointing_steps",
    "target_modules": "lora.targets",
    "train_data_dir": "data.path",
    "use_ema": "ema_decay",
    "vae_encode_batch_size": "data.vae_batch",
    "validation_epochs": "validation_steps",
    "validation_prompt": "samples.prompts",
    "validation_prompts": "samples.prompts",
    "warmup_steps": "lr_warmup_steps",
    "weight_decay": "adam_weight_decay",
}
UNKNOWN = re.compile(r"(?:Option|accept option) '([^']+)'|--([\w.-]+)")
# what is said of a class path that is none, of no text, or of no class that can stand there
NO_CLASS = re.compile(r"[Ii]mport path|instantiatable class|is not iterable|unhashable type|No module named")
# what is said of a setting that may be of several types, without another such inside
INSIDE = "((?:(?!Does not validate).)*?)"
UNION = re.compile(
    rf"Does not validate against any of the Union subtypes Subtypes: \[{INSIDE}\] Errors: - {INSIDE} "
    r"Given value type: <class '[^']*'> Given value: (.*?)(?= - |$)"
)


def plain(message: str) -> str:
    """A parser's ``message``, in fewer words where a value is of none of several types: what is wrong with it as one of
    them, where one says more than that, or all that were expected."""

    def shorter(found: re.Match[str]) -> str:
        errors = list(dict.fromkeys(found[2].split(" - ")))
        told = [error for error in errors if not error.startswith("Expected a")]
        kinds = [re.sub(r"Expected an? (?:<class '([^']*)'>)?", r"\1", error) for error in errors if error not in told]
        expected = " or ".join("null" if kind == "NoneType" else kind for kind in kinds)
        return "; ".join(told) or f"Expected {expected}. Got value: {found[3]}"

    while (less := UNION.sub(shorter, message)) != message:
        message = less
    return message


def suggestion(message: str, settings: type[Any]) -> str:
    """Which settings were meant by the names that a parser's ``message`` calls unknown, empty where none is near; or
    which classes there are, where it calls one unknown."""
    if re.search(r"NoneType.* Given value: none$", message, re.IGNORECASE):
        return "; null stands for none"
    if NO_CLASS.search(message):
        kind = _settings(settings).get(".".join(re.findall(r'Parser key "([^"]+)"', message)))
        classes = sorted(choice.__name__ for part in (kind, *get_args(kind)) for choice in _choices(part))
        return f"; there are {', '.join(classes)}, and your own by MODULE.CLASS" if classes else ""
    if not re.search(r"not accept|unrecognized arguments", message):
        return ""
    if given := re.findall(r"""Parser key "([^"]+)": Problem with given class_path '([\w.]+)\.(\w+)'""", message):
        chosen = getattr(import_module(given[-1][1]), given[-1][2])  # of whose settings one was meant
        names = list(_settings(chosen, "".join(f"{key}." for key, _, _ in given)))
    else:
        names = list(_settings(settings))
    meant = [_nearest(option or flag, names) for option, flag in UNKNOWN.findall(message)]
    found = list(dict.fromkeys(name for name in meant if name))
    return f"; did you mean {', '.join(found)}?" if found else ""


def nulls(given: Namespace, settings: type[Any], above: str = "") -> Iterator[str]:
    """The dotted names of settings that are null and may not be, which jsonargparse lets pass in a file."""
    for name, kind in _types(settings).items():
        value = given.get(name)
        if value is None:
            # null for a list is none of them
            if name in given and kind is not Any and type(None) not in get_args(kind) and get_origin(kind) is not list:
                yield above + name
        elif isinstance(value, Namespace) and "class_path" in value:
            module, _, class_name = value.class_path.rpartition(".")
            arguments = value.get("init_args") or Namespace()
            yield from nulls(arguments, getattr(import_module(module), class_name), f"{above}{name}.")
        elif isinstance(value, Namespace):
            for part in (p for p in (kind, *get_args(kind)) if isinstance(p, type) and dataclasses.is_dataclass(p)):
                yield from nulls(value, part, f"{above}{name}.")


def _types(settings: type[Any]) -> dict[str, Any]:
    try:
        return get_type_hints(settings)
    except NameError:  # a stranger's class, whose imports are for type checkers alone
        return {}


def _settings(settings: type[Any], above: str = "", inside: tuple[type, ...] = ()) -> dict[str, Any]:
    """The types of all settings by dotted name, those of every class that may stand in one too; the outer first."""
    types = _types(settings)
    found, below = dict[str, Any](), dict[str, Any]()
    for field in dataclasses.fields(settings):
        kind = found[above + field.name] = types.get(field.name)
        for each in (kind, *get_args(kind)):
            if each not in inside:
                for choice in _choices(each):
                    below |= _settings(choice, f"{above}{field.name}.", (*inside, each))
    return found | below


def _choices(kind: Any) -> list[type[Any]]:
    """The dataclasses that ``kind`` stands for: itself and all below it, but no abstract one."""
    if not isinstance(kind, type) or not (dataclasses.is_dataclass(kind) or inspect.isabstract(kind)):
        return []
    found = [] if inspect.isabstract(kind) else [kind]
    below: list[type[Any]] = kind.__subclasses__()
    return found + [choice for part in below for choice in _choices(part)]


def _nearest(unknown: str, names: Sequence[str]) -> str | None:
    *parents, last = unknown.replace("-", "_").split(".")
    if (known := FOREIGN.get(last)) in names:
        return known
    section = ".".join(parents)
    ends = {name.rpartition(".")[2]: name for name in reversed(names)}  # of two that end alike the outer
    ends |= {name.rpartition(".")[2]: name for name in reversed(names) if section and name.startswith(section)}
    near = difflib.get_close_matches(last, ends, n=1, cutoff=0.75)
    return ends[near[0]] if near else None
