"""The measurement beside other repositories, as far as it goes without them: what is missing is said, and what ours is
told to do is what it does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from align.common.command import parse
from align.objectives import DPO, PolicyGradient
from align.training.config import TrainConfig
from tests.benchmarks import peer_runs, peers


def test_a_folder_that_is_no_checkout_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no checkout.*ddpo-pytorch \(scripts/train.py\)") as raised:
        peers.main([str(tmp_path), "--quick"])
    assert "\n" not in str(raised.value)


def test_checkouts_are_known_by_their_files(tmp_path: Path) -> None:
    for name, file in {"a": "scripts/train_sd3.py", "b": "scripts/train.py"}.items():
        (tmp_path / name / "scripts").mkdir(parents=True)
        (tmp_path / name / file).touch()
    assert [peer.name for peer in peers.recognised(tmp_path / "a")] == ["flow_grpo", "flow_grpo, one T5 token"]
    assert [peer.name for peer in peers.recognised(tmp_path / "b")] == ["ddpo-pytorch"]


@pytest.mark.parametrize("peer", peers.PEERS, ids=lambda peer: peer.name)
def test_both_sides_pass_as_many_rows_of_as_many_pictures(peer: peers.Peer, tmp_path: Path) -> None:
    peers.materials(tmp_path)
    config, _ = parse(TrainConfig, "align.train", "", peers.filled(list(peer.ours), tmp_path))
    rows = config.train_batch_size * config.gradient_accumulation_steps
    if isinstance(config.objective, DPO):
        options = list(peer.theirs)
        theirs = {name: options[options.index(f"--{name}") + 1] for name in ("train_batch_size", "beta_dpo", "rank")}
        assert config.lora is not None
        assert (rows, config.lora.rank) == (int(theirs["train_batch_size"]), int(theirs["rank"]))
        assert config.objective.beta == 2 * float(theirs["beta_dpo"])  # theirs has no half
        return
    assert isinstance(config.objective, PolicyGradient)
    sample, train = peer.settings["sample"], peer.settings["train"]
    batch = sample.get("train_batch_size", sample.get("batch_size"))
    assert config.rollout_batch_size is not None
    pictures = config.rollout_batch_size * config.objective.images_per_prompt
    assert pictures == batch * sample["num_batches_per_epoch"]
    steps = int(sample["num_steps"] * train.get("timestep_fraction", 1.0))
    assert config.objective.trained_steps == steps
    assert pictures * steps == peer.updates * rows
    assert rows == train["batch_size"] * train["gradient_accumulation_steps"] * steps
    assert config.objective.sampler.guidance_scale == sample["guidance_scale"]


def test_the_meter_reads_the_clock_at_each_step_and_stops_at_the_last() -> None:
    weight = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    weight.sum().backward()
    meter = peer_runs.Meter(2)
    try:
        optimizer.step()
        with pytest.raises(peer_runs.Enough):
            optimizer.step()
    finally:
        meter.remove()
    assert len(meter.seconds) == 2 and meter.seconds[0] <= meter.seconds[1]
    optimizer.step()
    assert len(meter.seconds) == 2
