"""The Linear in 4 bit: its arithmetic and its bytes.

Four bits a weight (QLoRA, Dettmers et al. 2023, §3): the nearest of sixteen values, times the largest absolute weight
of its block of 64. That is 4.5 bits a weight, or about 4.13 where the blocks' scales are quantised as well (double
quantisation, ibid. §3.2). It saves bytes, not time.
"""

from __future__ import annotations

import re
from typing import Any
from unittest import mock

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from torch import Tensor, nn
from torch.nn import functional as F

from pruning.nf4 import NF4

BLOCK = 64  # weights that share one scale
STATE = "quant_state.bitsandbytes__nf4"


def unpacked(weight: bnb.nn.Params4bit, dtype: torch.dtype) -> Tensor:
    """The (out, in) matrix that a packed weight stands for, in ``dtype``.

    As one row: where rows are no multiple of a block, bitsandbytes 0.50 scales them wrongly on a CPU with AVX-512
    (it starts a new block at every row), and a length that is odd sends it through ``torch.compile``.
    """
    state = weight.quant_state
    row = QuantState(
        absmax=state.absmax,
        shape=torch.Size([2 * weight.numel()]),
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=dtype,
        offset=state.offset,
        state2=state.state2,
    )
    values = dequantize_4bit(weight.data, row).reshape(-1)
    return values[: state.shape.numel()].view(state.shape)


class _Product(torch.autograd.Function):
    """``x @ W.T`` for a packed W, which the backward pass unpacks again rather than keep."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: bnb.nn.Params4bit) -> Tensor:
        ctx.weight = weight
        return F.linear(x, unpacked(weight, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ unpacked(ctx.weight, grads[0].dtype), None


class Linear4bit(bnb.nn.Linear4bit):
    """bitsandbytes' own layer, but for what it does on a CPU.

    There, with AVX512-BF16, its forward repacks the weights for good, rounds their scales to bfloat16 and cannot undo
    that when the module is saved, and it fails on sizes that are no multiple of 32. This one leaves its weights alone,
    and gives the same output with and without gradients.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        y = _Product.apply(x.to(self.compute_dtype), self.weight)
        if self.bias is not None:
            y = y + self.bias.to(self.compute_dtype)
        return y.to(x.dtype)


def empty_layer(linear: nn.Linear, settings: NF4) -> Linear4bit:
    """A layer of the same size without weights."""
    size, dtype = (linear.in_features, linear.out_features), getattr(torch, settings.compute_dtype)
    layer = Linear4bit(*size, linear.bias is not None, dtype, settings.double_quant, "nf4", device="meta")
    return layer.requires_grad_(False).train(linear.training)


def pack(linear: nn.Linear, settings: NF4) -> Linear4bit:
    """``linear`` as NF4, on its device."""
    layer = empty_layer(linear, settings)
    weight = bnb.nn.Params4bit(
        linear.weight.detach(),
        requires_grad=False,
        blocksize=BLOCK,
        compress_statistics=settings.double_quant,
        quant_type="nf4",
        module=layer,
    )
    device = linear.weight.device
    if device.type == "meta":  # shapes alone; bitsandbytes would keep its codebook of them for the real ones
        with mock.patch.dict(bnb.functional.name2qmap, clear=True):
            layer.weight = weight._quantize(device)
    else:
        layer.weight = weight.to(device)
    layer.bias = linear.bias
    return layer


def bytes_of(module: nn.Module) -> int:
    """What the tensors of ``module`` take on disk, a shared one counted once; works on the meta device."""
    tensors = {id(t): t for t in module.state_dict(keep_vars=True).values()}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def piece_of(key: str) -> tuple[str, str]:
    """A state dict's ``block.0.proj.weight.absmax`` is a piece of ``block.0.proj``: ``("block.0.proj", "absmax")``. The
    weight itself is the piece ``""``; what is no weight belongs to no layer."""
    match = re.fullmatch(r"(.*)\.weight(?:\.(.+))?", key)
    return (match[1], match[2] or "") if match else ("", "")
