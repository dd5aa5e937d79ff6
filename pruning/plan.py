"""What goes: chosen by measured importance to a budget, or named by hand; as JSON.

Hierarchical position pruning (HierarchicalPrune, arXiv 2508.04663) protects early blocks. The paper's printed score,
read literally, prunes the earlier of two equally important blocks first, and its released code weights no positions at
all; the cost here is a monotone one of ours:

    cost(i, c) = max(dP, 0) * exp((|B| - i) / |B|) / parameters

for a unit c at position i of |B| blocks whose removal costs dP. The cheapest go first; of equals the later.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from align.common.errors import UserError
from pruning.graph import BlockGraph
from rewards.common.files import write_text

_RANGE = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?(?:\.(\w+))?")


def key(unit: Iterable[str]) -> str:
    """How a unit, a set of names that goes together, is called in a profile and a plan: ``a`` or ``a+b``."""
    return "+".join(unit)


@dataclass(frozen=True)
class Budget:
    """How small the denoiser has to become; exactly one of the three.

    Args:
        parameters: what has to go: below 1 a share of the denoiser's parameters, else a number of them.
        bytes: the most that what is left may take, at ``bits`` for every parameter.
        latency: the share of the denoiser's time that has to go, by the times that the profile measured.
        bits: per parameter; NF4 with blocks of 64 takes 4.5, with double quantisation 4.127, bfloat16 16.
    """

    parameters: float | None = None
    bytes: float | None = None
    latency: float | None = None
    bits: float = 4.5

    def check(self) -> list[str]:
        """Everything that is wrong with it, in words."""
        given = [name for name, value in asdict(self).items() if value is not None and name != "bits"]
        several = f", not {' and '.join(given)}" if given else ""
        wrong = [] if len(given) == 1 else [f"give one of parameters, bytes and latency{several}"]
        values = {name: getattr(self, name) for name in (*given, "bits")}
        wrong += [
            f"{name} is {value}; expected a number above 0"
            for name, value in values.items()
            if not (math.isfinite(value) and value > 0)
        ]
        if self.latency is not None and self.latency >= 1:
            wrong.append(f"latency is {self.latency}; expected a share below 1")
        return [f"budget: {text}" for text in wrong]

    def asked(self) -> dict[str, float]:
        """The one that is given, and the bits where it depends on them."""
        names = ("bytes", "bits") if self.bytes is not None else ("parameters", "latency")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def missing(self, graph: BlockGraph, drop: Iterable[str], seconds: Mapping[str, float]) -> float:
        """What has to go beside ``drop``, in parameters or seconds; 0 or less where ``drop`` is enough. ``seconds`` is
        :func:`pruning.importance.seconds`, for latency."""
        drop = set(drop)
        if self.latency is not None:
            return self.latency * seconds["denoiser"] - sum(seconds[name] for name in drop)
        total, rest = graph.parameters(), graph.parameters(drop)
        if self.bytes is not None:
            return rest - self.bytes * 8 / self.bits
        assert self.parameters is not None
        return self.parameters * (total if self.parameters < 1 else 1) - (total - rest)


@dataclass(frozen=True)
class Plan:
    """What goes, what is frozen while the rest heals, and why.

    ``dropped`` and ``frozen`` are names of the graph that the plan was made for; ``frozen`` are the whole blocks before
    the first that loses anything (positional weight preservation). ``sizes`` holds the parameters of every whole
    block, in the order in which they run, and of the dropped parts; ``owners`` says whose parts those are. ``scores``
    are the costs that decided; empty for a plan by hand. ``before`` and ``after`` count the denoiser's parameters.
    """

    model: str
    dropped: tuple[str, ...]
    frozen: tuple[str, ...]
    before: int
    after: int
    sizes: dict[str, int]
    owners: dict[str, str] = field(default_factory=dict)
    budget: dict[str, float] | None = None
    position_weighting: bool = True
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def healing(self) -> tuple[str, ...]:
        """The whole blocks that stay and are not frozen."""
        still = [name for name in self.sizes if name not in self.owners]
        return tuple(name for name in still if name not in self.dropped and name not in self.frozen)

    def save(self, path: Path) -> None:
        """Write JSON, whole or not at all."""
        write_text(path, json.dumps(asdict(self), indent=2) + "\n")

    @staticmethod
    def load(path: Path) -> Plan:
        """What :meth:`save` wrote; :class:`UserError` for anything else."""
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read the plan {path}: {error}") from error
        names = {f.name for f in fields(Plan)}
        if not isinstance(saved, dict) or saved.keys() != names:
            odd = sorted(saved.keys() ^ names) if isinstance(saved, dict) else type(saved).__name__
            raise UserError(f"{path} is no plan: expected the keys {', '.join(sorted(names))}; they differ in {odd}")
        return Plan(**saved | {"dropped": tuple(saved["dropped"]), "frozen": tuple(saved["frozen"])})

    def fits(self, graph: BlockGraph) -> None:
        """Raise :class:`UserError` where the plan was made for another denoiser than this graph's."""
        wrong = graph.check(self.dropped)
        blocks = {block.name: block.parameters for block in graph.blocks}
        if blocks != {name: size for name, size in self.sizes.items() if name not in self.owners}:
            wrong.append(
                f"it is for {len(self.sizes) - len(self.owners)} blocks and {self.before} parameters, and the denoiser "
                f"has {len(blocks)} and {graph.parameters()}"
            )
        if wrong:
            raise UserError(f"the plan for {self.model!r} does not fit: " + "; ".join(wrong))

    def text(self) -> str:
        """One line a reader understands."""
        share, parts = 1 - self.after / self.before, len(self.owners)
        also = f" and {parts} parts of others" if parts else ""
        return (
            f"{self.model}: {len(self.dropped) - parts} of {len(self.sizes) - parts} blocks{also} go, "
            f"{self.before - self.after:,} of {self.before:,} parameters ({share:.1%}); {len(self.frozen)} blocks "
            f"frozen, {len(self.healing)} heal"
        )


