"""Pictures from prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
    tell_truncated(family, prompts)
    steps = family.default_num_inference_steps if num_inference_steps is None else num_inference_steps
    grid, shape = family.grid(steps, *sides(resolution)), family.latent_shape(*sides(resolution))
    scale = family.default_guidance_scale if guidance_scale is None else guidance_scale
    images = []
    starts = range(0, len(prompts), batch_size)
    for start in tqdm(starts, desc=progress, disable=progress is None):
        part = slice(start, start + batch_size)
        x = initial(prompts[part], initial_noise(shape, seeds[part])).to(family.device)
        cond = family.encode(prompts[part])
        with family.autocast():
            images.append(family.to_image(sample(predict, grid, cond, x, scale)).cpu())
    return torch.cat(images)
