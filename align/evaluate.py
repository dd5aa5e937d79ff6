"""Base against tuned: the same prompts and noise through any number of models, scored, compared and shown.

    python -m align.evaluate --tuned outputs/run --prompts shapes --reward Shapes
    accelerate launch -m align.evaluate --tuned [outputs/a,outputs/b] --prompts prompts.jsonl --samples_per_prompt 4

Writes into ``output_dir``: ``images/MODEL/`` (PNG files with ``metadata.jsonl``, which ``rewards.score`` reads),
``scores.json`` (means, medians, differences and win rates with intervals, per task, and what they depend on),
``images.jsonl`` (every image's scores), ``gallery.png`` and ``gallery.html``; and the figures into a tuned run folder's
model card. The same command goes on after a kill, and draws again what was drawn with other settings.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from align import families
from align.common.assets import EMBEDDED, TakesPaths
from align.common.command import command, parse
from align.common.errors import UserError
from align.common.provenance import provenance
from align.common.resolution import Resolution, sides
from align.evaluation.compare import Comparison, depends, diversity, draw_and_compare, summary, table
from align.evaluation.pictures import folder_name
from align.families import Family
from align.sampling.diversity import Features
from align.training.model_card import add_section, picture
from align.training.run_folder import base_of, packed_base
from rewards.common.command import exit_status
from rewards.common.device import Launched, pick_device
from rewards.common.files import locked, write_text
from rewards.common.page import escape

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Evaluate(Comparison, TakesPaths):
    """Compare tuned pipelines with their base.

    Args:
        tuned: run folder, LoRA folder or file, or whole pipeline (folder or hub id: a pruned or quantized one too); or
            a list of them.
        base: pipeline; default the one that the first tuned run folder started from.
        output_dir: where to write; default ``evaluation`` in the first tuned folder.
        resolution: pixels a side, or WIDTHxHEIGHT; null is the model's own.
        diversity_features: a vision model (DINOv2, CLIP) or ``lpips:FILE`` to measure diversity by, beside pixels;
            with several images a prompt.
        device: where to run; null takes a GPU where there is one.
        mixed_precision: of all models: no (float32), fp16 or bf16.
    """

    tuned: list[Path] | Path
    base: str | None = None
    output_dir: Path | None = None
    resolution: Resolution = None
    diversity_features: str | None = None
    device: str | None = None
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"

    def __post_init__(self) -> None:
        super().__post_init__()
        TakesPaths.__post_init__(self)  # no base of Comparison's: --print_config would make of such a setting a class

    @property
    def sources(self) -> list[Path]:
        """What ``tuned`` names. Raises :class:`UserError` where that is nothing."""
        sources = self.tuned if isinstance(self.tuned, list) else [self.tuned]
        if not sources:
            raise UserError("tuned is empty; expected a run folder, a LoRA or a pipeline")
        return sources


def names(sources: Sequence[Path], taken: Sequence[str] = ()) -> list[str]:
    """A name of each, which a folder can have and none of ``taken`` is: the last part of the path, with a number where
    two have the same."""
    found = list(taken)
    for source in sources:
        found.append(folder_name(source.name.removesuffix(".safetensors"), found))
    return found[len(taken) :]


def is_pipeline(source: Path) -> bool:
    """Whether ``source`` draws by itself: a whole pipeline's folder, an embedded one, a hub id."""
    return (source / "model_index.json").is_file() or str(source) in EMBEDDED or not source.exists()


def open_model(source: Path, base: str | None, dtype: torch.dtype, device: str) -> Family:
    """A whole pipeline, or what was tuned put into ``base`` or the pipeline that its run started from."""
    if is_pipeline(source):
        return families.load(str(source), dtype, device)
    return families.tuned(families.load(base or base_of(source), dtype, device), str(source))


def tell_packed(sources: Sequence[Path]) -> None:
    """Log which runs were trained on a base in 4 bit, which is whole here."""
    for source in sources:
        if (kind := packed_base(source)) is not None:
            logger.warning("%s was trained on its base in %s; here it is drawn on the base as it came", source, kind)


def beside(source: Path) -> Path:
    """Where the results of ``source`` are written unasked."""
    if not source.exists():
        return Path("outputs/evaluation")
    return (source if source.is_dir() else source.parent) / "evaluation"


def evaluate(config: Evaluate) -> dict[str, Any] | None:
    """Sample, score, compare and write; returns what ``scores.json`` holds, in the first process."""
    sides(config.resolution)
    if config.diversity_features and config.samples_per_prompt < 2:
        raise UserError("diversity_features compares pictures of one prompt; give samples_per_prompt of at least 2")
    launched, sources = Launched.here(), config.sources
    device = pick_device(config.device, launched.local)
    bench = config.bench(device)
    base, dtype = config.base or base_of(sources[0]), families.DTYPES[config.mixed_precision]
    tell_packed(sources)
    family = families.load(base, dtype, device)
    for source in sources:  # now, not after the base's images
        if is_pipeline(source):
            families.find(str(source))
        elif families.what_is_tuned(family, source) == "lora":
            families.read_lora(source, family.pipe, family.denoiser_name)
    samples = config.samples_per_prompt
    features = Features(config.diversity_features, device) if config.diversity_features and samples > 1 else None
    output = config.output_dir or beside(sources[0])
    labels = ["tuned"] if len(sources) == 1 else names(sources, ("base",))
    guidance_scale = family.default_guidance_scale if config.guidance_scale is None else config.guidance_scale
    config = replace(config, guidance_scale=guidance_scale)  # the base's own for all

    def models() -> Iterator[tuple[str, Family]]:
        yield "base", family
        for number, (name, source) in enumerate(zip(labels, sources, strict=True)):
            if number or is_pipeline(source):
                yield name, open_model(source, base, dtype, device)
            else:  # it uses up the base
                yield name, families.tuned(family, str(source))

    with locked(output):
        compared = draw_and_compare(models(), config, bench, output, config.resolution, launched)
        if compared is None:
            return None
        report = dict(compared.report)
        if samples > 1:
            report["diversity"] = diversity(compared.images, samples, features)
        report |= {
            "base": base,
            "tuned": str(sources[0]) if len(sources) == 1 else list(map(str, sources)),
            "prompts": len(bench.rows),
            "samples_per_prompt": samples,
            "num_inference_steps": config.num_inference_steps or family.default_num_inference_steps,
            "guidance_scale": guidance_scale,
            "noise": config.noise,
            "seed": config.seed,
            "scorers": [reward.record() for reward in config.reward],
            "gallery": str(output / "gallery.html"),
        }
        title = f"{base} against {', '.join(map(str, sources))}"
        compared.show(output, title, [table(report)])
        write_text(output / "images.jsonl", "".join(json.dumps(row) + "\n" for row in compared.rows()))
        write_text(output / "scores.json", json.dumps(report | provenance(), indent=2) + "\n")
        for source in sources:
            text = f"{table(report).markdown()}\n\n{escape(depends(report))}"
            if output.resolve().is_relative_to(source.resolve()):  # so that it goes where the card goes
                shown = (output.resolve() / "gallery.png").relative_to(source.resolve()).as_posix()
                text += f"\n\n{picture('Above base, below tuned', shown)}"
            add_section(source / "README.md", "Held-out prompts, base against tuned", text)
    return report


@exit_status
def main(argv: Sequence[str] | None = None) -> int:
    config, _ = parse(Evaluate, "align.evaluate", __doc__, argv)

    def run() -> None:
        report = evaluate(config)
        if report is not None:
            print(table(report).markdown())
            print(depends(report))
            print(json.dumps(summary(report)))

    return command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
