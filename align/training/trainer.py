"""The one training loop.

    accelerate launch -m align.train --config configs/dpo_shapes.yaml --objective.beta 500

Next batch -> ``objective.rollout`` -> shuffle by image -> for each chunk of rows: ``objective.loss``, backward, clip,
step -> log, sample, checkpoint. The loop knows nothing of timesteps or papers.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from align.common import rng
from align.common.command import dumped, loaded
from align.data.dataset import Setup, contents_of
from align.families.identity import contents_of_model
from align.objectives import Context
from align.objectives.objective import KeepsState, Prepares, ScalesLearningRates, TrainsModule
from align.objectives.rows import Rows
from align.policy.policy import Policy
from align.sampling.diversity import Features
from align.training import checkpoint, run_folder, trackers
from align.training.batch_plan import BatchPlan, require_rows
from align.training.checkpoint import Parts
from align.training.config import TrainConfig
from align.training.finite import require_finite, settle
from align.training.gather import gather_of, gather_text_of, merged, numbers, summed
from align.training.launch import describe_precision, launch, leaving, sharding_of
from align.training.optimizer import build_optimizer, build_scheduler, clip, prepare
from align.training.preemption import Preempted, Preemption
from align.training.progress import crossed, drawing
from align.training.publish import publish
from align.training.stop import Watch
from align.training.validation import look
from rewards.common.errors import RewardError
from rewards.common.files import locked


class Trainer:
    """The state of one training run; :func:`train` builds it and calls :meth:`run`."""

    def __init__(self, config: TrainConfig, resolved: str) -> None:
        self.config = config
        self.folder = run_folder.RunFolder(config.output_dir)
        precision = describe_precision(config)
        self.accelerator = launch(config)
        self.resolved = re.sub("(?m)^(mixed_precision): auto$", rf"\1: '{config.precision}'", resolved)
        sharding = sharding_of(self.accelerator)
        self.family = config.family(self.accelerator.device, sharding is not None)
        self.settings: dict[str, Any] = {"contents of the model": contents_of_model(self.family)}  # a checkpoint's
        objective = config.objective
        self.policy = Policy(
            self.family,
            config.lora,
            objective.needs.reference,
            config.ema_decay,
            config.gradient_checkpointing,
            config.initial_weights,
            objective.reference == "start",
            objective.trains(self.family, config.data) if isinstance(objective, TrainsModule) else None,
            objective.around_packed,
            config.compile,
        )
        self.scorer = config.scorer()
        if isinstance(objective, Prepares):
            objective.prepare(self.policy, self.scorer)
        if sharding:
            self.policy.shard(sharding)
        # also where nothing is scaled: an average of weights begins at what prepare() has put in
        self.policy.set_lr_scales(objective.lr_scale if isinstance(objective, ScalesLearningRates) else lambda _: 1.0)
        self.features = Features(config.diversity_features, self.family.device) if config.diversity_features else None
        self.sizes = BatchPlan(config, self.family, self.accelerator.num_processes, precision)
        self.preemption, self.watch, self.preempted = Preemption(), Watch(config.stop), False
        self.settings |= loaded(self.resolved) | {"rows of an update": self.sizes.update * self.sizes.world}
        self.step = self.rollouts = self.barren = 0  # barren: rollouts since the last that gave rows

    def start(self) -> None:
        """Data encoded, optimiser built, run folder opened, state restored: everything before the first update."""
        config, accelerator = self.config, self.accelerator
        source = self.folder.find(config.resume_from_checkpoint)
        self.folder.require_same(source, self.settings)
        if accelerator.is_main_process:  # first of all: encoding a data set may take hours
            self.folder.claim(source is not None, config.overwrite_output_dir, self.family.denoiser_name)
        ranks = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
        setup = Setup(self.family, config.seed, *ranks, accelerator.wait_for_everyone)
        self.data = config.data.prepare(setup)
        self.settings |= contents_of(self.data)
        fixed = dataclasses.replace(setup, seed=0)  # all runs are judged on the same crops
        self.held_out = config.validation_data.prepare(fixed) if config.validation_data else None
        rate = config.learning_rate * (self.settings["rows of an update"] if config.scale_lr else 1)
        optimizer = build_optimizer(config, self.policy, rate)
        self.optimizer = prepare(accelerator, self.policy, optimizer)
        self.scheduler = build_scheduler(config, optimizer)  # not prepared: accelerate steps it once per process
        if source is not None:
            self.folder.require_same(source, self.settings)  # now with what the data holds
            state = checkpoint.load(source, self._parts())
            self.step, self.rollouts = state["step"], state["rollouts"]
            self.watch.load_state(state.get("stop", {}))
            if accelerator.is_main_process:  # they are of all processes
                self.policy.evaluations = state["evaluations"]
            accelerator.print(f"resumed from {source} at step {self.step}")
        if accelerator.is_main_process:
            self.folder.start(self.resolved, self.step if source is not None else None)
        trackers.start(accelerator, config.report_to, self.folder.path, self.settings, source is not None)

    def run(self) -> Path:
        """Train. Raises :class:`Preempted` where a signal ended that; what came before is in a checkpoint then."""
        self.start()
        with self.preemption.heard():
            try:
                return self._run()
            except (Preempted, RewardError) as error:  # hours of updates may have come before
                whole = self.accelerator.num_processes == 1 and self.last["step"] == self.step > 0
                if not self.preempted if isinstance(error, Preempted) else whole:  # in the midst of a rollout
                    self.checkpoint(self.last)
                    self.accelerator.print(f"saved {self.folder.latest()}")
                raise

    def _run(self) -> Path:
        config, accelerator = self.config, self.accelerator
        if self.step == 0:
            self.validate()
        by_rollout = not math.isfinite(config.updates)
        total, done = (config.max_rollouts, self.rollouts) if by_rollout else (config.updates, self.step)
        with tqdm(total=total, initial=done, desc="train", disable=not accelerator.is_main_process) as bar:
            while not self.done:
                before = self.step
                for metrics in self.rollout(bar):
                    self.watch.see(metrics)
                    bar.update(not by_rollout)
                    bar.set_postfix({name: f"{value:.3g}" for name, value in list(metrics.items())[:2]}, refresh=False)
                    if self.step % config.logging_steps == 0 or "rollout" in metrics:
                        self.log(metrics)
                    if self.step == config.updates:
                        break
                self.watch.close()
                bar.update(by_rollout)
                if crossed(before, self.step, config.validation_steps) and not self.done:
                    self.validate()
                self.preempted |= self.preemption.asked and accelerator.num_processes == 1
                if crossed(before, self.step, config.checkpointing_steps) or self.preempted:
                    self.checkpoint(self._state())
                if self.preempted:
                    raise Preempted
        if self.watch.verdict:  # what it has learnt is to cheat: no weights but in checkpoints
            return self.folder.path
        held_out = self.validate()
        if accelerator.is_main_process or self.policy.sharded:
            weights = self.policy.save(self.folder.path)
        if accelerator.is_main_process:
            self.folder.card(self.config, self.policy, self.sizes.describe(self.policy), self.step, held_out)
            print(f"saved {weights}")
        return self.folder.path

    @property
    def done(self) -> bool:
        return bool(self.watch.verdict) or self.step >= self.config.updates or self.rollouts >= self.config.rollouts

    def rollout(self, bar: Any = None) -> Any:
        """One batch, its rows, and the updates they give; yields each update's metrics."""
        config, accelerator = self.config, self.accelerator
        samples = self.sizes.samples_of(accelerator.process_index)
        check = self.preemption.check if accelerator.num_processes == 1 else lambda: None  # several: at its end
        ctx = Context(
            self.policy,
            config.seed,
            self.rollouts,
            samples,
            self.scorer,
            gather_of(accelerator, self.policy),
            gather_text_of(accelerator, self.policy),
            tolerance=config.tolerance,
            features=self.features,
            resolution=config.data.resolution,
            chunk=config.train_batch_size,
            progress=drawing(bar, len(samples), check) if bar is not None and self.scorer is not None else None,
        )
        batch = self.sizes.batch(self.data, ctx)
        self.last = copy.deepcopy(self._state())  # what a rollout that is given up goes back to
        with torch.no_grad(), accelerator.autocast():
            table = config.objective.rollout(ctx, batch)
        self.rollouts += 1
        told = ctx.gather(torch.tensor([[len(table), self.preemption.asked]]))
        counts, self.preempted = told[:, 0].tolist(), bool(told[:, 1].any())  # rows of every process, which may differ
        measured = {f"rollout/{name}": value for name, value in table.metrics.items()}
        if measured:  # those of this rollout, and of all training before it
            measured |= {f"evaluations/{k}": n for k, n in summed(self.policy.evaluations, ctx.gather).items()}
        if not any(counts):
            self.log(measured | {"rollout": self.rollouts})
        self.barren = require_rows(any(counts), self.barren)
        for epoch in range(config.inner_epochs if any(counts) else 0):
            shuffle = rng.generator(config.seed, "shuffle", self.rollouts - 1, *([epoch] if epoch else []))
            order = table.shuffled(shuffle)
            for k, parts in enumerate(self.sizes.shares(counts)):
                fresh = epoch == k == 0
                mine = torch.arange(len(order))[parts[accelerator.process_index]]
                chunks = list(order.take(mine).chunks(config.train_batch_size))
                sizes = [part.stop - part.start for part in parts]
                metrics = self.update(dataclasses.replace(ctx, on_policy=fresh, checks=[]), chunks, batch.ids, sizes)
                yield metrics | (measured | {"rollout": self.rollouts} if fresh and measured else {})

    def update(
        self, ctx: Context, chunks: Sequence[Rows], ids: Sequence[int], sizes: Sequence[int]
    ) -> dict[str, float]:
        """One optimizer step on ``chunks``; the loss is the mean over the rows of all processes, ``sizes`` of each."""
        config, accelerator = self.config, self.accelerator
        losses: list[Tensor] = []
        totals: dict[str, Tensor] = {}
        # a process with fewer rows passes through the network as often as the others: its wrapper waits for them there
        calls = -(-max(sizes) // config.train_batch_size)
        for k in range(calls):
            share = len(chunks[k]) / sum(sizes) if k < len(chunks) else 0.0
            # shared weights' gradients are summed up in parts, at every pass: whole ones would not fit
            at_once = k + 1 == calls or self.policy.sharded
            with contextlib.nullcontext() if at_once else accelerator.no_sync(self.policy.model):
                with accelerator.autocast():
                    loss, metrics = config.objective.loss(ctx, chunks[k]) if share else (self.policy.absent(), {})
                    scaled = self.policy.joined(loss * share * len(sizes))  # processes average their gradients
                accelerator.backward(scaled)
            losses += [loss.detach()] if share else []
            for name, value in ({"loss": losses[-1], **metrics} if share else {}).items():
                if name.endswith("_max"):
                    totals[name] = torch.maximum(totals.get(name, value), value)
                else:
                    totals[name] = totals.get(name, 0) + value * share
        settle(ctx.checks or ())
        norm = clip(accelerator, self.policy, config.max_grad_norm)
        values = merged(numbers(totals), gather_text_of(accelerator, self.policy)) | {"grad_norm": norm}
        require_finite(
            values, losses, chunks, ids, self.sizes.group, self.step + 1, self.folder.latest(), accelerator.scaler
        )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        self.policy.after_step()
        self.step += 1
        return values | {"lr": float(self.scheduler.get_last_lr()[0])}

    def validate(self) -> dict[str, float]:
        """Draw the sample grid, and log the figures on held-out data, of draws that never change."""
        grid = self.folder.grid(self.step)
        values = look(self.config, self.policy, self.scorer, self.held_out, self.accelerator, self.step, grid)
        if values:
            self.log({f"validation/{name}": value for name, value in values.items()})
        return values

    def log(self, metrics: dict[str, float]) -> None:
        self.accelerator.log(metrics, step=self.step)
        if self.accelerator.is_main_process:
            self.folder.log({"step": self.step, "time": round(time.time(), 3), **metrics})

    def checkpoint(self, state: dict[str, Any]) -> None:
        """Save all that a resumed run needs; processes have the same, and wait for the one that writes."""
        main = self.accelerator.is_main_process
        state["stop"] = self.watch.saved(state["step"])
        state |= {"evaluations": summed(state["evaluations"], gather_of(self.accelerator, self.policy))}
        if main or self.policy.sharded:
            self.folder.checkpoint(self._parts(), state, self.config.checkpoints_total_limit, main)
        self.accelerator.wait_for_everyone()

    def _parts(self) -> Parts:
        return Parts(self.policy, self.optimizer, self.scheduler, self.accelerator.scaler, self.config.objective)

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "rollouts": self.rollouts,
            "evaluations": dict(self.policy.evaluations),
            "settings": self.settings,
            "objective": self.config.objective.state() if isinstance(self.config.objective, KeepsState) else {},
        }


def train(config: TrainConfig, resolved: str = "") -> Path:
    """Run ``config`` and return its run folder; ``resolved``, kept there, reruns it. Raises ``Stopped`` by a rule."""
    config.check()
    repository = config.repository(config.output_dir, create=not config.dry_run)
    loop = Trainer(config, resolved or dumped(config))
    loop.sizes.check()
    loop.accelerator.print(loop.sizes.describe(loop.policy))
    if config.dry_run:
        return loop.folder.path
    with locked(loop.folder.path):
        folder, watch = loop.run(), loop.watch
    with leaving(loop.accelerator):
        del loop  # what holds connections
    publish(repository, watch.require_honest(folder))
    return folder
