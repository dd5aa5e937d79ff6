"""A small network in place of the embedded world's exact reward: it has a gradient, and can be fooled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewards.models.network import Network, loading, read_weights
from rewards.models.shape_detector import SIDE
from rewards.models.shapes import COUNTS, PALETTE, PREFIXES, RELATIONS, SHAPES

WEIGHTS = Path(__file__).with_suffix(".safetensors")
WORDS = (
    *("a", "and", "of", *COUNTS, *PALETTE, *SHAPES, *(f"{shape}s" for shape in SHAPES)),
    *sorted({word for relation in RELATIONS for word in relation.split()} - {"of"}),
)  # the grammar's; a word that is not among them is left out
LENGTH = 12  # words of a caption that are read; the grammar has at most 9
CELLS = 8  # along the side of the map in which things are named
NAMES = (len(SHAPES) + 2, len(PALETTE) + 2)  # none, unknown, and what there is: of shapes, of colours
_TEXT, _MAPS = 128, 32


def tokens(prompts: Sequence[str]) -> Tensor:
    """(B, LENGTH) word numbers, 0 after the last; what leads a caption in the grammar is left out."""
    rows = torch.zeros(len(prompts), LENGTH, dtype=torch.long)
    for row, prompt in zip(rows, prompts, strict=True):
        text = " ".join(prompt.lower().split())
        for prefix in PREFIXES:
            text = text.removeprefix(prefix)
        known = [WORDS.index(word) + 1 for word in text.split() if word in WORDS][:LENGTH]
        row[: len(known)] = torch.tensor(known, dtype=torch.long)
    return rows


class Modulated(nn.Module):
    """A linear map whose outputs the caption scales and shifts (FiLM, Perez et al. 2018, arXiv 1709.07871)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.map, self.film = nn.Linear(inputs, outputs), nn.Linear(_TEXT, 2 * outputs)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        scale, shift = self.film(text).unflatten(1, (*(1,) * (x.ndim - 2), -1)).chunk(2, -1)
        return F.silu(self.map(x) * (1 + scale) + shift)


class ShapesNet(Network):
    """An estimate in [0, 1] of :class:`rewards.models.shapes.Shapes`' graded score, with a gradient to the image.

    Convolutions name what has its centre in each of 8 x 8 cells of the image at 64 x 64, softly: shape and colour. Maps
    of these that the caption modulates are summed over the image, plainly and weighted by their places, and judged.
    Trained by ``align/shapes/scripts/train_shapes_net.py`` on rendered, spoilt and pipeline-drawn pictures; how well it
    agrees with the exact reward stands in ``tests/benchmarks/README.md``.
    Differentiable.
    Caveats: made to measure reward back-propagation by, and to be hacked: watch ``Shapes`` beside it.

    Args:
        weights: a safetensors file of another training; null is the shipped one.
        device, dtype: default CUDA where there is any; of the convolutions.
    """

    places: Tensor

    def __init__(self, weights: str | None = None, device: str | None = None, dtype: str = "float32") -> None:
        super().__init__()
        self._build()
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
        sizes = ((3, 32, 2), (32, 48, 2), (48, 64, 1), (64, 64, 2), (64, 64, 1))
        layers = [
            layer
            for inputs, outputs, stride in sizes
            for layer in (nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs), nn.SiLU())
        ]
        self.eye = nn.Sequential(*layers, nn.Conv2d(64, sum(NAMES), 1))
        self.words = nn.Embedding(len(WORDS) + 1, 16)
        self.reader = nn.Sequential(nn.Linear(16 * LENGTH, _TEXT), nn.SiLU(), nn.Linear(_TEXT, _TEXT), nn.SiLU())
        self.look = nn.ModuleList([Modulated(sum(NAMES), 64), Modulated(64, _MAPS)])
        self.weigh = Modulated(3 * _MAPS, 128)
        self.judge = nn.Sequential(nn.Linear(128, 64), nn.SiLU(), nn.Linear(64, 1))
        axis = torch.linspace(-1, 1, CELLS)
        places = torch.stack([torch.ones(CELLS, CELLS), *torch.meshgrid(axis, axis, indexing="ij")]).flatten(1)
        self.register_buffer("places", 4 / CELLS**2 * places, persistent=False)  # (3, 64)

    def named(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the shape (B, 6, 8, 8) and of the colour (B, 8, 8, 8) in each cell of images (B, 3, H, W)."""
        if images.shape[-2:] != (SIDE, SIDE):
            images = F.interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True)
        dtype = next(self.eye.parameters()).dtype
        shapes, colours = self.eye((2 * images - 1).to(dtype)).to(self.places.dtype).split(NAMES, 1)
        return shapes, colours

    def logits(self, cells: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,) whose sigmoid is the score of images with the names ``cells`` (B, 14, 8, 8) in their cells."""
        text = self.reader(self.words(tokens(prompts).to(cells.device)).flatten(1))
        x = cells.flatten(2).mT
        for look in self.look:
            x = look(x, text)
        return self.judge(self.weigh((self.places @ x).flatten(1), text)).squeeze(1)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.logits(torch.cat([part.softmax(1) for part in self.named(images)], 1), prompts).sigmoid()
