"""How well does the small network say what the exact reward says? ``python tests/benchmarks/shapes_net.py``

``ShapesNet`` beside ``Shapes``, graded, on pictures that it was not trained on: rendered scenes of true captions and of
near misses, the same of the held-out prompts (whose combinations no training shows), spoilt ones, ones through the
autoencoder with noise, and both pipelines' own: the held-out pairs of the shipped preference sets, and what
``shapes-sd3`` draws of held-out prompts in ten steps, half of it unguided.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
from torch import Tensor

from align.shapes import world
from align.shapes.scripts.train_shapes_net import SETS, Pictures, drawn, encoded, floats, hasty, near_miss, rendered
from rewards.models.shapes import find, grade, parse
from rewards.models.shapes_net import WEIGHTS, ShapesNet
from tests.benchmarks import record


def clean(captions: Sequence[str], seed: int) -> Pictures:
    """A render of each caption, asked for by that caption or, every other one, by a near miss."""
    rng = np.random.default_rng(seed)
    pixels = np.stack([world.render(rng, text) for text in captions])
    texts = [near_miss(rng, text) if k % 2 else text for k, text in enumerate(captions)]
    return Pictures(pixels, texts, [find(image) for image in floats(pixels)])


def agreement(net: ShapesNet, data: Pictures, pairs: bool) -> dict[str, float]:
    """Correlation and mean distance of the two scores; the share of (right, wrong) that the network puts in order, and
    of ``pairs``, each picture and the next, the share in which it prefers as the exact one does."""
    images = floats(data.pixels)
    parts = [slice(k, k + 256) for k in range(0, len(images), 256)]
    scores = torch.cat([net.score(images=images[part], prompts=data.captions[part]) for part in parts])
    exact = torch.tensor([grade(parse(text), found) for text, found in zip(data.captions, data.objects, strict=True)])
    right = exact > 1 - 1e-6
    found = {
        "pictures": len(exact),
        "correlation": float(np.corrcoef(scores, exact)[0, 1]),
        "mean_absolute_error": (scores - exact).abs().mean().item(),
        "right_above_wrong": _in_order(scores[right][:, None], scores[~right][None]),
    }
    if pairs:
        better = exact[0::2] > exact[1::2]
        found["pairs_in_order"] = ((scores[0::2] > scores[1::2]) == better).float().mean().item()
    return found


def _in_order(above: Tensor, below: Tensor) -> float:
    return (above > below).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="of another training; those are only printed")
    args = parser.parse_args()
    net = ShapesNet(args.weights, device="cpu")
    rng = np.random.default_rng(99)
    texts = [world.caption(rng, world.TASKS[k % len(world.TASKS)]) for k in range(1200)]
    kinds: dict[str, Pictures] = {
        "rendered": clean(texts, 99),
        "rendered, held-out prompts": clean(world.held_out_prompts(), 98),
        "rendered, spoilt": rendered(1000, 97),
        "through the autoencoder, noisy": encoded(600, 96),
    }
    kinds |= {f"drawn, {name}": drawn(name, "heldout") for name in SETS}
    kinds["drawn in ten steps, shapes-sd3"] = hasty("shapes-sd3", world.held_out_prompts()[::2], 95_000)
    rows: dict[str, Any] = {name: agreement(net, data, name.startswith("drawn, ")) for name, data in kinds.items()}
    figures = {"bytes": WEIGHTS.stat().st_size, "weights": sum(p.numel() for p in net.parameters()), "kinds": rows}
    record("shapes_net", figures, quick=args.weights is not None)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
