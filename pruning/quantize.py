"""INT4: NF4 weights through bitsandbytes, written as stock diffusers and transformers read them, and run anywhere.

Four bits a weight (QLoRA, Dettmers et al. 2023, §3): the nearest of sixteen values, times the largest absolute weight
of its block of 64. That is 4.5 bits a weight, or about 4.13 where the blocks' scales are quantised as well (double
quantisation, ibid. §3.2). It saves bytes, not time.

    report = quantize(pipe.transformer)          # in place; says what was kept and why
    save_pipeline(pipe, "outputs/int4")          # stock `from_pretrained` reads it where a GPU is
    pipe = load("outputs/int4")                  # here, without one
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import bitsandbytes as bnb
import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from bitsandbytes.functional import QuantState, dequantize_4bit
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.quantizers.auto import DiffusersAutoQuantizer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from align.errors import UserError
from align.families import LORA_FILE
from pruning.saving import skeleton

Model = Any  # a ModelMixin or a PreTrainedModel
BLOCK = 64  # weights that share one scale
COMPUTE = ("bfloat16", "float16", "float32")
STATE = "quant_state.bitsandbytes__nf4"
# What stays in full precision unless the settings say otherwise: the way in, the way out, and what makes the
# conditioning vector. All together under 1 % of a large model. An entry means what the model's library takes it to
# mean (see `_names`): in diffusers a bare `proj_out` would also name the `proj_out` of each of FLUX's single blocks,
# 15 % of that model, so FLUX's last layer is quantised.
KEPT: dict[str, tuple[str, ...]] = {
    "SD3Transformer2DModel": ("context_embedder", "time_text_embed", "norm_out", "proj_out"),
    "FluxTransformer2DModel": ("x_embedder", "context_embedder", "time_text_embed", "norm_out"),
    "UNet2DConditionModel": ("time_embedding", "add_embedding"),
    "CLIPTextModelWithProjection": ("text_projection",),
}


@dataclass(frozen=True)
class NF4:
    """How to quantise.

    Args:
        double_quant: quantise the blocks' scales to 8 bits as well.
        compute_dtype: what the packed weights are unpacked to, and multiplied in.
        skip: modules to keep in full precision, by name, in place of the architecture's own list (``KEPT``).
    """

    double_quant: bool = False
    compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    skip: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.compute_dtype not in COMPUTE:
            raise UserError(f"compute_dtype is {self.compute_dtype!r}, expected {' or '.join(map(repr, COMPUTE))}")


@dataclass(frozen=True)
class Layer:
    """One ``nn.Linear``: its name, its number of weights (the bias not counted), and why it was kept, if it was."""

    name: str
    weights: int
    kept: str | None


@dataclass(frozen=True)
class Bytes:
    """What a module takes on disk, headers apart: packed codes, scales (``absmax``), maps (codebooks and the JSON that
    goes with each layer), and everything that is not quantised."""

    codes: int
    scales: int
    maps: int
    rest: int

    @property
    def total(self) -> int:
        return self.codes + self.scales + self.maps + self.rest


@dataclass(frozen=True)
class Report:
    """What :func:`quantize` did: every Linear, and the module's bytes before and after."""

    architecture: str
    layers: tuple[Layer, ...]
    before: Bytes
    after: Bytes

    @property
    def quantised(self) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if layer.kept is None)

    @property
    def kept(self) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if layer.kept is not None)

    def __str__(self) -> str:
        done, weights = self.quantised, sum(layer.weights for layer in self.layers)
        lines = [
            f"{self.architecture}: {len(done)} of {len(self.layers)} Linears quantised, "
            f"{sum(layer.weights for layer in done) / weights:.1%} of their weights; "
            f"{self.before.total:,} bytes before, {self.after.total:,} after",
            *(f"  kept {layer.name} ({layer.weights:,}): {layer.kept}" for layer in self.kept),
        ]
        return "\n".join(lines)


# the layer
def unpacked(weight: bnb.nn.Params4bit, dtype: torch.dtype) -> Tensor:
    """The (out, in) matrix that a packed weight stands for, in ``dtype``.

    As one row: where rows are no multiple of a block, bitsandbytes 0.50 scales them wrongly on a CPU with AVX-512
    (it starts a new block at every row), and a length that is odd sends it through ``torch.compile``.
    """
    state = weight.quant_state
    row = QuantState(
        absmax=state.absmax,
        shape=torch.Size([2 * weight.numel()]),
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=dtype,
        offset=state.offset,
        state2=state.state2,
    )
    values = dequantize_4bit(weight.data, row).reshape(-1)
    return values[: state.shape.numel()].view(state.shape)


