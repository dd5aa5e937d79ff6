"""Draw pictures of prompts, with tuned weights or learned initial noise if wanted, and keep their captions.

    python -m align.sample --prompts "two red stars" --images_per_prompt 4 --output_dir outputs/pictures
    python -m align.sample --noise outputs/find/find.safetensors --images_per_prompt 16

writes ``00000.png``, .. and ``metadata.jsonl`` (``file_name``, ``prompt``, ``seed``), the layout of datasets' image
folders that ``python -m rewards.score`` reads, and ``gallery.html`` to look at: every image in it is one of them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from align import families
from align.common.assets import TakesPaths, locate
from align.common.command import command, parse
from align.common.errors import UserError, require_at_least
from align.common.resolution import Resolution, sides
from align.data.prompts import read_prompts
from align.evaluation import gallery
from align.policy.initial_noise import InitialNoise
from align.sampling import generate
from rewards.common.command import exit_status
from rewards.common.device import pick_device
from rewards.common.files import locked, write_text
from rewards.common.page import Card, Figure, Page
from rewards.data.records import RECORD_SUFFIXES


@dataclass
class Sample(TakesPaths):
    """Draw pictures.

    Args:
        prompts: a prompt, or a prompt file (.txt, .jsonl, .json, .csv, .tsv); with ``noise`` null is all
            prompts it was learned for.
        pretrained_model_name_or_path: diffusers folder, hub id, ``shapes-sd`` or ``shapes-sd3``; null is the one that
            ``noise`` was learned for, else ``shapes-sd``.
        weights: the run or LoRA folder whose weights draw; null is the pipeline as it is.
        noise: the ``find.safetensors`` of a FIND or ReNO run: pictures start from what was learned for their prompt.
        output_dir: where to write; a folder that holds pictures already is refused.
        images_per_prompt: pictures of each prompt.
        num_inference_steps: sampler steps; null is the pipeline's own default.
        guidance_scale: guidance scale; null is the pipeline's own default.
        seed: picture k starts from seed + k.
        batch_size: pictures drawn at once.
        resolution: pixels a side, or WIDTHxHEIGHT; null is the model's own.
        mixed_precision: the precision of the weights.
        device: where to run; null takes a GPU where there is one.
    """

    prompts: str | None = None
    pretrained_model_name_or_path: str | None = None
    weights: Path | None = None
    noise: Path | None = None
    output_dir: Path = Path("outputs/samples")
    images_per_prompt: int = 1
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0
    batch_size: int = 32
    resolution: Resolution = None
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    device: str | None = None


def sample(config: Sample) -> Path:
    """Draw and write; returns the folder. Raises :class:`UserError`."""
    require_at_least(1, config, "images_per_prompt", "num_inference_steps", "batch_size")
    sides(config.resolution)
    if any(config.output_dir.glob("*.png")):
        raise UserError(f"{config.output_dir} holds pictures already; give another output_dir")
    for name in (gallery.METADATA, "gallery.html"):  # of a folder of .jpg, say
        if (config.output_dir / name).exists():
            raise UserError(f"{config.output_dir} holds a {name} already; give another output_dir")
    noise = InitialNoise.load(config.noise) if config.noise else None
    prompts = _prompts(config.prompts, noise)
    for prompt in prompts if noise else []:
        noise.number(prompt)  # type: ignore[union-attr]  # none of the pictures may quietly start elsewhere
    source = config.pretrained_model_name_or_path
    if source is None:
        source = noise.source if noise else "shapes-sd"
    with locked(config.output_dir):
        family = families.load(source, families.DTYPES[config.mixed_precision], pick_device(config.device))
        if noise:
            noise.check(family, config.resolution)
        if config.weights is not None:
            family = families.tuned(family, str(config.weights))
        texts = [prompt for prompt in prompts for _ in range(config.images_per_prompt)]
        seeds = [config.seed + k for k in range(len(texts))]
        sampler = config.num_inference_steps, config.guidance_scale, config.batch_size, config.resolution
        start = noise.initial if noise else generate.as_drawn
        images = generate.sample_images(family.predict, family, texts, seeds, *sampler, "draw", start)
        gallery.save_folder(images, texts, seeds, config.output_dir)
        _show(config.output_dir, images, prompts)
    print(f"{len(texts)} pictures in {config.output_dir}")
    return config.output_dir


def _show(folder: Path, images: Tensor, prompts: Sequence[str]) -> None:
    """The page of the first prompts' images."""
    each = len(images) // len(prompts)
    cards = []
    for number, prompt in enumerate(prompts[: max(1, 64 // each)]):
        shown = range(number * each, (number + 1) * each)[:64]
        cards.append(Card(prompt, [Figure(gallery.to_pil(images[k]), f"{k:05d}.png", {}) for k in shown]))
    introduction = f"{len(cards)} of {len(prompts)} prompts." if len(cards) < len(prompts) else ""
    write_text(folder / "gallery.html", Page(f"{len(images)} images", introduction, cards=cards).html())


def _prompts(given: str | None, noise: InitialNoise | None) -> list[str]:
    if given is None:
        if noise is None:
            raise UserError('say what to draw: --prompts "two red stars", or a prompt file')
        return noise.prompts
    file = os.path.isfile(locate(given)) or given.lower().endswith((".txt", *RECORD_SUFFIXES))
    return read_prompts(given) if file else [given]


@exit_status
def main(argv: Sequence[str] | None = None) -> int:
    config, _ = parse(Sample, "align.sample", __doc__, argv)
    return command(lambda: sample(config), argv)


if __name__ == "__main__":
    sys.exit(main())
