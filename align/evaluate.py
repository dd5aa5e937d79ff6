"""Base against tuned: the same prompts and seeds through both, scored, compared and shown.

    python -m align.evaluate --tuned outputs/run --prompts shapes --reward Shapes

Writes ``scores.json`` (means, medians, win rates with intervals, per task), ``images.jsonl`` (every picture's scores),
``gallery.png`` and ``gallery.html`` into ``output_dir``, and the figures into a tuned run folder's model card.
"""

from __future__ import annotations

import html
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from torch import Tensor

from align import families
from align.common.command import command, parse
from align.common.errors import UserError, require_at_least
from align.common.provenance import provenance
from align.data.prompts import read_prompts
from align.evaluation import gallery
from align.sampling import generate
from align.sampling.diversity import Features, pairwise, thumbnails
from align.shapes.world import held_out_prompts
from align.training import model_card
from rewards import RewardSum
from rewards import load as load_reward
from rewards.common.files import claim, write_text
from rewards.models.shapes import Shapes
from rewards.models.shapes import parse as parse_caption

STRICT = "Shapes (strict)"


@dataclass
class Evaluate:
    """Compare a tuned pipeline with its base.

    Args:
        tuned: run folder, LoRA folder or pipeline.
        base: pipeline; default the one that the tuned run folder started from.
        prompts: a prompt file (.txt, .jsonl with ``prompt`` and perhaps ``task``, .json) or ``shapes``, the embedded
            world's held-out set.
        reward: names or import paths; the first decides the win rate (``Shapes``: by its strict verdict, the right
            picture against a wrong one).
        output_dir: where to write; default ``evaluation`` in the tuned folder.
        samples_per_prompt: pictures per prompt, each with a seed of its own.
        num_inference_steps: sampler steps; null is the pipeline's own default.
        guidance_scale: guidance scale; null is the pipeline's own default.
        seed: picture k of prompt j starts from seed + j * samples_per_prompt + k, for both models.
        batch_size: pictures sampled at once.
        resolution: side in pixels; null is the model's own.
        max_prompts: use evenly spaced prompts, so many at most.
        diversity_features: a vision model (DINOv2, CLIP) or ``lpips:FILE`` to measure diversity by, beside pixels;
            with several pictures a prompt.
        device: where to run; null takes a GPU where there is one.
        mixed_precision: of both models: no (float32), fp16 or bf16.
    """

    tuned: Path
    base: str | None = None
    prompts: str = "shapes"
    reward: list[str] = field(default_factory=lambda: ["Shapes"])
    output_dir: Path | None = None
    samples_per_prompt: int = 1
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 1000
    batch_size: int = 64
    resolution: int | None = None
    max_prompts: int | None = None
    diversity_features: str | None = None
    device: str | None = None
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"


