"""Train the embedded differentiable reward, ``ShapesNet``, to say what the exact one says.

    python -m align.shapes.scripts.train_shapes_net    # the shipped file: 6.4 minutes of one core

Pictures: rendered scenes, some of other things than their caption asks for; the same blurred, mixed, noisy, cut or
through the pipelines' autoencoder with noise on the latent; what the pipelines drew (the shipped preference sets'
training splits); and what they draw in ten steps, half of it without guidance. The exact reward's detector looks at
each once. The network's eye learns first, to name what the detector finds, then eye and judge together: each picture is
asked for by several captions, true ones, near misses and others, whose graded scores are the target of a
cross-entropy. Captions are of seen combinations, but for near misses.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from align import families
from align.common.assets import locate
from align.sampling import generate
from align.shapes.world import SEEN, SIZE, TASKS, caption, draw, place
from rewards.common.files import atomic
from rewards.models.shape_detector import DetectedObject
from rewards.models.shapes import COUNTS, PALETTE, RELATIONS, SHAPES, Spec, Thing, find, grade, parse
from rewards.models.shapes_net import CELLS, WEIGHTS, ShapesNet

SETS = ("shapes-preferences", "shapes-preferences-sd3")
SPOILT = ("none", "none", "blur", "mix", "noise", "cut", "fade")
PER_TURN = 3  # captions that one picture is asked for at one update


class Pictures(NamedTuple):
    """N pictures (N, 64, 64, 3) uint8, the caption that each was made for, and what the detector finds in it."""

    pixels: np.ndarray
    captions: list[str]
    objects: list[list[DetectedObject]]


def looked_at(pixels: Sequence[np.ndarray], captions: list[str]) -> Pictures:
    stacked = np.stack(list(pixels))
    return Pictures(stacked, captions, [find(image) for image in floats(stacked)])


def floats(pixels: np.ndarray) -> Tensor:
    """(N, H, W, 3) uint8 to (N, 3, H, W) in [0, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def wanted(rng: np.random.Generator, text: str) -> Spec:
    """What ``text`` asks for or, one time in four, one to four things chosen freely."""
    if rng.random() >= 0.25:
        return parse(text)
    chosen = [SEEN[rng.integers(len(SEEN))] for _ in range(rng.integers(1, 5))]
    return Spec("attribution", tuple(Thing(shape, colour) for colour, shape in chosen))


def scene(rng: np.random.Generator) -> tuple[str, np.ndarray]:
    """A caption, and a picture of what is :func:`wanted` for it."""
    text = caption(rng, TASKS[rng.integers(len(TASKS))])
    return text, draw(rng, place(rng, wanted(rng, text)))


def spoilt(rng: np.random.Generator, pixels: np.ndarray, other: np.ndarray) -> np.ndarray:
    """``pixels`` (64, 64, 3) made worse in one of the ways :data:`SPOILT`, or left as they are."""
    way, image = SPOILT[rng.integers(len(SPOILT))], pixels.astype(np.float64)
    if way == "blur":
        small = int(rng.integers(10, 40))
        soft = Image.fromarray(pixels).resize((small, small), Image.Resampling.BILINEAR)
        image = np.asarray(soft.resize((SIZE, SIZE), Image.Resampling.BICUBIC), np.float64)
    elif way == "mix":
        share = rng.uniform(0.2, 0.8)
        image = share * image + (1 - share) * other
    elif way == "noise":
        image = image + rng.normal(0, rng.uniform(5, 40), image.shape)
    elif way == "cut":
        x, y, wide, high = rng.integers(0, 48), rng.integers(0, 48), *rng.integers(8, 40, 2)
        image[y : y + high, x : x + wide] = other[y : y + high, x : x + wide]
    elif way == "fade":
        image = 255 - (255 - image) * rng.uniform(0.2, 1.3)
    return np.clip(image, 0, 255).astype(np.uint8)


def rendered(count: int, seed: int) -> Pictures:
    """Rendered scenes, most of them spoilt."""
    rng = np.random.default_rng(seed)
    texts, clean = zip(*(scene(rng) for _ in range(count)), strict=True)
    return looked_at([spoilt(rng, image, clean[rng.integers(count)]) for image in clean], list(texts))


def encoded(count: int, seed: int) -> Pictures:
    """Rendered scenes as the autoencoder gives them back from a latent that is noisy, or mixed with another's."""
    rng, family = np.random.default_rng(seed), families.load("shapes-sd", device="cpu")
    draws = torch.Generator().manual_seed(seed)
    pixels: list[np.ndarray] = []
    texts: list[str] = []
    with torch.no_grad():
        while len(pixels) < count:
            made = [scene(rng) for _ in range(min(64, count - len(pixels)))]
            z = family.to_latent(floats(np.stack([image for _, image in made])))
            level = 0.7 * torch.rand(len(z), 1, 1, 1, generator=draws)
            share = torch.where(torch.rand(len(z), 1, 1, 1, generator=draws) < 0.3, 0.5 * level, 0.0)
            z = (1 - share) * z + share * z.roll(1, 0) + level * torch.randn(z.shape, generator=draws)
            levels = (family.to_image(z) * 255).round().byte()
            pixels += list(levels.permute(0, 2, 3, 1).numpy())
            texts += [text for text, _ in made]
    return looked_at(pixels, texts)


def drawn(name: str, split: str) -> Pictures:
    """What a pipeline drew: both pictures of every pair of a shipped preference set."""
    rows = pq.read_table(Path(locate(name)) / f"{split}.parquet").to_pylist()
    files = [(row["caption"], row[side]) for row in rows for side in ("jpg_0", "jpg_1")]
    pixels = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for _, data in files]
    return looked_at(pixels, [text for text, _ in files])


