"""What a run takes of a GPU's memory, known before it is spent: one real update on a device that is not there.

The config's own objects run on it (:mod:`align.training.ghost`): the family with networks of full size
(:func:`align.families.blank.blank`), the policy, the objective's rollout and loss, backward, the optimizer. What frozen
networks say again of inputs of one shape is run once. Rewards score on the host and are not counted.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from align import families
from align.common.errors import UserError
from align.common.resolution import Resolution, sides
from align.data.captioned import EncodedData
from align.data.latent_cache import EncodedBatch
from align.data.prompts import PromptBatch
from align.data.text_cache import TEXTS
from align.families.blank import blank, captions
from align.families.loading import quantized
from align.families.resting import Resting
from align.objectives import Context
from align.objectives.objective import Prepares, ScalesLearningRates, TrainsModule
from align.objectives.online.rewards import Scorer
from align.policy.policy import Policy
from align.sampling.generate import sample_images
from align.training.batch_plan import BatchPlan
from align.training.config import TrainConfig
from align.training.ghost import GHOST, Ghost
from align.training.ledger import Estimate, Part, Phase
from align.training.optimizer import build_optimizer


class _Untold(Scorer):
    """Scores on the host that mean nothing, one for each picture and unlike the others'."""

    def __init__(self, config: TrainConfig) -> None:
        weights = {reward.label or reward.name: reward.weight for reward in config.rewards}
        super().__init__(dict.fromkeys(weights, _score), weights)  # type: ignore[arg-type]
        self._draws = torch.Generator().manual_seed(0)

    def submit(self, images: Tensor, *_: Any) -> Callable[[], dict[str, Tensor]]:
        scores = {name: torch.rand(len(images), generator=self._draws) for name in self.rewards}
        return lambda: scores

    def score(self, images: Tensor, *_: Any) -> dict[str, Tensor]:
        return self.submit(images)()

    @property
    def without_gradient(self) -> list[str]:
        return []  # a run says so; here none is loaded

    def differentiable_scores(self, images: Tensor, *_: Any) -> dict[str, Tensor]:
        return {name: images.float().mean((1, 2, 3)) for name in self.rewards}

    def differentiable_total(self, images: Tensor, *_: Any) -> Tensor:
        return images.float().mean((1, 2, 3))


def _score(*_: Any, **__: Any) -> Tensor:
    raise NotImplementedError("a trace scores nothing")


