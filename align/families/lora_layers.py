"""The algebra of LoRA layers: alpha folded into a factor, several layers in one, and one in several.

Original networks have one weight where diffusers has several, such as ``qkv`` for ``to_q``, ``to_k``, ``to_v``, whose
rows lie one below the other in it. Several LoRAs are one of the fused weight by a block-diagonal B::

    [s_q B_q A_q]     [B_q         ] [A_q]
    [s_k B_k A_k] = s [    B_k     ] [A_k]         rank r_q + r_k + r_v
    [s_v B_v A_v]     [         B_v] [A_v]

and one of the fused weight is several by its rows: exact both ways, whatever B is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LoRALayer:
    """What is added to one weight: ``scale * B @ A``, A (r, in[, kh, kw]) and B (out, r[, 1, 1])."""

    A: Tensor
    B: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return len(self.A)

    @property
    def alpha(self) -> float:
        """What other programs divide by the rank."""
        return self.scale * self.rank

    def folded(self, scale: float = 1.0) -> LoRALayer:
        """The same layer with ``scale`` for its own: B makes up for it, multiplied once and in float32."""
        if self.scale == scale:
            return self
        return LoRALayer(self.A, (self.B.float() * (self.scale / scale)).to(self.B.dtype), scale)

    def delta(self) -> Tensor:
        """scale · B · A in float32, of the weight's own shape."""
        product = self.B.float().flatten(1) @ self.A.float().flatten(1)
        return self.scale * product.view(len(self.B), *self.A.shape[1:])


def fuse(layers: Sequence[LoRALayer | None], rows: Sequence[int]) -> LoRALayer:
    """One layer of the weight that has ``rows[k]`` rows of layer k, one below the other; None adds nothing to its rows,
    and at least one is a layer.

    Layers of one and the same A share it (what :func:`split` makes of a dense B), so that nothing grows.
    """
    present = [layer for layer in layers if layer is not None]
    scale = present[0].scale if len({layer.scale for layer in present}) == 1 else 1.0
    present = [layer.folded(scale) for layer in present]
    first = present[0]
    if len(present) == len(layers) and all(torch.equal(layer.A, first.A) for layer in present):
        return LoRALayer(first.A, torch.cat([layer.B for layer in present]), scale)
    diagonal = first.B.new_zeros(sum(rows), sum(layer.rank for layer in present))
    below = column = 0
    remaining = iter(present)
    for layer, height in zip(layers, rows, strict=True):
        if layer is not None:
            own = next(remaining)
            diagonal[below : below + height, column : column + own.rank] = own.B
            column += own.rank
        below += height
    return LoRALayer(torch.cat([layer.A for layer in present]), diagonal, scale)


def split(layer: LoRALayer, rows: Sequence[int]) -> list[LoRALayer | None]:
    """The layers whose weights lie one below the other, ``rows[k]`` high, in the weight of ``layer``. They get columns
    of their own where B is block-diagonal, in equal blocks, and the whole A where it is dense; None for rows of zeros
    beside blocks of the others."""
    parts = list(layer.B.split(list(rows)))
    all_of, moved = range(len(parts)), [k for k, part in enumerate(parts) if part.any()]
    for owners in (list(all_of), moved):
        if owners and (columns := _blocks(parts, owners)) is not None:
            cut = {k: LoRALayer(layer.A[at].clone(), parts[k][:, at].clone(), layer.scale) for k, at in columns.items()}
            return [cut.get(k) for k in all_of]
    return [LoRALayer(layer.A, part.clone(), layer.scale) for part in parts]


def _blocks(parts: Sequence[Tensor], owners: Sequence[int]) -> dict[int, slice] | None:
    """The columns of each owner where B is block-diagonal in as many equal blocks; None where it is not."""
    rank = parts[0].shape[1]
    if rank % len(owners):
        return None
    width = rank // len(owners)
    columns = {k: slice(j * width, (j + 1) * width) for j, k in enumerate(owners)}
    for k, at in columns.items():
        outside = parts[k].clone()
        outside[:, at] = 0
        if outside.any():
            return None
    return columns


def swapped(layer: LoRALayer) -> LoRALayer:
    """The layer of a weight whose upper and lower half have changed places."""
    upper, lower = layer.B.chunk(2)
    return LoRALayer(layer.A, torch.cat([lower, upper]), layer.scale)
