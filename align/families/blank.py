"""A family from the config files of its parts alone, its networks on the ``meta`` device: nothing is read but JSON."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from importlib import import_module
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from align.families.conditioning import Conditioning
from align.families.family import Family
from align.families.folder import Unsupported
from align.families.loading import find, reader
from align.families.parts import INDEX, components, configs, read_json
from align.families.skeleton import config_folder, empty_network

META = torch.device("meta")


def blank(source: str, dtype: torch.dtype = torch.float32, revision: str | None = None) -> Family:
    """The family of ``source`` without weights: networks of the sizes that its configs say, on ``meta``, in ``dtype``.
    Of a hub id the JSON files alone are fetched. Raises :class:`Unsupported`.

    It has no tokenizers, so it encodes no prompts; :func:`captions` says what they would become.
    """
    family, folder = find(source, revision), config_folder(source, revision)
    family.require_supported(source, configs(folder))
    index = read_json(folder / INDEX)
    parts: dict[str, Any] = dict.fromkeys(family.pipeline._optional_components)
    for name, (library, class_name) in components(folder).items():
        if library in ("diffusers", "transformers") and (folder / name).is_dir():
            parts[name] = _part(folder / name, getattr(import_module(library), class_name, None), class_name, dtype)
    known = signature(family.pipeline.__init__).parameters
    settings = {key: value for key, value in index.items() if key in known and not isinstance(value, list)}
    options = {key: value for key, value in (settings | family.read_options).items() if key in known}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a pipeline does without
        pipe = family.pipeline(**{key: value for key, value in parts.items() if key in known} | options)
    found = family(pipe, source)
    found._uncond = captions(found, 1).to(META)
    return found


def _part(where: Path, cls: Any, class_name: str, dtype: torch.dtype) -> Any:
    if cls is None or not issubclass(cls, nn.Module):
        config = next((read_json(path) for path in where.glob("*config.json")), {})
        if cls is not None and "scheduler" in where.name:
            return cls.from_config(config)
        return _tokenizer(where, cls, config)
    if reader(where) is not None:
        raise Unsupported(f"{where} is packed or pruned; what it takes can be counted of the model that it was made of")
    try:
        module = empty_network(where, cls)
    except Exception as error:  # a class of diffusers or transformers meets files of a stranger
        text = " ".join(str(error).split())[:300]
        raise Unsupported(f"{where} is no config of a {class_name}: {type(error).__name__}: {text}") from error
    return _cast(module, dtype)


def _tokenizer(where: Path, cls: Any, config: Mapping[str, Any]) -> Any:
    """The tokenizer, or what stands for one without its vocabulary: its class, for the pipeline, and its limit."""
    try:
        return cls.from_pretrained(str(where))
    except Exception:  # whatever a class says where files are missing
        made = type(cls.__name__, (cls,), {"__init__": lambda self: None}) if cls is not None else SimpleNamespace
        tokenizer = made()
        tokenizer.__dict__["model_max_length"] = int(min(config.get("model_max_length") or 77, 1 << 20))
        return tokenizer


def _cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``module`` in ``dtype``, but for what its library keeps in float32: diffusers in any, transformers in float16."""
    strict = "_keep_in_fp32_modules_strict" if dtype == torch.bfloat16 else ""
    attribute = strict if hasattr(module, strict) else "_keep_in_fp32_modules"
    kept: Collection[str] = getattr(module, attribute, None) or ()
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and not any(part in name.split(".") for part in kept):
            parameter.data = parameter.data.to(dtype)
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if buffer.is_floating_point():
                owner._buffers[name] = buffer.to(dtype)  # not its data: a view would keep what it is of
    return module


def captions(family: Family, count: int) -> Conditioning:
    """What ``count`` prompts of the most tokens become, on the host; one prompt's memory stands for all.

    Widths are the denoiser's own; lengths are those at which the pipeline cuts, or that it fills up to.
    """
    config, dtype = family.denoiser.config, family.dtype
    names = ("caption_channels", "cap_feat_dim", "joint_attention_dim", "cross_attention_dim")
    width = next(config[name] for name in names if config.get(name))
    limit = family.pipe.tokenizer.model_max_length
    first = limit if family.text_tokens else next(iter(family.token_limits.values()), limit)
    length = first + family.text_tokens
    tensors = {"prompt_embeds": torch.zeros(1, length, width, dtype=dtype)}
    if pooled := _pooled(config):
        tensors["pooled"] = torch.zeros(1, pooled, dtype=dtype)
    if family.text_mask:
        tensors["mask"] = torch.ones(1, length, dtype=torch.bool if family.text_mask == "bool" else dtype)
    return Conditioning(tensors).expand(count)


def _pooled(config: Mapping[str, Any]) -> int:
    if config.get("addition_embed_type") == "text_time":
        return int(config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"])
    return int(config.get("pooled_projection_dim") or 0)
