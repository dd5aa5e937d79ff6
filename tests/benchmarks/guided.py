"""Guided training of ``shapes-sd3``, and what a reward can and cannot teach it: three ways to learn, a run each a seed.

    python tests/benchmarks/guided.py                     # what is not recorded yet; all: two hours of a core
    python tests/benchmarks/guided.py --arms rendered

Every weight trains, and pictures are drawn as they are judged, with guidance 3 in ten steps: two of each held-out
prompt, and of as many that are trained on. ``AWM`` has the strict score as its reward and the conditional answer in its
loss, as AWM has; ``guided loss`` the guided one, by which its pictures are drawn. ``rendered`` has no reward: its
pictures are the world's own, each right, and the loss is the one that the pipeline was made with. ``--quick`` makes two
rollouts and records nothing. Finished runs are kept in ``outputs/``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor

from align.common import rng
from align.data.captioned import ImageBatch
from align.data.prompts import PromptBatch
from align.diffusion.process import add_noise
from align.evaluation.compare import STRICT, overall
from align.families import Conditioning, Family, Resolution
from align.objectives import AWM, Context, Cost, Metrics, Needs, Objective
from align.objectives.losses import denoising_error
from align.objectives.online.forward_process import NoisedRows
from align.objectives.rows import Rows
from align.shapes.world import training_prompts
from rewards.common.files import write_text
from tests.benchmarks import RESULTS, command, finished, metrics, record, runs_folder

CONFIG = "configs/awm_shapes_sd3.yaml"
GUIDANCE = 3.0
JUDGED = ("--num_inference_steps", "10", "--guidance_scale", str(GUIDANCE), "--samples_per_prompt", "2")
STRICTLY = '[{"name": "Shapes", "args": {"mode": "strict"}, "label": "strict"}]'
AWM_OPTIONS = ("--objective.sampler.guidance_scale", str(GUIDANCE), "--rewards", STRICTLY, "--learning_rate", "4e-5")
RENDERED = (
    *("--objective", "tests.benchmarks.guided.Regression", "--rewards", "[]", "--learning_rate", "2e-4"),
    *("--data", "align.shapes.scenes.Scenes", "--data.limit", "64000", "--data.vae_batch", "64"),
    *("--gradient_accumulation_steps", "1"),
)
# what is changed in the config, pictures of a rollout's batch, and updates: two a rollout, or one a batch
ARMS: Mapping[str, tuple[tuple[str, ...], int, int]] = {
    "AWM": (AWM_OPTIONS, 32, 128),
    "guided loss": (("--objective", "tests.benchmarks.guided.GuidedAWM", *AWM_OPTIONS), 32, 128),
    "rendered": (RENDERED, 64, 1000),
}


class Guided:
    """A policy whose answer, where no guidance is named, is the guided one."""

    def __init__(self, policy: Any) -> None:
        self._policy = policy

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def predict(self, x_t: Tensor, t: Tensor, cond: Any, guidance_scale: Any = GUIDANCE) -> Any:
        return self._policy.predict(x_t, t, cond, guidance_scale)


@dataclass
class GuidedAWM(AWM):
    """AWM by the answer that draws."""

    def rollout(self, ctx: Context, batch: PromptBatch) -> NoisedRows:
        return super().rollout(replace(ctx, policy=Guided(ctx.policy)), batch)  # type: ignore[arg-type]

    def loss(self, ctx: Context, rows: NoisedRows) -> tuple[Tensor, Metrics]:
        return super().loss(replace(ctx, policy=Guided(ctx.policy)), rows)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class NoisedImages(Rows):
    """R images, noised."""

    latents: Tensor  # (R, C, h, w)
    cond: Conditioning
    eps: Tensor  # (R, C, h, w)
    t: Tensor  # (R,)


@dataclass
class Regression(Objective):
    """The loss that the network was made with, on images that are good, a tenth of them without their caption."""

    @property
    def needs(self) -> Needs:
        return Needs((ImageBatch,), reference=False)

    def cost(self, family: Family, resolution: Resolution) -> Cost:
        return Cost(trained=1, frozen=0)

    def rollout(self, ctx: Context, batch: ImageBatch) -> NoisedImages:
        family, generators = ctx.policy.family, ctx.generators("regression")
        return NoisedImages(
            image=torch.arange(len(batch.latents)),
            latents=batch.latents.float(),
            cond=family.drop_prompts(batch.cond, rng.uniform(generators) < 0.1),
            eps=rng.normal(tuple(batch.latents.shape[1:]), generators),
            t=family.sample_timesteps(rng.uniform(generators)),
        )

    def loss(self, ctx: Context, rows: NoisedImages) -> tuple[Tensor, Metrics]:
        x_t = add_noise(rows.latents, rows.eps, *ctx.policy.family.path(rows.t))
        error = denoising_error(ctx.policy.predict(x_t, rows.t, rows.cond), rows.latents, rows.eps)
        return error.mean(), {"error": error.mean().detach()}


def trained(arm: str, seed: int, quick: bool) -> tuple[Path, int]:
    """The folder of a run, trained unless that is done, and the CPU seconds that this took."""
    options, batch, updates = ARMS[arm]
    folder = runs_folder(quick) / "guided" / f"{arm.replace(' ', '_')}-{seed}"
    words = ["--config", CONFIG, *options, "--lora", "null", "--rollout_batch_size", str(batch)]
    words += ["--max_train_steps", str(4 if quick else updates), "--validation_data", "null", "--samples.prompts", "[]"]
    if quick and arm == "rendered":
        words += ["--data.limit", "256"]
    words += ["--checkpointing_steps", "0", "--overwrite_output_dir", "true", "--seed", str(seed)]
    return folder, finished(folder, *words).cpu_seconds


def evaluations(run: Path) -> int:
    """The rows that went through the network, of pictures that were drawn or of those of the data."""
    lines = metrics(run)
    # said after a rollout's first update, so that two such lines have one rollout between them
    asked = [line["evaluations/trained"] + line["evaluations/frozen"] for line in lines if "rollout" in line]
    return round(len(asked) * (asked[-1] - asked[0]) / (len(asked) - 1)) if asked else 64 * lines[-1]["step"]


def judged(run: Path, quick: bool) -> dict[str, Any]:
    """``run`` beside the base: strict scores of held-out prompts and of those trained on, with the difference's
    interval; the base's pictures stay from one run to the next."""
    folder, found = runs_folder(quick) / "guided", dict[str, Any]()
    seen = folder / "prompts.txt"
    write_text(seen, "\n".join(training_prompts()[::2]) + "\n")
    for title, prompts in (("held_out", "shapes"), ("trained_on", str(seen))):
        where = ["--base", "shapes-sd3", "--tuned", str(run), "--output_dir", str(folder / f"evaluation_{title}")]
        more = ["--prompts", prompts, *JUDGED, *(["--max_prompts", "12"] if quick else [])]
        command("align.evaluate", "--config", "configs/evaluate_shapes.yaml", *where, *more)
        entry = json.loads((folder / f"evaluation_{title}/scores.json").read_text())["rewards"][STRICT]
        scores = {model: overall(entry, model) for model in ("base", "tuned")}
        found[title] = scores | {"difference_ci": entry["difference_ci"]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", choices=ARMS, nargs="+", default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    file = RESULTS / "guided.json"
    known = json.loads(file.read_text())["runs"] if file.exists() and not args.quick else []
    runs = {(run["arm"], run["seed"]): run for run in known}
    for seed, arm in product(args.seeds, args.arms):
        if (arm, seed) in runs:
            continue
        folder, seconds = trained(arm, seed, args.quick)
        run = {"arm": arm, "seed": seed, "date": time.strftime("%Y-%m-%d"), "cpu_seconds": seconds}
        run |= {"evaluations": evaluations(folder)}
        runs[arm, seed] = run | judged(folder, args.quick)
        print(json.dumps(runs[arm, seed]), flush=True)
        record(
            "guided",
            {"runs": [runs[one] for one in sorted(runs, key=lambda one: (list(ARMS).index(one[0]), one[1]))]},
            args.quick,
        )


if __name__ == "__main__":
    main()