def hasty(name: str, texts: list[str], seed: int) -> Pictures:
    """What the pipeline ``name`` draws of ``texts`` as online runs do: in ten steps, every other one unguided."""
    family = families.load(name, device="cpu")
    pixels: list[np.ndarray] = []
    halves = (texts[0::2], texts[1::2])
    for k, scale in enumerate((None, 1.0)):
        seeds = range(seed + k, seed + 2 * len(halves[k]) + k, 2)
        images = generate.sample_images(family.predict, family, halves[k], seeds, 10, scale)
        pixels += list((images * 255).round().byte().permute(0, 2, 3, 1).numpy())
    return looked_at(pixels, halves[0] + halves[1])


def near_miss(rng: np.random.Generator, text: str) -> str:
    """``text`` with one word of the grammar put in another's place; itself where that is no caption."""
    spec = parse(text)
    words = text.split()
    kinds: list[tuple[str, ...]] = [tuple(PALETTE), SHAPES, tuple(f"{shape}s" for shape in SHAPES), COUNTS[1:]]
    places = [(k, kind) for k, word in enumerate(words) for kind in kinds if word in kind]
    if spec.relation and rng.random() < 0.5:
        return text.replace(spec.relation, tuple(RELATIONS)[rng.integers(len(RELATIONS))])
    k, kind = places[rng.integers(len(places))]
    words[k] = kind[rng.integers(len(kind))]
    return " ".join(words)


def described(rng: np.random.Generator, objects: Sequence[DetectedObject]) -> str | None:
    """A caption that is true of some of ``objects``, or nearly; None where there is none with a name."""
    named = [one for one in objects if one.shape in SHAPES and one.colour in PALETTE]
    if not named:
        return None
    first = named[rng.integers(len(named))]
    alike = sum((one.shape, one.colour) == (first.shape, first.colour) for one in named)
    if 1 < alike <= 4 and rng.random() < 0.7:
        return f"{COUNTS[alike - 1]} {first.colour} {first.shape}s"
    if len(named) == 1:
        return f"a {first.colour} {first.shape}" if rng.random() < 0.7 else f"a {first.shape}"
    second = named[rng.integers(len(named))]
    if rng.random() < 0.2:
        return f"a {first.shape} and a {second.shape}"
    across, along = second.x - first.x, second.y - first.y
    beside = ("left of", "right of")[int(across < 0)]
    relation = beside if abs(across) > abs(along) else ("above", "below")[int(along < 0)]
    joint = relation if rng.random() < 0.6 else "and"
    return f"a {first.colour} {first.shape} {joint} a {second.colour} {second.shape}"


def asked(rng: np.random.Generator, text: str, objects: Sequence[DetectedObject]) -> str:
    """One caption to ask a picture for."""
    way = rng.random()
    if way < 0.35:
        return text
    if way < 0.6:
        return near_miss(rng, text)
    if way < 0.9 and (true := described(rng, objects)):
        return true if way < 0.78 else near_miss(rng, true)
    return caption(rng, TASKS[rng.integers(len(TASKS))])


def named_cells(objects: Sequence[DetectedObject]) -> np.ndarray:
    """(2, 8, 8) shape and colour of the object whose centre lies there: 0 none, 1 unknown, then as they are listed."""
    cells = np.zeros((2, CELLS, CELLS), np.int64)
    for one in objects:
        x, y = (min(max(int(v * CELLS / SIZE), 0), CELLS - 1) for v in (one.x, one.y))
        names = ((SHAPES, one.shape), (tuple(PALETTE), one.colour))
        cells[:, y, x] = [2 + kinds.index(name) if name in kinds else 1 for kinds, name in names]
    return cells


