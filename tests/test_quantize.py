"""INT4: codes against a reference written from the paper, files against the stock libraries, adapters on top."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import diffusers
import pytest
import torch
import transformers
from accelerate import init_empty_weights
from bitsandbytes.functional import quantize_4bit
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, StableDiffusion3Pipeline, UNet2DConditionModel
from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer
from diffusers.quantizers.bitsandbytes.utils import replace_with_bnb_linear
from peft.tuners.lora.bnb import Linear4bit as PackedLoRA
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel
from transformers.integrations import replace_with_bnb_linear as replace_in_transformers

from align.common.assets import locate
from align.common.errors import UserError
from align.families.sd3 import SD3
from align.policy.policy import LoRA, Policy
from pruning import linear4bit, loading
from pruning import quantize as q
from pruning.graph import BlockGraph
from pruning.linear4bit import bytes_of
from pruning.loading import load
from pruning.nf4 import NF4
from pruning.quantize import choose, quantize
from pruning.saving import save, save_pipeline
from tests.benchmarks.sizes import packed_bytes
from tests.pipelines import Build, _randomise
from tests.test_policy import disturb

FLOAT = NF4(compute_dtype="float32")
DOUBLE = NF4(double_quant=True, compute_dtype="float32")


# the reference: QLoRA's NF4 (app. E), in blocks of 64, two codes a byte, the first in the high half
# fmt: off
CODE = torch.tensor(
    [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.09105, 0.0,
     0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.562617, 0.7229568, 1.0],
    dtype=torch.float64,
)
# fmt: on


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (ceil(n / 2),) and absmax (ceil(n / 64),)."""
    flat = weight.double().flatten()
    blocks = nn.functional.pad(flat, (0, -len(flat) % 64)).view(-1, 64)
    absmax = blocks.abs().amax(1)
    scaled = blocks / absmax.clamp(min=1e-30)[:, None]
    index = (scaled[..., None] - CODE).abs().argmin(-1).flatten()[: len(flat) + len(flat) % 2]
    return (index[::2] << 4 | index[1::2]).to(torch.uint8), absmax.float()


def unpack(codes: Tensor, absmax: Tensor, shape: torch.Size) -> Tensor:
    codes = codes.flatten().long()
    values = CODE[torch.stack([codes >> 4, codes & 15], 1).flatten()][: shape.numel()]
    return (values * absmax.double().repeat_interleave(64)[: shape.numel()]).view(shape)


def scales(weight: bnb.nn.Params4bit) -> Tensor:
    """absmax in float64, whether it was quantised itself or not."""
    state = weight.quant_state
    if not state.nested:
        return state.absmax.double()
    inner = state.state2.absmax.double().repeat_interleave(256)[: state.absmax.numel()]
    return state.state2.code.double()[state.absmax.long()] * inner + state.offset.double()


# models small enough to build at once; widths that no block of 64 divides
def tiny_sd3() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=3,
        joint_attention_dim=20,
        caption_projection_dim=24,
        pooled_projection_dim=12,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )


def tiny_flux() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=20,
        pooled_projection_dim=12,
        axes_dims_rope=(4, 6, 6),
    )


def tiny_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=20,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def tiny_sdxl() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=20,
        attention_head_dim=(2, 4),
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=60,
    )


def tiny_t5() -> T5EncoderModel:
    """Its matrices have 45 and 63 weights: odd, and less than a block."""
    config = T5Config(
        vocab_size=32, d_model=9, d_kv=5, d_ff=7, num_layers=2, num_heads=1, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config)


def tiny_clip() -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=32,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=12,
        max_position_embeddings=8,
    )
    return CLIPTextModelWithProjection(config)


MODELS: dict[str, Callable[[], Any]] = {
    "sd3": tiny_sd3,
    "flux": tiny_flux,
    "sd15": tiny_unet,
    "sdxl": tiny_sdxl,
    "t5": tiny_t5,
    "clip": tiny_clip,
}


