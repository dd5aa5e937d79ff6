"""The optimiser that a config asks for."""

from __future__ import annotations

from typing import Any

import torch

from align.policy.policy import Policy
from align.training.config import TrainConfig


def build_optimizer(config: TrainConfig, policy: Policy, rate: float) -> torch.optim.Optimizer:
    """Over the trained parameters, each at ``rate`` times its own factor."""
    groups = [{"params": some, "lr": rate * factor} for factor, some in policy.groups().items()]
    if config.sgd_momentum is not None:
        return torch.optim.SGD(groups, lr=rate, momentum=config.sgd_momentum, nesterov=True)
    adam: Any = torch.optim.AdamW
    if config.use_8bit_adam:
        from bitsandbytes import optim

        adam = optim.AdamW8bit
    return adam(
        groups,
        lr=rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
    )
