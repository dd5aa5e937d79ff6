"""Which blocks a plan chooses, and how it is written and shown."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import SD3Transformer2DModel
from PIL import Image

from align.common.errors import UserError
from pruning import plots
from pruning.graph import BlockGraph
from pruning.plan import Budget, Plan, costs, from_ranges, key, parse_ranges, to_budget
from tests.benchmarks import sizes
from tests.test_pruning_graph import flux, sd3, sd15, sdxl


def equal(layers: int = 9) -> BlockGraph:
    """An SD3 of equal blocks but the last; on the meta device, since plans read no weights."""
    with torch.device("meta"):
        return BlockGraph.of(
            SD3Transformer2DModel(
                num_layers=layers, attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16
            )
        )


def flat(graph: BlockGraph, value: float = 1.0) -> dict[str, float]:
    return {key(unit): value for unit in graph.units()}


def names(*indices: int) -> tuple[str, ...]:
    return tuple(f"transformer_blocks.{i}" for i in indices)


# the score
def test_equal_importance_prunes_the_later_block_first() -> None:
    graph = equal()
    for weighting in (True, False):  # without weighting they are exactly equal, and the later still goes first
        assert tuple(costs(graph, flat(graph), weighting)) == names(7, 6, 5, 4, 3, 2, 1, 0)
    assert tuple(costs(graph, flat(graph, -3.0))) == names(7, 6, 5, 4, 3, 2, 1, 0)  # a loss that helps costs nothing


def test_larger_importance_costs_more_at_any_position() -> None:
    graph = equal()
    for i in range(8):
        found = [costs(graph, flat(graph) | {names(i)[0]: value})[names(i)[0]] for value in (0.0, 0.5, 1.0, 2.0)]
        assert found == sorted(set(found)) and found[0] == 0


def test_the_cost_is_the_formula() -> None:
    graph = equal()
    size, importance = graph["transformer_blocks.2"].parameters, flat(graph) | {"transformer_blocks.2": 3.0}
    found = costs(graph, importance)["transformer_blocks.2"]
    assert math.isclose(found, 3.0 * math.exp((9 - 2) / 9) / size)
    assert math.isclose(costs(graph, importance, False)["transformer_blocks.2"], 3.0 / size)
    # early blocks are protected: a middle one that matters a little more is still the cheaper one
    assert list(costs(graph, {names(0)[0]: 1.0, names(7)[0]: 1.5})) == list(names(7, 0))
    assert list(costs(graph, {names(0)[0]: 1.0, names(7)[0]: 1.5}, False)) == list(names(0, 7))


def test_a_unit_of_two_counts_as_its_earlier_block() -> None:
    graph = BlockGraph.of(sd15())
    unit = ("down_blocks.0.pairs.1", "up_blocks.2.pairs.1")
    size = sum(graph[name].parameters for name in unit)
    assert math.isclose(costs(graph, {key(unit): 2.0})[key(unit)], 2 * math.exp((16 - 1) / 16) / size)


def test_importance_that_is_no_number_is_refused() -> None:
    graph = equal()
    with pytest.raises(UserError, match=r"unknown block 'nope'.*transformer_blocks\.1 is nan"):
        costs(graph, {"nope": 1.0, "transformer_blocks.1": float("nan")})


# ranges by hand
def test_ranges_are_closed() -> None:
    graph = equal(38)
    eight = names(25, 26, 27, 28, 31, 32, 33, 34)
    assert parse_ranges("25-28,31-34", graph) == eight
    assert parse_ranges(" 25-28 , 31-34,26", graph) == eight
    assert parse_ranges("3", graph) == parse_ranges("3-3", graph) == names(3)
    plan = from_ranges(graph, "25-28,31-34", "large")
    assert plan.dropped == eight and plan.frozen == names(*range(25)) and plan.healing == names(29, 30, 35, 36, 37)
    assert plan.before - plan.after == 8 * graph["transformer_blocks.0"].parameters


def test_ranges_of_parts_and_names() -> None:
    graph = equal()
    assert parse_ranges("1-2.ff_context,transformer_blocks.4.attn", graph) == (
        "transformer_blocks.1.ff_context",
        "transformer_blocks.2.ff_context",
        "transformer_blocks.4.attn",
    )
    assert parse_ranges("mid_block", BlockGraph.of(sd15())) == ("mid_block",)
    # FLUX: the single blocks count on from the double ones
    assert parse_ranges("1-2", BlockGraph.of(flux())) == ("transformer_blocks.1", "single_transformer_blocks.0")


def test_all_that_is_wrong_with_ranges_is_told_at_once() -> None:
    with pytest.raises(UserError) as error:
        parse_ranges("5-3, 7-9, 2.nose, 1--2, ,mid_block", equal())
    for words in (
        "'5-3' runs backwards",
        "'7-9' goes beyond the last block, 8",
        "there is no transformer_blocks.2.nose",
        "'1--2' is neither",
        "'' is neither",
        "'mid_block' is neither",
    ):
        assert words in str(error.value)
    with pytest.raises(UserError, match=r"transformer_blocks\.8 has to stay"):
        from_ranges(equal(), "7-8")


# budgets
def test_parameters_as_a_share_and_as_a_number() -> None:
    graph = equal()
    block = graph["transformer_blocks.0"].parameters
    share = 2.5 * block / graph.parameters()
    assert to_budget(graph, flat(graph), Budget(parameters=share)).dropped == names(5, 6, 7)
    assert to_budget(graph, flat(graph), Budget(parameters=2 * block)).dropped == names(6, 7)
    assert to_budget(graph, flat(graph), Budget(parameters=2 * block + 1)).dropped == names(5, 6, 7)


def test_bytes_are_those_of_what_is_left() -> None:
    graph = equal()
    six = graph.parameters(names(6, 7)) * 4.5 / 8
    plan = to_budget(graph, flat(graph), Budget(bytes=six, bits=4.5))
    assert plan.dropped == names(6, 7) and plan.budget == {"bytes": six, "bits": 4.5}
    assert to_budget(graph, flat(graph), Budget(bytes=six - 1, bits=4.5)).dropped == names(5, 6, 7)
    assert to_budget(graph, flat(graph), Budget(bytes=graph.parameters() * 2, bits=16)).dropped == ()


def test_latency_goes_by_measured_seconds() -> None:
    graph = equal()
    times = {block.name: 1.0 for block in graph.blocks} | {"denoiser": 10.0, "transformer_blocks.7": 0.1}
    assert to_budget(graph, flat(graph), Budget(latency=0.21), times).dropped == names(5, 6, 7)
    # without the quick one, which would go first, two are enough
    assert to_budget(graph, flat(graph), Budget(latency=0.2), times).dropped == names(5, 6)
    with pytest.raises(UserError, match="needs measured seconds"):
        to_budget(graph, flat(graph), Budget(latency=0.2))


def test_importance_decides_and_not_only_position() -> None:
    graph = equal()
    importance = flat(graph) | {names(7)[0]: 50.0, names(1)[0]: 0.0}
    plan = to_budget(graph, importance, Budget(parameters=graph["transformer_blocks.0"].parameters * 2))
    assert plan.dropped == names(1, 6) and plan.frozen == names(0)
    assert list(plan.scores)[:2] == list(names(1, 6))


def test_a_budget_out_of_reach_says_what_there_is() -> None:
    graph = equal()
    with pytest.raises(UserError, match=r"parameters 0\.95 is out of reach: all 8 blocks .* what is left takes"):
        to_budget(graph, flat(graph), Budget(parameters=0.95))
    with pytest.raises(UserError, match=r"bytes 10 at bits 4\.5 is out of reach"):
        to_budget(graph, flat(graph), Budget(bytes=10))
    with pytest.raises(UserError, match=r"80\.0% of its time"):
        times = {block.name: 1.0 for block in graph.blocks} | {"denoiser": 10.0}
        to_budget(graph, flat(graph), Budget(latency=0.9), times)


def test_a_budget_is_one_positive_number() -> None:
    assert Budget(parameters=0.2).check() == []
    told = "; ".join(Budget(parameters=-1, latency=1.5, bits=0).check())
    for words in ("not parameters and latency", "parameters is -1", "latency is 1.5", "bits is 0"):
        assert words in told
    assert "give one of" in Budget().check()[0]
    with pytest.raises(UserError, match="give one of"):
        to_budget(equal(), flat(equal()), Budget())


def test_a_unet_never_loses_one_side_of_a_skip_connection() -> None:
    for build in (sd15, sdxl):
        graph = BlockGraph.of(build())
        importance = {key(unit): 1.0 + k for k, unit in enumerate(graph.units(components=True))}
        shares = []
        for share in (0.05, 0.15, 0.3, 0.45):
            plan = to_budget(graph, importance, Budget(parameters=share))
            assert graph.check(plan.dropped) == []
            shares.append(1 - plan.after / plan.before)
            assert shares[-1] >= share
        assert shares == sorted(shares)


def test_a_block_takes_the_place_of_its_parts() -> None:
    graph = BlockGraph.of(sd3())
    importance = {key(unit): 1.0 for unit in graph.units()} | {"transformer_blocks.2.ff": 0.0}
    plan = to_budget(graph, importance, Budget(parameters=0.02), model="tiny")
    assert plan.dropped == ("transformer_blocks.2.ff",) and plan.frozen == names(0, 1)
    everything = to_budget(
        graph, importance, Budget(parameters=float(graph.parameters() - graph.parameters(names(*range(5)))))
    )
    assert everything.dropped == names(0, 1, 2, 3, 4)


def test_no_block_goes_for_the_last_few_parameters() -> None:
    graph = BlockGraph.of(sd3())
    block, part = names(4)[0], f"{names(3)[0]}.ff"
    small = graph[part].parameters
    assert 2 * small < graph[block].parameters
    # by the parameter the part is dearer by a half, but all of it is needed
    importance = {block: float(graph[block].parameters), part: 1.5 * small}
    for asked, dropped in ((small, {part}), (small + 1, {block}), (graph[block].parameters + 1, {block, part})):
        plan = to_budget(graph, importance, Budget(parameters=float(asked)), position_weighting=False)
        assert set(plan.dropped) == dropped


# on disk and on paper
def test_a_plan_survives_json(tmp_path: Path) -> None:
    graph = BlockGraph.of(sd3())
    importance = {key(unit): 1.0 for unit in graph.units(components=True)}
    plan = to_budget(graph, importance, Budget(parameters=0.3), model="tiny")
    plan.save(tmp_path / "deep/plan.json")
    again = Plan.load(tmp_path / "deep/plan.json")
    assert again == plan
    again.fits(graph)
    assert again.after == sum(p.numel() for p in graph.remove(again.dropped).parameters())
    with pytest.raises(UserError, match=r"'tiny' does not fit: .*it is for 6 blocks"):
        again.fits(BlockGraph.of(graph.denoiser))
    content = json.loads((tmp_path / "deep/plan.json").read_text())
    del content["frozen"]
    (tmp_path / "deep/plan.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"is no plan: .*\['frozen'\]"):
        Plan.load(tmp_path / "deep/plan.json")
    with pytest.raises(UserError, match="cannot read the plan"):
        Plan.load(tmp_path / "none.json")


def test_the_picture_shows_what_goes_what_is_frozen_and_what_heals(tmp_path: Path) -> None:
    graph = equal()
    plan = from_ranges(graph, "2,5.ff,5.attn,7", "tiny")
    plots.stack(plan, tmp_path / "plan.png")
    with Image.open(tmp_path / "plan.png") as picture:
        rows = [picture.getpixel((255, 20 * (k + 3) + 6)) for k in range(9)]
        assert picture.size[1] == 20 * (9 + 4)
    frozen, goes, heals = (159, 191, 223), (244, 214, 210), (159, 208, 168)
    assert rows == [frozen, frozen, goes, heals, heals, heals, heals, goes, heals]
    assert not list(tmp_path.glob("*.tmp*"))
    assert "2 of 9 blocks and 2 parts of others go" in plan.text() and "2 blocks frozen" in plan.text()


@pytest.mark.slow
def test_eight_blocks_of_sd35_large_and_the_gigabytes_of_the_paper() -> None:
    """HierarchicalPrune's sizes: 8.06 to 6.36 B parameters, 3.58 GB in NF4, within 1 %."""
    large, schnell = (cast(Any, sizes.meta(model)) for model in (sizes.SD35_LARGE, sizes.FLUX_SCHNELL))
    plan = from_ranges(BlockGraph.of(large), "25-28,31-34")
    assert plan.before == pytest.approx(8.06e9, rel=0.01) and plan.after == pytest.approx(6.36e9, rel=0.01)
    assert plan.after * 4.5 / 8 == pytest.approx(3.58e9, rel=0.01)
    graph = BlockGraph.of(large)
    importance = {key(unit): 1.0 for unit in graph.units()}
    assert len(to_budget(graph, importance, Budget(bytes=3.58e9)).dropped) == 8
    graph = BlockGraph.of(schnell)
    importance = {key(unit): 1.0 for unit in graph.units(components=True)}
    plan = to_budget(graph, importance, Budget(parameters=0.3))
    assert 1 - plan.after / plan.before == pytest.approx(0.3, abs=0.02)
