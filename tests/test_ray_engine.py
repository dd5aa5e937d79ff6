"""``python -m rewards.score --engine ray`` leaves what the local engine leaves, also after stops and deaths."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from torch import Tensor

from rewards import RewardError, parse_rewards
from rewards.data.formats import open_input
from rewards.score import main
from rewards.scoring.output import BadRows, ScoreShards
from tests.test_score import COUNT, PROMPTS, REWARD, Length, lay

ray = pytest.importorskip("ray")
from rewards.scoring import ray_engine  # noqa: E402

SHARDS = 5


class Fragile(Length):
    """Fails at one picture while the file ``stop`` is there; kills its process where it finds ``fall``, once."""

    def __init__(self, flags: list[str]) -> None:  # a file among the settings would be one of them
        super().__init__()
        self.stop, self.fall = map(Path, flags)

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        if self.stop.exists() and PROMPTS[7] in prompts:
            raise RewardError("told to stop")
        if self.fall.exists():
            self.fall.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().score(images=images, prompts=prompts, metadata=metadata)


def spoiled(root: Path, layout: str) -> str:
    """The ten pictures, of which the third is none."""
    source = lay(root, layout)
    if layout == "sidecar":
        (root / "2.png").write_bytes(b"no picture")
    return source


def left(folder: Path) -> dict[str, Any]:
    """All that a run leaves in its folder: tables with their metadata, JSON and text."""
    found: dict[str, Any] = {}
    for path in folder.iterdir():
        table = pq.read_table(path) if path.suffix == ".parquet" else None
        found[path.name] = path.read_text() if table is None else (table.to_pydict(), table.schema.metadata)
    return found


@pytest.mark.parametrize("layout", ["sidecar", "tar"])
def test_an_actor_writes_the_local_engines_shards(tmp_path: Path, layout: str) -> None:
    """What Ray calls in its processes, called here."""
    source = spoiled(tmp_path / "in", layout)
    command = [source, "--reward", REWARD, "--shard_size", "2", "--skip_errors", "--output"]
    assert main([*command, str(tmp_path / "local")]) == 0
    settings = pq.read_schema(tmp_path / "local/scores-00000.parquet").metadata[b"t2i-align.settings"]
    shards = ScoreShards(tmp_path / "actor", json.loads(settings), keep_pictures=True)

    def share(**changes: Any) -> ray_engine._Scoring:
        given: dict[str, Any] = dict.fromkeys(("prompts", "caption_column", "image_column", "split", "limit", "device"))
        given |= {"source": source, "batch_size": 32, "shard_size": 2, "threads": 1, "max_bad": 1, **changes}
        identity = open_input(source).identity
        bad: BadRows = {}
        arguments = argparse.Namespace(**given)
        return ray_engine._Scoring(
            arguments=arguments,
            identity=identity,
            named=parse_rewards([REWARD]),
            shards=shards,
            bad_file=tmp_path / "bad.jsonl",
            bad=bad,
        )

    actor = ray_engine._Scorer(share())
    for number in (3, 1, 0, 4, 2):
        assert actor({"item": np.array([number])}) == {"shard": [number], "error": [""]}
    written = {name: content for name, content in left(tmp_path / "local").items() if name.startswith("scores")}
    assert len(written) == SHARDS and left(tmp_path / "actor") == written
    other = ray_engine._Scorer(share(source=lay(tmp_path / "other", "csv")))
    assert "finds other images" in other({"item": np.array([0])})["error"][0]
    if layout == "sidecar":
        (error,) = ray_engine._Scorer(share(max_bad=0))({"item": np.array([1])})["error"]
        assert "1 images cannot be read, the last 2.png" in error
        assert [json.loads(line)["file"] for line in (tmp_path / "bad.jsonl").read_text().splitlines()] == ["2.png"]


@pytest.mark.slow
def test_two_workers_that_are_stopped_and_killed_end_as_the_local_engine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, stop, fall = spoiled(tmp_path / "in", "sidecar"), tmp_path / "stop", tmp_path / "fall"
    reward = f"{{name: tests.test_ray_engine.Fragile, args: {{flags: [{stop}, {fall}]}}}}"
    command = [source, "--reward", reward, "--shard_size", "2", "--skip_errors", "--output"]
    assert main([*command, str(tmp_path / "local")]) == 0
    out = tmp_path / "ray"
    there = [*command, str(out), "--engine", "ray", "--workers", "2"]
    with ray_engine.cluster(2):
        stop.touch()
        assert main(there) == 2
        assert "told to stop" in capsys.readouterr().err
        stamps = {path: path.stat().st_mtime_ns for path in out.glob("scores-*.parquet")}
        assert not (out / "scores-00003.parquet").exists() and not (out / "summary.json").exists()
        stop.unlink()
        fall.touch()
        assert main(there) == 0
    assert not fall.exists()  # so one worker did die
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert left(out) == left(tmp_path / "local")
    assert (
        json.loads((out / "summary.json").read_text())["rewards"]["tests.test_ray_engine.Fragile"]["count"] == COUNT - 1
    )
    assert main(there) == 0  # nothing is left to do, and no Ray is started for it
    assert not ray.is_initialized()
    assert main([*there, "--max_bad", "0", "--retry_bad"]) == 2  # scores the shard with the bad file again
    assert "1 images cannot be read, the last 2.png" in capsys.readouterr().err


def test_what_does_not_go_with_ray_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [lay(tmp_path / "in", "sidecar"), "--reward", REWARD, "--output", str(tmp_path / "out")]
    assert main([*command, "--workers", "2"]) == 2
    assert "--workers is for --engine ray" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*command, "--engine", "ray"]) == 2
    assert "--engine ray with 2 processes" in capsys.readouterr().err
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delitem(sys.modules, "rewards.scoring.ray_engine")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main([*command, "--engine", "ray"]) == 2
    assert "--engine ray needs ray: pip install 't2i-align[ray]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