def evaluate(config: Evaluate) -> dict[str, Any]:
    """Sample, score, compare and write; returns what ``scores.json`` holds."""
    require_at_least(1, config, "samples_per_prompt", "num_inference_steps", "batch_size", "max_prompts")
    prompts, tasks = chosen_prompts(config.prompts, config.max_prompts)
    rewards = RewardSum({name: load_reward(name) for name in config.reward})
    scorers: dict[str, Any] = dict(rewards.rewards)
    if "Shapes" in scorers:
        scorers[STRICT] = Shapes(mode="strict")
    rewards = RewardSum(scorers)
    base = config.base or base_of(config.tuned)
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    texts = [prompt for prompt in prompts for _ in range(config.samples_per_prompt)]
    seeds = [config.seed + k for k in range(len(texts))]

    family = families.load(base, families.DTYPES[config.mixed_precision], device)
    families.what_is_tuned(family, config.tuned)  # now, not after the base's pictures
    output = config.output_dir or config.tuned / "evaluation"
    claim(output)
    guidance_scale = family.default_guidance_scale if config.guidance_scale is None else config.guidance_scale
    scores: dict[str, dict[str, np.ndarray]] = {}
    pictures: dict[str, Tensor] = {}
    for who in ("base", "tuned"):
        if who == "tuned":
            family = families.tuned(family, str(config.tuned))
        pictures[who] = generate.sample_images(
            family.predict,
            family,
            texts,
            seeds,
            config.num_inference_steps,
            guidance_scale,
            config.batch_size,
            config.resolution,
            who,
        )
        found = rewards.components(images=pictures[who], prompts=texts)
        scores[who] = {name: found[name].double().numpy() for name in scorers}

    decides = STRICT if config.reward[0] == "Shapes" else config.reward[0]
    report = compare(scores, tasks, config.samples_per_prompt, decides)
    if config.samples_per_prompt > 1:
        features = Features(config.diversity_features, device) if config.diversity_features else None
        report["diversity"] = diversity(pictures, config.samples_per_prompt, features)
    report |= {
        "base": base,
        "tuned": str(config.tuned),
        "prompts": len(prompts),
        "samples_per_prompt": config.samples_per_prompt,
        "num_inference_steps": config.num_inference_steps or family.default_num_inference_steps,
        "guidance_scale": guidance_scale,
        "gallery": str(output / "gallery.html"),
    }
    _gallery(output, prompts, config.samples_per_prompt, pictures, scores, decides, report)
    rows = [
        {"prompt": text, "seed": seed}
        | {f"{who}/{name}": float(v[k]) for who in scores for name, v in scores[who].items()}
        for k, (text, seed) in enumerate(zip(texts, seeds, strict=True))
    ]
    write_text(output / "images.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_text(output / "scores.json", json.dumps(report | provenance(), indent=2) + "\n")
    model_card.add_to_card(config.tuned / "README.md", "Held-out prompts, base against tuned", table(report))
    return report


def diversity(pictures: dict[str, Tensor], samples: int, features: Features | None) -> dict[str, dict[str, float]]:
    """Mean distance of two pictures of a prompt, over prompts, for base and tuned: in pixels, and in features."""
    found: dict[str, dict[str, float]] = {}
    for who, images in pictures.items():
        groups = torch.arange(len(images)) // samples
        found.setdefault("pixels", {})[who] = pairwise(thumbnails(images), groups).mean().item()
        if features is not None:
            values = torch.cat([features(part) for part in images.split(64)])
            found.setdefault("features", {})[who] = pairwise(values, groups, features.power).mean().item()
    return found


def compare(
    scores: dict[str, dict[str, np.ndarray]], tasks: Sequence[str] | None, samples: int, decides: str
) -> dict[str, Any]:
    """Means, medians and win rates of ``tuned`` over ``base`` per reward.

    Win rate: the share of pictures where tuned scores higher, ties one half; its 95 % interval is a bootstrap over
    prompts, since pictures of one prompt are not independent. Task means and ``overall``, the mean over tasks, follow
    GenEval.
    """
    report: dict[str, Any] = {"rewards": {}}
    for name, base in scores["base"].items():
        tuned = scores["tuned"][name]
        wins = ((tuned > base) + 0.5 * (tuned == base)).reshape(-1, samples).mean(1)
        low, high = bootstrap(wins)
        entry: dict[str, Any] = {
            "base_mean": base.mean(),
            "tuned_mean": tuned.mean(),
            "base_median": float(np.median(base)),
            "tuned_median": float(np.median(tuned)),
            "win_rate": wins.mean(),
            "win_rate_ci": [low, high],
        }
        if tasks is not None:
            each = np.repeat(np.array(tasks), samples)
            names = list(dict.fromkeys(tasks))
            entry["tasks"] = {t: {"base": base[each == t].mean(), "tuned": tuned[each == t].mean()} for t in names}
            for who in ("base", "tuned"):
                entry[f"{who}_overall"] = float(np.mean([entry["tasks"][t][who] for t in names]))
        report["rewards"][name] = entry
    report["win_rate"] = report["rewards"][decides]["win_rate"]
    report["win_rate_ci"] = report["rewards"][decides]["win_rate_ci"]
    return json.loads(json.dumps(report, default=float))


def bootstrap(values: np.ndarray, draws: int = 4000, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of ``values`` (N,)."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(draws, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def base_of(tuned: Path) -> str:
    """The model that a run folder started from, by its ``config.yaml``."""
    path = tuned / "config.yaml"
    if not path.is_file():
        raise UserError(f"{tuned} is no run folder (no config.yaml); say which model to compare with: --base MODEL")
    return str(yaml.safe_load(path.read_text(encoding="utf-8"))["pretrained_model_name_or_path"])


def chosen_prompts(source: str, limit: int | None) -> tuple[list[str], list[str] | None]:
    """Evenly spaced prompts of a file, or of the embedded world with their tasks (``shapes``); ``limit`` at most."""
    if source == "shapes":
        prompts = held_out_prompts()
        tasks: list[str] | None = [parse_caption(prompt).task for prompt in prompts]
    else:
        prompts, tasks = read_prompts(source), None
    if limit and limit < len(prompts):
        index = np.linspace(0, len(prompts) - 1, limit).round().astype(int)
        prompts = [prompts[k] for k in index]
        tasks = [tasks[k] for k in index] if tasks else None
    return prompts, tasks


def table(report: dict[str, Any]) -> str:
    """The comparison as a Markdown table."""
    lines = ["| | base | tuned | win rate (95 % interval) |", "|---|---|---|---|"]
    for name, entry in report["rewards"].items():
        low, high = entry["win_rate_ci"]
        means = [entry.get(f"{who}_overall", entry[f"{who}_mean"]) for who in ("base", "tuned")]
        lines.append(
            f"| **{name}** | {means[0]:.3f} | {means[1]:.3f} | {entry['win_rate']:.3f} ({low:.3f}–{high:.3f}) |"
        )
        for task, means_of in entry.get("tasks", {}).items():
            lines.append(f"| {task.replace('_', ' ')} | {means_of['base']:.3f} | {means_of['tuned']:.3f} | |")
    for name, entry in report.get("diversity", {}).items():
        lines.append(f"| diversity, {name} | {entry['base']:.4f} | {entry['tuned']:.4f} | |")
    return "\n".join(lines)


def _gallery(
    output: Path,
    prompts: list[str],
    samples: int,
    pictures: dict[str, Tensor],
    scores: dict[str, dict[str, np.ndarray]],
    reward: str,
    report: dict[str, Any],
) -> None:
    """Evenly spaced prompts, the first picture of each: nobody picked the good ones."""
    chosen = np.linspace(0, len(prompts) - 1, min(48, len(prompts))).round().astype(int)
    few = chosen[:: max(1, len(chosen) // 16)][:16]
    both = torch.stack([pictures[who][k * samples] for k in few for who in ("base", "tuned")])
    gallery.save_grid(both, [prompts[k] for k in few], output / "gallery.png", 8, ("base", "tuned"))

    def cell(who: str, k: int) -> str:
        caption = f"{who} {scores[who][reward][k]:.2f}"
        return f'<figure><img src="{gallery.embedded(pictures[who][k])}"><figcaption>{caption}</figcaption></figure>'

    cards = "".join(
        f"<article><h2>{html.escape(prompts[j])}</h2>{cell('base', j * samples)}{cell('tuned', j * samples)}</article>"
        for j in chosen
    )
    low, high = report["win_rate_ci"]
    page = f"""<!doctype html><meta charset="utf-8"><title>{html.escape(report["tuned"])}</title>
<style>body{{font:15px system-ui;margin:2em;background:#fafafa}}main{{display:grid;gap:14px;
grid-template-columns:repeat(auto-fill,minmax(270px,1fr))}}article{{background:#fff;border:1px solid #ddd;
border-radius:8px;padding:10px}}h2{{font-size:14px;margin:0 0 8px;min-height:2.4em}}figure{{display:inline-block;
margin:0 6px 0 0}}img{{width:120px;height:120px;object-fit:contain;border:1px solid #eee}}
figcaption{{color:#555;font-size:12px}}</style>
<h1>{html.escape(report["base"])} against {html.escape(report["tuned"])}</h1>
<p>Same prompts and seeds; evenly spaced prompts, first picture of each. {html.escape(reward)}: tuned wins
{report["win_rate"]:.1%} (95 % interval {low:.1%} to {high:.1%}, ties one half).</p><main>{cards}</main>"""
    write_text(output / "gallery.html", page)


def main(argv: Sequence[str] | None = None) -> int:
    config, _ = parse(Evaluate, "align.evaluate", __doc__, argv)

    def run() -> None:
        report = evaluate(config)
        print(table(report))
        print(json.dumps(summary(report)))

    return command(run)


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """The few figures that scripts read: the last line that the command prints."""
    found = {name: report[name] for name in ("win_rate", "win_rate_ci", "gallery")}
    strict = report["rewards"].get(STRICT)
    if strict is None:
        return found
    means = {f"strict_{who}": strict.get(f"{who}_overall", strict[f"{who}_mean"]) for who in ("base", "tuned")}
    return means | found


if __name__ == "__main__":
    sys.exit(main())