class _Product(torch.autograd.Function):
    """``x @ W.T`` for a packed W, which the backward pass unpacks again rather than keep."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: bnb.nn.Params4bit) -> Tensor:
        ctx.weight = weight
        return F.linear(x, unpacked(weight, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ unpacked(ctx.weight, grads[0].dtype), None


class Linear4bit(bnb.nn.Linear4bit):
    """bitsandbytes' own layer, but for what it does on a CPU.

    There, with AVX512-BF16, its forward repacks the weights for good, rounds their scales to bfloat16 and cannot undo
    that when the module is saved, and it fails on sizes that are no multiple of 32. This one leaves its weights alone,
    and gives the same output with and without gradients.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        y = _Product.apply(x.to(self.compute_dtype), self.weight)
        if self.bias is not None:
            y = y + self.bias.to(self.compute_dtype)
        return y.to(x.dtype)


def _empty(linear: nn.Linear, settings: NF4) -> Linear4bit:
    """A layer of the same size without weights."""
    layer = Linear4bit(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        compute_dtype=getattr(torch, settings.compute_dtype),
        compress_statistics=settings.double_quant,
        quant_type="nf4",
        device="meta",
    )
    layer.requires_grad_(False).train(linear.training)
    return layer


def _packed(linear: nn.Linear, settings: NF4) -> Linear4bit:
    """``linear`` as NF4, on its device."""
    layer = _empty(linear, settings)
    layer.weight = bnb.nn.Params4bit(
        linear.weight.detach(),
        requires_grad=False,
        blocksize=BLOCK,
        compress_statistics=settings.double_quant,
        quant_type="nf4",
        module=layer,
    ).to(linear.weight.device)
    layer.bias = linear.bias
    return layer


# which layers
def choose(module: Model, settings: NF4 = NF4()) -> tuple[Layer, ...]:
    """Every ``nn.Linear`` of a diffusers or transformers model, quantised or kept with the reason; touches nothing.

    Works on the meta device. The choice is the one that the model's own library makes when it reads the saved folder,
    which is why the list of what it keeps by itself (T5's ``wo``) is added. Raises :class:`align.errors.UserError`
    with everything that stands against it.
    """
    problems = _against(module)
    if problems:
        raise UserError(f"cannot quantise {type(module).__name__}: " + "; ".join(problems))
    own = [*(module._keep_in_fp32_modules or ())]
    reasons = {entry: f"{entry!r} is on the skip list" for entry in skip_list(module, settings)}
    reasons |= {entry: f"its library keeps {entry!r} in full precision" for entry in own}
    layers = tuple(Layer(*found) for found in _split(module, reasons))
    idle = [e for e in settings.skip or () if not any(layer.kept == reasons[e] for layer in layers)]
    if idle:
        raise UserError(f"skip: {', '.join(map(repr, idle))} names no Linear of {type(module).__name__}")
    if not any(layer.kept is None for layer in layers):
        raise UserError(f"nothing to quantise in {type(module).__name__}: it has {len(layers)} Linears, all kept")
    return layers


def skip_list(module: Model, settings: NF4) -> list[str]:
    """What ``llm_int8_skip_modules`` says in the saved config: the given or the default entries, then what the model's
    library adds by itself."""
    given = KEPT.get(type(module).__name__, ()) if settings.skip is None else settings.skip
    return list(dict.fromkeys([*given, *(module._keep_in_fp32_modules or ())]))


def _against(module: nn.Module) -> list[str]:
    """Why a module cannot be quantised: all reasons."""
    if not isinstance(module, (ModelMixin, PreTrainedModel)):
        return ["expected a diffusers ModelMixin or a transformers PreTrainedModel"]
    problems = []
    if packed := sum(isinstance(m, bnb.nn.Linear4bit) for m in module.modules()):
        problems.append(f"{packed} of its Linears are quantised already")
    if adapted := sum(isinstance(m, BaseTunerLayer) for m in module.modules()):
        problems.append(f"{adapted} of its layers carry a LoRA; merge it first (pruning.quantize.merge_lora)")
    linears = [(name, m.weight) for name, m in module.named_modules() if isinstance(m, nn.Linear)]
    for name, weight in linears if not packed else ():
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            problems.append(f"{name} is in {weight.dtype}; expected 16 or 32-bit floats")
        elif not weight.is_meta and not bool(weight.isfinite().all()):
            problems.append(f"{name} holds NaN or infinity")
    return problems


