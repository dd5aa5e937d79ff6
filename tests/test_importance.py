"""Leave-one-out profiles: what is measured, how often the network runs, and that a killed run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from align.common.errors import NonFinite, UserError
from align.families import Family
from align.sampling.generate import sample_images
from align.sampling.loop import initial_noise, sample
from pruning import importance, plots
from pruning.graph import BlockGraph
from pruning.importance import Calibration, profile, scores, seconds
from pruning.plan import Budget, key, to_budget
from rewards import RewardSum
from tests.helpers import TEXTS, Bright
from tests.pipelines import Build

STEPS, SEED = 3, 5


def bright() -> RewardSum:
    return RewardSum({"bright": Bright()})


class Count:
    """Rows that went through a denoiser."""

    def __init__(self, family: Family) -> None:
        self.rows = 0
        family.denoiser.register_forward_hook(self._hear)

    def _hear(self, module: Any, args: Any, output: tuple[Tensor]) -> None:
        self.rows += len(output[0])


def measured(family: Family, path: Path, **changes: Any) -> dict[str, Any]:
    options = {name: changes.pop(name) for name in ("units", "reward") if name in changes}
    settings: dict[str, Any] = {"num_inference_steps": STEPS, "seed": SEED, "guidance_scale": 1.0, "batch_size": 3}
    return profile(family, Calibration(TEXTS, **settings | changes), path, **options)


@pytest.mark.parametrize(
    ("guidance_scale", "kind"),
    [
        *((1.0, "flow"), (3.0, "epsilon")),
        *(pytest.param(*both, marks=pytest.mark.slow) for both in ((1.0, "epsilon"), (3.0, "flow"))),
    ],
)
def test_every_candidate_is_evaluated_once_a_state(
    tiny: Build, tmp_path: Path, kind: str, guidance_scale: float
) -> None:
    family = tiny(kind)
    units, states = len(BlockGraph.of(family.denoiser).units()), len(TEXTS) * STEPS
    passes = 1 if guidance_scale == 1.0 else 2
    heard = Count(family)
    measured(family, tmp_path / "a.json", guidance_scale=guidance_scale)
    assert heard.rows == passes * states * (1 + units)
    heard.rows = 0
    measured(family, tmp_path / "b.json", guidance_scale=guidance_scale, reward=bright())
    # its own trajectory begins where the full model's does, and that state was evaluated already
    assert heard.rows == passes * (states * (1 + units) + (states - len(TEXTS)) * units)
    heard.rows = 0
    measured(family, tmp_path / "b.json", guidance_scale=guidance_scale, reward=bright())
    assert heard.rows == 0


def test_the_numbers_are_those_of_a_loop_written_by_hand(tiny: Build, tmp_path: Path) -> None:
    family, unit = tiny("flow"), ("transformer_blocks.1",)
    found = measured(family, tmp_path / "p.json", reward=bright(), guidance_scale=2.0)
    graph, grid, seeds = BlockGraph.of(family.denoiser), family.grid(STEPS), [SEED + k for k in range(len(TEXTS))]
    with torch.no_grad():
        cond, x = family.encode(TEXTS), initial_noise(family.latent_shape(), seeds)
        states: list[Tensor] = []
        sample(family.predict, grid, cond, x, 2.0, callback=lambda i, x, step, y: states.append(x))
        errors, cosines = [], []
        for i, state in enumerate(states):
            t = grid.t[i].expand(len(state))
            with graph.tap(unit, before=True) as into, graph.tap(unit) as out:
                full = family.forward(state, t, cond, 2.0)
            a, b = into[unit[0]]["hidden"], out[unit[0]]["hidden"]
            cosines.append(((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean())
            with graph.skip(unit):
                errors.append((family.forward(state, t, cond, 2.0) - full).square().mean())
        whole = sample_images(family.predict, family, TEXTS, seeds, STEPS, 2.0)
        with graph.skip(unit):
            without = sample_images(family.predict, family, TEXTS, seeds, STEPS, 2.0)
    entry = found["units"][unit[0]]
    assert entry["mse"] == pytest.approx(torch.stack(errors).mean().item(), rel=1e-4) and entry["mse"] > 0
    assert found["blocks"][unit[0]]["cosine"] == pytest.approx(torch.stack(cosines).mean().item(), rel=1e-3)
    assert found["full"]["reward"] == pytest.approx(whole.mean().item(), rel=1e-5)
    assert entry["reward"] == pytest.approx(without.mean().item(), rel=1e-5)
    assert entry["drop"] == found["full"]["reward"] - entry["reward"] != 0


def test_a_killed_run_goes_on_to_the_same_numbers(tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measured(tiny("flow"), tmp_path / "whole.json", reward=bright())
    write, calls = importance.write_text, []

    def dies(path: Path, text: str) -> None:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(path)
        write(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(importance, "write_text", dies)
        with pytest.raises(KeyboardInterrupt):
            measured(tiny("flow"), tmp_path / "killed.json", reward=bright())
    half = json.loads((tmp_path / "killed.json").read_text())
    assert list(half["units"]) == ["transformer_blocks.0"]
    family = tiny("flow")
    heard = Count(family)
    done = measured(family, tmp_path / "killed.json", reward=bright())
    states = len(TEXTS) * STEPS
    assert heard.rows == states + (2 * states - len(TEXTS))  # the full model, and the one unit that was missing
    assert done == json.loads((tmp_path / "killed.json").read_text())
    assert done["units"] == whole["units"]
    assert done["full"] == half["full"] and done["blocks"] == half["blocks"]  # times are those measured first
    assert done["full"]["reward"] == whole["full"]["reward"]
    assert not list(tmp_path.glob("*.tmp"))


def test_units_of_a_unet_and_parts_are_measured_too(tiny: Build, tmp_path: Path) -> None:
    family = tiny("epsilon")
    found = measured(family, tmp_path / "unet.json")
    assert list(found["units"]) == ["mid_block"]
    blocks = found["blocks"]
    # pairs that change the width have no similarity; the middle keeps it
    assert blocks["mid_block"]["cosine"] is not None and blocks["down_blocks.1.pairs.0"]["cosine"] is None
    assert 0 < blocks["mid_block"]["seconds"] < found["full"]["seconds"]
    assert (
        sum(b["seconds"] for name, b in blocks.items() if "transformer_blocks" not in name) < found["full"]["seconds"]
    )
    family = tiny("flow")
    units = BlockGraph.of(family.denoiser).units(components=True)
    found = measured(family, tmp_path / "sd3.json", units=units)
    assert set(found["units"]) == {key(unit) for unit in units}
    assert set(found["blocks"]) >= set(found["units"])
    assert all(entry["mse"] > 0 for entry in found["units"].values())


def test_another_setting_and_impossible_units_are_refused_before_the_network_runs(tiny: Build, tmp_path: Path) -> None:
    family = tiny("flow")
    measured(family, tmp_path / "p.json")
    heard = Count(family)
    with pytest.raises(UserError) as error:
        measured(family, tmp_path / "p.json", seed=6, num_inference_steps=2, units=[["transformer_blocks.2"], ["nope"]])
    for words in ("other steps, seed", "transformer_blocks.2 has to stay", "unknown block 'nope'"):
        assert words in str(error.value)
    with pytest.raises(UserError, match="no prompts"):
        profile(family, Calibration([]), tmp_path / "q.json")
    (tmp_path / "odd.json").write_text("[]")
    with pytest.raises(UserError, match="is no profile"):
        measured(family, tmp_path / "odd.json")
    assert heard.rows == 0 and not (tmp_path / "q.json").exists()


def test_an_output_that_is_not_finite_stops_the_run(tiny: Build, tmp_path: Path, monkeypatch: Any) -> None:
    family = tiny("flow")
    original = family.forward

    def broken(x: Tensor, *rest: Any) -> Tensor:
        raw = original(x, *rest)
        return raw if len(family.denoiser.transformer_blocks) == 3 else raw * float("inf")

    monkeypatch.setattr(family, "forward", broken)
    with pytest.raises(NonFinite, match=r"without transformer_blocks\.0"):
        measured(family, tmp_path / "p.json")


def test_scores_feed_a_plan(tiny: Build, tmp_path: Path) -> None:
    family = tiny("flow")
    found = measured(family, tmp_path / "p.json", reward=bright())
    graph = BlockGraph.of(family.denoiser)
    for measure in ("drop", "mse", "cosine"):
        importance = scores(found, measure)
        assert set(importance) == {"transformer_blocks.0", "transformer_blocks.1"}
        assert len(to_budget(graph, importance, Budget(parameters=0.2)).dropped) == 1
    assert importance["transformer_blocks.1"] == 1 - found["blocks"]["transformer_blocks.1"]["cosine"]
    fast = to_budget(graph, scores(found, "mse"), Budget(latency=0.05), seconds(found))
    assert fast.dropped
    plain = measured(family, tmp_path / "plain.json")
    with pytest.raises(UserError, match=r"no drop of .*measured without a reward"):
        scores(plain)


def test_the_heat_map_has_a_row_a_unit_and_a_column_a_measure(tiny: Build, tmp_path: Path) -> None:
    found = measured(tiny("flow"), tmp_path / "p.json", reward=bright())
    plots.heatmap(found, tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as four:
        wide, high = four.size
        assert high == 20 * (2 + 3)
        shades = {four.getpixel((wide - 10 - 3 * 110 + 2, 20 * (k + 2) + 2)) for k in range(2)}
        assert shades == {(245, 240, 225), (120, 20, 50)}  # of two errors one is the smallest, one the largest
    plots.heatmap(measured(tiny("flow"), tmp_path / "q.json"), tmp_path / "q.png")
    with Image.open(tmp_path / "q.png") as three:
        assert three.size == (wide - 110, high)
