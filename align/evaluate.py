"""Base against tuned: the same prompts and seeds through both, scored, compared and shown.

    python -m align.evaluate --tuned outputs/run --prompts shapes --reward Shapes

Writes ``scores.json`` (means, medians, win rates with intervals, per task), ``images.jsonl`` (every picture's scores),
``gallery.png`` and ``gallery.html`` into ``output_dir``, and the figures into a tuned run folder's model card.
"""

from __future__ import annotations

import html
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from torch import Tensor

from align import families
from align.common.command import command, parse
from align.common.errors import UserError
from align.common.provenance import provenance
from align.evaluation import gallery
from align.evaluation.compare import Comparison, compare, diversity, draw_and_score, summary, table
from align.families import Family
from align.sampling.diversity import Features
from align.training import model_card
from rewards.common.files import claim, write_text


@dataclass(kw_only=True)
class Evaluate(Comparison):
    """Compare a tuned pipeline with its base.

    Args:
        tuned: run folder, LoRA folder or pipeline.
        base: pipeline; default the one that the tuned run folder started from.
        output_dir: where to write; default ``evaluation`` in the tuned folder.
        resolution: side in pixels; null is the model's own.
        diversity_features: a vision model (DINOv2, CLIP) or ``lpips:FILE`` to measure diversity by, beside pixels;
            with several pictures a prompt.
        device: where to run; null takes a GPU where there is one.
        mixed_precision: of both models: no (float32), fp16 or bf16.
    """

    tuned: Path
    base: str | None = None
    output_dir: Path | None = None
    resolution: int | None = None
    diversity_features: str | None = None
    device: str | None = None
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"


def evaluate(config: Evaluate) -> dict[str, Any]:
    """Sample, score, compare and write; returns what ``scores.json`` holds."""
    config.check()
    prompts, tasks = config.read_prompts()
    rewards = config.load_rewards()
    base = config.base or base_of(config.tuned)
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    family = families.load(base, families.DTYPES[config.mixed_precision], device)
    families.what_is_tuned(family, config.tuned)  # now, not after the base's pictures
    output = config.output_dir or config.tuned / "evaluation"
    claim(output)
    guidance_scale = family.default_guidance_scale if config.guidance_scale is None else config.guidance_scale
    config = replace(config, guidance_scale=guidance_scale)  # the base's own for both

    def models() -> Iterator[tuple[str, Family]]:
        yield "base", family
        yield "tuned", families.tuned(family, str(config.tuned))

    images, scores = draw_and_score(models(), config, prompts, rewards, config.resolution)
    samples = config.samples_per_prompt
    report = compare(scores, tasks, samples, config.deciding_reward)
    if samples > 1:
        features = Features(config.diversity_features, device) if config.diversity_features else None
        report["diversity"] = diversity(images, samples, features)
    report |= {
        "base": base,
        "tuned": str(config.tuned),
        "prompts": len(prompts),
        "samples_per_prompt": samples,
        "num_inference_steps": config.num_inference_steps or family.default_num_inference_steps,
        "guidance_scale": guidance_scale,
        "gallery": str(output / "gallery.html"),
    }
    _gallery(output, prompts, samples, images, scores, config.deciding_reward, report)
    rows = [
        {"prompt": text, "seed": seed}
        | {f"{model}/{reward}": float(v[k]) for model in scores for reward, v in scores[model].items()}
        for k, (text, seed) in enumerate(zip(*config.texts_and_seeds(prompts), strict=True))
    ]
    write_text(output / "images.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_text(output / "scores.json", json.dumps(report | provenance(), indent=2) + "\n")
    model_card.add_to_card(config.tuned / "README.md", "Held-out prompts, base against tuned", table(report))
    return report


def base_of(tuned: Path) -> str:
    """The model that a run folder started from, by its ``config.yaml``."""
    path = tuned / "config.yaml"
    if not path.is_file():
        raise UserError(f"{tuned} is no run folder (no config.yaml); say which model to compare with: --base MODEL")
    return str(yaml.safe_load(path.read_text(encoding="utf-8"))["pretrained_model_name_or_path"])


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


if __name__ == "__main__":
    sys.exit(main())