EACH = [pytest.param(name, marks=pytest.mark.slow) if name == "sdxl" else name for name in sorted(MODELS)]


def fresh(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]()
    _randomise(model)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def run(name: str, model: Any) -> Tensor:
    """The model's output for fixed inputs."""
    g = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    ids = torch.tensor([[5, 6, 7, 1], [8, 9, 10, 1]])
    if name in ("t5", "clip"):
        return model(input_ids=ids)[0]
    t = torch.tensor([500.0, 20.0])
    if name == "sd3":
        pooled = normal(2, 12)
        return model(normal(2, 4, 8, 8), normal(2, 5, 20), pooled, t, return_dict=False)[0]
    if name == "flux":
        places, words = torch.zeros(6, 3), torch.zeros(5, 3)
        return model(normal(2, 6, 4), normal(2, 5, 20), normal(2, 12), t / 1000, places, words, return_dict=False)[0]
    added = {"text_embeds": normal(2, 12), "time_ids": torch.ones(2, 6)} if name == "sdxl" else None
    return model(normal(2, 4, 8, 8), t, normal(2, 5, 20), added_cond_kwargs=added, return_dict=False)[0]


def same_state(a: nn.Module, b: nn.Module) -> bool:
    """Every tensor that would be saved, to the bit: codes, scales, maps, and what is not packed."""
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) and x[k].dtype == y[k].dtype for k in x)


def packed(model: nn.Module) -> dict[str, bnb.nn.Linear4bit]:
    return {name: m for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}