def from_ranges(graph: BlockGraph, text: str, model: str = "") -> Plan:
    """A plan from :func:`parse_ranges`. Raises :class:`UserError` where this cannot go."""
    return make_plan(graph, parse_ranges(text, graph), model)


def parse_ranges(text: str, graph: BlockGraph) -> tuple[str, ...]:
    """The names that a list such as ``25-28, 31-34, 13-19.ff_context, mid_block`` stands for.

    A number is a block's position, from 0, in the order in which blocks run (FLUX: the single blocks count on from the
    double ones). Ranges are CLOSED: 25-28 is four blocks. ``.part`` takes that part of each. Anything else is a name.
    Raises :class:`UserError` with all that is wrong at once.
    """
    names: list[str] = []
    wrong: list[str] = []
    for token in (piece.strip() for piece in text.split(",")):
        match = _RANGE.fullmatch(token)
        if not match:
            names.append(token)
            if token not in graph:
                wrong.append(f"{_short(token)} is neither a block's name nor a range such as 25-28")
            continue
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            wrong.append(f"{token!r} runs backwards")
        elif last >= len(graph.blocks):
            wrong.append(f"{token!r} goes beyond the last block, {len(graph.blocks) - 1}")
        else:
            chosen = [block.name for block in graph.blocks[first : last + 1]]
            chosen = [f"{name}.{match[3]}" for name in chosen] if match[3] else chosen
            wrong += [f"{token!r}: there is no {name}" for name in chosen if name not in graph]
            names += chosen
    if wrong:
        raise UserError("ranges: " + "; ".join(wrong))
    return tuple(dict.fromkeys(names))


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}…")


def require_reachable(graph: BlockGraph, budget: Budget, components: bool) -> None:
    """Raise :class:`UserError` where a budget would not be met though every block and part went that can go by itself:
    known before anything is measured, but for a latency."""
    names = {name for unit in graph.units(components) for name in unit}
    most = {name for name in names if graph[name].part_of not in names}
    if budget.latency is None and budget.missing(graph, most, {}) > 0:
        asked = " at ".join(f"{name} {value:g}" for name, value in budget.asked().items())
        share = 1 - graph.parameters(most) / graph.parameters()
        raise UserError(f"budget: {asked} is out of reach: all that can go is {share:.1%} of the parameters")


