"""Torch files are converted, never read by the packages; what is no state dict is refused unread."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub.errors import RemoteEntryNotFoundError
from safetensors.torch import load_file, save_file

from rewards.models.network import TorchFileError, find, read_weights
from scripts.convert_weights import main

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("package", ["rewards", "align", "pruning"])
def test_no_package_unpickles(package: str) -> None:
    files = [file for file in (ROOT / package).rglob("*.py") if "scripts" not in file.parts]
    assert files
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert "torch.load(" not in text and "import pickle" not in text, file


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


def test_a_torch_file_names_the_command_that_converts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "w.pt").touch()
    for source in (tmp_path, tmp_path / "w.pt"):
        with pytest.raises(TorchFileError, match=rf"`python scripts/convert_weights.py state {tmp_path}/w.pt`"):
            find(str(source), "w.pt")
    asked = []

    def download(source: str, name: str) -> str:
        asked.append(name)
        raise RemoteEntryNotFoundError("none", response=Mock())

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(TorchFileError, match="state owner/name/w.pt`"):
        find("owner/name", "w.pt")
    assert asked == ["w.safetensors"]  # gigabytes that cannot be read are not fetched
    save_file({"a": torch.ones(1)}, tmp_path / "w.safetensors")
    assert read_weights(str(tmp_path), "w.pt").keys() == {"a"}
