"""The one training loop.

    accelerate launch -m align.train --config configs/dpo_shapes.yaml --objective.beta 500

Next batch -> ``objective.rollout`` -> shuffle by image -> for each chunk of rows: ``objective.loss``, backward, clip,
step -> log, sample, checkpoint. The loop knows nothing of timesteps or papers.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from torch import Tensor
from tqdm import tqdm

from align import draws, families, runs
from align.config import command, parse
from align.data import shuffled
from align.encoded import EncodedPairs
from align.errors import NonFinite
from align.gallery import sample_images, save_grid
from align.objectives import Context, Metrics, Objective
from align.policy import Policy
from align.settings import Train
from align.table import Table

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Loop:
    """The state of one training run; :func:`train` builds it and calls :meth:`run`."""

    def __init__(self, config: Train, resolved: str) -> None:
        self.config, self.resolved = config, resolved
        self.folder = runs.RunFolder(config.output_dir)
        self.accelerator = Accelerator(mixed_precision=config.mixed_precision, project_dir=str(config.output_dir))
        set_seed(config.seed)  # LoRA's initial weights; every draw after that is keyed
        torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
        frozen = DTYPES[config.mixed_precision] if config.lora else torch.float32
        self.family = families.load(
            config.pretrained_model_name_or_path, frozen, self.accelerator.device, config.revision, config.variant
        )
        if config.attention_backend:
            self.family.denoiser.set_attention_backend(config.attention_backend)
        self.policy = Policy(
            self.family,
            config.lora,
            config.objective.needs_reference,
            config.ema_decay,
            config.gradient_checkpointing,
        )
        self.step = self.rollouts = 0

    @property
    def items(self) -> int:
        """Batch items of this process in one rollout."""
        return self.config.train_batch_size * self.config.gradient_accumulation_steps

    def plan(self) -> str:
        """What an update is made of, in words."""
        config, world = self.config, self.accelerator.num_processes
        plan = config.objective.plan(self.family.latent_shape(config.data.resolution))
        items = self.items * world
        trained = sum(p.numel() for p in self.policy.parameters())
        total = sum(p.numel() for p in self.family.denoiser.parameters())
        weights = sum(p.numel() * p.element_size() for p in self.family.denoiser.parameters())
        copies = 1 if config.lora or not config.objective.needs_reference else 2
        state = trained * 4 * (2 + 1 + bool(config.ema_decay))  # two AdamW moments, the gradient, the average
        lines = {
            "model": f"{config.pretrained_model_name_or_path} ({type(self.family).__name__}, {self.family.kind})",
            "objective": type(config.objective).__name__,
            "items per update": f"{config.train_batch_size} x {config.gradient_accumulation_steps} accumulated "
            f"x {world} processes = {items}",
            "evaluations per update": f"{plan.trained * items} trained + {plan.frozen * items} frozen",
            "trainable parameters": f"{trained:,} of {total:,} ({'LoRA' if config.lora else 'full'})",
            "estimated memory": f"{(weights * copies + state) / 2**20:,.0f} MiB for denoiser, gradients and optimiser, "
            "activations not counted",
            **plan.notes,
        }
        width = max(map(len, lines))
        return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())

    def start(self) -> None:
        """Data encoded, optimiser built, run folder opened, state restored: everything before the first update."""
        config, accelerator = self.config, self.accelerator
        self.data = config.data.prepare(
            self.family,
            config.seed,
            accelerator.process_index,
            accelerator.num_processes,
            accelerator.is_main_process,
            accelerator.wait_for_everyone,
        )
        self.held_out = config.validation_data.prepare(self.family) if config.validation_data else None
        self._optimise()
        source = self.folder.find(config.resume_from_checkpoint)
        if accelerator.is_main_process:
            self.folder.start(self.resolved, resumed=source is not None)
        if config.report_to != "none":
            accelerator.log_with = _trackers(accelerator, config.report_to)
            accelerator.init_trackers("t2i-align")
        if source is not None:
            state = self.folder.restore(accelerator, source)
            self.step, self.rollouts = state["step"], state["rollouts"]
            if accelerator.is_main_process:
                self.folder.forget_after(self.step)
            accelerator.print(f"resumed from {source} at step {self.step}")

    def run(self) -> Path:
        config, accelerator = self.config, self.accelerator
        self.start()
        if self.step == 0:
            self.validate()
        with tqdm(
            total=config.max_train_steps, initial=self.step, desc="train", disable=not accelerator.is_main_process
        ) as bar:
            while self.step < config.max_train_steps:
                before = self.step
                for metrics in self.rollout():
                    bar.update()
                    bar.set_postfix({name: f"{value:.3g}" for name, value in list(metrics.items())[:2]}, refresh=False)
                    if self.step % config.logging_steps == 0:
                        self.log(metrics)
                    if self.step == config.max_train_steps:
                        break
                if _crossed(before, self.step, config.validation_steps) and self.step < config.max_train_steps:
                    self.validate()
                if _crossed(before, self.step, config.checkpointing_steps):
                    self.folder.checkpoint(accelerator, self._state(), config.checkpoints_total_limit)
        held_out = self.validate()
        if accelerator.is_main_process:
            weights = self.policy.save(self.folder.path)
            self.folder.card(self.config, self.family, self.plan(), held_out)
            print(f"saved {weights}")
        accelerator.end_training()
        return self.folder.path

    def rollout(self) -> Any:
        """One batch, its rows, and the updates they give; yields each update's metrics."""
        config, accelerator = self.config, self.accelerator
        everyone = self.items * accelerator.num_processes
        first = self.items * accelerator.process_index
        ctx = Context(self.policy, config.seed, self.rollouts, range(first, first + self.items))
        indices = shuffled(len(self.data), everyone, config.seed, self.rollouts)[first : first + self.items]
        views = (draws.uniform(ctx.generators("view")) * config.data.variants).long().tolist()
        batch = self.data.batch(indices, views)
        with torch.no_grad(), accelerator.autocast():
            table = config.objective.rollout(ctx, batch)
        table = table.shuffled(draws.generator(config.seed, "shuffle", self.rollouts))
        self.rollouts += 1
        chunks = list(table.chunks(config.train_batch_size))
        for start in range(0, len(chunks), config.gradient_accumulation_steps):
            yield self.update(ctx, chunks[start : start + config.gradient_accumulation_steps], batch.ids)

    def update(self, ctx: Context, chunks: Sequence[Table], ids: Sequence[int]) -> dict[str, float]:
        """One optimiser step on ``chunks``; the loss is the mean over all of their rows."""
        config, accelerator = self.config, self.accelerator
        rows = sum(map(len, chunks))
        losses: list[Tensor] = []
        totals: dict[str, Tensor] = {}
        for k, chunk in enumerate(chunks):
            share = len(chunk) / rows
            last = k + 1 == len(chunks)
            with contextlib.nullcontext() if last else accelerator.no_sync(self.policy.model):
                with accelerator.autocast():
                    loss, metrics = config.objective.loss(ctx, chunk)
                accelerator.backward(loss * share)
            losses.append(loss.detach())
            for name, value in {"loss": losses[-1], **metrics}.items():
                totals[name] = totals.get(name, 0) + value * share
        norm = accelerator.clip_grad_norm_(self.policy.parameters(), config.max_grad_norm)
        names = [*totals, "grad_norm"]
        summed = accelerator.reduce(torch.stack([*totals.values(), norm.detach().to(losses[0].device)]), "mean")
        values = dict(zip(names, summed.tolist(), strict=True))
        self._require_finite(values, losses, chunks, ids)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        self.policy.after_step()
        self.step += 1
        return values | {"lr": self.scheduler.get_last_lr()[0]}

    def _require_finite(
        self, values: dict[str, float], losses: list[Tensor], chunks: Sequence[Table], ids: Sequence[int]
    ) -> None:
        scaled = self.accelerator.scaler is not None  # fp16: an infinite gradient only skips the step
        wrong = [name for name in ("loss", "grad_norm") if not _finite(values[name])]
        if not wrong or (wrong == ["grad_norm"] and scaled):
            return
        bad = [chunk for chunk, loss in zip(chunks, losses, strict=True) if not bool(torch.isfinite(loss))] or chunks
        rows = [str(ids[int(image)]) for chunk in bad for image in chunk.image]
        good = self.folder.latest()
        raise NonFinite(
            f"{wrong[0]} is {values[wrong[0]]} at step {self.step + 1}, rows {', '.join(rows[:8])}"
            f"{' …' if len(rows) > 8 else ''}; last good checkpoint: {good or 'none'}. "
            "Try a lower learning rate, or look at those rows"
        )

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Draw the sample grid, and the objective's metrics on held-out data with draws that never change."""
        config, accelerator = self.config, self.accelerator
        values: dict[str, float] = {}
        with self.policy.averaged(), accelerator.autocast():
            if self.held_out is not None:
                values = held_out_metrics(config.objective, self.policy, self.held_out, config.train_batch_size)
            if config.samples.prompts and accelerator.is_main_process:
                images = sample_images(
                    self.policy.predict,
                    self.family,
                    config.samples.prompts,
                    [config.samples.seed + k for k in range(len(config.samples.prompts))],
                    config.samples.steps,
                    config.samples.guidance,
                    config.train_batch_size,
                    config.data.resolution,
                )
                save_grid(images, config.samples.prompts, self.folder.path / f"samples/step-{self.step:06d}.png")
                for tracker in accelerator.trackers:
                    if tracker.name == "tensorboard":
                        tracker.log_images({"samples": images.numpy()}, step=self.step, dataformats="NCHW")
        if values:
            self.log({f"held_out/{name}": value for name, value in values.items()})
        return values

    def log(self, metrics: dict[str, float]) -> None:
        self.accelerator.log(metrics, step=self.step)
        if self.accelerator.is_main_process:
            self.folder.log({"step": self.step, "time": round(time.time(), 3), **metrics})

    def _optimise(self) -> None:
        config, accelerator = self.config, self.accelerator
        rate = config.learning_rate
        if config.scale_lr:
            rate *= self.items * accelerator.num_processes
        adam: Any = torch.optim.AdamW
        if config.use_8bit_adam:
            from bitsandbytes import optim

            adam = optim.AdamW8bit
        optimizer = adam(
            self.policy.parameters(),
            lr=rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.adam_weight_decay,
            eps=config.adam_epsilon,
        )
        self.policy.model, self.optimizer = accelerator.prepare(self.policy.denoiser, optimizer)
        # not prepared: accelerate would step it once per process
        self.scheduler = get_scheduler(
            config.lr_scheduler,
            optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
        )
        accelerator.register_for_checkpointing(self.scheduler)
        runs.slim_checkpoints(accelerator, self.policy)

    def _state(self) -> dict[str, int]:
        return {"step": self.step, "rollouts": self.rollouts}


