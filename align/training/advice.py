"""Whether a run fits a GPU, and what to change where it does not: every suggestion traced."""

from __future__ import annotations

import copy
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from align.common.errors import UserError
from align.common.resolution import sides
from align.data.captioned import EncodedData
from align.policy.policy import LoRA
from align.training.config import TrainConfig
from align.training.launch import configured
from align.training.ledger import Estimate, size_of
from align.training.memory import trace

RESERVED = 1 << 30  # of a GPU, for CUDA's context, cuBLAS's workspace and what the allocator cannot fill: an allowance
WORTH = 0.01  # of the peak; what saves less is not suggested
UNITS = {
    "GB": 1 << 30,
    "GIB": 1 << 30,
    "G": 1 << 30,
    "MB": 1 << 20,
    "MIB": 1 << 20,
    "M": 1 << 20,
}  # a card's GB are GiB


@dataclass(frozen=True)
class Advice:
    """A change of settings, and the peak with it and all before it."""

    change: str
    saves: int
    peak: int


def parse_memory(text: str) -> int:
    """``24GB`` as bytes; the GB that a card is sold by are GiB. Raises :class:`UserError`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = UNITS.get((match[2] or "GB").upper()) if match else None
    if match is None or unit is None or float(match[1]) <= 0:
        raise UserError(f"memory is {text!r}; expected what a GPU has, such as 24GB")
    return int(float(match[1]) * unit)


def room(memory: int) -> int:
    """What of ``memory`` bytes tensors can have."""
    return memory - min(RESERVED, memory // 8)


def _checkpoint(config: TrainConfig) -> str | None:
    if config.gradient_checkpointing:
        return None
    config.gradient_checkpointing = True
    return "gradient_checkpointing: true"


def _offload(config: TrainConfig) -> str | None:
    if config.offload_idle:
        return None
    config.offload_idle = True
    return "offload_idle: true"


def _slice(config: TrainConfig) -> str | None:
    if config.vae_slicing:
        return None
    config.vae_slicing = True
    return "vae_slicing: true"


def _half(config: TrainConfig) -> str | None:
    if config.precision != "no":
        return None
    config.mixed_precision = "bf16"
    return "mixed_precision: bf16"


def _one_row(config: TrainConfig) -> str | None:
    if config.train_batch_size == 1:
        return None
    config.gradient_accumulation_steps *= config.train_batch_size
    config.train_batch_size = 1
    return f"train_batch_size: 1, gradient_accumulation_steps: {config.gradient_accumulation_steps} (the same updates)"


def _one_picture(config: TrainConfig) -> str | None:
    sampler = getattr(config.objective, "sampler", None)
    if sampler is None or sampler.batch_size == 1 or not config.draws:
        return None
    sampler.batch_size = 1
    return "objective.sampler.batch_size: 1"


def _one_image(config: TrainConfig) -> str | None:
    if not isinstance(config.data, EncodedData) or config.data.vae_batch == 1 or config.vae_slicing:
        return None
    config.data.vae_batch = 1
    return "data.vae_batch: 1"


def _adam(config: TrainConfig) -> str | None:
    if config.use_8bit_adam or config.sgd_momentum is not None:
        return None
    config.use_8bit_adam = True
    return "use_8bit_adam: true"


def _lora(config: TrainConfig) -> str | None:
    if config.lora is not None:
        return None
    config.lora = LoRA()
    return f"lora: {{rank: {config.lora.rank}}} instead of every weight"


def _nf4(config: TrainConfig) -> str | None:
    if config.quantize or config.lora is None:
        return None
    config.quantize = "nf4"
    return "quantize: nf4"


def _smaller(config: TrainConfig) -> str | None:
    height, width = sides(getattr(config.data, "resolution", None))
    if height is None or width is None or min(height, width) <= 512:
        return None
    config.data.resolution = 512
    return "data.resolution: 512"


# from what costs nothing but time to what changes the result
CHANGES: tuple[Callable[[TrainConfig], str | None], ...] = (
    *(_offload, _slice, _one_image, _checkpoint, _one_picture, _one_row),
    *(_half, _adam, _nf4, _lora, _nf4, _smaller),
)


def advise(config: TrainConfig, memory: int, found: Estimate, world: int = 1, shards: int = 1) -> Iterator[Advice]:
    """What to change, in order, until ``config`` fits ``memory`` bytes; each is traced on top of those before it, and
    what saves nothing is left out. ``config`` stays as it is."""
    peak, now = found.peak.total, copy.deepcopy(config)
    for change in CHANGES:
        if peak <= room(memory):
            return
        tried = copy.deepcopy(now)
        name = change(tried)
        if name is None:
            continue
        with_it = trace(tried, world, shards).peak.total
        if peak - with_it > WORTH * peak:
            yield Advice(name, peak - with_it, with_it)
            peak, now = with_it, tried


def processes() -> tuple[int, int]:
    """Processes of this launch, and over how many of them it divides what is trained."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    asked = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    return world, world if any(os.environ.get(name, "false").lower() == "true" for name in asked) else 1


@contextmanager
def quiet() -> Iterator[None]:
    """Without what libraries say of models that have no weights and prompts that have no words."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def report(config: TrainConfig) -> str:
    """What ``config`` takes of a GPU, whether ``config.memory`` is enough, and else what to change."""
    memory = parse_memory(config.memory or "")
    config = copy.deepcopy(config)
    if config.mixed_precision == "auto":
        config.mixed_precision = configured()
    with quiet():
        world, shards = processes()
        found = trace(config, world, shards)
        lines = [found.describe()]
        total, free = found.peak.total, room(memory)
        whole = f"{config.memory}, less {size_of(memory - free)} for CUDA itself"
        if total <= free:
            return "\n".join([*lines, f"fits {whole}"])
        lines.append(f"does not fit {whole}; in this order:")
        for advice in advise(config, memory, found, world, shards):
            total = advice.peak
            lines.append(f"  {advice.change:<44} saves {size_of(advice.saves):>11}, then {size_of(advice.peak)}")
        last = "that fits" if total <= free else "no setting here makes it fit: take a smaller model"
        return "\n".join([*lines, last])
