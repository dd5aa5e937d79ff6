"""Wall time of an online training phase over the bare time of its own forward and backward calls.

    python tests/benchmarks/overhead_online.py

``shapes-sd``, DDPO, LoRA: one rollout is drawn; then the real loop's updates on its rows (likelihood ratio, clip,
backward, gradient clip, AdamW, metrics) alternate with a bare replay, the guided forward and the backward of the same
rows and nothing else. The ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from align.data.prompts import Prompts
from align.objectives import Context
from align.objectives.online.rewards import RewardConfig
from align.objectives.policy_gradient import PolicyGradient, PolicyGradientRows
from align.sampling.sampler import Sampler
from align.training.config import TrainConfig
from align.training.trainer import Trainer
from tests.benchmarks import record

ROWS = 32


def bare(loop: Trainer, rows: PolicyGradientRows, t: torch.Tensor) -> float:
    """Seconds of the guided forward and its backward."""
    policy = loop.policy
    latents = rows.trajectories.latents
    x, cond = latents[rows.image, rows.step], rows.trajectories.cond_of(rows.image)
    start = time.perf_counter()
    policy.family.forward(x, t, cond, 3.0, policy.model).square().mean().backward()
    seconds = time.perf_counter() - start
    for parameter in policy.parameters():
        parameter.grad = None
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    updates = 8 if args.quick else args.updates
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            Prompts("shapes-prompts"),
            PolicyGradient(Sampler(num_inference_steps=10, guidance_scale=3.0), images_per_prompt=8),
            [RewardConfig("Shapes")],
            output_dir=Path(folder) / "run",
            train_batch_size=ROWS,
            rollout_batch_size=4,
            checkpointing_steps=0,
            report_to="none",
        )
        loop = Trainer(config, "")
        loop.start()
        ctx = Context(loop.policy, 0, 0, range(32), loop.scorer)
        with torch.no_grad():
            table = config.objective.rollout(ctx, loop.data.batch(range(4)))
        grid = loop.family.grid(10)
        chunks = list(table.shuffled(torch.Generator().manual_seed(0)).chunks(ROWS))
        whole, replay = [], []
        for k in range(updates):
            rows = chunks[k % len(chunks)]
            start = time.perf_counter()
            loop.log(loop.update(dataclasses.replace(ctx, on_policy=k == 0), [rows], range(4), [len(rows)]))
            whole.append(time.perf_counter() - start)
            replay.append(bare(loop, rows, grid.t[rows.step]))
    skip = updates // 4  # warm-up
    figures = {
        "ratio": round(statistics.median(whole[skip:]) / statistics.median(replay[skip:]), 4),
        "loop_ms": round(1e3 * statistics.median(whole[skip:]), 2),
        "bare_ms": round(1e3 * statistics.median(replay[skip:]), 2),
        "updates": updates - skip,
        "rows": ROWS,
    }
    record("overhead_online", figures, args.quick)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
