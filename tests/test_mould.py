"""Copies of models are the models, and nobody else's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import ModelMixin, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel, PreTrainedModel

from align.policy.policy import LoRA, Policy
from tests.mould import Mould, each_folder_read_once
from tests.pipelines import Build

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_a_copy_is_the_model_and_shares_nothing(tiny: Build, kind: str) -> None:
    policy = Policy(tiny(kind), LoRA(2))
    tied = nn.ModuleDict({"one": nn.Linear(2, 2), "other": nn.Linear(2, 2)})
    tied["other"].weight = tied["one"].weight
    mould = Mould((policy, tied))
    one, other = mould.copy(), mould.copy()
    before, state, theirs = (each[0].denoiser.state_dict() for each in ((policy,), one, other))
    assert list(before) == list(state) and all(before[name].equal(state[name]) for name in before)
    assert one[1]["one"].weight is one[1]["other"].weight
    for parameter in one[0].denoiser.parameters():
        parameter.data.add_(1)
    assert all(before[name].equal(theirs[name]) for name in before)


def test_a_folder_is_read_again_where_a_byte_or_a_word_is_another(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    tiny = UNet2DConditionModel.from_pretrained(tiny_folders["epsilon"], subfolder="unet")
    tiny.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    with each_folder_read_once(ModelMixin):
        models = [UNet2DConditionModel.from_pretrained(tmp_path) for _ in range(4)]
        assert len({id(model.conv_in.weight) for model in models}) == 4
        assert all(model.conv_in.weight.equal(tiny.conv_in.weight) for model in models)
        save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
        assert UNet2DConditionModel.from_pretrained(tmp_path).conv_in.weight.equal(tiny.conv_in.weight + 1)
        assert UNet2DConditionModel.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_copy_from_another_place_names_that_place(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    """Also where the one was read as a path and the other as a string."""
    with each_folder_read_once(ModelMixin), each_folder_read_once(PreTrainedModel):
        for place in ("one", "two", "three"):
            shutil.copytree(tiny_folders["epsilon"], tmp_path / place)
            for asked in (tmp_path / place, str(tmp_path / place)):
                unet = UNet2DConditionModel.from_pretrained(asked, subfolder="unet")
                encoder = CLIPTextModel.from_pretrained(asked, subfolder="text_encoder")
                assert unet.config["_name_or_path"] == asked
                assert encoder.config._name_or_path == encoder.name_or_path == str(asked)
                assert unet.conv_in.weight.equal(load_file(tmp_path / place / UNET)["conv_in.weight"])
        file = tmp_path / "three" / UNET
        save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
        other = UNet2DConditionModel.from_pretrained(str(tmp_path / "three"), subfolder="unet")
        assert other.conv_in.weight.equal(unet.conv_in.weight + 1)
