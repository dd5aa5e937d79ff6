"""How exact is the reward that looks? ``python -m tests.benchmarks.shapes_reward [--vae FOLDER]``

Renders captions of every task over all colour-shape combinations, and measures: how often the right caption is
strict 1, how often wrong captions are strict 0, and which shapes and colours are taken for which - on clean pictures,
on blurred and noisy ones, and on reconstructions of the shipped VAE. The last line is JSON, and goes to
``results/shapes_reward.json`` too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from align.shapes.world import COMBINATIONS, Body, caption, draw, place
from rewards.models.shapes import COUNTS, PALETTE, RELATIONS, SHAPES, TASKS, Spec, Thing, find, flawless, grade, parse
from tests.benchmarks import record

Degrade = Callable[[Tensor, np.random.Generator], Tensor]
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def scene(rng: np.random.Generator, text: str) -> tuple[Tensor, list[Body]]:
    """A picture of a caption, (3, 64, 64) float in [0, 1], and what was drawn."""
    bodies = place(rng, parse(text))
    return torch.from_numpy(draw(rng, bodies).copy()).permute(2, 0, 1).float() / 255, bodies


def clean(image: Tensor, rng: np.random.Generator) -> Tensor:
    """The picture as it was drawn."""
    return image


def blurred(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Gaussian blur of 0.8 pixels and noise of 0.02: what a lossy decoder does, roughly."""
    soft = ndimage.gaussian_filter(image.numpy(), (0, 0.8, 0.8))
    return torch.from_numpy(np.clip(soft + rng.normal(0, 0.02, soft.shape), 0, 1)).float()


def through(folder: str) -> Degrade:
    """The picture as the VAE in ``folder`` gives it back."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder).eval()

    def reconstruct(image: Tensor, rng: np.random.Generator) -> Tensor:
        with torch.no_grad():
            latent = vae.encode(image[None] * 2 - 1).latent_dist.mean
            return (vae.decode(latent).sample[0] / 2 + 0.5).clamp(0, 1)

    return reconstruct


def phrase(spec: Spec) -> str:
    """A caption with the meaning of ``spec``: the inverse of ``parse``."""
    names = [f"{thing.colour} {thing.shape}" if thing.colour else thing.shape for thing in spec.things]
    if spec.task == "counting":
        return f"{COUNTS[len(names) - 1]} {names[0]}s"
    return f" {spec.relation or 'and'} ".join(f"a {name}" for name in names)


def true_of(spec: Spec, bodies: Sequence[Body]) -> bool:
    """Whether the drawn ``bodies`` are what ``spec`` asks for, from the drawing's own geometry."""
    if len(bodies) != len(spec.things):
        return False
    sign_x, sign_y = RELATIONS[spec.relation] if spec.relation else (0, 0)
    for order in itertools.permutations(bodies):
        pairs = list(zip(spec.things, (body.thing for body in order), strict=True))
        if all(a.shape == b.shape and a.colour in (None, b.colour) for a, b in pairs):
            along = sign_x * (order[0].x - order[-1].x) + sign_y * (order[0].y - order[-1].y)
            if spec.relation is None or along >= 4:
                return True
    return False


def wrong_captions(rng: np.random.Generator, text: str, bodies: Sequence[Body]) -> dict[str, str]:
    """Captions that the drawn ``bodies`` are not a picture of: each one small mistake away, and a random one."""
    spec = parse(text)
    things, which = list(spec.things), int(rng.integers(len(spec.things)))
    thing = things[which]
    wrong: dict[str, str] = {}

    def replaced(new: Thing) -> str:
        if spec.task == "counting":
            return phrase(Spec("counting", (new,) * len(things)))
        return phrase(Spec(spec.task, (*things[:which], new, *things[which + 1 :]), spec.relation))

    wrong["shape"] = replaced(Thing(str(rng.choice([s for s in SHAPES if s != thing.shape])), thing.colour))
    if thing.colour:
        wrong["colour"] = replaced(Thing(thing.shape, str(rng.choice([c for c in PALETTE if c != thing.colour]))))
    if spec.task in ("counting", "colours"):
        count = len(things) + (1 if len(things) == 1 else -1 if len(things) == 4 else int(rng.choice([-1, 1])))
        wrong["count"] = phrase(Spec("counting" if count > 1 else "colours", (thing,) * count))
    if spec.relation:
        wrong["relation"] = phrase(Spec("position", spec.things, OPPOSITE[spec.relation]))
    if len(things) == 2 and things[0].colour != things[1].colour and things[0].shape != things[1].shape:
        swapped = (Thing(things[0].shape, things[1].colour), Thing(things[1].shape, things[0].colour))
        wrong["attribution"] = phrase(Spec(spec.task, swapped, spec.relation))
    while "random" not in wrong:
        other = caption(rng, TASKS[rng.integers(len(TASKS))], COMBINATIONS)
        if not true_of(parse(other), bodies):
            wrong["random"] = other
    return wrong