def _split(module: Model, reasons: Mapping[str, str]) -> Iterator[tuple[str, int, str | None]]:
    """Name, weights and reason (None: quantised) of every Linear."""
    for name, linear in module.named_modules():
        if not isinstance(linear, nn.Linear):
            continue
        kept = next((reason for entry, reason in reasons.items() if _names(module, entry, name)), None)
        if kept is None and isinstance(module, PreTrainedModel) and type(linear) is not nn.Linear:
            kept = f"a {type(linear).__name__}, which transformers leaves alone"
        yield name, linear.weight.numel(), kept


def _names(module: Model, entry: str, name: str) -> bool:
    """Whether a skip list's ``entry`` names the Linear ``name``, as the library of ``module`` reads it.

    diffusers (``quantizers/bitsandbytes/utils.py``): the last part of the name, the whole name, or a run of parts in
    it. transformers (``quantizers/quantizers_utils.py``): a regular expression from the start to a boundary, or how
    the name ends.
    """
    if isinstance(module, ModelMixin):
        return entry in (name, name.rpartition(".")[2]) or f"{entry}." in name
    return bool(re.match(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))", name)) or name.endswith(entry)


# what it costs
def packed_bytes(weights: int, double_quant: bool = False) -> int:
    """Bytes of a Linear's packed weights: half a byte each, a 4-byte scale a block and the 64-byte codebook; with
    double quantisation a byte a scale, four bytes a 256 scales and a second codebook of 1024. Without the JSON of some
    hundred bytes that bitsandbytes writes beside each layer."""
    blocks = -(-weights // BLOCK)
    scales = blocks + 4 * -(-blocks // 256) + 1024 if double_quant else 4 * blocks
    return -(-weights // 2) + scales + 64


def bytes_of(module: nn.Module) -> Bytes:
    """What the tensors of ``module`` take on disk, a shared one counted once; works on the meta device."""
    packed = {name for name, m in module.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    parts: Counter[str] = Counter()
    for key, tensor in {id(t): (key, t) for key, t in module.state_dict(keep_vars=True).items()}.values():
        layer, piece = _piece(key)
        part = _PARTS.get(piece, "maps") if layer in packed else "rest"
        parts[part] += tensor.numel() * tensor.element_size()
    return Bytes(parts["codes"], parts["scales"], parts["maps"], parts["rest"])


_PARTS = {"": "codes", "absmax": "scales", "nested_absmax": "scales"}


def _piece(key: str) -> tuple[str, str]:
    """A state dict's ``block.0.proj.weight.absmax`` is a piece of ``block.0.proj``: ``("block.0.proj", "absmax")``. The
    weight itself is the piece ``""``; what is no weight belongs to no layer."""
    found = re.fullmatch(r"(.*)\.weight(?:\.(.+))?", key)
    return (found[1], found[2] or "") if found else ("", "")


# doing it
def quantize(module: Model, settings: NF4 = NF4()) -> Report:
    """Replace, in place, the Linears of a diffusers or transformers model by NF4 ones; see :func:`choose` for which.

    The weights that stay keep their dtype. Raises :class:`align.errors.UserError` before anything is changed.
    """
    layers, before = choose(module, settings), bytes_of(module)
    for layer in layers:
        if layer.kept is None:
            module.set_submodule(layer.name, _packed(module.get_submodule(layer.name), settings))
    _mark(module, settings)
    return Report(type(module).__name__, layers, before, bytes_of(module))


def _mark(module: Model, settings: NF4) -> None:
    """Give the model what the libraries give theirs, so that it saves, trains adapters and refuses casts as theirs."""
    diffusing = isinstance(module, ModelMixin)
    config = (diffusers if diffusing else transformers).BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=settings.double_quant,
        bnb_4bit_compute_dtype=settings.compute_dtype,
        llm_int8_skip_modules=skip_list(module, settings),
    )
    if diffusing:
        module.register_to_config(quantization_config=config)
    else:
        module.config.quantization_config = config
    quantizer = (DiffusersAutoQuantizer if diffusing else AutoHfQuantizer).from_config(config, pre_quantized=True)
    module.hf_quantizer = quantizer
    module.quantization_method = config.quant_method
    module.is_quantized = module.is_loaded_in_4bit = True


def quantised(pipe: DiffusionPipeline) -> list[str]:
    """The names of the pipeline's parts that hold packed weights."""
    return [
        name
        for name, part in pipe.components.items()
        if isinstance(part, nn.Module) and any(isinstance(m, bnb.nn.Linear4bit) for m in part.modules())
    ]


def merge_lora(pipe: DiffusionPipeline, folder: Path | str) -> None:
    """Add the LoRA in ``folder`` (a run folder of ours, or any that diffusers loads) to the pipeline's own weights.

    Before quantising: four bits round a weight by some 9 %, more than a LoRA changes it. A LoRA for a quantised
    pipeline is loaded with ``pipe.load_lora_weights`` and stays beside the weights (QLoRA). Raises
    :class:`align.errors.UserError`.
    """
    problems = []
    if names := quantised(pipe):
        problems.append(
            f"{', '.join(names)} of this pipeline are quantised, and 4-bit weights would round most of a LoRA away: "
            "merge into the unquantised pipeline and quantise that, or leave the LoRA unmerged (pipe.load_lora_weights)"
        )
    if not (Path(folder) / LORA_FILE).is_file():
        problems.append(f"no {Path(folder) / LORA_FILE}; expected the folder of a LoRA run")
    if problems:
        raise UserError("cannot merge: " + "; ".join(problems))
    pipe.load_lora_weights(str(folder), weight_name=LORA_FILE)
    if not pipe.get_active_adapters():
        raise UserError(f"cannot merge: nothing in {Path(folder) / LORA_FILE} fits {type(pipe).__name__}")
    pipe.fuse_lora(safe_fusing=True)
    pipe.unload_lora_weights()


# to disk
_ONE_FILE = "1000GB"  # diffusers' own loader fails where a shard ends between a weight's codes and its scales


def save_pipeline(pipe: DiffusionPipeline, folder: Path | str, beside: Mapping[str, str] | None = None) -> None:
    """Write the whole pipeline as ``from_pretrained`` reads it: all of it, or nothing.

    ``beside`` holds more files, name to text: a model card, ``sampling.json``. Raises
    :class:`align.errors.UserError` where ``folder`` exists.
    """

    def fill(draft: Path) -> None:
        pipe.save_pretrained(draft, max_shard_size=_ONE_FILE)
        for name, text in (beside or {}).items():
            (draft / name).write_text(text, encoding="utf-8")

    _whole(Path(folder), fill)


def save(module: Model, folder: Path | str) -> None:
    """Write one component, as :func:`save_pipeline` does."""
    _whole(Path(folder), lambda draft: module.save_pretrained(draft, max_shard_size=_ONE_FILE))


def _whole(folder: Path, fill: Callable[[Path], Any]) -> None:
    if folder.exists():
        raise UserError(f"{folder} exists; name another folder or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        fill(draft)
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


# from disk
def load(folder: Path | str, dtype: torch.dtype | None = None) -> DiffusionPipeline | Model:
    """The pipeline in ``folder``, or the single component; what is not packed in ``dtype``, or as it was saved.

    Where a GPU is, stock ``from_pretrained`` reads it, and puts the quantised parts on the GPU and the rest on the CPU:
    ``.to("cuda")`` brings them together, as with any pipeline of diffusers. Built here, on the CPU, is what it cannot
    read: quantised parts where there is no GPU, which diffusers refuses ("No GPU found"), and denoisers that lost parts
    of blocks. They are the stock classes, but for their Linears and for what is gone. Raises
    :class:`align.errors.UserError` with all that is missing, unexpected or of the wrong size.
    """
    folder = Path(folder)
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        return _component(folder, dtype)
    index = json.loads(index_file.read_text(encoding="utf-8"))
    cls = _class(diffusers, index.get("_class_name"), index_file)
    parts = [name for name, value in index.items() if isinstance(value, list) and value[0]]
    if absent := [name for name in parts if not (folder / name).is_dir()]:
        raise UserError(f"{folder} lacks {', '.join(absent)}, which its model_index.json names")
    models = [folder / name for name in parts if (folder / name / "config.json").is_file()]
    own = {part.name: build(part, dtype) for part in models if not _stock_reads(part)}
    dtypes = {part.name: dtype or _stored_dtype(part) for part in models} | {"default": torch.float32}
    return cls.from_pretrained(folder, dtype=dtypes, use_safetensors=True, **own)


def _component(folder: Path, dtype: torch.dtype | None) -> Model:
    if not _gpu() or not _stock_reads(folder):
        return build(folder, dtype)
    return _model_class(folder).from_pretrained(folder, dtype=dtype or _stored_dtype(folder), use_safetensors=True)


def _stock_reads(part: Path) -> bool:
    config = _config(part)
    return not _lost_parts(config) and ("quantization_config" not in config or _gpu())


def _lost_parts(config: Mapping[str, Any]) -> bool:
    return bool((config.get("pruning") or {}).get("removed"))


def _gpu() -> bool:
    """diffusers' own condition (``quantizers/bitsandbytes/bnb_quantizer.py``)."""
    return torch.cuda.is_available() or torch.xpu.is_available() or torch.backends.mps.is_available()


def build(folder: Path, dtype: torch.dtype | None = None) -> Model:
    """One component on the CPU, quantised or pruned or neither: its class without weights, Linears swapped, tensors
    put in; what is not packed in ``dtype``, or as it was saved. Raises :class:`align.errors.UserError`."""
    model = _skeleton(folder)
    saved = _config(folder).get("quantization_config")
    settings = _settings(saved, folder) if saved else NF4()
    packed: dict[str, dict[str, Tensor]] = {}
    if saved:
        reasons = dict.fromkeys(skip_list(model, settings), "")
        packed = {name: {} for name, _, kept in _split(model, reasons) if kept is None}
    for name in packed:
        model.set_submodule(name, _empty(model.get_submodule(name), settings))
    tensors = {key: tensor for file in _files(folder) for key, tensor in load_file(file).items()}
    for key in list(tensors):
        layer, piece = _piece(key)
        if layer in packed:
            packed[layer][piece] = tensors.pop(key)
    problems = [problem for name in packed for problem in _torn(model.get_submodule(name), name, packed[name])]
    problems += _fill(model, tensors, {f"{name}.weight" for name in packed})
    if problems:
        raise UserError(f"{folder} does not fit {type(model).__name__}: " + "; ".join(problems))
    for name, pieces in packed.items():
        linear = model.get_submodule(name)
        codes = pieces.pop("")
        linear.weight = bnb.nn.Params4bit.from_prequantized(codes, pieces, device="cpu", module=linear)
    for tensor in (*model.parameters(), *model.buffers()) if dtype else ():
        if tensor.is_floating_point() and not isinstance(tensor, bnb.nn.Params4bit):
            tensor.data = tensor.data.to(dtype)
    if saved:
        _mark(model, settings)
    return model.eval()


def _skeleton(folder: Path) -> Model:
    """The component from its config, parameters on the meta device."""
    cls, config = _model_class(folder), _config(folder)
    if _lost_parts(config):
        return skeleton({key: value for key, value in config.items() if key != "quantization_config"})
    with init_empty_weights(include_buffers=False):
        if issubclass(cls, ModelMixin):
            return cls.from_config(cls.load_config(folder))
        return cls(cls.config_class.from_pretrained(folder))


def _settings(saved: Mapping[str, Any], folder: Path) -> NF4:
    """The settings that a saved ``quantization_config`` stands for."""
    expected = {
        "quant_method": ("bitsandbytes",),
        "load_in_4bit": (True,),
        "bnb_4bit_quant_type": ("nf4",),
        "bnb_4bit_quant_storage": ("uint8",),
        "bnb_4bit_compute_dtype": COMPUTE,
        "bnb_4bit_use_double_quant": (True, False),
    }
    wrong = [
        f"{key} is {saved.get(key)!r}, expected {' or '.join(map(repr, values))}"
        for key, values in expected.items()
        if saved.get(key) not in values
    ]
    if wrong:
        raise UserError(f"{folder / 'config.json'}: in quantization_config, " + "; ".join(wrong))
    return NF4(
        saved["bnb_4bit_use_double_quant"], saved["bnb_4bit_compute_dtype"], saved.get("llm_int8_skip_modules") or ()
    )


def _fill(model: Model, tensors: Mapping[str, Tensor], elsewhere: set[str]) -> list[str]:
    """Put in what is not packed, in the dtype it has; returns what is missing, unexpected or of another size. The keys
    ``elsewhere`` are not looked for."""
    expected = {key: tensor for key, tensor in model.state_dict().items() if key not in elsewhere}
    fits = {key: tensor for key, tensor in tensors.items() if key in expected and tensor.shape == expected[key].shape}
    model.load_state_dict(fits, strict=False, assign=True)
    if isinstance(model, PreTrainedModel):
        model.tie_weights()  # of tied weights the file holds one
    buffers = dict(model.named_buffers())
    lost = [key for key, t in model.state_dict().items() if key not in elsewhere and (t.is_meta or key in buffers)]
    return [
        *(f"{key} is missing" for key in lost if key not in tensors),
        *(f"{key} is unexpected" for key in tensors if key not in expected),
        *(
            f"{key} is {tuple(tensors[key].shape)}, expected {tuple(tensor.shape)}"
            for key, tensor in expected.items()
            if key in tensors and key not in fits
        ),
    ]


def _torn(layer: Linear4bit, name: str, pieces: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with the pieces of one packed weight."""
    needed = {"", "absmax", "quant_map", STATE}
    if layer.weight.compress_statistics:
        needed |= {"nested_absmax", "nested_quant_map"}
    full = {piece: f"{name}.weight.{piece}".removesuffix(".") for piece in needed | pieces.keys()}
    problems = [f"{full[piece]} is missing" for piece in sorted(needed - pieces.keys())]
    problems += [f"{full[piece]} is unexpected" for piece in sorted(pieces.keys() - needed)]
    if problems:
        return problems
    size, weights = [layer.out_features, layer.in_features], layer.out_features * layer.in_features
    said = json.loads(bytes(pieces[STATE].tolist()))
    if (said["shape"], said["blocksize"]) != (size, BLOCK):
        return [f"{name} was {said['shape']} in blocks of {said['blocksize']}, expected {size} in blocks of {BLOCK}"]
    counts = {"": -(-weights // 2), "absmax": -(-weights // BLOCK)}
    return [
        f"{full[piece]} holds {pieces[piece].numel()} values, expected {count}"
        for piece, count in counts.items()
        if pieces[piece].numel() != count
    ]


def _config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise UserError(f"no model_index.json and no config.json in {folder}; expected a pipeline or one part of it")
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def _model_class(folder: Path) -> Any:
    """diffusers writes ``_class_name``, transformers ``architectures``."""
    config = _config(folder)
    if "_class_name" in config:
        return _class(diffusers, config["_class_name"], folder / "config.json")
    return _class(transformers, (config.get("architectures") or [None])[0], folder / "config.json")


def _class(library: Any, name: str | None, where: Path) -> Any:
    cls = getattr(library, name or "", None)
    if cls is None:
        raise UserError(f"{where} names the class {name!r}, which the installed {library.__name__} does not have")
    return cls


def _files(folder: Path) -> list[Path]:
    """The safetensors that hold the weights: one, or the shards that an index names."""
    for stem in ("diffusion_pytorch_model", "model"):
        if (index := folder / f"{stem}.safetensors.index.json").is_file():
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            files = [folder / name for name in dict.fromkeys(names)]
            if absent := [file.name for file in files if not file.is_file()]:
                raise UserError(f"{folder} lacks {', '.join(absent)}, which {index.name} names")
            return files
        if (whole := folder / f"{stem}.safetensors").is_file():
            return [whole]
    raise UserError(f"no safetensors weights in {folder}")


def _stored_dtype(folder: Path) -> torch.dtype:
    """The commonest dtype of the tensors that are not pieces of packed weights."""
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    count: Counter[torch.dtype] = Counter()
    for file in _files(folder):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  it is no dict
                kind = tensors.get_slice(key).get_dtype()
                if not _piece(key)[1] and kind in kinds:
                    count[kinds[kind]] += 1
    return count.most_common(1)[0][0] if count else torch.float32
