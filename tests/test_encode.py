"""``align.encode``: the cache of a run without the run, by this process or on Ray, bit for bit the same."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors import safe_open

from align.data import latent_cache, text_cache
from align.data.preferences import PreferencePairs
from align.encode import main
from align.families import Family
from align.objectives import DPO
from align.training import trainer
from align.training.config import TrainConfig
from tests.benchmarks.emoji_pairs import Pair, pick_a_pic
from tests.helpers import errors
from tests.test_data import noise

COUNT = 10


@pytest.fixture
def config(tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(latent_cache, "SHARD", 4)
    monkeypatch.setattr(text_cache, "TEXTS", 3)
    pick_a_pic(
        [Pair(f"thing {k % 8}", noise(k), noise(1000 + k)) for k in range(COUNT)], tmp_path / "a.parquet", seed=3
    )
    return {
        "pretrained_model_name_or_path": str(tiny_folders["flow"]),
        "data": {"class_path": "PreferencePairs", "init_args": {"path": str(tmp_path / "a.parquet"), "vae_batch": 3}},
        "objective": {"class_path": "DPO"},
        "output_dir": str(tmp_path / "run"),
        "max_train_steps": 1,
        "train_batch_size": 2,
        "report_to": "none",
    }


def told(config: dict[str, Any], tmp_path: Path, cache: str, *words: str) -> list[str]:
    (tmp_path / "encode.yaml").write_text(yaml.safe_dump(config))
    return ["--config", str(tmp_path / "encode.yaml"), "--data.cache_dir", str(tmp_path / cache), *words]


def left(folder: Path) -> dict[str, Any]:
    """What the cache's shards hold: their header, and their tensors' names and bytes."""
    found = {}
    for file in folder.rglob("*.safetensors"):
        with safe_open(file, framework="np") as opened:
            tensors = {name: opened.get_tensor(name).tobytes() for name in opened.keys()}  # noqa: SIM118
            found[file.parent.parent.name, file.name] = opened.metadata(), tensors
    return found


def test_training_finds_the_cache_whole(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(told(config, tmp_path, "cache")) == 0
    assert len(left(tmp_path / "cache")) == 3 + 3 and not (tmp_path / "run").exists()
    data = PreferencePairs(str(tmp_path / "a.parquet"), cache_dir=str(tmp_path / "cache"), vae_batch=3)
    monkeypatch.setattr(Family, "to_latent", None)
    settings = {"pretrained_model_name_or_path": config["pretrained_model_name_or_path"], "report_to": "none"}
    run = TrainConfig(data, DPO(), output_dir=tmp_path / "run", max_train_steps=1, train_batch_size=2, **settings)
    assert trainer.train(run) == tmp_path / "run"


def test_actors_write_the_cache_of_one_process(config: dict[str, Any], tmp_path: Path) -> None:
    """What Ray calls in its processes, called here, in any order."""
    pytest.importorskip("ray")
    from align.training import ray_encoding

    assert main(told(config, tmp_path, "cache")) == 0
    data = PreferencePairs(str(tmp_path / "a.parquet"), cache_dir=str(tmp_path / "ray"), vae_batch=3)
    run = TrainConfig(data, DPO(), pretrained_model_name_or_path=config["pretrained_model_name_or_path"])
    run.mixed_precision = "no"
    assert data.shards == 3
    share = ray_encoding._Encoding(config=run, data=data, seed=0, digest=data.items().digest, shards=3)
    actors = [ray_encoding._Encoder(share) for _ in range(2)]
    for actor, number in zip((0, 1, 1), (2, 0, 1), strict=True):
        assert actors[actor]({"item": np.array([number])}) == {"shard": [number], "error": [""]}
    assert left(tmp_path / "ray") == left(tmp_path / "cache")
    other = ray_encoding._Encoder(replace(share, digest="another"))
    (error,) = other({"item": np.array([0])})["error"]
    assert "finds other data at" in error


class Falls(PreferencePairs):
    """Pairs that kill the process that encodes them, once."""

    def encode(self, setup: Any) -> Any:
        latent_cache.SHARD, text_cache.TEXTS = 4, 3  # in a worker these are not yet what the test set
        if setup.num_processes > 1 and (fall := Path(self.cache_dir or "") / "fall").exists():
            fall.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(setup)


@pytest.mark.slow
def test_two_workers_of_which_one_dies_encode_it_all(config: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    config["data"]["class_path"] = "tests.test_encode.Falls"
    assert main(told(config, tmp_path, "cache")) == 0
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray/fall").touch()
    assert main(told(config, tmp_path, "ray", "--engine", "ray", "--workers", "2")) == 0
    assert not (tmp_path / "ray/fall").exists()
    assert left(tmp_path / "ray") == left(tmp_path / "cache")


def test_what_cannot_be_encoded_is_refused(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(told(config, tmp_path, "cache", "--workers", "2")) == 2
    assert errors(capsys.readouterr().err)[0].startswith("error: workers is for engine: ray")
    del config["data"]["init_args"]["vae_batch"]
    config["data"] = {"class_path": "Prompts", "init_args": {"path": "shapes-prompts"}}
    (tmp_path / "encode.yaml").write_text(yaml.safe_dump(config))
    assert main(["--config", str(tmp_path / "encode.yaml")]) == 2
    assert "Prompts has nothing to encode" in errors(capsys.readouterr().err)[0]