# numerics
SHAPES = [(128, 128), (48, 24), (24, 48), (16, 16), (64, 96), (10, 6), (7, 9), (3, 5), (5, 65), (1, 64), (33, 192)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("double", [False, True])
def test_codes_and_scales_are_those_of_bitsandbytes_and_of_the_paper(shape: tuple[int, int], double: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(shape[1], shape[0])
    layer = linear4bit.pack(linear, NF4(double, "float32"))
    codes, state = quantize_4bit(linear.weight.data, blocksize=64, quant_type="nf4", compress_statistics=double)
    assert torch.equal(layer.weight.data, codes)
    assert torch.equal(layer.weight.quant_state.absmax, state.absmax)
    ours, absmax = pack(linear.weight.data)
    assert torch.equal(codes.flatten(), ours)
    n = shape[0] * shape[1]
    assert len(ours) == -(-n // 2) and len(absmax) == -(-n // 64)
    if not double:
        assert torch.equal(state.absmax, absmax)
    expected = unpack(ours, scales(layer.weight), linear.weight.shape)
    torch.testing.assert_close(
        linear4bit.unpacked(layer.weight, torch.float32).double(), expected, rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("double", [False, True])
def test_the_layer_multiplies_by_what_the_codes_stand_for(shape: tuple[int, int], double: bool) -> None:
    """Forward and gradient, at sizes where bitsandbytes' own CPU path is wrong or fails."""
    torch.manual_seed(0)
    linear = nn.Linear(shape[1], shape[0])
    layer = linear4bit.pack(linear, NF4(double, "float32")).eval()
    matrix = unpack(layer.weight.data, scales(layer.weight), linear.weight.shape).float()
    x = torch.randn(4, 2, shape[1], requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, nn.functional.linear(x, matrix, linear.bias), rtol=1e-5, atol=1e-5)
    slope = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, slope)[0], slope @ matrix, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(layer(x.detach()), y), "a rollout and its replay have to agree"


def test_the_error_is_that_of_nf4() -> None:
    """§4.6.1: each weight within .1520 of its block's absmax; relative error of normal weights .090 to .094."""
    torch.manual_seed(0)
    linear = nn.Linear(512, 512, bias=False)
    nn.init.normal_(linear.weight)
    layer = linear4bit.pack(linear, FLOAT)
    error = (linear4bit.unpacked(layer.weight, torch.float32) - linear.weight).detach()
    bound = 0.1520 * layer.weight.quant_state.absmax.repeat_interleave(64).view_as(error)
    assert bool((error.abs() <= bound).all())
    assert 0.090 < float(error.norm() / linear.weight.detach().norm()) < 0.094


def test_quantising_again_changes_nothing_and_zeros_stay_zeros() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(100, 13, bias=False)
    linear.weight.data.view(-1)[64:128] = 0
    first = linear4bit.pack(linear, FLOAT)
    again = nn.Linear(100, 13, bias=False)
    again.weight.data = linear4bit.unpacked(first.weight, torch.float32)
    second = linear4bit.pack(again, FLOAT)
    assert torch.equal(first.weight.data, second.weight.data)
    assert torch.equal(first.weight.quant_state.absmax, second.weight.quant_state.absmax)
    assert torch.equal(again.weight.data.view(-1)[64:128], torch.zeros(64))


def test_compute_dtype_is_what_it_multiplies_in() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(96, 32), torch.randn(3, 96)
    half = linear4bit.pack(linear, NF4())
    matrix = linear4bit.unpacked(half.weight, torch.bfloat16)
    expected = nn.functional.linear(x.bfloat16(), matrix) + linear.bias.bfloat16()
    assert half(x).dtype == torch.float32
    assert torch.equal(half(x), expected.float())


# which Linears
@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_linear_is_listed_and_the_libraries_choose_the_same(name: str) -> None:
    model = fresh(name)
    linears = {k for k, m in model.named_modules() if isinstance(m, nn.Linear)}
    with init_empty_weights():
        stock = copy.deepcopy(model).to("meta")
    report = quantize(model, FLOAT)
    assert {layer.name for layer in report.layers} == linears
    assert {layer.name for layer in report.quantised} == packed(model).keys()
    assert all(layer.kept for layer in report.kept) and report.quantised
    skip = model.config.quantization_config.llm_int8_skip_modules
    if isinstance(model, diffusers.ModelMixin):
        replace_with_bnb_linear(stock, list(skip), quantization_config=model.config.quantization_config)
    else:
        skip = model.hf_quantizer.get_modules_to_not_convert(stock, skip, stock._keep_in_fp32_modules)
        replace_in_transformers(stock, skip, model.config.quantization_config)
    assert packed(stock).keys() == packed(model).keys()
    for layer in report.layers:
        assert layer.name in str(report) or layer.kept is None


def test_what_is_kept_by_default() -> None:
    kept = {name: {layer.name.partition(".")[0] for layer in choose(fresh(name)) if layer.kept} for name in MODELS}
    assert kept["sd3"] == {"context_embedder", "time_text_embed", "norm_out", "proj_out"}
    assert kept["flux"] == {"x_embedder", "context_embedder", "time_text_embed", "norm_out"}
    assert kept["sd15"] == {"time_embedding"}
    assert kept["sdxl"] == {"time_embedding", "add_embedding"}
    assert kept["clip"] == {"text_projection"}
    assert all(layer.name.endswith(".wo") == (layer.kept is not None) for layer in choose(fresh("t5")))


def test_a_bare_proj_out_would_keep_every_single_block_of_flux() -> None:
    """diffusers matches the last part of a name: why FLUX's own list does without."""
    kept = [layer.name for layer in choose(fresh("flux"), NF4(skip=["proj_out"])) if layer.kept]
    assert kept == [f"single_transformer_blocks.{k}.proj_out" for k in range(2)] + ["proj_out"]


def test_a_skip_list_of_ones_own_is_kept_and_saved(tmp_path: Path) -> None:
    model = fresh("sd3")
    report = quantize(model, NF4(compute_dtype="float32", skip=["transformer_blocks.2", "to_q", "ff_context"]))
    kept = {layer.name for layer in report.kept}
    assert {f"transformer_blocks.{k}" for k in ("2.ff.net.2", "0.attn.to_q", "0.ff_context.net.2")} <= kept
    assert "proj_out" not in kept
    save(model, tmp_path / "model")
    assert packed(load(tmp_path / "model")).keys() == packed(model).keys()


def test_refusals_name_everything_at_once() -> None:
    model = fresh("sd3")
    with pytest.raises(UserError, match="'nothing', 'nowhere' names no Linear of SD3Transformer2DModel"):
        choose(model, NF4(skip=["nothing", "nowhere", "proj_out"]))
    with pytest.raises(UserError, match="all kept"):
        choose(model, NF4(skip=["transformer_blocks", "context_embedder", "time_text_embed", "norm_out", "proj_out"]))
    model.context_embedder.weight.data[0, 0] = float("nan")
    model.proj_out.double()
    with pytest.raises(UserError, match=r"context_embedder holds NaN.*; proj_out is in torch.float64"):
        quantize(model)
    assert not packed(model)
    model = fresh("sd3")
    quantize(model)
    with pytest.raises(UserError, match="are quantised already"):
        quantize(model)
    with pytest.raises(UserError, match="compute_dtype is 'int8', expected 'bfloat16' or"):
        NF4(compute_dtype="int8")  # type: ignore[arg-type]
    for names in (r"(\w+)+-", "[", 3):  # transformers takes them for regular expressions: these do not end, or are none
        with pytest.raises(UserError, match="is no name of modules"):
            NF4(skip=[names])  # type: ignore[list-item]
    with pytest.raises(UserError, match="skip: 3 is no name of modules"):
        NF4(skip=3)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="expected a diffusers ModelMixin"):
        quantize(nn.Linear(4, 4))


# bytes
@pytest.mark.parametrize("double", [False, True])
def test_bytes_are_counted_exactly(double: bool, tmp_path: Path) -> None:
    model = fresh("sd3")
    whole = bytes_of(model)
    report = quantize(model, NF4(double, "float32"))
    assert report.before == whole and report.after == bytes_of(model)
    sizes = [layer.weights for layer in report.quantised]
    notes = sum(len(m.weight.quant_state.as_dict(packed=True)[linear4bit.STATE]) for m in packed(model).values())
    arithmetic = sum(packed_bytes(n, double) for n in sizes)
    assert report.after == whole - 4 * sum(sizes) + arithmetic + notes
    save(model, tmp_path / "model")
    tensors = load_file(tmp_path / "model/diffusion_pytorch_model.safetensors").values()
    assert sum(t.numel() * t.element_size() for t in tensors) == report.after


def test_a_shared_tensor_is_counted_once(tmp_path: Path) -> None:
    model = fresh("t5")
    save(model, tmp_path / "model")
    tensors = load_file(tmp_path / "model/model.safetensors").values()
    assert bytes_of(model) == sum(t.numel() * t.element_size() for t in tensors)


# to disk and back
@pytest.mark.parametrize(
    ("settings", "name"),
    [
        pytest.param(settings, name, id=f"{kind}-{name}", marks=[] if name in fast else pytest.mark.slow)
        for kind, settings, fast in (
            ("float32", FLOAT, ("clip", "flux", "sd3", "t5")),
            ("double", DOUBLE, ("sd15", "t5")),
            ("bf16", NF4(), ("clip", "flux")),
        )
        for name in sorted(MODELS)
    ],
)
def test_saved_and_loaded_to_the_bit(name: str, settings: NF4, tmp_path: Path) -> None:
    model = fresh(name)
    before = run(name, model)
    quantize(model, settings)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    output = run(name, model)
    assert not torch.equal(output, before)
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items()), "running changed it"
    save(model, tmp_path / "model")
    again = load(tmp_path / "model")
    assert type(again) is type(model)
    assert same_state(again, model)
    assert torch.equal(run(name, again), output)
    save(again, tmp_path / "twice")
    stem = "model" if name in ("t5", "clip") else "diffusion_pytorch_model"
    first, second = (load_file(tmp_path / folder / f"{stem}.safetensors") for folder in ("model", "twice"))
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("name", ["sd3", "t5"])
def test_the_config_is_what_the_library_writes(name: str, tmp_path: Path) -> None:
    model = fresh(name)
    quantize(model, DOUBLE)
    save(model, tmp_path / "model")
    library: Any = diffusers if name == "sd3" else transformers
    skip = ["context_embedder", "time_text_embed", "norm_out", "proj_out"] if name == "sd3" else ["wo"]
    expected = library.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=skip,
    )
    written = json.loads((tmp_path / "model/config.json").read_text())["quantization_config"]
    assert written == json.loads(json.dumps(expected.to_dict()))
    assert written["quant_method"] == "bitsandbytes" and written["bnb_4bit_quant_type"] == "nf4"


