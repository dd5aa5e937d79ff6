"""Networks of which every process holds a part (FSDP2, torch's ``fully_shard``): what is whole of them, and how
processes that have unequal work pass through them together.

A shared network gathers its layers from all processes whenever one passes through it, forward and backward, so all
have to pass at once. Processes need not have equally much to do: one has fewer rows, draws the sample grid alone, or
asks the reference once more. :class:`Lockstep` has the others pass through at no image in particular meanwhile, without
gradient or with one of 0, so no caller counts calls and no row is left out or asked about twice.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


@dataclass(frozen=True)
class Sharding:
    """How a network is divided.

    Attributes:
        mesh: the processes, one dimension of them.
        blocks: class names of the layers that are gathered one at a time; none takes the network's own
            ``_no_split_modules``.
        output_dtype: what the network's output is cast to; None leaves it.
        let_go: each layer is let go after its pass and gathered again for the backward one (ZeRO-3); else it stays
            until :func:`let_go` or the end of a backward pass (as in ZeRO-2).
    """

    mesh: DeviceMesh
    blocks: tuple[str, ...] = ()
    output_dtype: torch.dtype | None = None
    let_go: bool = True

    @property
    def world(self) -> int:
        return self.mesh.size()

    def shard(self, module: nn.Module) -> None:
        """Divide ``module`` where it stands, block by block, onto the mesh's device. Parameters become DTensors.

        Weights are gathered in the precision they are kept in and autocast does the rest, as on one process: float32
        adapters stand beside a bf16 backbone, and nothing is rounded that was not before. What is packed in 4 bit stays
        whole in every process.
        """
        packed = {p for p in module.parameters() if not p.is_floating_point()}
        divide = partial(fully_shard, mesh=self.mesh, reshard_after_forward=self.let_go, ignored_params=packed)
        blocks = self.blocks or tuple(getattr(module, "_no_split_modules", None) or ())
        for child in reversed(list(module.modules())[1:]):  # inner before outer
            if type(child).__name__ in blocks:
                divide(child)
        name = type(module).__name__
        divide(module, mp_policy=MixedPrecisionPolicy(output_dtype=self.output_dtype))
        type(module).__name__ = name  # which configs and model cards say


def skeleton(module: nn.Module) -> nn.Module:
    """A copy of ``module`` without its weights, to put whole ones into (``load_state_dict(..., assign=True)``)."""
    tensors = [*module.parameters(), *module.buffers()]
    memo = {
        id(t): nn.Parameter(t.detach().to("meta"), False) if isinstance(t, nn.Parameter) else t.to("meta")
        for t in tensors
    }
    return copy.deepcopy(module, memo)


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` on the CPU. Those that are divided are gathered one by one, at which every process has to take part,
    and only the first process gets them."""
    found = {}
    for name, tensor in tensors.items():
        gathered = tensor.detach()
        if isinstance(gathered, DTensor):
            mesh, gathered = gathered.device_mesh, gathered.full_tensor()
            if mesh.get_rank():
                continue
        found[name] = gathered.cpu().contiguous()
    return found


def part(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of ``tensor``, which every process has whole, where ``like`` is divided; else the tensor."""
    if not isinstance(like, DTensor):
        return tensor
    there = tensor.to(like.to_local().device)
    return distribute_tensor(there, like.device_mesh, like.placements, src_data_rank=None)


def exchange(a: Tensor, b: Tensor) -> None:
    """Swap the values of two tensors that are divided alike."""
    kept = a.detach().clone()
    a.detach().copy_(b)
    b.detach().copy_(kept)


def let_go(module: nn.Module) -> None:
    """Leave ``module`` with this process's part alone, which is then what its parameters are: where layers stay
    gathered they are whole, and would be stale after the next step."""
    for each in module.modules():
        if isinstance(each, FSDPModule):
            each.reshard()


def is_sharded(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule)


def held(module: nn.Module) -> int:
    """Bytes of ``module``'s parameters in this process."""
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in module.parameters()]
    return sum(p.numel() * p.element_size() for p in parts)


BACKWARD, SETTLED = -2, -1  # where a process may wait, beside a network's number


class Lockstep:
    """Has all processes pass through the same shared network at the same time.

    Each tells the others where it stands before it goes on: at a forward pass (2 x the network's number, + 1 with a
    gradient), at :meth:`backward`, or at :meth:`settle`, which comes before any other exchange. While one stands at a
    forward pass, those elsewhere help with it: the lowest such process's first, so all get through. It is one number
    over gloo a pass, which waits for no GPU.

    Args:
        helps: for each network, a pass through it at no image in particular: 0, with a gradient of 0. The same network
            with other values in its weights is another one.
        exchange: gives every process's number for one's own, in the order of the processes.
    """

    def __init__(self, helps: Sequence[Callable[[], Tensor]], exchange: Callable[[int], list[int]]) -> None:
        self.helps, self.exchange = helps, exchange
        self.helped = 0  # passes for others
        self._pending: list[Tensor] = []  # those that wait for a backward pass

    def forward(self, network: int) -> None:
        """To be called before every pass through ``network``."""
        self._reach(2 * network + torch.is_grad_enabled())

    def settle(self) -> None:
        """Wait until no process has a pass left."""
        self._reach(SETTLED)

    def backward(self, loss: Tensor) -> Tensor:
        """``loss`` and all that this process has helped with, to be differentiated at once, as the others do."""
        self._reach(BACKWARD)
        total = sum(self._pending, loss)
        self._pending = []
        return total

    def _reach(self, here: int) -> None:
        while (now := self._now(here)) != here:
            with torch.set_grad_enabled(bool(now % 2)):
                nothing = self.helps[now // 2]()
            self.helped += 1
            if nothing.requires_grad:
                self._pending.append(nothing)

    def _now(self, here: int) -> int:
        """What comes next, of what all processes stand at."""
        places = self.exchange(here)
        passes = [place for place in places if place >= 0]
        if not passes and len(set(places)) > 1:
            raise RuntimeError("processes wait for different things: one is at a backward pass, another is done")
        return passes[0] if passes else here


def exchange_over_gloo() -> Callable[[int], list[int]]:
    """One number of each process, over connections of their own."""
    group = dist.new_group(backend="gloo")

    def exchange_numbers(mine: int) -> list[int]:
        places = [torch.zeros(1, dtype=torch.long) for _ in range(dist.get_world_size(group))]
        dist.all_gather(places, torch.tensor([mine]), group=group)
        return [int(place) for place in places]

    return exchange_numbers
