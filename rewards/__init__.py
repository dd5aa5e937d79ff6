"""Reward models: score images, higher is better.

>>> from rewards import RewardSum, load
>>> reward = RewardSum({"shapes": load("Shapes"), "small": load("JPEGCompressibility")}, {"small": 0.1})
>>> reward.components(images=images, prompts=prompts)  # {"shapes": (B,), "small": (B,), "total": (B,)}

A reward is any object with the attribute and the method of :class:`Reward`. It may also declare
``needs_prompt = False`` if it looks at the image alone. Scorers are imported when they are asked for.
"""

from __future__ import annotations

import logging

from rewards.common import torchvision_shim

torchvision_shim.ensure()  # before anything can import torchvision

# diffusers and peft import bitsandbytes where it is installed, which on some CPUs asks for a package it can do without
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from rewards.base import Reward, RewardSum, available, checked, load, needs_prompt  # noqa: E402
from rewards.common.errors import RewardError  # noqa: E402
from rewards.config import RewardConfig, parse_rewards  # noqa: E402

list = available  # ``rewards.list()``; kept out of ``__all__``, where it would hide the built-in

__all__ = [
    "Reward",
    "RewardConfig",
    "RewardError",
    "RewardSum",
    "available",
    "checked",
    "load",
    "needs_prompt",
    "parse_rewards",
]
