"""A pipeline's networks without their weights: names and shapes from the config files alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from align.common.assets import locate
from align.families.folder import Unsupported
from align.families.parts import components, configs


@dataclass(frozen=True)
class Skeleton:
    """The networks of a pipeline on the meta device, and what its parts' config files say."""

    source: str
    pipeline: str  # its class
    denoiser: str  # "unet" or "transformer"
    modules: Mapping[str, nn.Module]
    configs: Mapping[str, Mapping[str, Any]]

    @property
    def v_prediction(self) -> bool:
        return self.configs.get("scheduler", {}).get("prediction_type") == "v_prediction"

    @property
    def pruned(self) -> bool:
        """Whether the denoiser lost parts of blocks, so that no config of its class says its shapes."""
        entry = self.configs[self.denoiser].get("pruning")
        return bool(entry.get("removed") if isinstance(entry, Mapping) else entry)

    @property
    def packed(self) -> list[str]:
        """The parts whose weights are in 4 or 8 bit."""
        return [name for name, config in self.configs.items() if "quantization_config" in config]


def skeleton(source: str, pipeline: str, encoders: bool) -> Skeleton:
    """The networks of the ``pipeline`` class in ``source``, a folder, a hub id or an embedded name, with the text
    encoders or without. Raises :class:`Unsupported`."""
    folder = config_folder(source)
    said, named = configs(folder), components(folder)
    denoiser = "unet" if "unet" in named else "transformer"
    wanted = [name for name in named if name == denoiser or (encoders and name.startswith("text_encoder"))]
    try:
        classes = {name: getattr(import_module(named[name][0]), named[name][1]) for name in wanted if name in said}
        modules = {name: empty_network(folder / name, cls) for name, cls in classes.items()}
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
        raise Unsupported(f"{source}: a network cannot be built from its config: {error}") from error
    if denoiser not in modules:
        raise Unsupported(f"{source} has no {denoiser}/config.json; is the folder whole?")
    return Skeleton(source, pipeline, denoiser, modules, said)


def empty_network(where: Path, cls: Any) -> nn.Module:
    """The network of class ``cls`` that the config in ``where`` describes, without weights, on the meta device."""
    with torch.device("meta"):
        if (kind := getattr(cls, "config_class", None)) is not None:  # of transformers
            return cls(kind.from_pretrained(where))
        ours = ("pruning", "quantization_config")
        return cls.from_config({key: value for key, value in cls.load_config(where).items() if key not in ours})


def config_folder(source: str, revision: str | None = None) -> Path:
    """The folder of ``source``, or of the JSON files of a hub id, which are fetched. Raises :class:`Unsupported`."""
    folder = Path(locate(source))
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=["*.json", "*/*.json"]))
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split())[:300]
        raise Unsupported(f"{source!r} is neither a folder nor a reachable hub pipeline: {said}") from error
