"""Fine-tune text-to-image diffusion pipelines through a pluggable objective.

>>> from align import DPO, LoRA, Policy, PreferencePairs, TrainConfig, fine_tune, load_family, sample_images
>>> family = load_family("shapes-sd")  # a diffusers folder, a hub id, an embedded name
>>> images = sample_images(family.predict, family, ["two red stars"], seeds=[0])  # (1, 3, H, W) in [0, 1]
>>> policy = Policy(family, LoRA(rank=8))
>>> with policy.reference():
...     base = policy.predict(x_t, t, family.encode(["two red stars"]))  # x_t (1, C, h, w), t (1,)
>>> pairs = PreferencePairs("shapes-preferences", split="train")
>>> run = fine_tune(TrainConfig(pairs, DPO(beta=500.0), max_train_steps=100))  # the run folder

Names are imported when they are asked for. ``align.train`` and ``align.evaluate`` are the commands; from Python
they are :func:`fine_tune` and :func:`evaluate_run`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import rewards  # noqa: F401  first: it makes torchvision importable beside a CPU torch

if TYPE_CHECKING:
    from align.data import Images, LabelledRollout, PreferencePairs, Prompts, RatedImages, TaskPrompts
    from align.evaluate import Evaluate
    from align.evaluate import evaluate as evaluate_run
    from align.families import Family
    from align.families import load as load_family
    from align.families import tuned as load_tuned
    from align.objectives import (
        AWM,
        D3PO,
        DGPO,
        DPO,
        FIND,
        KTO,
        NFT,
        OPD,
        B2DiffuRL,
        DirectReward,
        Objective,
        PolicyGradient,
        ReNO,
    )
    from align.policy.lora import LoRA
    from align.policy.policy import Policy
    from align.sampling.generate import sample_images
    from align.training.config import TrainConfig
    from align.training.trainer import train as fine_tune

__all__ = [
    "AWM",
    "D3PO",
    "DGPO",
    "DPO",
    "FIND",
    "KTO",
    "NFT",
    "OPD",
    "B2DiffuRL",
    "DirectReward",
    "Evaluate",
    "Family",
    "Images",
    "LabelledRollout",
    "LoRA",
    "Objective",
    "Policy",
    "PolicyGradient",
    "PreferencePairs",
    "Prompts",
    "RatedImages",
    "ReNO",
    "TaskPrompts",
    "TrainConfig",
    "evaluate_run",
    "fine_tune",
    "load_family",
    "load_tuned",
    "sample_images",
]

_FROM = {
    "align.data": "Images LabelledRollout PreferencePairs Prompts RatedImages TaskPrompts",
    "align.evaluate": "Evaluate",
    "align.families": "Family",
    "align.objectives": "AWM B2DiffuRL D3PO DGPO DPO DirectReward FIND KTO NFT OPD Objective PolicyGradient ReNO",
    "align.policy.lora": "LoRA",
    "align.policy.policy": "Policy",
    "align.sampling.generate": "sample_images",
    "align.training.config": "TrainConfig",
}
_HOME = {name: (module, name) for module, names in _FROM.items() for name in names.split()}
_HOME |= {"fine_tune": ("align.training.trainer", "train"), "evaluate_run": ("align.evaluate", "evaluate")}
_HOME |= {"load_family": ("align.families", "load"), "load_tuned": ("align.families", "tuned")}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'align' has no attribute {name!r}")
    module, there = _HOME[name]
    return getattr(import_module(module), there)