@pytest.fixture
def as_if_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers without its question whether there is a GPU, and with the CPU as the device that it would choose."""
    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "validate_environment", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "update_device_map", lambda self, device_map: {"": "cpu"})


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        pytest.param(settings, name, id=f"{kind}-{name}", marks=[] if name in fast else pytest.mark.slow)
        for kind, settings, fast in (("single", FLOAT, ("sd3", "clip")), ("double", DOUBLE, ("sd15", "flux", "t5")))
        for name in sorted(MODELS)
    ],
)
def test_stock_loading_gives_the_same_tensors(name: str, settings: NF4, tmp_path: Path, as_if_gpu: None) -> None:
    model = fresh(name)
    quantize(model, settings)
    save(model, tmp_path / "model")
    stock, said = type(model).from_pretrained(tmp_path / "model", dtype=torch.float32, output_loading_info=True)
    assert not any(said.values()), said
    assert same_state(stock, model)
    for layer in packed(stock).values():
        assert layer.compute_dtype == torch.float32 and layer.weight.quant_type == "nf4"


def test_diffusers_refuses_where_there_is_no_gpu(tmp_path: Path) -> None:
    """Why there is a loader of our own; when this fails, it can go."""
    if torch.cuda.is_available():
        pytest.skip("there is one")
    model = fresh("sd3")
    quantize(model)
    save(model, tmp_path / "model")
    with pytest.raises(RuntimeError, match="No GPU found"):
        SD3Transformer2DModel.from_pretrained(tmp_path / "model")


def test_a_half_precision_model_keeps_its_dtypes(tmp_path: Path) -> None:
    model = nn.Module.to(fresh("sd3"), torch.bfloat16)
    quantize(model)
    save(model, tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.proj_out.weight.dtype == again.transformer_blocks[0].attn.to_q.bias.dtype == torch.bfloat16
    assert same_state(again, model)


def test_a_model_that_is_not_quantised_loads_too(tmp_path: Path) -> None:
    for name in ("sdxl", "t5"):
        model = fresh(name)
        save(model, tmp_path / name)
        assert torch.equal(run(name, load(tmp_path / name)), run(name, model))


@pytest.mark.parametrize("packed_too", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_denoiser_that_lost_parts_of_blocks_comes_back(
    packed_too: bool, tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    """What no stock class is: alone and in its pipeline, in 4 bits or not."""
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny_folders["flow"])
    BlockGraph.of(pipe.transformer).remove(["transformer_blocks.1.ff", "transformer_blocks.0.ff_context"])
    if packed_too:
        quantize(pipe.transformer, FLOAT)
    save_pipeline(pipe, tmp_path / "pruned")
    again = load(tmp_path / "pruned")
    assert same_state(again.transformer, pipe.transformer) and bool(q.quantised(again)) == packed_too
    assert torch.equal(draw(again), draw(pipe))
    assert same_state(load(tmp_path / "pruned/transformer"), pipe.transformer)
    save_pipeline(again, tmp_path / "twice")
    assert same_state(load(tmp_path / "twice/transformer"), pipe.transformer)


def test_shards_are_read_but_not_written(tmp_path: Path, as_if_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh("sd3")
    quantize(model, DOUBLE)
    model.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    assert same_state(load(tmp_path / "model"), model)
    with pytest.raises(ValueError, match="other `quantized_stats` components"):  # why save() writes one file
        SD3Transformer2DModel.from_pretrained(tmp_path / "model")
    shard = sorted((tmp_path / "model").glob("*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(UserError, match=f"lacks {shard.name}"):
        load(tmp_path / "model")
    sizes = []
    monkeypatch.setattr(type(model), "save_pretrained", lambda self, at, max_shard_size: sizes.append(max_shard_size))
    with pytest.raises(UserError, match="cannot write .*again"):
        save(model, tmp_path / "again")
    assert sizes == ["1000GB"]


# whole pipelines
@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> tuple[StableDiffusion3Pipeline, Path]:
    """The shipped shapes-sd3, denoiser and text encoders quantised, and the folder it was saved to."""
    pipe = StableDiffusion3Pipeline.from_pretrained(locate("shapes-sd3"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for name in ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3"):
        quantize(getattr(pipe, name), FLOAT)
    folder = tmp_path_factory.mktemp("int4") / "shapes"
    save_pipeline(pipe, folder, {"README.md": "a card", "sampling.json": "{}"})
    return pipe, folder


def draw(pipe: StableDiffusion3Pipeline) -> Tensor:
    g = torch.Generator().manual_seed(0)
    pipe.set_progress_bar_config(disable=True)
    return pipe("two red stars", generator=g, num_inference_steps=2, max_sequence_length=32, output_type="pt").images


def test_the_shipped_pipeline_saved_and_loaded(shapes: tuple[StableDiffusion3Pipeline, Path]) -> None:
    pipe, folder = shapes
    again = load(folder)
    assert type(again) is StableDiffusion3Pipeline
    assert q.quantised(again) == q.quantised(pipe) and len(q.quantised(pipe)) == 4
    for name in ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "vae"):
        assert same_state(getattr(again, name), getattr(pipe, name))
    assert torch.equal(draw(again), draw(pipe))
    assert (folder / "README.md").read_text() == "a card"
    assert sorted(p.name for p in folder.parent.iterdir()) == ["shapes"]
    whole = Path(locate("shapes-sd3"))
    assert {p.name for p in whole.iterdir()} == {p.name for p in folder.iterdir()} - {"README.md"}
    assert type(again.scheduler) is type(pipe.scheduler) and again.tokenizer_3 is not None


def test_stock_loads_the_pipeline(shapes: tuple[StableDiffusion3Pipeline, Path], as_if_gpu: None) -> None:
    pipe, folder = shapes
    stock = StableDiffusion3Pipeline.from_pretrained(folder, dtype=torch.float32)
    for name in ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3"):
        assert same_state(getattr(stock, name), getattr(pipe, name))


def test_where_a_gpu_is_stock_diffusers_loads(
    shapes: tuple[StableDiffusion3Pipeline, Path], as_if_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, folder = shapes
    monkeypatch.setattr(loading, "_gpu", lambda: True)
    stock = load(folder)
    layers = {**packed(stock.transformer), **packed(load(folder / "text_encoder"))}
    assert layers and all(type(layer) is bnb.nn.Linear4bit for layer in layers.values())
    assert same_state(stock.transformer, pipe.transformer)


def test_the_four_bit_layers_are_four_bits_on_disk(shapes: tuple[StableDiffusion3Pipeline, Path]) -> None:
    _, folder = shapes
    before = Path(locate("shapes-sd3")) / "transformer/diffusion_pytorch_model.safetensors"
    after = folder / "transformer/diffusion_pytorch_model.safetensors"
    assert after.stat().st_size < 0.4 * before.stat().st_size  # of half precision, with everything kept in float32


def test_saving_is_whole_or_not_at_all(
    shapes: tuple[StableDiffusion3Pipeline, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, folder = shapes
    with pytest.raises(UserError, match="exists"):
        save_pipeline(pipe, folder)
    seen = []

    def fail(self: Any, at: str, **options: Any) -> None:
        seen.extend(tmp_path.rglob("*.safetensors"))
        raise OSError("no space left")

    monkeypatch.setattr(type(pipe.transformer), "save_pretrained", fail)
    with pytest.raises(UserError, match="cannot write .*new: no space left"):
        save_pipeline(pipe, tmp_path / "new")
    assert seen, "it failed too early to show anything"
    assert list(tmp_path.iterdir()) == []


# what cannot be loaded
@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = fresh("sd3")
    quantize(model, FLOAT)
    save(model, tmp_path / "model")
    return tmp_path / "model"


def change(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def test_a_file_that_does_not_fit_is_described_whole(saved: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        block = "transformer_blocks.0.attn"
        del tensors[f"{block}.to_q.weight.absmax"]
        del tensors[f"{block}.to_k.weight"]
        tensors[f"{block}.to_v.weight"] = tensors[f"{block}.to_v.weight"][:-1]
        tensors[f"{block}.to_v.weight.extra"] = torch.zeros(1)
        del tensors["proj_out.bias"]
        del tensors["pos_embed.pos_embed"]
        tensors["norm_out.linear.bias"] = torch.zeros(3)
        tensors["transformer_blocks.9.attn.to_q.bias"] = torch.zeros(24)

    change(saved, edit)
    with pytest.raises(UserError) as error:
        load(saved)
    for said in (
        "does not fit SD3Transformer2DModel",
        "transformer_blocks.0.attn.to_q.weight.absmax is missing",
        "transformer_blocks.0.attn.to_k.weight is missing",
        "transformer_blocks.0.attn.to_v.weight.extra is unexpected",
        "proj_out.bias is missing",
        "pos_embed.pos_embed is missing",
        "norm_out.linear.bias is (3,), expected (48,)",
        "transformer_blocks.9.attn.to_q.bias is unexpected",
    ):
        assert said in str(error.value)
    assert str(error.value).count(";") == 6


def test_codes_of_another_size_are_refused(saved: Path) -> None:
    name = "transformer_blocks.0.attn.to_v"

    def cut(tensors: dict[str, Tensor]) -> None:
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"][:-1]

    def swap(tensors: dict[str, Tensor]) -> None:
        for piece in ("", ".absmax", ".quant_map", f".{linear4bit.STATE}"):
            tensors[f"{name}.weight{piece}"] = tensors[f"transformer_blocks.0.ff.net.2.weight{piece}"].clone()

    change(saved, cut)
    with pytest.raises(UserError, match=f"{name}.weight holds 287 values, expected 288"):
        load(saved)
    change(saved, swap)
    with pytest.raises(UserError, match=r"to_v was \[24, 96\] in blocks of 64, expected \[24, 24\]"):
        load(saved)


def test_a_config_of_another_kind_is_refused(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"] |= {"bnb_4bit_quant_type": "fp4", "load_in_4bit": False}
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"load_in_4bit is False, expected True; bnb_4bit_quant_type is 'fp4'"):
        load(saved)
    (saved / "config.json").write_text(json.dumps(config | {"_class_name": "NoSuchModel"}))
    with pytest.raises(UserError, match="'NoSuchModel', which the installed diffusers does not have"):
        load(saved)


def test_folders_that_are_nothing(tmp_path: Path, shapes: tuple[StableDiffusion3Pipeline, Path]) -> None:
    with pytest.raises(UserError, match=r"no model_index.json and no config.json"):
        load(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"_class_name": "SD3Transformer2DModel"}')
    with pytest.raises(UserError, match="no safetensors weights"):
        load(tmp_path)
    index = json.loads((shapes[1] / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"lacks scheduler, text_encoder,.* which its model_index.json names"):
        load(tmp_path)


# LoRA
def test_a_lora_trains_on_four_bits_and_leaves_them_alone(tiny: Build) -> None:
    """QLoRA: with B = 0 it changes nothing; training moves the adapters and nothing else."""
    pipe = tiny("flow").pipe
    quantize(pipe.transformer, FLOAT)
    family = SD3(pipe, "tiny")
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([500.0, 20.0]), family.encode(["a star", "two red stars"])
    base = family.call(family.denoiser, x, t, cond)
    policy = Policy(family, LoRA(2))
    assert all("lora_" in name for name, p in family.denoiser.named_parameters() if p.requires_grad)
    assert isinstance(family.denoiser.transformer_blocks[0].attn.to_q, PackedLoRA)
    assert torch.equal(family.call(policy.model, x, t, cond), base)
    frozen = {k: v.clone() for k, v in family.denoiser.state_dict().items() if "lora_" not in k}
    optimiser = torch.optim.AdamW(policy.parameters(), 1e-2)
    for _ in range(3):
        optimiser.zero_grad()
        family.call(policy.model, x, t, cond).square().mean().backward()
        optimiser.step()
    assert all((p.grad is not None) == p.requires_grad for p in family.denoiser.parameters())
    after = {k: v for k, v in family.denoiser.state_dict().items() if "lora_" not in k}
    assert after.keys() == frozen.keys() and all(torch.equal(after[k], frozen[k]) for k in frozen)
    assert not torch.equal(family.call(policy.model, x, t, cond), base)
    with policy.reference():
        assert torch.equal(policy.predict(x, t, cond).raw, base)


def test_a_lora_loads_unmerged_on_a_saved_pipeline(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny_folders["flow"])
    for part in (pipe.transformer, pipe.text_encoder):
        quantize(part, FLOAT)
    save_pipeline(pipe, tmp_path / "int4")
    policy = Policy(SD3(pipe, "tiny"), LoRA(2))
    disturb(policy, 0.1)
    policy.save(tmp_path / "lora")
    again = load(tmp_path / "int4")
    plain = draw(again)
    again.load_lora_weights(str(tmp_path / "lora"))
    tuned = draw(again)
    assert not torch.equal(tuned, plain)
    family = SD3(again, "tiny")
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([500.0, 20.0]), family.encode(["a star", "two red stars"])
    torch.testing.assert_close(family.call(family.denoiser, x, t, cond), policy.predict(x, t, cond).raw)


def test_merging_comes_before_quantising(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny_folders["flow"])
    policy = Policy(SD3(pipe, "tiny"), LoRA(2))
    disturb(policy, 0.1)
    policy.save(tmp_path / "lora")
    family = policy.family
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([500.0, 20.0]), family.encode(["a star", "two red stars"])
    expected = policy.predict(x, t, cond).raw
    with pytest.raises(UserError, match="carry a LoRA; merge it first"):
        quantize(pipe.transformer)

    merged = StableDiffusion3Pipeline.from_pretrained(tiny_folders["flow"])
    plain = {k: v.clone() for k, v in merged.transformer.state_dict().items()}
    q.merge_lora(merged, tmp_path / "lora")
    assert merged.transformer.state_dict().keys() == plain.keys()
    assert type(merged.transformer.transformer_blocks[0].attn.to_q) is nn.Linear
    assert not torch.equal(
        merged.transformer.transformer_blocks[0].attn.to_q.weight, plain["transformer_blocks.0.attn.to_q.weight"]
    )
    torch.testing.assert_close(SD3(merged, "tiny").call(merged.transformer, x, t, cond), expected, rtol=1e-4, atol=1e-4)
    quantize(merged.transformer)
    with pytest.raises(UserError, match=r"transformer of this pipeline are quantised"):
        q.merge_lora(merged, tmp_path / "elsewhere")
