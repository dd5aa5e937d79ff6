"""Pictures from prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from align.common.resolution import Resolution, sides
from align.families import Family, tell_truncated
from align.sampling.loop import Predictor, initial_noise, sample


def as_drawn(prompts: Sequence[str], noise: Tensor) -> Tensor:
    """Pictures start from the noise itself."""
    return noise


@torch.no_grad()
def draw(
    predict: Predictor,
    family: Family,
    prompts: Sequence[Sequence[str]],
    seeds: Sequence[Sequence[int]],
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    resolution: Resolution = None,
    initial: Callable[[Sequence[str], Tensor], Tensor] = as_drawn,
) -> Iterator[Tensor]:
    """The pictures of every batch of ``prompts`` as :func:`sample_images` draws them, a batch at a time."""
    tell_truncated(family, [prompt for batch in prompts for prompt in batch])
    steps = family.default_num_inference_steps if num_inference_steps is None else num_inference_steps
    grid, shape = family.grid(steps, *sides(resolution)), family.latent_shape(*sides(resolution))
    scale = family.default_guidance_scale if guidance_scale is None else guidance_scale
    for texts, numbers in zip(prompts, seeds, strict=True):
        x = initial(texts, initial_noise(shape, numbers)).to(family.device)
        cond = family.encode(texts)
        with family.autocast():
            yield family.to_image(sample(predict, grid, cond, x, scale)).cpu()


def sample_images(
    predict: Predictor,
    family: Family,
    prompts: Sequence[str],
    seeds: Sequence[int],
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int = 32,
    resolution: Resolution = None,
    progress: str | None = None,
    initial: Callable[[Sequence[str], Tensor], Tensor] = as_drawn,
) -> Tensor:
    """One picture a prompt, (N, 3, H, W) in [0, 1] on the CPU, by the family's deterministic sampler.

    Picture k starts from ``manual_seed(seeds[k])`` whatever the batch size, or what ``initial`` makes of it.
    ``num_inference_steps`` and ``guidance_scale`` None are the pipeline's own.
    """
    parts = [slice(start, start + batch_size) for start in range(0, len(prompts), batch_size)]
    texts, numbers = [prompts[part] for part in parts], [seeds[part] for part in parts]
    settings = num_inference_steps, guidance_scale, resolution, initial
    batches = draw(predict, family, texts, numbers, *settings)
    return torch.cat(list(tqdm(batches, total=len(parts), desc=progress, disable=progress is None)))
