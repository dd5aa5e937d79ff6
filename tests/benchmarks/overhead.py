"""Wall time of the training loop over the bare time of its own forward and backward calls.

    python tests/benchmarks/overhead.py

``shapes-sd``, Diffusion-DPO, LoRA, 16 pairs. In one process the real loop's updates alternate with a bare replay: the
two network calls and the backward of the same rows, nothing else; the ratio is that of their medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from align.data.preferences import PreferencePairs
from align.diffusion.process import add_noise
from align.families import Conditioning
from align.objectives import Context
from align.objectives.dpo import DPO
from align.objectives.pair_losses import PairRows
from align.training.config import TrainConfig
from align.training.trainer import Trainer
from tests.benchmarks import record


def bare(loop: Trainer, rows: PairRows) -> float:
    """Seconds of the reference forward, the trained forward and its backward: what nothing can do without."""
    policy = loop.policy
    x0 = torch.cat(rows.latents.unbind(1))
    eps, t = rows.eps.repeat(2, 1, 1, 1), rows.t.repeat(2)
    cond = Conditioning.cat([rows.cond, rows.cond])
    x_t = add_noise(x0, eps, *policy.family.path(t))
    with torch.no_grad(), policy.reference():
        start = time.perf_counter()
        policy.family.call(policy.denoiser, x_t, t, cond)
        seconds = time.perf_counter() - start
    start = time.perf_counter()
    policy.family.call(policy.model, x_t, t, cond).square().mean().backward()
    seconds += time.perf_counter() - start
    for parameter in policy.parameters():
        parameter.grad = None
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    updates = 12 if args.quick else args.updates
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            PreferencePairs("shapes-preferences", split="train", limit=256),
            DPO(beta=100.0),
            output_dir=Path(folder) / "run",
            train_batch_size=16,
            max_train_steps=updates,
            checkpointing_steps=0,
            report_to="none",
        )
        loop = Trainer(config, "")
        loop.start()
        ctx = Context(loop.policy, 0, 0, range(16))
        with torch.no_grad():
            rows = config.objective.rollout(ctx, loop.data.batch(range(16)))
        whole, replay = [], []
        for _ in range(updates):
            start = time.perf_counter()
            for metrics in loop.rollout():
                loop.log(metrics)
            whole.append(time.perf_counter() - start)
            replay.append(bare(loop, rows))
    skip = updates // 4  # warm-up
    figures = {
        "ratio": round(statistics.median(whole[skip:]) / statistics.median(replay[skip:]), 4),
        "loop_ms": round(1e3 * statistics.median(whole[skip:]), 2),
        "bare_ms": round(1e3 * statistics.median(replay[skip:]), 2),
        "updates": updates - skip,
        "pairs": 16,
    }
    record("overhead", figures, args.quick)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
