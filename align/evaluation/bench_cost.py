"""How long a bench would take, measured on a batch."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from align.common.resolution import Resolution
from align.evaluation.compare import Bench, Comparison
from align.families import Family
from align.sampling.generate import draw


@dataclass(frozen=True)
class Pace:
    """Seconds of a picture, to draw and to score, as ``pictures`` of them took after as many to warm up."""

    drawing: float
    scoring: float
    pictures: int

    def told(self, pictures: int, device: str) -> str:
        """How long ``pictures`` take by one process, in words."""
        seconds = round(pictures * (self.drawing + self.scoring))
        minutes, hours = seconds // 60, seconds // 3600
        whole = f"{hours} h {minutes % 60} min" if hours else f"{minutes} min {seconds % 60} s"
        each = f"{self.drawing:.3g} s a picture to draw and {self.scoring:.3g} s to score"
        return f"{each}, measured on {self.pictures} on {device}: about {whole} by one process"


def pace(family: Family, settings: Comparison, bench: Bench, resolution: Resolution) -> Pace:
    """Draw and score the first batch of ``bench`` twice, from other noise, and time the second pass."""
    wanted = settings.wanted(bench.rows)[: settings.batch_size]
    texts, metadata = [one.prompt for one in wanted], [dict(one.metadata) for one in wanted]
    drawing, spent = (settings.num_inference_steps, settings.guidance_scale, resolution), (0.0, 0.0)
    for again in range(2):
        start = time.perf_counter()
        (images,) = draw(family.predict, family, [texts], [[one.seed + again for one in wanted]], *drawing)
        middle = time.perf_counter()
        shown = ((images * 255).round() / 255).to(bench.device)
        with torch.no_grad():
            bench.rewards.scores(images=shown, prompts=texts, metadata=metadata)
        spent = middle - start, time.perf_counter() - middle
    return Pace(spent[0] / len(wanted), spent[1] / len(wanted), len(wanted))
