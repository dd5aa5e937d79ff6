"""What ``align.export`` writes is what was trained, by the rules of whoever reads it.

The rules are facts of the readers' own code: ComfyUI ``comfy/lora.py`` and ``comfy/utils.py`` (ec93dca, 09708ea:
which names it maps, to which rows of which weight; ``{key}.alpha`` or 1), ``networks/lora*.py`` of kohya-ss/sd-scripts
(48d368f) and kohya-ss/musubi-tuner (30c658c: ``lora_unet_`` and the module's path, alpha / rank). None of it is copied.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from align import export, families
from align.common.errors import UserError
from align.families.lora_file import LoRAFile, read_lora
from align.families.lora_formats import Target, header, readers, tensors_for, write
from align.families.lora_layers import LoRALayer, fuse, split
from align.families.original_names import originals
from align.families.single_file import checkpoint
from align.policy.policy import LoRA, Policy
from align.shapes.scripts import pretrain
from tests import tiny_families
from tests.mould import Mould
from tests.pipelines import Build, tiny_sd, tiny_sd3, tokenizers
from tests.test_policy import disturb

RANK = 4
FACTORS = [2.0, *(pytest.param(factor, marks=pytest.mark.slow) for factor in (0.5, 1.0))]  # alpha / rank
BUILD: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd": lambda: tiny_sd().pipe,
    "sd3": lambda: tiny_sd3(dual=(0,)).pipe,
    **{name: tiny_families.BUILD[name] for name in ("sdxl", "flux-dev", "flux2-dev", "flux2-klein", "qwen-image")},
    **{name: tiny_families.BUILD[name] for name in ("z-image", "sana", "chroma", "lumina2", "pixart-sigma")},
}


@functools.cache
def _mould(name: str) -> Mould:
    pipe = BUILD[name]()
    return Mould(pipe, tokenizers(pipe))


def built(name: str) -> DiffusionPipeline:
    """One of one's own, at a fifth of what it takes to build."""
    pipe: DiffusionPipeline = _mould(name).copy()
    return pipe


# of the layers that are trained: diffusers' path, the original's, and in which order several are its rows
QKV = ("to_q", "to_k", "to_v")
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
FLUX = [
    (r"transformer_blocks\.(\d+)\.attn\.(to_[qkv])", "double_blocks.{}.img_attn.qkv", QKV),
    (r"transformer_blocks\.(\d+)\.attn\.(add_[qkv]_proj)", "double_blocks.{}.txt_attn.qkv", ADDED),
    (r"transformer_blocks\.(\d+)\.attn\.(to_out\.0)", "double_blocks.{}.img_attn.proj", ()),
    (r"transformer_blocks\.(\d+)\.attn\.(to_add_out)", "double_blocks.{}.txt_attn.proj", ()),
]
SINGLE = (*QKV, "proj_mlp")
TABLES: dict[str, list[tuple[str, str, tuple[str, ...]]]] = {
    "SD3Transformer2DModel": [
        (r"transformer_blocks\.(\d+)\.attn\.(to_[qkv])", "joint_blocks.{}.x_block.attn.qkv", QKV),
        (r"transformer_blocks\.(\d+)\.attn2\.(to_[qkv])", "joint_blocks.{}.x_block.attn2.qkv", QKV),
        (r"transformer_blocks\.(\d+)\.attn\.(add_[qkv]_proj)", "joint_blocks.{}.context_block.attn.qkv", ADDED),
        (r"transformer_blocks\.(\d+)\.attn\.(to_out\.0)", "joint_blocks.{}.x_block.attn.proj", ()),
        (r"transformer_blocks\.(\d+)\.attn2\.(to_out\.0)", "joint_blocks.{}.x_block.attn2.proj", ()),
        (r"transformer_blocks\.(\d+)\.attn\.(to_add_out)", "joint_blocks.{}.context_block.attn.proj", ()),
        (r"transformer_blocks\.(\d+)\.ff\.(net\.0\.proj)", "joint_blocks.{}.x_block.mlp.fc1", ()),
    ],
    "FluxTransformer2DModel": [
        *FLUX,
        (r"single_transformer_blocks\.(\d+)\.(?:attn\.)?(to_[qkv]|proj_mlp)", "single_blocks.{}.linear1", SINGLE),
        (r"single_transformer_blocks\.(\d+)\.(proj_out)", "single_blocks.{}.linear2", ()),
    ],
    "Flux2Transformer2DModel": [
        *FLUX,
        (r"single_transformer_blocks\.(\d+)\.attn\.(to_qkv_mlp_proj)", "single_blocks.{}.linear1", ()),
        (r"single_transformer_blocks\.(\d+)\.attn\.(to_out)", "single_blocks.{}.linear2", ()),
    ],
    "Lumina2Transformer2DModel": [
        (rf"{where}\.(\d+)\.attn\.({layer})", where + ".{}.attention." + name, order)
        for where in ("layers", "noise_refiner", "context_refiner")
        for layer, name, order in (("to_[qkv]", "qkv", QKV), (r"to_out\.0", "out", ()))
    ],
    "ZImageTransformer2DModel": [
        (rf"{where}\.(\d+)\.attention\.({layer})", where + ".{}.attention." + name, order)
        for where in ("layers", "noise_refiner", "context_refiner")
        for layer, name, order in (("to_[qkv]", "qkv", QKV), (r"to_out\.0", "out", ()))
    ],
    "PixArtTransformer2DModel": [
        (r"transformer_blocks\.(\d+)\.attn1\.(to_[qkv])", "blocks.{}.attn.qkv", QKV),
        (r"transformer_blocks\.(\d+)\.attn2\.(to_q)", "blocks.{}.cross_attn.q_linear", ()),
        (r"transformer_blocks\.(\d+)\.attn2\.(to_[kv])", "blocks.{}.cross_attn.kv_linear", ("to_k", "to_v")),
        (r"transformer_blocks\.(\d+)\.attn1\.(to_out\.0)", "blocks.{}.attn.proj", ()),
        (r"transformer_blocks\.(\d+)\.attn2\.(to_out\.0)", "blocks.{}.cross_attn.proj", ()),
    ],
}
TABLES["ChromaTransformer2DModel"] = TABLES["FluxTransformer2DModel"]
KOHYA_KEEPS = ("UNet2DConditionModel", "QwenImageTransformer2DModel", "ZImageTransformer2DModel")  # diffusers' names


