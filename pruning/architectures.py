"""Where blocks stand in diffusers' transformers and U-Nets, and the config that these need for what is left.

The only file that knows how these classes are built; :mod:`pruning.graph` is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from align.common.errors import UserError
from pruning.identity import Identity

if TYPE_CHECKING:
    from diffusers import ModelMixin

# "joint", "double", "single": SD3's and FLUX.1's, of parts; "dual", "unified": of two streams and of one, whole only
Kind = Literal[
    "joint", "double", "single", "dual", "unified", "down", "mid", "up", "attn", "ff", "norm", "mlp", "layer"
]
# the lists of blocks of diffusers' transformers: kind, and the number of the config that counts them
LISTS: dict[str, dict[str, tuple[Kind, str]]] = {
    "SD3Transformer2DModel": {"transformer_blocks": ("joint", "num_layers")},
    "FluxTransformer2DModel": {
        "transformer_blocks": ("double", "num_layers"),
        "single_transformer_blocks": ("single", "num_single_layers"),
    },
    "Flux2Transformer2DModel": {
        "transformer_blocks": ("dual", "num_layers"),
        "single_transformer_blocks": ("unified", "num_single_layers"),
    },
    "QwenImageTransformer2DModel": {"transformer_blocks": ("dual", "num_layers")},
    "ZImageTransformer2DModel": {"layers": ("unified", "n_layers")},
    "SanaTransformer2DModel": {"transformer_blocks": ("unified", "num_layers")},
    "Lumina2Transformer2DModel": {"layers": ("unified", "num_layers")},
    "PixArtTransformer2DModel": {"transformer_blocks": ("unified", "num_layers")},
}
CLASSES = (*LISTS, "UNet2DConditionModel")  # of diffusers
REFUSED = {
    "ChromaTransformer2DModel": "its blocks find their modulation by their number among all, so that one that goes "
    "moves those of the others"
}
MID_LAYERS = "mid_block.attentions.0.transformer_blocks"
Parts = dict[str, tuple[Kind, tuple[str, ...]]]  # name of a part -> kind, attributes of the block that it is made of
_MMDIT: Parts = {
    "norm1": ("norm", ("norm1",)),
    "norm1_context": ("norm", ("norm1_context",)),
    "attn": ("attn", ("attn",)),
    "attn2": ("attn", ("attn2",)),
    "ff": ("ff", ("ff",)),
    "ff_context": ("ff", ("ff_context",)),
}
_SINGLE: Parts = {
    "norm": ("norm", ("norm",)),
    "attn": ("attn", ("attn",)),
    "mlp": ("mlp", ("proj_mlp", "proj_out")),
}
PARTS: dict[str, Parts] = {"joint": _MMDIT, "double": _MMDIT, "single": _SINGLE}  # in the order in which they run


@dataclass(frozen=True)
class Row:
    """Blocks that stand in one ModuleList, or in several of equal length; a block goes by leaving them all.

    ``stay`` says which cannot go, and why; ``least`` how many have to stay; ``partner`` names the row that has to lose
    as many. Block i is called ``{stem}.{i}``; a row without lists is a block by itself.
    """

    stem: str
    kind: Kind
    lists: tuple[str, ...]
    stay: Mapping[int, str] = field(default_factory=dict)
    least: int = 0
    partner: str | None = None
    part_of: str | None = None


def rows(denoiser: ModelMixin) -> list[Row]:
    """The rows of a denoiser in the order in which they run; :class:`UserError` for a class that is not known."""
    from diffusers import UNet2DConditionModel

    name = type(denoiser).__name__
    if isinstance(denoiser, UNet2DConditionModel):
        return list(_unet_rows(denoiser))
    if name in REFUSED:
        raise UserError(f"no block of a {name} can go: {REFUSED[name]}")
    if name not in LISTS:
        raise UserError(f"no block graph for {name}; expected {', '.join(CLASSES)}")
    return [Row(path, kind, (path,), _last(denoiser, kind)) for path, (kind, _) in LISTS[name].items()]


def _last(denoiser: Any, kind: Kind) -> dict[int, str]:
    if kind != "joint":
        return {}
    why = "SD3's last block is built without a context output, and only that one can end the stack"
    return {len(denoiser.transformer_blocks) - 1: why}


def _unet_rows(unet: Any) -> Iterator[Row]:
    from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, UNetMidBlock2DCrossAttn

    last = len(unet.down_blocks) - 1
    for k, stage in enumerate(unet.down_blocks):
        yield from _stage(f"down_blocks.{k}", "down", stage, f"up_blocks.{last - k}.pairs")
    if unet.mid_block is not None:
        yield Row("mid_block", "mid", ())
        for path in _attentions("mid_block", unet.mid_block, UNetMidBlock2DCrossAttn, UNetMidBlock2D):
            yield Row(path, "layer", (path,), part_of="mid_block")
    for k, stage in enumerate(unet.up_blocks):
        yield from _stage(f"up_blocks.{k}", "up", stage, None)


def _stage(path: str, side: Literal["down", "up"], stage: Any, partner: str | None) -> Iterator[Row]:
    from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D, CrossAttnUpBlock2D, DownBlock2D, UpBlock2D

    wide, plain = (CrossAttnDownBlock2D, DownBlock2D) if side == "down" else (CrossAttnUpBlock2D, UpBlock2D)
    layers = _attentions(path, stage, wide, plain)
    lists = (f"{path}.resnets", f"{path}.attentions") if layers else (f"{path}.resnets",)
    yield Row(f"{path}.pairs", side, lists, _edges(side, stage), 1, partner)
    for i, stem in enumerate(layers):
        yield Row(stem, "layer", (stem,), part_of=f"{path}.pairs.{i}")


def _attentions(path: str, stage: Any, wide: Any, plain: Any) -> list[str]:
    """The paths of the lists of transformer layers in a stage; :class:`UserError` for a stage that is not known."""
    from diffusers import Transformer2DModel

    if isinstance(stage, plain):
        return []
    if not isinstance(stage, wide) or not all(isinstance(m, Transformer2DModel) for m in stage.attentions):
        raise UserError(f"no block graph for a U-Net whose {path} is a {type(stage).__name__} as this one's")
    return [f"{path}.attentions.{i}.transformer_blocks" for i in range(len(stage.attentions))]


def _edges(side: str, stage: Any) -> dict[int, str]:
    """The pairs of a stage that take in another width than those inside it: only these fit where they stand."""
    reasons = {}
    for i, resnet in enumerate(stage.resnets):
        inside = resnet.out_channels * (1 if side == "down" else 2)
        if resnet.in_channels != inside:
            reasons[i] = f"it takes {resnet.in_channels} channels where a pair inside its stage takes {inside}"
    return reasons


def describe(denoiser: ModelMixin) -> None:
    """Bring ``denoiser.config`` up to date with the modules that are there."""
    from diffusers import SD3Transformer2DModel, UNet2DConditionModel

    config: dict[str, Any]
    if isinstance(denoiser, UNet2DConditionModel):
        config = _unet_config(denoiser)
    else:
        lists = LISTS[type(denoiser).__name__]
        config = {count: len(denoiser.get_submodule(path)) for path, (_, count) in lists.items()}
        if isinstance(denoiser, SD3Transformer2DModel):
            dual = [i for i, block in enumerate(denoiser.transformer_blocks) if block.use_dual_attention]
            config["dual_attention_layers"] = dual
    removed = [part_name(p) for p, module in denoiser.named_modules() if isinstance(module, Identity) and module.part]
    if removed or "pruning" in denoiser.config:
        config["pruning"] = {"removed": removed}
    changed = {key: value for key, value in config.items() if short(value) != short(denoiser.config.get(key))}
    # a key that stays listed here, diffusers' from_config would set back to its class's default
    defaults = [key for key in denoiser.config.get("_use_default_values", []) if key not in changed]
    denoiser.register_to_config(**changed, _use_default_values=defaults)


def part_name(path: str) -> str:
    """The name of the part whose first module stands at ``path``."""
    return f"{path.removesuffix('.proj_mlp')}.mlp" if path.endswith(".proj_mlp") else path


def _unet_config(unet: Any) -> dict[str, Any]:
    from diffusers.models.unets.unet_2d_blocks import DownBlock2D, UNetMidBlock2DCrossAttn, UpBlock2D

    config, mid = unet.config, unet.mid_block
    told = config.transformer_layers_per_block
    told = [told] * len(unet.down_blocks) if isinstance(told, int) else list(told)
    told_up = config.reverse_transformer_layers_per_block or told[::-1]
    down = [_layers(stage, old) for stage, old in zip(unet.down_blocks, told, strict=True)]
    up = [_layers(stage, old) for stage, old in zip(unet.up_blocks, told_up, strict=True)]
    if isinstance(mid, UNetMidBlock2DCrossAttn) and isinstance(unet.down_blocks[-1], DownBlock2D):
        down[-1] = len(mid.attentions[0].transformer_blocks)  # that stage has no use for it, and the middle takes it
    mirrored = [isinstance(s, UpBlock2D) or a == b for s, a, b in zip(unet.up_blocks, up, down[::-1], strict=True)]
    symmetric = all(mirrored) and all(isinstance(layers, int) for layers in down)
    return {
        "layers_per_block": short([len(stage.resnets) for stage in unet.down_blocks]),
        "transformer_layers_per_block": short(down),
        "reverse_transformer_layers_per_block": None if symmetric else up,
        "mid_block_type": None if mid is None else config.mid_block_type,
    }


def _layers(stage: Any, old: Any) -> Any:
    """One number where all attentions of the stage have as many layers, else a list with a number for each."""
    from diffusers.models.unets.unet_2d_blocks import DownBlock2D, UpBlock2D

    if isinstance(stage, DownBlock2D | UpBlock2D):
        return old
    return short([len(model.transformer_blocks) for model in stage.attentions])


def short(value: Any) -> Any:
    """A list of one repeated number as that number; tuples as lists; anything else as it is."""
    if not isinstance(value, list | tuple):
        return value
    values = [short(v) for v in value]
    return values[0] if values and all(isinstance(v, int) and v == values[0] for v in values) else values
