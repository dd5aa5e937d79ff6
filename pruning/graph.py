"""Which blocks a denoiser is made of, and the denoiser without some of them.

A block that goes passes its input through, so leaving it out of its list is the same computation (HierarchicalPrune,
arXiv 2508.04663; for the resnet and attention pairs of a U-Net BK-SDM, arXiv 2305.15798). Blocks are named by where
they stand in the denoiser before anything goes. Nothing here reads a weight: a denoiser on the meta device will do.

What a stock diffusers config can express: any whole block of SD3 (but the last) and of FLUX; in a U-Net equally many
pairs of a down stage and of the up stage that consumes its skips, the middle block, and single transformer layers as
long as the middle block keeps as many as the first pair of the last down stage, since the config has one number for
both. A U-Net loses nothing else. SD3 and FLUX blocks can lose parts as well (attention, feed-forward, norms): the
config then lists them under ``pruning``, which :func:`pruning.load` reads and stock diffusers does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from align.common.errors import UserError
from pruning.architectures import MID_LAYERS, PARTS, Kind, Row, describe, part_name, rows
from pruning.blocks import Block, Streams, follow, put_out, taken_in, weights
from pruning.identity import Identity, stand_in

if TYPE_CHECKING:
    from diffusers import ModelMixin

_NOT_STOCK = ("attn", "ff", "norm", "mlp")


class BlockGraph:
    """The blocks of a denoiser; make it by :meth:`of`.

    ``drop`` is everywhere a collection of names of blocks and parts. Methods that act on it raise
    :class:`UserError` with all that :meth:`check` says.
    """

    def __init__(self, denoiser: ModelMixin, rows: Iterable[Row]) -> None:
        self.denoiser = denoiser
        self._rows = {row.stem: row for row in rows}
        self._modules: dict[str, nn.Module] = dict(denoiser.named_modules())
        self._lengths = {
            stem: len(list(self._modules[r.lists[0]].children())) for stem, r in self._rows.items() if r.lists
        }
        self._named: dict[str, Block] = {}
        self._changed = False
        for row in self._rows.values():
            if not row.lists:
                self._add(row.stem, row.kind, (row.stem,))
            for i in range(self._lengths.get(row.stem, 0)):
                name = f"{row.stem}.{i}"
                self._add(name, row.kind, tuple(f"{path}.{i}" for path in row.lists), row.part_of)
                for part, (kind, attributes) in PARTS.get(row.kind, {}).items():
                    paths = tuple(f"{name}.{attribute}" for attribute in attributes)
                    if all(path in self._modules and not isinstance(self._modules[path], Identity) for path in paths):
                        self._add(f"{name}.{part}", kind, paths, name)
        self.blocks = tuple(block for block in self._named.values() if block.part_of is None)

    @staticmethod
    def of(denoiser: ModelMixin) -> BlockGraph:
        """The graph of a denoiser; :class:`UserError` for a class that :mod:`pruning.architectures` does not know."""
        return BlockGraph(denoiser, rows(denoiser))

    def _add(self, name: str, kind: Kind, modules: tuple[str, ...], part_of: str | None = None) -> None:
        whole = sum(block.part_of is None for block in self._named.values())
        position = self._named[part_of].position if part_of else whole
        parameters = sum(weights(p) for path in modules for p in self._modules[path].parameters())
        self._named[name] = Block(name, kind, position, parameters, modules, part_of)

    def __getitem__(self, name: str) -> Block:
        if name not in self._named:
            raise UserError(self._unknown(name))
        return self._named[name]

    def __contains__(self, name: str) -> bool:
        return name in self._named

    def components(self, block: str) -> tuple[Block, ...]:
        """The parts of a block that can go by themselves: attention, feed-forward and norms of an SD3 or FLUX block,
        transformer layers of a U-Net's pair or middle block."""
        return tuple(part for part in self._named.values() if part.part_of == self[block].name)

    def ordered(self, names: Iterable[str]) -> list[str]:
        """``names`` in the order in which they run, a block before its parts."""
        chosen = set(names)
        return sorted((name for name in self._named if name in chosen), key=lambda name: self[name].position)

    def parameters(self, drop: Iterable[str] = ()) -> int:
        """How many parameters the denoiser has without ``drop``."""
        return sum(map(weights, self.denoiser.parameters())) - sum(self[name].parameters for name in set(drop))

    def portable(self, drop: Iterable[str]) -> bool:
        """Whether what is left is a stock diffusers class with a stock config."""
        whole = not any(isinstance(module, Identity) for module in self._modules.values())
        return whole and all(self[name].kind not in _NOT_STOCK for name in drop)

    # what may go
    def check(self, drop: Iterable[str]) -> list[str]:
        """Everything that is wrong with dropping ``drop``, in words; empty where it can go."""
        drop = set(drop)
        wrong = [self._unknown(name) for name in sorted(drop - self._named.keys())]
        known = [name for name in self._named if name in drop]
        for name in known:
            if (owner := self._named[name].part_of) in drop:
                wrong.append(f"{name} is a part of {owner}, which goes as a whole; name one of the two")
        for stem, row in self._rows.items():
            dropped = self._dropped_in(row, drop)
            wrong += [f"{stem}.{i} has to stay: {row.stay[i]}" for i in dropped if i in row.stay]
            if self._lengths.get(stem, 0) - len(dropped) < row.least:
                wrong.append(f"nothing of {stem} would be left; at least {row.least} has to stay")
            if row.partner and len(dropped) != len(self._dropped_in(self._rows[row.partner], drop)):
                wrong.append(self._torn(row, drop))
        if all(block.name in drop for block in self.blocks):
            wrong.append("no block would be left: the model would be empty")
        return wrong + self._uneven(drop)

    def units(self, components: bool = False) -> list[tuple[str, ...]]:
        """The smallest sets that can go, for leave-one-out and for a planner to choose from: single blocks; in a U-Net
        a down pair with an up pair of the stage that consumes its skips; with ``components`` single parts too, and a
        layer of the middle block together with its twin in the last down stage."""
        candidates: list[tuple[str, ...]] = [(block.name,) for block in self.blocks]
        for row in self._rows.values():
            if row.partner:
                downs, ups = range(self._lengths[row.stem]), range(self._lengths[row.partner])
                candidates += [(f"{row.stem}.{i}", f"{row.partner}.{j}") for i in downs for j in ups]
        if components:
            candidates += [(block.name,) for block in self._named.values() if block.part_of]
            if twins := self._twins(set()):
                count = min(self._lengths[row.stem] for row in twins)
                candidates += [tuple(f"{row.stem}.{i}" for row in twins) for i in range(count)]
        return sorted((unit for unit in candidates if not self.check(unit)), key=lambda unit: self[unit[0]].position)

    def _unknown(self, name: str) -> str:
        return f"unknown block {name!r}; the blocks run from {self.blocks[0].name} to {self.blocks[-1].name}"

    def _dropped_in(self, row: Row, drop: set[str]) -> list[int]:
        return [i for i in range(self._lengths.get(row.stem, 0)) if f"{row.stem}.{i}" in drop]

    def _torn(self, row: Row, drop: set[str]) -> str:
        assert row.partner
        down, up = len(self._dropped_in(row, drop)), len(self._dropped_in(self._rows[row.partner], drop))
        short = self._rows[row.partner if down > up else row.stem]
        free = [f"{short.stem}.{i}" for i in range(self._lengths[short.stem]) if i not in short.stay]
        may = f"of {short.stem} there may go {', '.join(free)}" if free else f"none of {short.stem} may go"
        return (
            f"{row.stem} would lose {down} and {row.partner} {up}, and the skip connection between them would be torn: "
            f"what a down pair puts out an up pair takes in, so as many must go from both; {may}"
        )

    def _twins(self, drop: set[str]) -> tuple[Row, Row] | None:
        """The two rows of transformer layers for whose length a U-Net's config has only one number."""
        mid = self._rows.get(MID_LAYERS)
        if mid is None or "mid_block" in drop:
            return None
        stage = [row for row in self._rows.values() if row.kind == "down"][-1]
        kept = [i for i in range(self._lengths[stage.stem]) if f"{stage.stem}.{i}" not in drop]
        layers = [row for row in self._rows.values() if kept and row.part_of == f"{stage.stem}.{kept[0]}"]
        return (layers[0], mid) if layers else None

    def _uneven(self, drop: set[str]) -> list[str]:
        if not (twins := self._twins(drop)):
            return []
        first, mid = (self._lengths[row.stem] - len(self._dropped_in(row, drop)) for row in twins)
        if first == mid:
            return []
        return [
            f"{twins[0].stem} would keep {first} layers and {twins[1].stem} {mid}, for which a stock config has one "
            "number: drop as many from each, or the whole mid_block"
        ]

    def need(self, drop: Iterable[str]) -> set[str]:
        """``drop`` as a set; :class:`UserError` with all that :meth:`check` says."""
        if wrong := self.check(drop := set(drop)):
            raise UserError("cannot prune: " + "; ".join(wrong))
        return drop

    # the denoiser without them
    def _edits(self, drop: set[str]) -> list[tuple[nn.Module, str, nn.Module | None]]:
        """(parent, attribute, what takes its place) for everything that dropping changes."""
        if self._changed:
            raise RuntimeError("this graph's denoiser is pruned already, or within skip(); make a new BlockGraph of it")
        new: dict[str, nn.Module | None] = {"mid_block": None} if "mid_block" in drop else {}
        for row in self._rows.values():
            if dropped := self._dropped_in(row, drop):
                for path in row.lists:
                    kept = [m for i, m in enumerate(self._modules[path].children()) if i not in dropped]
                    new[path] = nn.ModuleList(kept)
                    new[path].training = self._modules[path].training  # type: ignore[union-attr]
        for name in drop:
            if self[name].kind in _NOT_STOCK:
                new |= {path: stand_in(path, self._modules[path]) for path in self[name].modules}
        split = [(path.rpartition("."), module) for path, module in new.items()]
        return [(self._modules[parent], attribute, module) for (parent, _, attribute), module in split]

    @contextmanager
    def skip(self, drop: Iterable[str]) -> Iterator[None]:
        """Within, the denoiser computes as if ``drop`` were gone; no weight changes, and afterwards all is as before.

        A whole block passes (context, hidden) through. An attention or feed-forward gives back the input of its
        branch, so that its block adds gate * norm(x); an AdaLN becomes a plain LayerNorm with gate 1, shift and
        scale 0 (HierarchicalPrune's released code).
        """
        edits = self._edits(self.need(drop))
        before = [(parent, attribute, getattr(parent, attribute)) for parent, attribute, _ in edits]
        self._changed = True
        try:
            for parent, attribute, module in edits:
                setattr(parent, attribute, module)
            yield
        finally:
            for parent, attribute, module in before:
                setattr(parent, attribute, module)
            self._changed = False

    def remove(self, drop: Iterable[str]) -> ModelMixin:
        """Take ``drop`` out of the denoiser itself, bring its config up to date and return it.

        Blocks are renumbered (:meth:`renamed`): make a new graph of what is returned. Kept modules are the same
        objects, with their weights, dtype and attention processors. Copy the denoiser first where it is still needed.
        """
        if edits := self._edits(self.need(drop)):
            for parent, attribute, module in edits:
                setattr(parent, attribute, module)
            self._changed = True
            describe(self.denoiser)
        return self.denoiser

    def moved(self, drop: Iterable[str]) -> dict[str, str | None]:
        """Where :meth:`remove` puts the modules of blocks: old path to new path, None for what is gone. Paths under a
        path in it go along (:func:`follow`); what is neither stays where it is."""
        drop = self.need(drop)
        paths: dict[str, str | None] = dict.fromkeys(path for name in drop for path in self[name].modules)
        for row in self._rows.values():  # a pair before the layers within it
            dropped = self._dropped_in(row, drop)
            kept = [i for i in range(self._lengths.get(row.stem, 0)) if i not in dropped]
            for path in row.lists:
                paths |= dict.fromkeys(f"{path}.{i}" for i in dropped)
                home = follow(path, paths)
                paths |= {f"{path}.{i}": home and f"{home}.{k}" for k, i in enumerate(kept)}
        return paths

    def renamed(self, drop: Iterable[str]) -> dict[str, str]:
        """Old name to new name of every block and part that stays."""
        moved, names = self.moved(drop), {}
        for block in self._named.values():
            if new := follow(block.modules[0], moved):
                pair = block.kind in ("down", "up")
                names[block.name] = new.replace(".resnets.", ".pairs.") if pair else part_name(new)
        return names

    # what they say
    @contextmanager
    def tap(self, names: Iterable[str], before: bool = False) -> Iterator[dict[str, Streams]]:
        """A dictionary that every forward within fills with what these blocks put out (with ``before``: take in).

        ``features[name]["hidden"]`` is (B, tokens, channels), for pairs and middle of a U-Net (B, channels, h, w);
        ``["context"]`` is there for the text stream of SD3 and FLUX blocks. Gradients flow where they are enabled. A
        block that is skipped has no entry. Before an up pair, ``hidden`` is what comes from below, without the skip.
        """
        features: dict[str, Streams] = {}

        def enter(block: Block, module: nn.Module, args: Any, kwargs: Any) -> None:
            features[block.name] = taken_in(block, module, args, kwargs)

        def leave(block: Block, module: nn.Module, args: Any, output: Any) -> None:
            features[block.name] = put_out(block, output)

        with ExitStack() as hooks:
            for block in [self[name] for name in names]:
                module = self._modules[block.modules[0 if before else -1]]
                if before:
                    handle = module.register_forward_pre_hook(partial(enter, block), with_kwargs=True)
                else:
                    handle = module.register_forward_hook(partial(leave, block))
                hooks.enter_context(handle)
            yield features
