"""What a LoRA's settings, in diffusers' header or in peft's file beside, say of the strength of each layer."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from align.common.errors import UserError
from align.common.patterns import LONGEST, is_bounded

PEFT_SETTINGS = "adapter_config.json"
_RESIDUAL = ("pissa", "olora", "corda", "lora_ga")  # of peft's initialisations: they take B · A out of the weight first


class LoRASettings:
    """The settings at ``path`` by ``component.name``, as ``header`` has them or, where the tensors have peft's names
    and so are all of the ``denoiser``, the file beside. Raises :class:`UserError` where they are no JSON object."""

    def __init__(self, path: Path, header: str, denoiser: str | None) -> None:
        self.path, beside = path, path.parent / PEFT_SETTINGS
        self._patterns: dict[str, re.Pattern[str]] = {}  # re itself remembers 512, and a model has more layers
        self._components: dict[str, dict[str, Any]] = {}
        try:
            settings = json.loads(header)
            if not settings and denoiser is not None and beside.is_file():
                settings = {f"{denoiser}.{k}": v for k, v in json.loads(beside.read_text("utf-8")).items()}
            for key, value in settings.items():
                component, _, name = key.partition(".")
                self._components.setdefault(component, {})[name] = value
        except (ValueError, AttributeError, OSError, RecursionError):
            raise UserError(f"{path}: the settings in its header or in {PEFT_SETTINGS} are no JSON object") from None

    def scale(self, name: str, rank: int, alpha: Tensor | None) -> float:
        """alpha / r of the layer ``name``, whose own tensor of ``alpha`` goes before what the settings say; alpha /
        sqrt(r) with rsLoRA (arXiv 2312.03732). Raises :class:`UserError`."""
        component, _, module = name.partition(".")
        own = self._components.get(component, {})
        if own.get("use_dora") or own.get("lora_bias"):
            raise UserError(f"{self.path}: its settings say DoRA or a trained bias, which are more than scale · B · A")
        if str(own.get("init_lora_weights")).startswith(_RESIDUAL):
            raise UserError(
                f"{self.path}: its settings say init_lora_weights {own['init_lora_weights']!r}, which has changed the "
                "model's weights as well; save it by peft's save_pretrained with "
                "path_initial_model_for_weight_conversion"
            )
        value: Any = rank if alpha is None else alpha
        if alpha is None and "lora_alpha" in own:
            value = self._fitting(module, own.get("alpha_pattern"), own["lora_alpha"])
        try:
            value = float(value)
            scale = value / (math.sqrt(rank) if own.get("use_rslora") else rank)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{self.path}: the alpha of {name} is no number: {error}") from error
        if not math.isfinite(scale):
            raise UserError(f"{self.path}: the alpha of {name} is {value}; expected a finite number")
        return scale

    def _fitting(self, module: str, patterns: Any, default: Any) -> Any:
        """The value of the first of ``patterns`` that fits a layer, as peft has them fit."""
        patterns = patterns or {}
        if not isinstance(patterns, dict):
            raise UserError(f"{self.path}: alpha_pattern in its settings is no JSON object")
        if patterns and len(module) > LONGEST:
            raise UserError(f"{self.path}: no layer has a name of {len(module)} letters, as {module[:40]}…")
        return next((v for pattern, v in patterns.items() if self._compiled(pattern).fullmatch(module)), default)

    def _compiled(self, pattern: str) -> re.Pattern[str]:
        if pattern not in self._patterns:
            if not is_bounded(pattern):
                raise UserError(
                    f"{self.path}: alpha_pattern {pattern[:80]!r} is not read (no regular expression, or with "
                    "groups or more than two repetitions); expected the name of a layer or how it ends"
                )
            self._patterns[pattern] = re.compile(rf"(.*\.)?({pattern})")
        return self._patterns[pattern]