def trace(config: TrainConfig, world: int = 1, shards: int = 1) -> Estimate:
    """One update of ``config`` on ``world`` processes, traced from the config files of its model.

    ``shards``: over how many processes weights, gradients and optimizer are divided (FSDP, ZeRO-3).
    Raises :class:`UserError` for a model of which there are no config files, and for data that cannot be made up.
    """
    with torch.random.fork_rng(devices=[]):
        return _Trace(copy.deepcopy(config), world).run(shards)


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Weights and buffers; of one in 4 bit the scales too."""
    found = [*module.parameters(), *module.buffers()]
    states = [state for p in found if (state := getattr(p, "quant_state", None)) is not None]
    nested = [state.state2 for state in states if state.state2 is not None]
    return found + [x for s in (*states, *nested) for x in vars(s).values() if isinstance(x, Tensor)]


class _Adam8bit(torch.optim.Optimizer):
    """The state of bitsandbytes' AdamW8bit: two bytes a weight and two scales a block; small tensors have float32."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in [p for group in self.param_groups for p in group["params"] if not self.state[p]]:
            if p.numel() < 4096:
                self.state[p] = {"state1": torch.zeros_like(p), "state2": torch.zeros_like(p)}
                continue
            blocks = -(-p.numel() // 256)
            for k in (1, 2):
                self.state[p][f"state{k}"] = torch.zeros_like(p, dtype=torch.uint8)
                self.state[p][f"absmax{k}"] = torch.zeros(blocks, device=p.device)


class _Trace:
    def __init__(self, config: TrainConfig, world: int) -> None:
        self.config, self.world = config, world
        self.ghost = Ghost()
        self.ledger = self.ghost.ledger
        self.phases: list[Phase] = []
        self.dtype = families.DTYPES[config.precision]

    def run(self, shards: int) -> Estimate:
        with self.ghost.present():
            self._load()
            with self._phase("step"):
                self._optimizer()
            with self._phase("encoding"):
                self._encode()
            if self.config.samples.prompts:
                with self._phase("samples"):
                    self._sample()
            with self._phase("rollout"), torch.no_grad(), self.ghost.autocast(self.dtype):
                rows = self.config.objective.rollout(self.ctx, self._batch())
            if not len(rows):
                raise UserError("the traced rollout gave no row to train on; memory cannot be told")
            with self._phase("update"):
                self._update(next(rows.chunks(self.config.train_batch_size)))
        return Estimate(tuple(self.phases), shards, 2 * self._largest_block() if shards > 1 else 0)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        before = self.ledger.since()
        yield
        self.phases.append(Phase(name, +self.ledger.peak))
        self.ledger.resume(before)

    def _load(self) -> None:
        config, ledger, objective = self.config, self.ledger, self.config.objective
        self.family = family = blank(config.pretrained_model_name_or_path, config.frozen, config.revision)
        if config.quantize:
            quantized(family.denoiser)
        if config.vae_slicing:
            family.pipe.vae.enable_slicing()
        for name, part in family.pipe.components.items():
            if isinstance(part, nn.Module):
                kind = Part.TEXT if name.startswith("text_encoder") else Part.VAE if name == "vae" else Part.WEIGHTS
                ledger.move(tensors_of(part), kind)
        if config.offload_idle:
            Resting(family.pipe, family.denoiser, GHOST, self._move)
        self.policy = policy = Policy(
            family,
            config.lora,
            objective.needs.reference,
            config.ema_decay,
            config.gradient_checkpointing,
            None,
            trained=objective.trains(family, config.data) if isinstance(objective, TrainsModule) else None,
            around_packed=objective.around_packed,
        )
        self.resolution = self._largest()
        self.scorer = _Untold(config) if config.rewards else None
        if isinstance(objective, Prepares):
            objective.prepare(policy, self.scorer)
        policy.set_lr_scales(objective.lr_scale if isinstance(objective, ScalesLearningRates) else lambda _: 1.0)
        ledger.move(policy.parameters(), Part.LORA if config.lora else Part.WEIGHTS)
        if policy.ema is not None:
            ledger.move(policy.ema.shadow_params, Part.AVERAGE)
        if policy.weights.frozen is not None:
            frozen = policy.weights.frozen
            ledger.move(tensors_of(frozen), Part.REFERENCE)
            self.ghost.once(frozen)
        for parameter in policy.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: ledger.move([p.grad], Part.GRADIENTS))
        self.ghost.once(family.denoiser)
        for name in ("encode", "decode"):
            self.ghost.once(family.pipe.vae, name)
        self.sizes = BatchPlan(config, family, self.world)
        self.ctx = Context(
            policy,
            config.seed,
            0,
            range(self.sizes.samples // self.world),
            self.scorer,
            tolerance=math.inf,
            resolution=self.resolution,
            chunk=config.train_batch_size,
        )

    def _largest(self) -> Resolution:
        """The size of the images, of several buckets the one with the most pixels."""
        data = self.config.data
        if not isinstance(data, EncodedData):
            return data.resolution
        height, width = max(data.sizes(self.family), key=math.prod)
        return f"{width}x{height}"

    def _move(self, module: nn.Module, device: torch.device) -> None:
        self.ledger.park(tensors_of(module), device.type == "cpu")

    def _optimizer(self) -> None:
        """A first step: from here on there is the optimizer's state."""
        if self.config.use_8bit_adam:
            self.optimizer: torch.optim.Optimizer = _Adam8bit(self.policy.parameters())
        else:
            self.optimizer = build_optimizer(self.config, self.policy, self.config.learning_rate)
        optimizer = self.optimizer
        for group in optimizer.param_groups:
            if "foreach" in group:
                group["foreach"] = True  # as torch has it on a GPU
        with self.ledger.of(Part.GRADIENTS):
            for parameter in self.policy.parameters():
                parameter.grad = torch.zeros_like(parameter)
        with self.ledger.of(Part.OPTIMIZER):
            optimizer.step()
        if self.config.gradient_accumulation_steps == 1:
            optimizer.zero_grad(set_to_none=True)

    def _encode(self) -> None:
        """One call of the VAE and of the text encoders, as many inputs as the data gives them at once."""
        data, family = self.config.data, self.family
        with torch.no_grad(), self.ledger.of(Part.ACTIVATIONS):
            if isinstance(data, EncodedData):
                height, width = (side or family.resolution for side in sides(self.resolution))
                family.to_latent(torch.zeros(1, 3, height, width).expand(data.vae_batch, -1, -1, -1))
            with self.ghost.autocast(torch.float32):
                self._encode_text(TEXTS if isinstance(data, EncodedData) else 1)

    def _encode_text(self, count: int) -> None:
        """Prompts of the most tokens through the text encoders; by themselves, where a tokenizer has no vocabulary."""
        family = self.family
        limits = {name: family.token_limits.get(name, 77) for name in family.pipe.components if "tokenizer" in name}
        try:
            family.encode(["a " * max(limits.values())] * count)
        except Exception:  # a stand-in's; what an encoder itself refuses it refuses below
            for name, encoder in family.pipe.components.items():
                if isinstance(encoder, nn.Module) and name.startswith("text_encoder"):
                    ids = torch.zeros(count, self._tokens(name, encoder), dtype=torch.long, device=GHOST)
                    encoder(input_ids=ids, output_hidden_states=True)

    def _tokens(self, name: str, encoder: nn.Module) -> int:
        tokenizer = name.replace("text_encoder", "tokenizer")
        limit = self.family.token_limits.get(tokenizer) or self.family.pipe.components[tokenizer].model_max_length
        return min(limit, getattr(encoder.config, "max_position_embeddings", None) or limit)

    def _sample(self) -> None:
        config, prompts = self.config, self.config.samples.prompts
        with self.ghost.autocast(self.dtype):
            sample_images(
                self.policy.predict,
                self.family,
                prompts,
                range(len(prompts)),
                config.samples.num_inference_steps,
                config.samples.guidance_scale,
                config.train_batch_size,
                config.data.resolution,
                initial=self.policy.initial,
            )

    def _batch(self) -> Any:
        """A batch of the data's kind, with nothing in it."""
        kind, family = self.config.data.batch_type, self.family
        count = len(self.ctx.sample_indices) // self.sizes.group or 1
        texts, ids = [""] * count, list(range(count))
        if kind is PromptBatch:
            return PromptBatch(texts, captions(family, count), [{} for _ in ids], ids)
        if issubclass(kind, EncodedBatch):
            shape = family.latent_shape(*sides(self.resolution))
            each = (1, *((kind.images,) if kind.images > 1 else ()), *shape)
            labels = torch.ones(count)
            return kind(torch.zeros(each).expand(count, *each[1:]), captions(family, count), texts, ids, labels)
        raise UserError(f"memory: a {kind.__name__} cannot be made up; prompts, images and pairs can")

    def _update(self, rows: Any) -> None:
        with self.ledger.of(Part.ACTIVATIONS):
            with self.ghost.autocast(self.dtype):
                loss, _ = self.config.objective.loss(dataclasses.replace(self.ctx, on_policy=True), rows)
            self.ghost.backward(loss, self.dtype)

    def _largest_block(self) -> int:
        """Bytes of the greatest block of the denoiser that is not divided."""
        names = set(getattr(self.family.denoiser, "_no_split_modules", None) or ())
        blocks = [m for m in self.family.denoiser.modules() if type(m).__name__ in names] or [self.family.denoiser]
        return max(sum(p.numel() * p.element_size() for p in block.parameters()) for block in blocks)
