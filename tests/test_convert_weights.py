"""Torch files are converted, never read by the packages; what is no state dict is refused unread."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub.errors import RemoteEntryNotFoundError
from safetensors.torch import load_file, save_file

from rewards.models.network import find, read_weights
from tests.benchmarks.convert_weights import main

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("package", ["rewards", "align", "pruning"])
def test_no_package_unpickles(package: str) -> None:
    files = [file for file in (ROOT / package).rglob("*.py") if "scripts" not in file.parts]
    assert files
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            assert "torch.load(" not in line or "weights_only=True" in line, f"{file}: {line}"
            assert "import pickle" not in line and "allow_pickle=True" not in line, f"{file}: {line}"


def test_a_state_dict_keeps_every_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    state = {"a": whole, "shared": whole[:2], "turned": whole.T, "ids": torch.arange(3), "half": whole.half()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "one.pt")
    torch.save(state, tmp_path / "two.pth")
    assert main(["state", str(tmp_path / "one.pt")]) == 0
    assert main(["state", str(tmp_path / "two.pth"), "--output", str(tmp_path / "new/two.safetensors")]) == 0
    for file in (tmp_path / "one.safetensors", tmp_path / "new/two.safetensors"):
        weights = load_file(file)
        assert weights.keys() == state.keys()
        for name, value in state.items():
            assert torch.equal(weights[name], value) and weights[name].dtype == value.dtype, name
    assert "one.safetensors: 87 weights" in capsys.readouterr().out


class Harmful:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_what_is_no_state_dict_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": Harmful(tmp_path / "harm")}, tmp_path / "whole.pt")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    for source, message in {
        str(tmp_path / "whole.pt"): "whole.pt",
        str(tmp_path / "list.pt"): "it is no state dict",
        "gone.pt": "no such file",
    }.items():
        assert main(["state", source]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "harm").exists() and not list(tmp_path.glob("*.safetensors"))


def test_safetensors_are_taken_before_a_torch_file_whose_tensors_alone_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "harm",)

    torch.save({"state_dict": {"b": torch.ones(2)}}, tmp_path / "w.pt")
    assert read_weights(str(tmp_path), "w.pt").keys() == read_weights(str(tmp_path / "w.pt"), "w.pt").keys() == {"b"}
    torch.save({"weight": Harm()}, tmp_path / "harmful.pt")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        read_weights(str(tmp_path), "harmful.pt")
    assert not (tmp_path / "harm").exists()
    asked = []

    def download(source: str, name: str) -> str:
        asked.append(name)
        if name == "w.safetensors":
            raise RemoteEntryNotFoundError("none", response=Mock())
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert find("owner/name", "w.pt") == tmp_path / "w.pt"
    assert asked == ["w.safetensors", "w.pt"]
    save_file({"a": torch.ones(1)}, tmp_path / "w.safetensors")
    assert read_weights(str(tmp_path), "w.pt").keys() == {"a"}
