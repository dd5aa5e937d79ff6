"""A small network in place of the embedded world's exact reward: it has a gradient, and can be fooled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewards import RewardError
from rewards.models.network import Network, loading, read_weights
from rewards.models.shape_detector import SIDE
from rewards.models.shapes import OFFSET, PALETTE, RELATIONS, SHAPES, TASKS, Spec, parse

WEIGHTS = Path(__file__).with_suffix(".safetensors")
CELLS = 8  # along the side of the map in which things are named
NAMES = (len(SHAPES) + 2, len(PALETTE) + 2)  # none, unknown, and what there is: of shapes, of colours
_STEP = SIDE / CELLS  # pixels
_FEATURES = 24 + 4 + len(TASKS)
_FULL = 0.02  # how much of a window must be full to have a centre
_SURE = 0.02  # the rule's grade is taken to be this far from 0 and 1
_COUNTING = 4 + TASKS.index("counting")


class Asked:
    """Captions as numbers: names of the first and of the last asked thing (B, 2), the direction (B, 2) in which the
    first lies from the last, and what is known before any look (B, 4 + tasks): count and task, one-hot."""

    def __init__(self, specs: Sequence[Spec], device: torch.device) -> None:
        ends = [(spec.things[0], spec.things[-1]) for spec in specs]
        colours = tuple(PALETTE)
        self.shapes = torch.tensor([[2 + SHAPES.index(t.shape) for t in pair] for pair in ends], device=device)
        self.colours = torch.tensor(
            [[2 + colours.index(t.colour) if t.colour else 0 for t in pair] for pair in ends], device=device
        )
        self.way = torch.tensor([RELATIONS.get(spec.relation or "", (0, 0)) for spec in specs], device=device)
        self.count = torch.tensor([len(spec.things) for spec in specs], device=device)
        tasks = torch.tensor([TASKS.index(spec.task) for spec in specs], device=device)
        self.known = torch.cat([F.one_hot(self.count - 1, 4), F.one_hot(tasks, len(TASKS))], 1)


class ShapesNet(Network):
    """An estimate in [0, 1] of :class:`rewards.models.shapes.Shapes`' graded score, with a gradient to the image.

    Convolutions, the eye, name what has its centre in each of 8 x 8 cells of the image at 64 x 64, softly: shape and
    colour. By these the graded score's rule is followed, with windows of 2 x 2 cells for objects and likely numbers for
    counts; a small perceptron, the judge, corrects its logit by the same sums and maxima.
    Trained by ``align/shapes/scripts/train_shapes_net.py`` on rendered, spoilt and pipeline-drawn pictures; how well it
    agrees with the exact reward stands in ``tests/benchmarks/README.md``.
    Differentiable.
    Caveats: made to measure reward back-propagation by, and to be hacked: watch ``Shapes`` beside it. Captions are
    those of the embedded world's grammar.

    Args:
        weights: a safetensors file of another training; null is the shipped one.
        temperature: what the eye's logits are divided by. Above 1 an eye that is sure of a wrong name still has a
            gradient, and images share it more evenly; the score then agrees less with the exact one.
        device, dtype: default CUDA where there is any; of the convolutions.
    """

    places: Tensor
    apart: Tensor
    temperature: float = 1.0  # that of its training

    def __init__(
        self,
        weights: str | None = None,
        temperature: float = 1.0,
        device: str | None = None,
        dtype: str = "float32",
    ) -> None:
        if not 0 < temperature < math.inf:
            raise RewardError(f"ShapesNet: temperature is {temperature:g}; expected a number above 0")
        super().__init__()
        self._build()
        self.temperature = temperature
        with loading("ShapesNet", weights or str(WEIGHTS)):
            self.load_state_dict(read_weights(weights or str(WEIGHTS), WEIGHTS.name))
        self.settle(device, dtype, self.eye)

    @classmethod
    def untrained(cls) -> ShapesNet:
        """One of torch's initial weights that trains."""
        net = cls.__new__(cls)
        nn.Module.__init__(net)
        net._build()
        return net

    def _build(self) -> None:
        sizes = ((3, 32, 2), (32, 64, 2), (64, 128, 2), (128, 128, 1), (128, 64, 1))
        layers = [
            layer
            for inputs, outputs, stride in sizes
            for layer in (nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs), nn.SiLU())
        ]
        self.eye = nn.Sequential(*layers, nn.Conv2d(64, sum(NAMES), 1))
        self.judge = nn.Sequential(nn.Linear(_FEATURES, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))
        last = self.judge[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)  # the score begins as the rule's, of what the eye names
        nn.init.zeros_(last.bias)
        axis = _STEP * (torch.arange(CELLS) + 0.5)
        self.register_buffer("places", torch.stack(torch.meshgrid(axis, axis, indexing="xy")), persistent=False)
        windows = torch.cartesian_prod(torch.arange(CELLS - 1), torch.arange(CELLS - 1))
        far = (windows[:, None] - windows[None]).abs().amax(-1) > 1  # share no cell
        self.register_buffer("apart", far, persistent=False)  # (49, 49)

    def named(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the shape (B, 6, 8, 8) and of the colour (B, 8, 8, 8) in each cell of images (B, 3, H, W)."""
        if images.shape[-2:] != (SIDE, SIDE):
            images = F.interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True)
        dtype = next(self.eye.parameters()).dtype
        shapes, colours = self.eye((2 * images - 1).to(dtype)).to(self.places.dtype).split(NAMES, 1)
        return shapes, colours

    def logits(self, cells: Tensor, specs: Sequence[Spec]) -> Tensor:
        """(B,) whose sigmoid is the score of images with the names ``cells`` (B, 14, 8, 8) in their cells."""
        features = self.features(cells, Asked(specs, cells.device))
        rule = features[:, 0].clamp(_SURE, 1 - _SURE)
        return torch.logit(rule) + self.judge(features).squeeze(1)

    def features(self, cells: Tensor, asked: Asked) -> Tensor:
        """(B, features): the graded score by the rule, as if a window held a thing; then what it is made of: how many
        things there are, how many of these are as asked, and how well the best are."""
        shapes, colours = cells.split(NAMES, 1)
        there = 1 - shapes[:, :1]  # (B, 1, 8, 8)
        row = torch.arange(len(cells), device=cells.device)[:, None]
        shape = shapes[row, asked.shapes]  # (B, 2, 8, 8)
        open_ = (asked.colours == 0)[..., None, None]
        colour = torch.where(open_, there, colours[row, asked.colours])
        credit = torch.where(open_, shape, 0.5 * (shape + colour))
        maps = torch.cat([shape, colour, shape * colour, credit], 1)  # (B, 8, 8, 8)
        total = torch.cat([there, shapes[:, 1:2], colours[:, 1:2]], 1).sum((2, 3))
        sums = maps.sum((2, 3))
        best = _windows(maps).clamp(max=1)  # (B, 8, 49)
        centre = _windows(there * self.places) / (_windows(there) + _FULL)  # (B, 2, 49)
        first, last = best[:, 6], best[:, 7]
        along = torch.einsum("bk,bkw->bw", asked.way.to(centre.dtype), centre)
        holds = ((along[:, :, None] - along[:, None]) / OFFSET).clamp(0, 1)
        pair = 0.5 * (first[:, :, None] + last[:, None]) * self.apart
        gate = (2 * torch.minimum(first[:, :, None], last[:, None])).clamp(max=1)
        pairs = torch.stack([pair, pair * 0.5 * (1 + holds * gate)], 1).flatten(2).amax(2)  # (B, 2)
        count, found = asked.count.to(sums.dtype), total[:, 0]
        ratio = torch.minimum(count, found) / torch.maximum(count, found)
        share = (sums[:, 6] / count).clamp(max=1)
        tops = best.amax(2)
        credits = torch.where(asked.way.any(1), pairs[:, 1], pairs[:, 0])
        credits = torch.where(asked.known[:, _COUNTING] > 0, share, torch.where(count == 1, tops[:, 6], credits))
        rule = torch.stack([ratio * credits, ratio, share], 1)
        return torch.cat([rule, total, sums, tops, pairs, asked.known.to(sums.dtype)], 1)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        specs = []
        for row, prompt in enumerate(prompts):
            try:
                specs.append(parse(prompt))
            except ValueError as error:
                raise RewardError(f"ShapesNet: row {row}: {error}", row=row) from error
        cells = torch.cat([(part / self.temperature).softmax(1) for part in self.named(images)], 1)
        return self.logits(cells, specs).sigmoid()


def _windows(maps: Tensor) -> Tensor:
    """(B, C, 8, 8) to sums over 2 x 2 cells (B, C, 49): what lies on a border is whole in one of them."""
    return (4 * F.avg_pool2d(maps, 2, 1)).flatten(2)
