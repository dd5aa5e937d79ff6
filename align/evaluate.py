"""Base against tuned: the same prompts and seeds through both, scored, compared and shown.

    python -m align.evaluate --tuned outputs/run --prompts shapes --reward Shapes

Writes ``scores.json`` (means, medians, win rates with intervals, per task), ``images.jsonl`` (every image's scores),
``gallery.png`` and ``gallery.html`` into ``output_dir``, and the figures into a tuned run folder's model card.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from align import families
from align.common.command import command, parse
from align.common.provenance import provenance
from align.common.resolution import Resolution, sides
from align.evaluation.compare import Comparison, diversity, draw_and_compare, summary, table
from align.families import Family
from align.sampling.diversity import Features
from align.training.model_card import add_section
from align.training.run_folder import base_of
from rewards.common.command import exit_status
from rewards.common.device import pick_device
from rewards.common.files import locked, write_text


@dataclass(kw_only=True)
class Evaluate(Comparison):
    """Compare a tuned pipeline with its base.

    Args:
        tuned: run folder, LoRA folder or pipeline.
        base: pipeline; default the one that the tuned run folder started from.
        output_dir: where to write; default ``evaluation`` in the tuned folder.
        resolution: pixels a side, or WIDTHxHEIGHT; null is the model's own.
        diversity_features: a vision model (DINOv2, CLIP) or ``lpips:FILE`` to measure diversity by, beside pixels;
            with several images a prompt.
        device: where to run; null takes a GPU where there is one.
        mixed_precision: of both models: no (float32), fp16 or bf16.
    """

    tuned: Path
    base: str | None = None
    output_dir: Path | None = None
    resolution: Resolution = None
    diversity_features: str | None = None
    device: str | None = None
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"


def evaluate(config: Evaluate) -> dict[str, Any]:
    """Sample, score, compare and write; returns what ``scores.json`` holds."""
    sides(config.resolution)
    bench = config.bench()
    base, device = config.base or base_of(config.tuned), pick_device(config.device)
    family = families.load(base, families.DTYPES[config.mixed_precision], device)
    families.what_is_tuned(family, config.tuned)  # now, not after the base's images
    output = config.output_dir or config.tuned / "evaluation"
    guidance_scale = family.default_guidance_scale if config.guidance_scale is None else config.guidance_scale
    config = replace(config, guidance_scale=guidance_scale)  # the base's own for both

    def models() -> Iterator[tuple[str, Family]]:
        yield "base", family
        yield "tuned", families.tuned(family, str(config.tuned))

    with locked(output):
        compared, samples = draw_and_compare(models(), config, bench, config.resolution), config.samples_per_prompt
        report = dict(compared.report)
        if samples > 1:
            features = Features(config.diversity_features, device) if config.diversity_features else None
            report["diversity"] = diversity(compared.images, samples, features)
        report |= {
            "base": base,
            "tuned": str(config.tuned),
            "prompts": len(bench.prompts),
            "samples_per_prompt": samples,
            "num_inference_steps": config.num_inference_steps or family.default_num_inference_steps,
            "guidance_scale": guidance_scale,
            "gallery": str(output / "gallery.html"),
        }
        compared.show(output, f"{base} against {config.tuned}", [table(report)])
        write_text(output / "images.jsonl", "".join(json.dumps(row) + "\n" for row in compared.rows()))
        write_text(output / "scores.json", json.dumps(report | provenance(), indent=2) + "\n")
        add_section(config.tuned / "README.md", "Held-out prompts, base against tuned", table(report).markdown())
    return report


@exit_status
def main(argv: Sequence[str] | None = None) -> int:
    config, _ = parse(Evaluate, "align.evaluate", __doc__, argv)

    def run() -> None:
        report = evaluate(config)
        print(table(report).markdown())
        print(json.dumps(summary(report)))

    return command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