def denoiser_of(pipe: DiffusionPipeline) -> str:
    return "unet" if "unet" in pipe.components else "transformer"


def network_of(pipe: DiffusionPipeline) -> nn.Module:
    return getattr(pipe, denoiser_of(pipe))


def modules_of(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def lora_for(pipe: DiffusionPipeline, factor: float = 1.0, without: tuple[str, ...] = ()) -> LoRAFile:
    """A LoRA of alpha = factor * rank on what the family trains, but what ends like ``without``."""
    targets = families.of(pipe, "tiny").lora_targets or ("to_q", "to_k", "to_v", "to_out.0")
    name, generator = denoiser_of(pipe), torch.Generator().manual_seed(7)
    layers = {}
    for path, module in network_of(pipe).named_modules():
        if isinstance(module, nn.Linear) and f".{path}".endswith(tuple(f".{t}" for t in targets)):
            if path.endswith(without):
                continue
            a = torch.randn(RANK, module.in_features, generator=generator)
            b = torch.randn(module.out_features, RANK, generator=generator)
            layers[f"{name}.{path}"] = LoRALayer(a, b, factor)
    return LoRAFile(Path("made.safetensors"), layers)


def rows_in(network: nn.Module) -> dict[str, tuple[str, int, int]]:
    """Where ComfyUI and kohya have the rows of each diffusers layer: weight, first row, height of the weight."""
    found: dict[str, dict[int, tuple[str, int]]] = {}
    for path, module in network.named_modules():
        for pattern, original, order in TABLES.get(type(network).__name__, []):
            if (match := re.fullmatch(pattern, path)) and isinstance(module, nn.Linear):
                slot = order.index(match[2]) if order else 0
                found.setdefault(original.format(match[1]), {})[slot] = path, module.out_features
    rows = {}
    for original, slots in found.items():
        first = 0
        for slot in sorted(slots):
            path, height = slots[slot]
            rows[path] = original, first, sum(height for _, height in slots.values())
            first += height
    return rows


def expected(file: LoRAFile, pipe: DiffusionPipeline, plain: bool) -> dict[str, Tensor]:
    """What the LoRA adds to each original weight, or to each of diffusers' where those names are kept (``plain``)."""
    rows, found = rows_in(network_of(pipe)), {}
    for name, layer in file.of(denoiser_of(pipe)).items():
        delta = layer.scale * layer.B @ layer.A
        weight, first, height = (name, 0, len(delta)) if plain else rows[name]
        found.setdefault(weight, torch.zeros(height, delta.shape[1]))[first : first + len(delta)] += delta
    return found


def read_as(program: Target, state: Mapping[str, Tensor], network: nn.Module, plain: bool) -> dict[str, Tensor]:
    """What ``program`` adds to its weights; every tensor of the file has to have found a place."""
    rows = rows_in(network)
    known: dict[str, tuple[str, int, int]] = {}
    paths = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)]
    for path in paths:
        at = (path, 0, 0) if plain else rows.get(path)
        if at is not None and program == "comfyui":
            known[f"transformer.{path}"] = at
        if plain:
            known[f"lora_unet_{path.replace('.', '_')}"] = path, 0, 0
    if not plain:
        known |= {f"lora_unet_{original.replace('.', '_')}": (original, 0, 0) for original, _, _ in rows.values()}
    found: dict[str, Tensor] = {}
    used: set[str] = set()
    for key, (weight, first, height) in known.items():
        for up, down in (("lora_up", "lora_down"), ("lora_B", "lora_A")):
            b, a = state.get(f"{key}.{up}.weight"), state.get(f"{key}.{down}.weight")
            if a is None or b is None:
                continue
            used |= {f"{key}.{up}.weight", f"{key}.{down}.weight", f"{key}.alpha"}
            scale = state[f"{key}.alpha"].item() / len(a) if f"{key}.alpha" in state else 1.0
            whole = found.setdefault(weight, torch.zeros(height or len(b), a.shape[1]))
            whole[first : first + len(b)] += scale * b @ a
    assert state.keys() <= used, f"not loaded: {sorted(state.keys() - used)[:3]}"
    return found


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-4, rtol=1e-5)


