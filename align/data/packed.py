"""Conditions of prompts, each at its own length, perhaps in 8 bits, and back.

What a prompt is filled up with is zeros where the family masks it (Qwen-Image, Z-Image, SANA, Chroma, Lumina-Image,
PixArt), and so are the features that a narrow text encoder lacks beside a wide one (SD3's CLIP beside T5). Of each
token the zeros at its end are dropped, a token of zeros whole, and put back, bit for bit. Padding that a model attends
to (CLIP's in SD and SDXL, T5's in SD3 and FLUX.1) is no zeros: it differs from prompt to prompt, and is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from align.families import Conditioning

Storage = Literal["model", "float8"]
FLOAT8 = torch.float8_e4m3fn  # three bits of mantissa; a token's largest feature becomes 448, its largest number
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class PackedTensor:
    """R rows of L tokens of D features.

    Attributes:
        values: the kept features of all tokens, flat, as they were or in float8.
        widths: (R, L) int32, how many of each token's features are kept.
        like: (0, D), in the precision that the rows come back in.
        scales: (R, L) float32, by which tokens in float8 are multiplied.
    """

    values: Tensor
    widths: Tensor
    like: Tensor
    scales: Tensor | None = None

    @staticmethod
    def of(tensor: Tensor, storage: Storage) -> PackedTensor:
        like, scales, places = tensor.new_empty(0, tensor.shape[-1]), None, torch.arange(1, tensor.shape[-1] + 1)
        there = tensor.view(BITS[tensor.element_size()]) != 0  # -0.0 is no padding
        widths = torch.stack([(row * places).amax(-1) for row in there]).int()
        if storage == "float8":
            largest = tensor.float().abs().amax(-1)
            scales = torch.where(largest > 0, largest / torch.finfo(FLOAT8).max, 1.0)
            tensor = (tensor.float() / scales[..., None]).to(FLOAT8)
        return PackedTensor(tensor[places <= widths[..., None]], widths, like, scales)

    def row(self, number: int) -> Tensor:
        """(1, L, D)."""
        widths = self.widths[number]
        start = int(self.widths[:number].sum())
        own = self.values[start : start + int(widths.sum())]
        if self.scales is not None:
            own = own.float() * torch.repeat_interleave(self.scales[number], widths)
        full = self.like.new_zeros(len(widths), self.like.shape[1])
        edges = [0, *((widths[1:] != widths[:-1]).nonzero().flatten() + 1).tolist(), len(widths)]
        done = 0
        for first, last in pairwise(edges):  # tokens of one width
            width = int(widths[first])
            size = (last - first) * width
            full[first:last, :width] = own[done : done + size].view(last - first, width)
            done += size
        return full[None]


def pack(cond: Conditioning, storage: Storage = "model") -> dict[str, Tensor]:
    """The tensors of a file that :func:`unpack` reads rows of: a :class:`PackedTensor`'s, ``NAME:values`` and so on,
    for the floats that are (R, L, D), all others as they are."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in cond.tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.ndim == 3 and tensor.is_floating_point():
            parts = vars(PackedTensor.of(tensor, storage)).items()
            tensors |= {f"{name}:{part}": value for part, value in parts if value is not None}
        else:
            tensors[name] = tensor
    return tensors


def unpack(tensors: Mapping[str, Tensor], number: int) -> Conditioning:
    """Row ``number`` as a batch of one."""
    rows: dict[str, Tensor] = {}
    for name in dict.fromkeys(key.partition(":")[0] for key in tensors):
        if name in tensors:
            rows[name] = tensors[name][number : number + 1]
        else:
            parts = ("values", "widths", "like", "scales")
            rows[name] = PackedTensor(*(tensors.get(f"{name}:{part}") for part in parts)).row(number)  # type: ignore[arg-type]
    return Conditioning(rows)