class Schedule:
    """AdamW for ``updates`` updates of ``net``'s ``parts``, with a warm-up and a decay to nothing."""

    def __init__(self, net: nn.Module, updates: int, rate: float) -> None:
        self.net, self.updates = net, updates
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=1e-3)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, rate, total_steps=updates, pct_start=0.1)

    def run(self, loss_of: Callable[[], Tensor], name: str) -> None:
        bar = tqdm(range(self.updates), desc=name)
        for update in bar:
            loss = loss_of()
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            if update % 50 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")


def batches(rng: np.random.Generator, count: int, size: int) -> Iterator[np.ndarray]:
    """Places of ``size`` of ``count`` things, each as often as the others."""
    order = np.empty(0, np.int64)
    while True:
        if len(order) < size:
            order = rng.permutation(count)
        yield order[:size]
        order = order[size:]


def questions(
    rng: np.random.Generator, captions: Sequence[str], objects: Sequence[list[DetectedObject]], each: int
) -> tuple[list[Spec], Tensor]:
    """What ``each`` captions for every picture ask for, and their graded scores."""
    pairs = [
        (parse(asked(rng, text, found)), found)
        for text, found in zip(captions, objects, strict=True)
        for _ in range(each)
    ]
    return [spec for spec, _ in pairs], torch.tensor([grade(*pair) for pair in pairs], dtype=torch.float32)


def train(data: Pictures, updates: tuple[int, int], seed: int) -> ShapesNet:
    """First the eye, on names alone; then eye and judge together, on scores and names."""
    torch.manual_seed(seed)
    rng, net = np.random.default_rng(seed), ShapesNet.untrained()
    cells = torch.from_numpy(np.stack([named_cells(objects) for objects in data.objects]))
    turns = batches(rng, len(cells), 64)

    def looking(chosen: np.ndarray) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            shapes, colours = net.named(floats(data.pixels[chosen]))
        return shapes.float(), colours.float()

    def naming(parts: tuple[Tensor, Tensor], chosen: np.ndarray, weight: int) -> Tensor:
        """``weight`` is that of a cell in which there is something; but for 1, more are named than there are."""
        wrong = [F.cross_entropy(part, cells[chosen, k], reduction="none") for k, part in enumerate(parts)]
        return ((wrong[0] + wrong[1]) * (1 + (weight - 1) * (cells[chosen, 0] > 0))).mean()

    def seeing() -> Tensor:
        chosen = next(turns)
        return naming(looking(chosen), chosen, 4)

    def both() -> Tensor:
        chosen = next(turns)
        specs, goal = questions(rng, [data.captions[k] for k in chosen], [data.objects[k] for k in chosen], PER_TURN)
        parts = looking(chosen)
        soft = torch.cat([part.softmax(1) for part in parts], 1).repeat_interleave(PER_TURN, 0)
        return F.binary_cross_entropy_with_logits(net.logits(soft, specs), goal) + naming(parts, chosen, 1)

    stages = ((net.eye, seeing, 3e-3, "eye"), (net, both, 2e-3, "both"))
    for (part, loss_of, rate, name), count in zip(stages, updates, strict=True):
        if count:
            Schedule(part, count, rate).run(loss_of, name)
    return net


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    parser.add_argument("--scenes", type=int, default=7000, help="rendered scenes, spoilt")
    parser.add_argument("--encoded", type=int, default=300, help="rendered scenes through the autoencoder")
    parser.add_argument("--hasty", type=int, default=144, help="pictures that each pipeline draws in ten steps")
    parser.add_argument("--updates", type=int, nargs=2, default=[1200, 1600], help="of the eye, of both")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    parts = [rendered(args.scenes, args.seed), encoded(args.encoded, args.seed + 1)]
    parts += [drawn(name, "train") for name in SETS]
    rng = np.random.default_rng(args.seed + 2)
    for name in ("shapes-sd", "shapes-sd3") if args.hasty else ():
        parts.append(hasty(name, [caption(rng, TASKS[k % len(TASKS)]) for k in range(args.hasty)], args.seed))
    data = Pictures(
        np.concatenate([part.pixels for part in parts]),
        [text for part in parts for text in part.captions],
        [objects for part in parts for objects in part.objects],
    )
    net = train(data, tuple(args.updates), args.seed)
    with atomic(args.output) as draft:
        save_file({key: value.contiguous() for key, value in net.state_dict().items()}, draft)


if __name__ == "__main__":
    main()
