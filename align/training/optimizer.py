"""The optimizer that a config asks for, and the schedule of its learning rate."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from diffusers.optimization import get_scheduler
from torch.distributed.tensor import DTensor

from align.policy.policy import Policy
from align.training.config import TrainConfig


def build_optimizer(config: TrainConfig, policy: Policy, rate: float) -> torch.optim.Optimizer:
    """Over the trained parameters, each at ``rate`` times its own factor."""
    groups = [{"params": some, "lr": rate * factor} for factor, some in policy.groups().items()]
    if config.sgd_momentum is not None:
        return torch.optim.SGD(groups, lr=rate, momentum=config.sgd_momentum, nesterov=True)
    betas, decay, epsilon = (config.adam_beta1, config.adam_beta2), config.adam_weight_decay, config.adam_epsilon
    if config.use_8bit_adam:
        from bitsandbytes import optim

        return optim.AdamW8bit(groups, lr=rate, betas=betas, weight_decay=decay, eps=epsilon)
    # on a GPU one kernel, which differs in last bits; on a CPU the loop over parameters in C++, which does not
    fused = policy.family.device.type == "cuda"
    options = {"fused": True} if fused else {"foreach": True}
    return torch.optim.AdamW(groups, lr=rate, betas=betas, weight_decay=decay, eps=epsilon, **options)


def prepare(accelerator: Accelerator, policy: Policy, optimizer: torch.optim.Optimizer) -> AcceleratedOptimizer:
    """accelerate's wrappers around what trains: the network, but where it is divided already, and the optimizer."""
    if policy.sharded:
        return accelerator.prepare_optimizer(optimizer)
    policy.model, prepared = accelerator.prepare(policy.model, optimizer)
    return prepared


def clip(accelerator: Accelerator, policy: Policy, max_norm: float) -> float:
    """Scale the gradients down to ``max_norm``; the norm that they had, over all of a network that processes share."""
    norm = accelerator.clip_grad_norm_(policy.parameters(), max_norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def build_scheduler(config: TrainConfig, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """``lr_scheduler`` over the updates of the run."""
    warmup, steps = config.lr_warmup_steps, config.updates
    return get_scheduler(config.lr_scheduler, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