def measure(degrade: Degrade, n: int, seed: int) -> dict[str, Any]:
    """Rates over ``n`` pictures, the tasks in turn: right captions at strict 1, wrong captions at strict 0."""
    rng = np.random.default_rng(seed)
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    seconds = 0.0
    for number in range(n):
        task = TASKS[number % len(TASKS)]
        text = caption(rng, task, COMBINATIONS)
        picture, bodies = scene(rng, text)
        image = degrade(picture, rng)
        start = time.perf_counter()
        found = find(image)  # pictures of 64 x 64, for which grade needs no offset
        right[task] += flawless(grade(parse(text), found))
        seconds += time.perf_counter() - start
        for kind, other in wrong_captions(rng, text, bodies).items():
            asked[kind] += 1
            refused[kind] += not flawless(grade(parse(other), found))
    return {
        "accuracy": sum(right.values()) / n,
        "accuracy_by_task": {task: right[task] * len(TASKS) / n for task in TASKS},
        "wrong_refused": {kind: refused[kind] / asked[kind] for kind in sorted(asked)},
        "ms_per_image": 1000 * seconds / n,
    }


def confusion(n: int, seed: int, degrade: Degrade = clean) -> tuple[Counter[tuple[str, str]], Counter[tuple[str, str]]]:
    """What ``n`` single objects of each colour-shape combination are taken for: counts of (true, seen) shapes and of
    (true, seen) colours; ``nothing`` or ``several`` where not exactly one object is seen."""
    rng = np.random.default_rng(seed)
    shapes: Counter[tuple[str, str]] = Counter()
    colours: Counter[tuple[str, str]] = Counter()
    for (colour, shape), _ in itertools.product(COMBINATIONS, range(n)):
        seen = find(degrade(scene(rng, f"a {colour} {shape}")[0], rng))
        failed = "several" if seen else "nothing"
        shapes[shape, seen[0].shape if len(seen) == 1 else failed] += 1
        colours[colour, seen[0].colour if len(seen) == 1 else failed] += 1
    return shapes, colours


def table(counts: Counter[tuple[str, str]], names: Sequence[str]) -> str:
    """The counts as text, true names down and seen names across."""
    columns = [*names, "unknown", "nothing", "several"]
    lines = ["".join(f"{name:>10}" for name in ["", *columns])]
    lines += [f"{true:>10}" + "".join(f"{counts[true, seen]:>10}" for seen in columns) for true in names]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure the embedded world's reward.")
    parser.add_argument("--n", type=int, default=2400, help="pictures per condition")
    parser.add_argument("--singles", type=int, default=20, help="pictures per colour-shape combination, for confusion")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae", default="align/shapes/shapes-sd/vae", help="folder of a diffusers AutoencoderKL")
    parser.add_argument("--quick", action="store_true", help="few pictures, nothing recorded")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.n, arguments.singles = 240, 4
    conditions = {"clean": clean, "blurred": blurred, "vae": through(arguments.vae)}
    figures: dict[str, Any] = {}
    for name, degrade in conditions.items():
        figures[name] = measure(degrade, arguments.n, arguments.seed)
        shapes, colours = confusion(arguments.singles, arguments.seed, degrade)
        print(
            f"\n{name}: {json.dumps(figures[name], indent=1)}\n{table(shapes, SHAPES)}\n{table(colours, list(PALETTE))}"
        )
        for title, counts in (("shapes", shapes), ("colours", colours)):
            figures[name][f"{title}_right"] = sum(v for (a, b), v in counts.items() if a == b) / sum(counts.values())
    words = {"clean": "fresh renders", "blurred": "blurred and noisy", "vae": "through the shipped autoencoder"}
    told = []
    for name, found in figures.items():
        worst = min(found["wrong_refused"].values())
        told.append(f"{words[name]} {found['accuracy']:.2%} right, wrong captions {worst:.2%} refused")
    report = {"figures": figures, "config": vars(arguments), "summary": "; ".join(told) + "."}
    record("shapes_reward", report, arguments.quick)
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