def held_out_metrics(objective: Objective, policy: Policy, data: EncodedPairs, batch_size: int) -> dict[str, float]:
    """The objective's loss and metrics over all of ``data``, each pair with noise and time of its own that are the
    same at every call; means over pairs."""
    sums: dict[str, float] = {}
    for start in range(0, len(data), batch_size):
        index = range(start, min(start + batch_size, len(data)))
        ctx = Context(policy, 0, -1, index)
        loss, metrics = objective.loss(ctx, objective.rollout(ctx, data.batch(index)))
        values: Metrics = {"loss": loss, **metrics}
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value.item() * len(index)
    return {name: value / len(data) for name, value in sums.items()}


def _crossed(before: int, after: int, every: int) -> bool:
    return every > 0 and before // every != after // every


def _finite(value: float) -> bool:
    return value - value == 0


def _trackers(accelerator: Accelerator, report_to: str) -> list[Any]:
    from accelerate.tracking import filter_trackers

    return filter_trackers(report_to, accelerator.project_configuration.logging_dir)


def train(config: Train, resolved: str = "") -> Path:
    """Run ``config`` and return its run folder. ``resolved`` is the YAML kept there."""
    config.check()
    loop = Loop(config, resolved)
    loop.accelerator.print(loop.plan())
    return loop.folder.path if config.dry_run else loop.run()


def main(argv: Sequence[str] | None = None) -> int:
    config, resolved = parse(Train, "align.train", __doc__, argv)
    return command(lambda: train(config, resolved))


if __name__ == "__main__":
    sys.exit(main())
