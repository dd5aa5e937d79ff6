"""A device that is not there: shapes are computed on it, bytes are counted, and nothing is spent.

The tensors of the device are on torch's ``meta``; those of the host are real, so that what a program decides by them
(schedules, advantages, indices) it decides as ever. A small tensor of the device has a shadow on the host with its
values, by which ``.item()`` and ``bool()`` are answered; what a network would have said is answered by 1.

FakeTensorMode, which torch's own tracker runs under, would do neither: it makes the host's tensors fake too, and fake
tensors of a GPU need a build of torch with CUDA, autocast of one a GPU. Autocast is CUDA's here, by its lists of
operators, and attention is a fused kernel that keeps its result and one number a query.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from align.training.ledger import Ledger, Part

GHOST = torch.device("meta")
SHADOWED = 1 << 13  # elements up to which a tensor of the device keeps its values
SHADOWED_INDICES = 1 << 18  # and one of integers
WORKSPACE = 2  # of a convolution in half precision, in its input and output: fitted to an H200's peaks (online_gpu)
aten = torch.ops.aten
_CONVOLUTIONS = (aten.convolution.default, aten.convolution_backward.default)
_BY_INDEX = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those in the arguments or the result of an operator, in order; pytree would take a quarter of a trace's time."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


class _Device(TorchDispatchMode):
    """Counts what is on the device and keeps the shadows of what is small."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger
        self.shadows: MutableMapping[Tensor, Tensor] = WeakTensorKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        ghosts = [x for x in _tensors((args, kwargs)) if x.is_meta]
        wanted = kwargs.get("device")
        wanted = torch.device(wanted) if wanted is not None else None
        if not ghosts and (wanted is None or wanted.type != "meta"):
            return func(*args, **kwargs)
        known = all(x in self.shadows for x in ghosts)
        if func is aten._local_scalar_dense.default:
            return self.shadows[args[0]].item() if known else torch.ones((), dtype=args[0].dtype).item()
        if func is aten.equal.default:
            return func(*self._shadowed(args)) if known else True
        if func is aten._to_copy.default and wanted is not None and wanted.type != "meta":
            return self._to_host(args[0], kwargs, known)
        if func is aten.copy_.default and not args[0].is_meta:
            return args[0].copy_(self.shadows[args[1]]) if known else args[0].fill_(1)
        if func.overloadpacket in _BY_INDEX:
            args = (args[0], self._counted(args[1]), *args[2:])
        shadow = self._on_host(func, args, kwargs) if known else None
        if shadow is not None and torch.Tag.dynamic_output_shape in func.tags:
            out = tree_map_only(Tensor, lambda x: torch.empty_like(x, device=GHOST), shadow)
        else:
            out = func(*args, **kwargs)
        self._remember(out, shadow)
        if func in _CONVOLUTIONS and args[0].dtype.itemsize == 2:
            moved = args[0].nbytes + (args[1] if func is aten.convolution_backward.default else out).nbytes
            self.ledger.bump(WORKSPACE * moved)
        if shadow is None and func._schema.is_mutable:
            for x in ghosts:
                self.shadows.pop(x, None)
        return out

    def _counted(self, indices: Sequence[Tensor | None]) -> list[Tensor | None]:
        """``indices`` with the places where a mask is true in the mask's stead."""
        found: list[Tensor | None] = []
        for index in indices:
            if index is None or index.dtype != torch.bool or not index.is_meta or index not in self.shadows:
                found.append(index)
                continue
            for place in self.shadows[index].nonzero().unbind(1):
                ghost = torch.empty_like(place, device=GHOST)
                self.shadows[ghost] = place
                found.append(ghost)
        return found

    def _shadowed(self, value: Any) -> Any:
        return tree_map_only(Tensor, lambda x: self.shadows[x] if x.is_meta else x, value)

    def _to_host(self, tensor: Tensor, kwargs: dict[str, Any], known: bool) -> Tensor:
        if known:
            return aten._to_copy.default(self.shadows[tensor], **kwargs)
        return torch.ones(tensor.shape, dtype=kwargs.get("dtype") or tensor.dtype)

    def _on_host(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What ``func`` says of the shadows, where that is small."""
        given = [*_tensors((args, kwargs))]
        sizes = [x.numel() for x in given]
        size = args[0] if args and isinstance(args[0], list | tuple | torch.Size) else ()
        asked = torch.Size(size).numel() if size and all(isinstance(n, int) for n in size) else 0
        kinds = [x.is_floating_point() for x in given]
        if max([asked, *sizes]) > (SHADOWED if any(kinds) or not kinds else SHADOWED_INDICES):
            return None
        if "device" in kwargs:
            kwargs = kwargs | {"device": torch.device("cpu")}
        try:
            return func(*self._shadowed(args), **self._shadowed(kwargs))
        except (RuntimeError, NotImplementedError, IndexError):  # of half precision the CPU has less
            return None

    def _remember(self, out: Any, shadow: Any) -> None:
        made = [*_tensors(out)]
        for x in made:
            if x.is_meta:
                self.ledger.track(x)
        if shadow is not None:
            for x, value in zip(made, _tensors(shadow), strict=True):
                if x.is_meta:
                    self.shadows[x] = value


# CUDA's autocast, by function: what goes down to half precision, what goes up to float32
_LOWER = {
    *(F.linear, F.conv1d, F.conv2d, F.conv3d, F.scaled_dot_product_attention, F.conv_transpose2d, F.bilinear),
    *(torch.matmul, torch.bmm, torch.mm, torch.addmm, torch.baddbmm, torch.einsum, torch.conv1d, torch.conv2d),
    *(torch.conv3d, torch.conv_transpose2d, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.bmm),
}
_UPPER = {
    *(F.layer_norm, F.group_norm, F.softmax, F.log_softmax, F.mse_loss, F.l1_loss, F.softplus, F.cosine_similarity),
    *(torch.softmax, torch.log_softmax, torch.exp, torch.log, torch.pow, torch.rsqrt, torch.norm, torch.sum),
    *(torch.prod, torch.cumsum, torch.layer_norm, torch.group_norm, Tensor.softmax, Tensor.exp, Tensor.log),
    *(Tensor.pow, Tensor.__pow__, Tensor.rsqrt, Tensor.norm, Tensor.sum, Tensor.prod, Tensor.cumsum),
}


class _Functions(TorchFunctionMode):
    """Autocast as CUDA has it, and fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.dtype: torch.dtype | None = None
        self.caching = True
        self._casts: MutableMapping[Tensor, Tensor] = WeakTensorKeyDictionary()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if self.dtype is not None and (func in _LOWER or func in _UPPER):
            lower = self.dtype if func in _LOWER else None
            args, kwargs = tree_map(lambda x: self._cast(x, lower), (args, kwargs))
        if func is F.scaled_dot_product_attention:
            query, key, value = (*args, *(kwargs[name] for name in ("query", "key", "value") if name in kwargs))[:3]
            if query.is_meta:
                return _Attention.apply(query, key, value)
        return func(*args, **kwargs)

    def _cast(self, x: Any, lower: torch.dtype | None) -> Any:
        if not isinstance(x, Tensor) or not x.is_meta or not x.is_floating_point():
            return x
        if lower is None:
            return x.float()
        if x.dtype == lower or not (self.caching and x.is_leaf and x.requires_grad):
            return x.to(lower)
        if x not in self._casts:  # of weights that train, once in a scope; gradients flow through this one
            with torch.enable_grad():
                self._casts[x] = x.to(lower)
        return self._casts[x]

    def clear(self) -> None:
        """Stands for ``torch.clear_autocast_cache``."""
        self._casts.clear()

    def autocast(self, _device: str, dtype: torch.dtype | None = None, enabled: bool = True, **_: Any) -> Any:
        """Stands for ``torch.autocast``."""
        return self._scope(dtype if enabled else None)

    @contextmanager
    def _scope(self, dtype: torch.dtype | None) -> Iterator[None]:
        before, self.dtype = self.dtype, dtype
        try:
            yield
        finally:
            self.dtype = before
            if before is None:
                self._casts.clear()


class _Attention(torch.autograd.Function):
    """Query, key, value, the result and the logarithm of its denominator are kept; no matrix of scores is."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


class Ghost:
    """The device: its :class:`Ledger`, and the scope in which ``meta`` is it."""

    def __init__(self) -> None:
        self.ledger = Ledger()
        self._functions = _Functions()

    @contextmanager
    def present(self) -> Iterator[None]:
        with (
            mock.patch.object(torch, "autocast", self._functions.autocast),
            mock.patch.object(torch, "clear_autocast_cache", self._functions.clear),
            _Device(self.ledger),
            self._functions,
        ):
            yield

    def autocast(self, dtype: torch.dtype) -> AbstractContextManager[None]:
        return self._functions._scope(dtype) if dtype != torch.float32 else contextlib.nullcontext()

    def backward(self, loss: Tensor, dtype: torch.dtype) -> None:
        """``loss.backward()``; what checkpoints compute again is in ``dtype``, as it was forward."""
        with self.autocast(dtype):
            self._functions.caching = False  # a checkpoint's scope ends with it
            try:
                # torch.autograd.backward would take the modes of functions away
                _engine_run_backward(
                    (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
                )
            finally:
                self._functions.caching = True

    def once(self, module: nn.Module, name: str = "forward", part: Part = Part.ACTIVATIONS) -> None:
        """Have ``module.name`` run once for arguments of one kind, where there is no gradient, and be told from then on
        what it gave and how much it took meanwhile. What it allocates is of ``part``."""
        method: Callable[..., Any] = getattr(module, name)
        seen: dict[Any, tuple[int, Any]] = {}
        ledger = self.ledger

        def kind(x: Any) -> Any:
            return (
                (x.shape, x.dtype) if isinstance(x, Tensor) else repr(x) if isinstance(x, int | float | str) else None
            )

        def call(*args: Any, **kwargs: Any) -> Any:
            with ledger.of(part):
                if torch.is_grad_enabled():
                    return method(*args, **kwargs)
                flat, form = tree_flatten((args, kwargs))
                key = (*map(kind, flat), str(form), self._functions.dtype)
                if key not in seen:
                    before = ledger.since()
                    out = method(*args, **kwargs)
                    seen[key] = ledger.resume(before), tree_map_only(Tensor, lambda x: (x.shape, x.dtype), out)
                    return out
                rise, specs = seen[key]
                ledger.bump(rise)
                is_spec = lambda x: isinstance(x, tuple) and len(x) == 2 and isinstance(x[1], torch.dtype)  # noqa: E731
                return tree_map(
                    lambda s: torch.empty(s[0], dtype=s[1], device=GHOST) if is_spec(s) else s, specs, is_leaf=is_spec
                )

        setattr(module, name, call)