PROGRAMS = [(name, program) for name in BUILD for program in ("comfyui", "kohya") if name != "sana"]
PROGRAMS.remove(("pixart-sigma", "kohya"))


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize(("name", "program"), PROGRAMS)
def test_a_program_adds_what_was_trained(name: str, program: Target, factor: float) -> None:
    pipe = built(name)
    network, file = network_of(pipe), lora_for(pipe, factor)
    state = tensors_for(program, file, modules_of(pipe), denoiser_of(pipe))
    kind = type(network).__name__
    plain = kind not in TABLES or (program == "kohya" and kind in KOHYA_KEEPS)
    if name == "sdxl":  # of which only names are special, see below
        back = {path.replace(".", "_"): path for path, _ in network.named_modules()}
        names = {o.name.replace(".", "_"): back[o.parts[0].replace(".", "_")] for o in originals(network)}
        state = {_renamed(key, names): tensor for key, tensor in state.items()}
    same(read_as(program, state, network, plain), expected(file, pipe, plain))


def _renamed(key: str, names: Mapping[str, str]) -> str:
    name, _, part = key.removeprefix("lora_unet_").partition(".")
    return f"lora_unet_{names[name].replace('.', '_')}.{part}"


STOCK = [("diffusers", name) for name in BUILD if name != "pixart-sigma"]
# of FLUX.1 stock diffusers knows the published width alone
STOCK += [("kohya", name) for name in ("sd", "sdxl", "flux2-dev", "qwen-image", "z-image")]


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize(("target", "name"), STOCK)
def test_stock_diffusers_reads_it_from_tensors_alone(target: Target, name: str, factor: float) -> None:
    pipe = built(name)
    file, network = lora_for(pipe, factor), network_of(pipe)
    before = {path: network.get_submodule(path).weight.clone() for path in file.of(denoiser_of(pipe))}
    pipe.load_lora_weights(tensors_for(target, file, modules_of(pipe), denoiser_of(pipe)))
    pipe.fuse_lora()
    for path, layer in file.of(denoiser_of(pipe)).items():
        weight = network.get_submodule(path).base_layer.weight
        torch.testing.assert_close(weight, before[path] + layer.delta(), atol=1e-4, rtol=1e-5)


# and back
SOME = [("sd3", "kohya"), ("flux-dev", "kohya"), ("lumina2", "comfyui")]  # of what fuses, with layers missing


@pytest.mark.parametrize(
    ("name", "program", "without"),
    [*((*each, ()) for each in PROGRAMS), *((*each, gone) for each in SOME for gone in (("to_k",), ("to_q", "to_k")))],
)
def test_there_and_back_is_the_same_lora(name: str, program: Target, without: tuple[str, ...], tmp_path: Path) -> None:
    pipe = built(name)
    file = lora_for(pipe, 1.5, without)
    state = tensors_for(program, file, modules_of(pipe), denoiser_of(pipe))
    write(tmp_path / "a.safetensors", state, {})
    again = read_lora(tmp_path / "a.safetensors", pipe)
    assert again.layers.keys() == file.layers.keys()
    for path, layer in again.layers.items():
        own = file.layers[path] if program == "kohya" or layer.scale != 1.0 else file.layers[path].folded()
        assert layer.scale == own.scale and torch.equal(layer.A, own.A) and torch.equal(layer.B, own.B)
    twice = tensors_for(program, again, modules_of(pipe), denoiser_of(pipe))
    assert twice.keys() == state.keys() and all(torch.equal(twice[key], state[key]) for key in state)


@pytest.mark.parametrize("name", ["sd3", "flux-dev", "lumina2", "flux2-dev", "chroma"])
def test_a_lora_that_kohya_trained_is_read_and_written_as_it_was(name: str, tmp_path: Path) -> None:
    """One A for q, k and v together, and a dense B."""
    pipe = built(name)
    generator, state = torch.Generator().manual_seed(1), {}
    for original, _, height in rows_in(network_of(pipe)).values():
        flat = f"lora_unet_{original.replace('.', '_')}"
        width = next(o for o in originals(network_of(pipe)) if o.name == original).parts[0]
        inputs = network_of(pipe).get_submodule(width).in_features
        state[f"{flat}.lora_down.weight"] = torch.randn(RANK, inputs, generator=generator)
        state[f"{flat}.lora_up.weight"] = torch.randn(height, RANK, generator=generator)
        state[f"{flat}.alpha"] = torch.tensor(2.0)
    save_file(state, tmp_path / "theirs.safetensors")
    file = read_lora(tmp_path / "theirs.safetensors", pipe)
    assert {layer.rank for layer in file.layers.values()} == {RANK}
    same(expected(file, pipe, False), read_as("kohya", state, network_of(pipe), False))
    again = tensors_for("kohya", file, modules_of(pipe), denoiser_of(pipe))
    assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)


