"""A LoRA keeps its strength on the way to a pruned pipeline, whoever wrote it and however it is given."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from align.common.errors import UserError
from align.families import LORA_FILE, read_lora
from pruning import quantize
from pruning.graph import BlockGraph
from pruning.lora_remap import remap_lora
from pruning.settings import Compress

DROP = ("transformer_blocks.0",)
RANK, ALPHA = 2, 8.0


@pytest.fixture
def pipe(tiny_folders: dict[str, Path]) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline.from_pretrained(tiny_folders["flow"])


@pytest.fixture
def forms(tiny_folders: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """One LoRA with alpha 8 of rank 2 as every tool writes it."""
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny_folders["flow"])
    pipe.transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["to_q", "to_k", "ff.net.2"]))
    g = torch.Generator().manual_seed(5)
    for name, parameter in pipe.transformer.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=g) * 0.2
    layers = get_peft_model_state_dict(pipe.transformer)
    settings = pipe.transformer.peft_config["default"].to_dict()
    settings["target_modules"] = sorted(settings["target_modules"])
    run, peft, kohya = tmp_path / "run", tmp_path / "peft", tmp_path / "kohya"
    pipe.save_lora_weights(run, layers, transformer_lora_adapter_metadata=settings)
    peft.mkdir(), kohya.mkdir()
    save_file({f"base_model.model.{name}": t for name, t in layers.items()}, peft / "adapter_model.safetensors")
    (peft / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA}))
    save_file(as_kohya(layers), kohya / "style.safetensors")
    return {"folder": run, "file": run / LORA_FILE, "peft": peft, "kohya": kohya}


def as_kohya(layers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = {}
    for name, tensor in layers.items():
        module, part = name.removesuffix(".weight").rsplit(".", 1)
        stem = "lora_transformer_" + module.replace(".", "_")
        tensors[f"{stem}.{'lora_down' if part == 'lora_A' else 'lora_up'}.weight"] = tensor.contiguous().clone()
        tensors[f"{stem}.alpha"] = torch.tensor(ALPHA)
    return tensors


def deltas(path: Path) -> dict[str, Tensor]:
    """alpha / r · B · A by module, from the tensors that the run saved."""
    state = load_file(path)
    return {
        key.removeprefix("transformer.").removesuffix(".lora_A.weight"): ALPHA
        / RANK
        * (state[key.replace("lora_A", "lora_B")] @ state[key])
        for key in state
        if "lora_A" in key
    }


def given(form: str, forms: Mapping[str, Path], pipe: Any) -> Any:
    """What a user holds in his hand."""
    if form == "tensors with alpha":
        state = load_file(forms["file"])
        return state | {key.replace(".lora_A.weight", ".alpha"): torch.tensor(ALPHA) for key in state if "_A" in key}
    if form == "older tensors with alpha":
        state = given("tensors with alpha", forms, pipe)
        return {k.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): tensor for k, tensor in state.items()}
    return read_lora(forms[form], pipe) if form in ("peft", "kohya") else forms[form]


@pytest.mark.parametrize("form", ["folder", "file", "peft", "kohya", "tensors with alpha", "older tensors with alpha"])
def test_a_remapped_lora_moves_the_pruned_model_as_it_moved_the_whole(
    form: str, forms: dict[str, Path], pipe: StableDiffusion3Pipeline
) -> None:
    graph = BlockGraph.of(pipe.transformer)
    moved, before = graph.moved(DROP), {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    state = remap_lora(given(form, forms, pipe), moved, allow_lost=True)
    graph.remove(DROP)
    pipe.load_lora_weights(state)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    after = pipe.transformer.state_dict()
    kept = {name: d for name, d in deltas(forms["file"]).items() if not name.startswith(f"{DROP[0]}.")}
    assert len(kept) >= 4
    for name, delta in kept.items():
        block = f"transformer_blocks.{int(name.split('.')[1]) - 1}." + name.split(".", 2)[2]
        torch.testing.assert_close(after[f"{block}.weight"] - before[f"{name}.weight"], delta, rtol=1e-4, atol=1e-5)


def test_an_alpha_without_its_layer_is_refused() -> None:
    with pytest.raises(UserError, match=r"to_q\.alpha has no A and B"):
        remap_lora({"transformer.transformer_blocks.1.attn.to_q.alpha": torch.tensor(4.0)}, {})


@pytest.mark.parametrize("form", ["folder", "file", "peft", "kohya"])
def test_every_form_is_merged_at_its_strength(
    form: str, forms: dict[str, Path], pipe: StableDiffusion3Pipeline
) -> None:
    assert not any("weights" in text for text in problems(Compress(blocks="1", weights=forms[form])))
    before = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    quantize.merge_lora(pipe, forms[form])
    assert type(pipe.transformer.transformer_blocks[1].attn.to_q) is nn.Linear
    after = pipe.transformer.state_dict()
    for name, delta in deltas(forms["file"]).items():
        torch.testing.assert_close(after[f"{name}.weight"] - before[f"{name}.weight"], delta, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("what", ["nowhere", "empty", "several", "pickle", "cut", "NaN", "other model"])
def test_a_lora_that_cannot_be_merged_is_refused_in_a_line(
    what: str, forms: dict[str, Path], pipe: StableDiffusion3Pipeline, tmp_path: Path
) -> None:
    folder, state = tmp_path / what, load_file(forms["file"])
    if what != "nowhere":
        folder.mkdir()
    if what == "several":
        save_file(state, folder / "a.safetensors"), save_file(state, folder / "b.safetensors")
    elif what == "pickle":
        (folder / "my_lora.bin").write_bytes(b"\x80\x04N.")
    elif what == "cut":
        (folder / LORA_FILE).write_bytes(forms["file"].read_bytes()[:-9])
    elif what == "NaN":
        save_file({key: tensor * float("nan") for key, tensor in state.items()}, folder / LORA_FILE)
    elif what == "other model":
        save_file({k.replace("transformer_blocks", "layers"): t for k, t in state.items()}, folder / LORA_FILE)
    with pytest.raises(UserError) as error:
        quantize.merge_lora(pipe, folder)
    assert "\n" not in str(error.value) and what in str(error.value)
    said = [text for text in problems(Compress(blocks="1", weights=folder)) if "weights" in text]
    assert bool(said) == (what in ("nowhere", "empty", "several", "pickle"))


def problems(config: Compress) -> list[str]:
    try:
        config.check()
    except UserError as error:
        return str(error).split("; ")
    return []