def costs(graph: BlockGraph, importance: Mapping[str, float], position_weighting: bool = True) -> dict[str, float]:
    """The cost of every unit of ``importance`` (:func:`key` to dP), cheapest first, of equals the later first.

    A unit of several blocks counts as its earliest. Raises :class:`UserError` for unknown names and for numbers that
    are not finite.
    """
    units = {name: name.split("+") for name in importance}
    wrong = [text for names in units.values() for text in graph.check(names) if text.startswith("unknown")]
    wrong += [f"the importance of {name} is {v}" for name, v in importance.items() if not math.isfinite(v)]
    if wrong:
        raise UserError("importance: " + "; ".join(wrong))
    cost, count = {}, len(graph.blocks)
    places = {name: min(graph[n].position for n in names) for name, names in units.items()}
    for name, names in units.items():
        weight = math.exp((count - places[name]) / count) if position_weighting else 1.0
        cost[name] = max(importance[name], 0.0) * weight / sum(graph[n].parameters for n in names)
    order = {name: k for k, name in enumerate(units)}
    return {n: cost[n] for n in sorted(units, key=lambda n: (cost[n], -places[n], -order[n]))}


def to_budget(
    graph: BlockGraph,
    importance: Mapping[str, float],
    budget: Budget,
    seconds: Mapping[str, float] | None = None,
    position_weighting: bool = True,
    model: str = "",
) -> Plan:
    """The cheapest units first until ``budget`` is met, never against :meth:`BlockGraph.check`.

    What a unit gives beyond the budget is worth nothing: where a part is enough, no block goes for it. A block replaces
    parts of its own that were chosen before. ``importance`` is :func:`pruning.importance.scores`: its keys are what may
    be chosen. Raises :class:`UserError` for a budget that is wrong or out of reach.
    """
    wrong = budget.check()
    names = {name for unit in importance for name in unit.split("+")}
    if budget.latency is not None and (untimed := (names | {"denoiser"}) - (seconds or {}).keys()):
        wrong.append(f"budget: a latency needs measured seconds; there are none of {', '.join(sorted(untimed)[:5])}")
    if wrong:
        raise UserError("; ".join(wrong))
    prices, times = costs(graph, importance, position_weighting), seconds or {}
    chosen: set[str] = set()
    while (missing := budget.missing(graph, chosen, times)) > 0:
        best, cheapest = math.inf, None
        for unit, price in prices.items():
            if price >= best:
                break  # cheapest first, and what is counted of a unit never makes it cheaper
            new = unit.split("+")
            if any(name in chosen or graph[name].part_of in chosen for name in new):
                continue
            grown = {name for name in chosen if graph[name].part_of not in new} | set(new)
            if graph.check(grown):
                continue
            given = missing - budget.missing(graph, grown, times)
            if (counted := price * max(1.0, given / missing)) < best:
                best, cheapest = counted, grown
        if cheapest is None:
            break
        chosen = cheapest
    if missing > 0:
        share = 1 - graph.parameters(chosen) / graph.parameters()
        slow = f" and {sum(times[n] for n in chosen) / times['denoiser']:.1%} of its time" if budget.latency else ""
        asked = " at ".join(f"{name} {value:g}" for name, value in budget.asked().items())
        rest = f"{graph.parameters(chosen) * budget.bits / 8:,.0f} bytes at {budget.bits:g} bits"
        raise UserError(
            f"budget: {asked} is out of reach: all {len(chosen)} blocks and parts that may go together are "
            f"{share:.1%} of the parameters{slow}, and what is left takes {rest}"
        )
    for unit in reversed(prices):  # what a later choice made dispensable stays after all
        fewer = chosen - set(unit.split("+"))
        if not graph.check(fewer) and budget.missing(graph, fewer, times) <= 0:
            chosen = fewer
    return make_plan(graph, chosen, model, budget.asked(), position_weighting, prices)


def make_plan(
    graph: BlockGraph,
    drop: Iterable[str],
    model: str,
    budget: dict[str, float] | None = None,
    position_weighting: bool = True,
    scores: Mapping[str, float] | None = None,
) -> Plan:
    dropped = tuple(graph.ordered(graph.need(drop)))
    first = min((graph[name].position for name in dropped), default=len(graph.blocks))
    parts = [graph[name] for name in dropped if graph[name].part_of]
    sizes = {block.name: block.parameters for block in [*graph.blocks, *parts]}
    return Plan(
        model=model,
        dropped=dropped,
        frozen=tuple(block.name for block in graph.blocks if block.position < first),
        before=graph.parameters(),
        after=graph.parameters(dropped),
        sizes=sizes,
        owners={part.name: part.part_of or "" for part in parts},
        budget=budget,
        position_weighting=position_weighting,
        scores=dict(scores or {}),
    )