def test_a_fused_layer_of_another_size_is_refused(tmp_path: Path) -> None:
    pipe = built("sd3")
    state = tensors_for("kohya", lora_for(pipe), modules_of(pipe), "transformer")
    key = "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight"
    save_file({**state, key: torch.ones(7, 3 * RANK)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="attn_qkv has 7 rows, and .*to_q, .*to_v have 48 together"):
        read_lora(tmp_path / "a.safetensors", pipe)
    twice = {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(1, 16)}
    twice["transformer.transformer_blocks.0.attn.to_q.lora_B.weight"] = torch.ones(16, 1)
    save_file(state | twice, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="two layers for transformer.transformer_blocks.0.attn.to_q"):
        read_lora(tmp_path / "a.safetensors", pipe)


@pytest.mark.parametrize("rows", [(3, 3, 3), (5, 2, 2), (4, 4, 4, 16)])
@pytest.mark.parametrize("kind", ["dense", "diagonal", "without the second", "zero", "sparse"])
def test_splitting_is_exact(rows: tuple[int, ...], kind: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def made(height: int) -> LoRALayer:
        return LoRALayer(torch.randn(3, 6, generator=generator), torch.randn(height, 3, generator=generator), 0.7)

    layers: list[LoRALayer | None] = [made(height) for height in rows]
    if kind == "without the second":
        layers[1] = None
    whole = fuse(layers, rows)
    if kind in ("dense", "sparse"):
        a, b = torch.randn(4, 6, generator=generator), torch.randn(sum(rows), 4, generator=generator)
        whole = LoRALayer(a, b * (b > 1) if kind == "sparse" else b, 0.7)
    if kind == "zero":
        whole = LoRALayer(whole.A, torch.zeros_like(whole.B), 0.7)
    parts = split(whole, rows)
    stacked = [part.delta() if part else torch.zeros(height, 6) for part, height in zip(parts, rows, strict=True)]
    torch.testing.assert_close(torch.cat(stacked), whole.delta(), atol=1e-6, rtol=0)
    if kind in ("diagonal", "without the second"):
        for part, layer in zip(parts, layers, strict=True):
            assert (part is None) == (layer is None)
            assert part is None or (torch.equal(part.A, layer.A) and torch.equal(part.B, layer.B))


@pytest.mark.parametrize("name", ["sd3", "flux-dev"])
def test_scale_and_shift_change_places(name: str, tmp_path: Path) -> None:
    """diffusers' last norm reads (scale, shift), the originals' (shift, scale)."""
    pipe = built(name)
    module = network_of(pipe).get_submodule("norm_out.linear")
    b = torch.cat([torch.ones(module.out_features // 2, 1), torch.zeros(module.out_features // 2, 1)])
    layer = LoRALayer(torch.ones(1, module.in_features), b, 1.0)
    file = LoRAFile(Path("made"), {"transformer.norm_out.linear": layer})
    state = tensors_for("kohya", file, modules_of(pipe), "transformer")
    assert torch.equal(state["lora_unet_final_layer_adaLN_modulation_1.lora_up.weight"], b.flip(0))
    write(tmp_path / "a.safetensors", state, {})
    (again,) = read_lora(tmp_path / "a.safetensors", pipe).layers.values()
    assert torch.equal(again.B, b)


def test_scales_that_differ_are_folded_once_and_in_float32() -> None:
    a, b = torch.ones(2, 3, dtype=torch.float16), torch.ones(2, 2, dtype=torch.float16)
    whole = fuse([LoRALayer(a, b, 0.5), LoRALayer(2 * a, b, 2.0)], [2, 2])
    assert whole.scale == 1.0 and whole.B.dtype == torch.float16
    assert whole.delta().tolist() == [[1.0] * 3] * 2 + [[8.0] * 3] * 2


# names
def test_names_in_sdxl_as_everybody_knows_them() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            use_linear_projection=True,
        )
    names = {o.parts[0]: o.name for o in originals(unet)}
    assert names["down_blocks.1.attentions.0.proj_in"] == "input_blocks.4.1.proj_in"
    assert names["down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k"] == (
        "input_blocks.8.1.transformer_blocks.9.attn2.to_k"
    )
    assert names["down_blocks.0.downsamplers.0.conv"] == "input_blocks.3.0.op"
    assert names["mid_block.resnets.1.conv2"] == "middle_block.2.out_layers.3"
    assert names["up_blocks.1.attentions.2.proj_out"] == "output_blocks.5.1.proj_out"
    assert names["up_blocks.0.upsamplers.0.conv"] == "output_blocks.2.2.conv"
    assert names["up_blocks.2.resnets.2.conv_shortcut"] == "output_blocks.8.0.skip_connection"
    assert names["add_embedding.linear_2"] == "label_emb.0.2"
    assert readers(unet).version == "sdxl_base_v1-0"
    weights = {key.rpartition(".")[0] for key in unet.state_dict()}
    assert weights == names.keys() & weights, sorted(weights - names.keys())[:3]


@pytest.mark.parametrize("spelled", ["diffusion_model.{}", "lycoris_{}", "{}", "base_model.model.{}"])
def test_other_tools_spellings_are_read(spelled: str, tmp_path: Path) -> None:
    pipe = built("flux2-dev")
    file, state = lora_for(pipe), {}
    for name, layer in file.of("transformer").items():
        key = spelled.format(name.replace(".", "_") if spelled.startswith("lycoris") else name)
        state |= {f"{key}.lora_A.default.weight": layer.A, f"{key}.lora_B.default.weight": layer.B}
        state[f"{key}.alpha"] = torch.tensor(2.0)
    save_file(state, tmp_path / "other.safetensors")
    again = read_lora(tmp_path / "other.safetensors", pipe)
    assert again.layers.keys() == file.layers.keys()
    assert {layer.scale for layer in again.layers.values()} == {2.0 / RANK}


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux-dev"])
def test_layers_of_text_encoders_go_there_and_back(name: str, tmp_path: Path) -> None:
    pipe = built(name)
    file, width = lora_for(pipe), 0
    encoders = {}
    for component, part in modules_of(pipe).items():
        if component.startswith("text_encoder"):
            path = next(p for p, m in part.named_modules() if p.endswith(("q_proj", "SelfAttention.q")))
            inputs, width = part.get_submodule(path).in_features, part.get_submodule(path).out_features
            encoders[f"{component}.{path}"] = LoRALayer(torch.ones(2, inputs), torch.ones(width, 2), 0.5)
    both = LoRAFile(file.path, {**file.layers, **encoders})
    state = tensors_for("kohya", both, modules_of(pipe), denoiser_of(pipe))
    numbers = {key.split("_text_model")[0].split("_encoder_block")[0] for key in state if key.startswith("lora_te")}
    assert (
        numbers
        == {
            "sd": {"lora_te"},
            "sdxl": {"lora_te1", "lora_te2"},
            "sd3": {"lora_te1", "lora_te2"},
            "flux-dev": {"lora_te1", "lora_te3"},
        }[name]
    )
    write(tmp_path / "both.safetensors", state, {})
    assert read_lora(tmp_path / "both.safetensors", pipe).layers.keys() == both.layers.keys()


def test_a_layer_of_a_text_encoder_is_found_with_and_without_text_model(tiny: Build, tmp_path: Path) -> None:
    pipe = tiny("epsilon").pipe
    for spelled in ("text_encoder.text_model.encoder", "text_encoder.encoder"):
        state = {
            f"{spelled}.layers.0.self_attn.q_proj.lora_{part}.weight": torch.ones(shape)
            for part, shape in (("A", (2, 96)), ("B", (96, 2)))
        }
        save_file(state, tmp_path / "te.safetensors")
        (name,) = read_lora(tmp_path / "te.safetensors", pipe).layers
        assert pipe.text_encoder.get_submodule(name.removeprefix("text_encoder."))


# the command
def run_of(folder: Path, base: Path, factor: float = 2.0) -> Path:
    """A run folder whose every layer has moved, as training leaves one."""
    policy = Policy(families.load(str(base)), LoRA(RANK, factor * RANK))
    disturb(policy, 0.5)
    policy.save(folder)
    (folder / "config.yaml").write_text(f"pretrained_model_name_or_path: {base}\n")
    return folder


def told(*words: object) -> int:
    return export.main([str(word) for word in words])


def drawn(pipe: DiffusionPipeline, **arguments: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    size = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "pt"} | arguments
    return torch.as_tensor(pipe(prompt="two red stars", generator=generator, **size).images)


@pytest.mark.parametrize("kind", ["epsilon", pytest.param("flow", marks=pytest.mark.slow)])
def test_the_command_writes_what_others_draw_alike(kind: str, tiny_folders: Mapping[str, Path], tmp_path: Path) -> None:
    """Tensors alone, whose reader takes alpha for the rank, draw what diffusers draws with the header's alpha."""
    base, run = tiny_folders[kind], run_of(tmp_path / "run", tiny_folders[kind])
    stock = DiffusionPipeline.from_pretrained(base)
    before = drawn(stock)
    stock.load_lora_weights(run)
    right = drawn(stock)
    assert (right - before).abs().max() > 1e-2
    for program in ("diffusers", "kohya", "comfyui"):
        out = tmp_path / f"{program}.safetensors"
        assert told(run, "--to", program, "--output", out) == 0
        pipe = DiffusionPipeline.from_pretrained(base)
        if program == "diffusers":
            pipe.load_lora_weights(load_file(out))
        else:
            families.load_lora(pipe, out, denoiser_of(pipe))
        torch.testing.assert_close(drawn(pipe), right, atol=1e-4, rtol=0)
        again = tmp_path / "again.safetensors"
        assert told(out, "--to", "diffusers", "--output", again, "--pretrained_model_name_or_path", base) == 0
        assert load_file(again).keys() == load_file(tmp_path / "diffusers.safetensors").keys()


def test_a_run_starts_from_kohyas_file_where_it_left_off(tiny_folders: Mapping[str, Path], tmp_path: Path) -> None:
    base, run = tiny_folders["flow"], run_of(tmp_path / "run", tiny_folders["flow"])
    assert told(run, "--to", "kohya", "--output", tmp_path / "k.safetensors") == 0
    right = Policy(families.load(str(base)), LoRA(RANK), initial=run).parameters()
    found = Policy(families.load(str(base)), LoRA(RANK), initial=tmp_path / "k.safetensors").parameters()
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


def test_the_header_is_kohyas(tiny_folders: Mapping[str, Path], tmp_path: Path) -> None:
    run, out = run_of(tmp_path / "run", tiny_folders["v"]), tmp_path / "mine.safetensors"
    assert told(run, "--to", "kohya", "--output", out) == 0
    with safe_open(out, "pt") as file:
        said = file.metadata()
    assert said["ss_network_dim"] == "4" and float(said["ss_network_alpha"]) == 8.0
    assert said["ss_network_module"] == "networks.lora" and said["ss_base_model_version"] == "sd_v1"
    assert said["modelspec.architecture"] == "stable-diffusion-v1/lora" and said["modelspec.title"] == "mine"
    data = out.read_bytes()
    body = data[8 + int.from_bytes(data[:8], "little") :]
    assert said["sshs_model_hash"] == hashlib.sha256(body).hexdigest()
    assert told(run, "--to", "diffusers", "--output", out) == 0
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"format": "pt"}  # an alpha there would count once more


def test_networks_are_called_what_kohya_calls_them() -> None:
    said = {name: readers(network_of(built(name))) for name in BUILD}
    assert (said["sd3"].version, said["sd3"].architecture) == ("5-medium", "stable-diffusion-3-5-medium")
    assert (said["flux-dev"].module, said["flux-dev"].architecture) == ("networks.lora_flux", "flux-1-dev")
    assert said["flux2-dev"].version == "flux_2_dev" and said["flux2-klein"].version == "flux_2_klein_4b"
    assert said["lumina2"].version == "lumina2" and said["chroma"].version == "chroma"
    ranks = LoRAFile(Path("x"), {str(k): LoRALayer(torch.ones(k, 2), torch.ones(2, k), 1.0) for k in (1, 2)})
    assert header("kohya", ranks, said["sd"], "x")["ss_network_dim"] == "Dynamic"


def wide(pipe: DiffusionPipeline, width: int = 32, act: str = "quick_gelu", name: str = "text_encoder") -> None:
    """Another text encoder for ``pipe``, of another width or activation."""
    old = getattr(pipe, name)
    config = copy.deepcopy(old.config)
    config.hidden_size, config.intermediate_size, config.hidden_act = width, 2 * width, act
    config.num_attention_heads, config.projection_dim = 2, width
    pipe.register_modules(**{name: type(old)(config)})


def sd1() -> DiffusionPipeline:
    return tiny_sd().pipe


def sd2() -> DiffusionPipeline:
    pipe = tiny_sd("v_prediction").pipe
    wide(pipe, 96, "gelu")
    return pipe


def sdxl() -> DiffusionPipeline:
    pipe = built("sdxl")
    wide(pipe, 32)
    pipe.text_encoder_2.config.projection_dim = 64
    pipe.unet = UNet2DConditionModel.from_config(dict(pipe.unet.config) | {"cross_attention_dim": 96})
    return pipe


def sd3() -> DiffusionPipeline:
    pipe = tiny_sd3(dual=(0,)).pipe
    wide(pipe, 32)
    pipe.text_encoder.text_projection.weight.data = torch.eye(32)
    t5 = pretrain.silent_t5(128)
    t5.encoder.final_layer_norm.weight.data += 1
    pipe.register_modules(text_encoder_3=t5, tokenizer_3=pretrain.new_sd3(pipe.vae, pipe.tokenizer).tokenizer_3)
    return pipe


@pytest.mark.parametrize("build", [sd1, pytest.param(sd2, marks=pytest.mark.slow), sdxl, sd3])
def test_a_single_file_is_read_back_by_stock_diffusers(build: Callable[[], DiffusionPipeline], tmp_path: Path) -> None:
    torch.manual_seed(0)
    pipe = build()
    pipe.save_pretrained(tmp_path / "base")
    write(tmp_path / "one.safetensors", checkpoint(pipe), {})
    again = type(pipe).from_single_file(str(tmp_path / "one.safetensors"), config=str(tmp_path / "base"))
    assert modules_of(again).keys() == modules_of(pipe).keys()
    for name, part in modules_of(pipe).items():
        theirs = modules_of(again)[name].state_dict()
        for key, tensor in part.state_dict().items():
            assert torch.equal(theirs[key], tensor), f"{name}.{key}"


@pytest.mark.parametrize(
    "trained", ["lora", *(pytest.param(w, marks=pytest.mark.slow) for w in ("every weight", "pipeline"))]
)
def test_what_was_trained_is_merged(trained: str, tiny_folders: Mapping[str, Path], tmp_path: Path) -> None:
    base, run = tiny_folders["epsilon"], tmp_path / "run"
    if trained == "lora":
        run_of(run, base)
    elif trained == "every weight":
        policy = Policy(families.load(str(base)), None)
        disturb(policy, 0.05)
        policy.save(run)
        (run / "config.yaml").write_text(f"pretrained_model_name_or_path: {base}\n")
    else:
        shutil.copytree(base, run)
    right = drawn(families.tuned(families.load(str(base)), str(run)).pipe)
    assert told(run, "--to", "diffusers", "--merge", "--output", tmp_path / "whole") == 0
    torch.testing.assert_close(drawn(DiffusionPipeline.from_pretrained(tmp_path / "whole")), right, atol=1e-3, rtol=0)
    assert told(run, "--to", "single-file", "--output", tmp_path / "one.safetensors") == 0
    pipe = StableDiffusionPipeline.from_single_file(str(tmp_path / "one.safetensors"), config=str(base))
    torch.testing.assert_close(drawn(pipe), right, atol=1e-3, rtol=0)
    with safe_open(tmp_path / "one.safetensors", "pt") as file:
        assert file.metadata()["modelspec.architecture"] == "stable-diffusion-v1"


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_merged_weights_are_rounded_once(precision: str, tiny_folders: Mapping[str, Path], tmp_path: Path) -> None:
    base, run = tiny_folders["epsilon"], run_of(tmp_path / "run", tiny_folders["epsilon"])
    out, dtype = tmp_path / "one.safetensors", families.DTYPES[precision]
    assert told(run, "--to", "single-file", "--output", out, "--mixed_precision", precision) == 0
    state = load_file(out)
    assert {tensor.dtype for tensor in state.values()} == {dtype}
    unet, file = families.load(str(base)).denoiser, read_lora(run)
    for name, layer in file.of("unet").items():
        original = next(o.name for o in originals(unet) if o.parts == (name,))
        weight = unet.get_submodule(name).weight
        weight = weight.to(dtype).float() if precision == "bf16" else weight  # which is read in bf16
        right = (weight + layer.delta().view(weight.shape)).to(dtype)
        assert torch.equal(state[f"model.diffusion_model.{original}.weight"], right)


def edited(folder: Path, part: str, **settings: object) -> Path:
    path = folder / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


@pytest.mark.parametrize(
    ("case", "words", "message"),
    [
        ("nothing", ["--to", "comfyui"], "there is no"),
        ("noise", ["--to", "comfyui"], "holds learned initial noise"),
        ("noise file", ["--to", "diffusers"], "holds learned initial noise"),
        ("full", ["--to", "kohya"], "has no LoRA"),
        ("lora", ["--to", "kohya", "--merge"], "--merge writes a pipeline folder"),
        ("alone", ["--to", "kohya"], "does not say which model it is of"),
        ("pickle", ["--to", "kohya"], "may run code when read"),
        ("torn", ["--to", "diffusers"], "no whole safetensors file"),
        ("pruned", ["--to", "kohya"], "lost parts of blocks"),
        ("pruned", ["--to", "single-file"], "lost parts of blocks"),
        ("packed", ["--to", "single-file"], "in 4 or 8 bit"),
        ("other", ["--to", "kohya"], "made for another model"),
        ("overwrite", ["--to", "diffusers"], "is what is read"),
        ("overwrite in the folder", ["--to", "kohya"], "is what is read"),
        ("suffix", ["--to", "kohya"], "expected the name of a .safetensors file"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(
    case: str,
    words: list[str],
    message: str,
    tiny_folders: Mapping[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, run, out = tmp_path / "base", tmp_path / "run", tmp_path / "out.safetensors"
    shutil.copytree(tiny_folders["flow" if case == "other" else "epsilon"], base)
    run.mkdir()
    if case in ("noise", "noise file"):
        (run / "find.safetensors").touch()
        run = run / "find.safetensors" if case == "noise file" else run
    elif case == "full":
        (run / "unet").mkdir()
        (run / "unet/config.json").write_text("{}")
    elif case == "pickle":
        run = run / "lora.bin"
        run.touch()
    elif case == "torn":
        (run / "pytorch_lora_weights.safetensors").write_bytes(b"\x00")
    elif case != "nothing":
        file = lora_for(built("sd"))
        write(run / "pytorch_lora_weights.safetensors", file.state_dict(), {})
        if case != "alone":
            (run / "config.yaml").write_text(f"pretrained_model_name_or_path: {base}\n")
    if case == "nothing":
        run = tmp_path / "nowhere"
    if case == "pruned":
        edited(base, "unet", pruning={"removed": ["down_blocks.0.resnets.0"]})
    if case == "packed":
        edited(base, "unet", quantization_config={"quant_method": "bitsandbytes"})
    if case.startswith("overwrite"):
        out = run / "pytorch_lora_weights.safetensors"
        run = out if case == "overwrite" else run
    before = out.read_bytes() if out.exists() else b""
    assert told(run, *words, "--output", tmp_path / "out" if case == "suffix" else out) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1
    assert (out.read_bytes() if out.exists() else b"") == before


def test_a_lora_beside_4_bit_weights_is_a_lora_of_the_whole(tiny_folders: Mapping[str, Path], tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out.safetensors"
    shutil.copytree(tiny_folders["epsilon"], base)
    edited(base, "unet", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    file = lora_for(built("sd"))
    write(tmp_path / "lora.safetensors", file.state_dict(), {})
    words = "--to", "kohya", "--output", out, "--pretrained_model_name_or_path", base
    assert told(tmp_path / "lora.safetensors", *words) == 0
    assert len(load_file(out)) == 3 * len(file.layers)


def test_programs_without_a_network_are_named() -> None:
    pipe = built("sana")
    for program, name in (("comfyui", "ComfyUI"), ("kohya", "kohya's trainers")):
        with pytest.raises(UserError, match=f"{name} knows no SanaTransformer2DModel"):
            tensors_for(program, lora_for(pipe), modules_of(pipe), "transformer")  # type: ignore[arg-type]


def test_what_readers_of_a_single_file_would_mistake_is_refused() -> None:
    with pytest.raises(UserError, match="64 wide, and readers of a single file tell them by their width"):
        checkpoint(built("sdxl"))
    pipe = sd3()
    pipe.text_encoder.text_projection.weight.data += 1
    with pytest.raises(UserError, match="put the identity in the place"):
        checkpoint(pipe)
    with pytest.raises(UserError, match="a FluxPipeline has no single file here"):
        checkpoint(built("flux-dev"))


@pytest.mark.slow
@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("name", [name for name in tiny_families.BUILD if name != "pixart-sigma"])
def test_every_family_is_drawn_alike_from_every_file(name: str, factor: float, tmp_path: Path) -> None:
    base = tiny_families.save(name, tmp_path / "base")
    run = run_of(tmp_path / "run", base, factor)
    side = tiny_families.RESOLUTION.get(name, 16)
    size = {"height": side, "width": side}
    stock = DiffusionPipeline.from_pretrained(base)
    before = drawn(stock, **size)
    stock.load_lora_weights(run)
    right = drawn(stock, **size)
    assert (right - before).abs().max() > 1e-3
    for program in ("diffusers",) if name == "sana" else ("diffusers", "comfyui", "kohya"):
        out = tmp_path / f"{program}.safetensors"
        assert told(run, "--to", program, "--output", out) == 0
        pipe = DiffusionPipeline.from_pretrained(base)
        if program == "kohya" or (program == "comfyui" and name in ("lumina2", "sdxl", "sdxl-turbo")):
            families.load_lora(pipe, out, denoiser_of(pipe))
        else:
            pipe.load_lora_weights(load_file(out))
        torch.testing.assert_close(drawn(pipe, **size), right, atol=1e-3, rtol=0)
    assert told(run, "--to", "diffusers", "--merge", "--output", tmp_path / "whole") == 0
    torch.testing.assert_close(
        drawn(DiffusionPipeline.from_pretrained(tmp_path / "whole"), **size), right, atol=2e-3, rtol=0
    )


def test_a_merged_sd3_without_t5_loads_in_stock_diffusers(tmp_path: Path) -> None:
    """We do without shapes-sd3's T5, whose last norm is zero; stock diffusers asks for it."""
    run = tmp_path / "run"
    policy = Policy(families.load("shapes-sd3"), LoRA(2))
    disturb(policy, 0.1)
    policy.save(run)
    words = [str(run), "--to", "diffusers", "--merge", "--pretrained_model_name_or_path", "shapes-sd3"]
    assert export.main([*words, "--output", str(tmp_path / "whole")]) == 0
    pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path / "whole")
    assert pipe.text_encoder_3 is not None
    assert export.main([*words, "--output", str(tmp_path / "whole.safetensors")]) == 2
    tuned = families.tuned(families.load("shapes-sd3"), str(run)).pipe
    weight = pipe.transformer.transformer_blocks[0].attn.to_q.weight
    tuned.fuse_lora()
    layer = tuned.transformer.transformer_blocks[0].attn.to_q
    torch.testing.assert_close(weight, getattr(layer, "base_layer", layer).weight, atol=1e-5, rtol=1e-5)


def test_a_size_that_sd3_does_not_know_is_refused() -> None:
    with pytest.raises(UserError, match="a side of at most 128 pixels"):
        families.load("shapes-sd3").latent_shape(256)
