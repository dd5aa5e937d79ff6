"""A pruned denoiser is the skipped one, exactly smaller, and stock diffusers loads it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch.nn import functional as F

import pruning
from align import families
from align.common.errors import UserError
from align.families.sd3 import RepeatedTokenAttention
from align.sampling.loop import initial_noise
from pruning.graph import BlockGraph
from pruning.loading import skeleton
from pruning.lora_remap import remap_lora
from tests.pipelines import _randomise

Inputs = dict[str, Any]


def seeded(model: nn.Module) -> Any:
    torch.manual_seed(0)
    _randomise(model)
    return model.eval().requires_grad_(False)


def sd3() -> Any:
    torch.manual_seed(0)
    return seeded(
        SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=6,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=12,
            caption_projection_dim=16,
            pooled_projection_dim=12,
            pos_embed_max_size=8,
            qk_norm="rms_norm",
            dual_attention_layers=(1, 3),
        )
    )


def flux() -> Any:
    torch.manual_seed(0)
    return seeded(
        FluxTransformer2DModel(
            in_channels=4,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=12,
            pooled_projection_dim=12,
            axes_dims_rope=(4, 2, 2),
        )
    )


def sd15() -> Any:
    """As SD 1.5 in small: three stages, the last without attention, two pairs each, one width twice."""
    torch.manual_seed(0)
    return seeded(
        UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16, 16),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=12,
            attention_head_dim=2,
            norm_num_groups=4,
        )
    )


def sdxl() -> Any:
    """As SDXL in small: the first stage without attention, more transformer layers further down, added conditions."""
    torch.manual_seed(0)
    return seeded(
        UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, 2, 3],
            layers_per_block=2,
            cross_attention_dim=12,
            attention_head_dim=[1, 2, 2],
            norm_num_groups=4,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + 12,
        )
    )


def inputs(model: nn.Module) -> Inputs:
    g = torch.Generator().manual_seed(1)
    t = torch.tensor([700.0, 30.0])
    if isinstance(model, FluxTransformer2DModel):
        ids = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
        return {
            "hidden_states": torch.randn(2, 16, 4, generator=g),
            "encoder_hidden_states": torch.randn(2, 5, 12, generator=g),
            "pooled_projections": torch.randn(2, 12, generator=g),
            "timestep": t / 1000,
            "img_ids": ids,
            "txt_ids": torch.zeros(5, 3),
        }
    x = torch.randn(2, 4, 8, 8, generator=g)
    text = torch.randn(2, 5, 12, generator=g)
    if isinstance(model, SD3Transformer2DModel):
        pooled = torch.randn(2, 12, generator=g)
        return {"hidden_states": x, "encoder_hidden_states": text, "pooled_projections": pooled, "timestep": t}
    given: Inputs = {"sample": x, "timestep": t, "encoder_hidden_states": text}
    if model.config.addition_embed_type:
        added = {"text_embeds": torch.randn(2, 12, generator=g), "time_ids": torch.randn(2, 6, generator=g)}
        given["added_cond_kwargs"] = added
    return given


def out(model: nn.Module) -> Tensor:
    model.requires_grad_(False)  # of weights that ask for gradients torch may take products by another kernel
    with torch.no_grad():
        return model(**inputs(model), return_dict=False)[0]


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


Build = Callable[[], Any]
PAIRS = ("down_blocks.0.pairs.1", "up_blocks.2.pairs.1")  # sd15: as BK-SDM takes them
WHOLE: dict[str, tuple[Build, tuple[str, ...]]] = {
    "sd3": (sd3, ("transformer_blocks.0", "transformer_blocks.3")),
    "sd3 all but the last": (sd3, tuple(f"transformer_blocks.{i}" for i in range(5))),
    "flux": (flux, ("transformer_blocks.1", "single_transformer_blocks.0")),
    "flux without double blocks": (flux, ("transformer_blocks.0", "transformer_blocks.1")),
    "sd15 pairs": (sd15, PAIRS),
    "sd15 pair that other skips take the place of": (sd15, ("down_blocks.2.pairs.0", "up_blocks.0.pairs.0")),
    "sd15 small": (sd15, (*PAIRS, "down_blocks.1.pairs.1", "up_blocks.1.pairs.1", "mid_block")),
    "sd15 layer of the middle": (sd15, ("mid_block.attentions.0.transformer_blocks.0",)),
    "sdxl": (sdxl, ("mid_block", "down_blocks.2.pairs.1", "up_blocks.0.pairs.0")),
    "sdxl layers": (
        sdxl,
        (
            "down_blocks.1.attentions.0.transformer_blocks.0",
            "up_blocks.0.attentions.1.transformer_blocks.2",
            "up_blocks.1.attentions.2.transformer_blocks.1",
        ),
    ),
    "sdxl layers that the middle shares": (
        sdxl,
        ("down_blocks.2.attentions.0.transformer_blocks.1", "mid_block.attentions.0.transformer_blocks.2"),
    ),
    "sdxl layers and pairs": (
        sdxl,
        (
            "down_blocks.2.pairs.0",
            "up_blocks.0.pairs.1",
            "up_blocks.0.attentions.2.transformer_blocks.0",
            "down_blocks.1.attentions.1.transformer_blocks.1",
        ),
    ),
}
PARTS: dict[str, tuple[Build, tuple[str, ...]]] = {
    "sd3": (
        sd3,
        (
            "transformer_blocks.2",
            "transformer_blocks.0.norm1",
            "transformer_blocks.1.norm1",
            "transformer_blocks.1.attn2",
            "transformer_blocks.3.attn",
            "transformer_blocks.3.norm1_context",
            "transformer_blocks.4.ff",
            "transformer_blocks.4.ff_context",
            "transformer_blocks.5.norm1_context",
            "transformer_blocks.5.attn",
        ),
    ),
    "flux": (
        flux,
        (
            "single_transformer_blocks.0",
            "transformer_blocks.0.attn",
            "transformer_blocks.0.norm1_context",
            "transformer_blocks.1.ff_context",
            "single_transformer_blocks.1.norm",
            "single_transformer_blocks.1.mlp",
            "single_transformer_blocks.2.attn",
        ),
    ),
}
# others hold of each layer and pair among these
SLOW = ("sdxl", "sdxl layers", "sdxl layers and pairs", "sd15 pairs", "sd15 small")
whole = [pytest.param(*case, id=name, marks=pytest.mark.slow if name in SLOW else []) for name, case in WHOLE.items()]
everything = pytest.mark.parametrize(
    ("build", "drop"), [*whole, *(pytest.param(*case, id=f"{name} parts") for name, case in PARTS.items())]
)


@everything
def test_removing_is_skipping_and_loses_exactly_its_parameters(build: Build, drop: tuple[str, ...]) -> None:
    model = build()
    graph, whole, before = BlockGraph.of(model), out(model), count(model)
    state = {name: p.clone() for name, p in model.state_dict().items()}
    assert graph.check(drop) == []
    with graph.skip(drop):
        skipped = out(model)
    assert torch.equal(out(model), whole)
    assert all(torch.equal(p, state[name]) for name, p in model.state_dict().items())
    assert not torch.equal(skipped, whole)
    lost = sum(graph[name].parameters for name in drop)
    assert graph.parameters(drop) == before - lost
    small = graph.remove(drop)
    assert count(small) == before - lost
    assert torch.equal(out(small), skipped)


@pytest.mark.parametrize(("build", "drop"), whole)
def test_stock_diffusers_loads_whole_blocks_without_a_word(build: Build, drop: tuple[str, ...], tmp_path: Path) -> None:
    model = build()
    assert BlockGraph.of(model).portable(drop)
    small = BlockGraph.of(model).remove(drop)
    small.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert {name: list(value) for name, value in info.items() if value} == {}
    assert torch.equal(out(loaded), out(small))
    assert "pruning" not in json.loads((tmp_path / "config.json").read_text())
    # diffusers' own from_config must not set changed values back to defaults
    assert count(type(model).from_config(small.config)) == count(small)
    assert torch.equal(out(pruning.load(tmp_path)), out(small))


@pytest.mark.parametrize(("build", "drop"), [pytest.param(*case, id=name) for name, case in PARTS.items()])
def test_parts_come_back_by_pruning_load(build: Build, drop: tuple[str, ...], tmp_path: Path) -> None:
    model = build()
    assert not BlockGraph.of(model).portable(drop)
    small = BlockGraph.of(model).remove(drop)
    small.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = pruning.load(tmp_path)
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())
    assert torch.equal(out(loaded), out(small))
    assert pruning.load(tmp_path, torch.bfloat16).dtype == torch.bfloat16
    # and what was pruned can be pruned again; its parts are not there a second time
    again = BlockGraph.of(loaded)
    assert not again.portable(())
    last = again.blocks[-1].name
    assert not {f"{last}.attn"} & {part.name for part in again.components(last)}
    again.remove([again.blocks[0].name])
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(out(pruning.load(tmp_path / "again")), out(loaded))


def test_a_folder_that_does_not_fit_its_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no model_index\.json and no config\.json"):
        pruning.load(tmp_path)
    model = sd3()
    BlockGraph.of(model).remove(["transformer_blocks.3.ff"])
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["pruning"] == {"removed": ["transformer_blocks.3.ff"]}
    config["pruning"]["removed"].append("transformer_blocks.2.attn")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"does not fit SD3.*transformer_blocks\.2\.attn.* is unexpected"):
        pruning.load(tmp_path)
    with pytest.raises(UserError, match="UNet3D"):
        skeleton({"_class_name": "UNet3DConditionModel"})


@pytest.mark.parametrize("build", [sd3, flux, sd15, sdxl])
def test_an_empty_drop_is_the_identity(build: Build) -> None:
    model = build()
    config, graph, whole = copy.deepcopy(dict(model.config)), BlockGraph.of(model), out(model)
    with graph.skip(()):
        assert torch.equal(out(model), whole)
    assert graph.remove(()) is model
    assert dict(model.config) == config
    assert torch.equal(out(model), whole)
    assert graph.renamed(()) == {name: name for name in graph.renamed(())}


def test_skip_is_sd3s_own_skip_layers() -> None:
    model = sd3()
    with torch.no_grad():
        theirs = model(**inputs(model), skip_layers=[1, 4], return_dict=False)[0]
    with BlockGraph.of(model).skip(["transformer_blocks.1", "transformer_blocks.4"]):
        assert torch.equal(out(model), theirs)


def test_a_skipped_flux_block_passes_both_streams_through() -> None:
    model = flux()
    drop = ["transformer_blocks.0", "single_transformer_blocks.2"]
    with BlockGraph.of(model).skip(drop):
        skipped = out(model)
    for block in (model.transformer_blocks[0], model.single_transformer_blocks[2]):
        block.forward = lambda hidden_states, encoder_hidden_states, **_: (encoder_hidden_states, hidden_states)
    assert torch.equal(out(model), skipped)


def test_a_skipped_unet_pair_is_left_out_of_a_loop_written_by_hand() -> None:
    """The forward pass spelled out for sd15's stages, over lists from which the pairs are missing."""
    model = sd15()
    given = inputs(model)
    lost = {("down", 0): 1, ("up", 2): 1}

    def pairs(side: str, k: int) -> list[tuple[Any, Any]]:
        stage = (model.down_blocks if side == "down" else model.up_blocks)[k]
        attentions = stage.attentions if len(getattr(stage, "attentions", [])) else [None] * len(stage.resnets)
        both = list(zip(stage.resnets, attentions, strict=True))
        return [pair for i, pair in enumerate(both) if lost.get((side, k)) != i]

    def run(pair: tuple[Any, Any], x: Tensor) -> Tensor:
        x = pair[0](x, emb)
        return x if pair[1] is None else pair[1](x, encoder_hidden_states=text, return_dict=False)[0]

    with torch.no_grad():
        emb = model.time_embedding(model.time_proj(given["timestep"]))
        text, x = given["encoder_hidden_states"], model.conv_in(given["sample"])
        skips = [x]
        for k in range(3):
            for pair in pairs("down", k):
                x = run(pair, x)
                skips.append(x)
            if k < 2:
                x = model.down_blocks[k].downsamplers[0](x)
                skips.append(x)
        x = model.mid_block(x, emb, encoder_hidden_states=text)
        for k in range(3):
            for pair in pairs("up", k):
                x = run(pair, torch.cat([x, skips.pop()], 1))
            if k < 2:
                x = model.up_blocks[k].upsamplers[0](x)
        assert not skips
        x = model.conv_out(model.conv_act(model.conv_norm_out(x)))
    with BlockGraph.of(model).skip(PAIRS):
        torch.testing.assert_close(out(model), x)


def test_removed_parts_of_an_sd3_block_follow_the_identity_semantics() -> None:
    """What a block computes without its parts, written out: gate * norm(x) where attention or feed-forward was."""
    model = sd3()
    block, g = model.transformer_blocks[0], torch.Generator().manual_seed(2)
    x, c = torch.randn(2, 7, 16, generator=g), torch.randn(2, 3, 16, generator=g)
    temb = torch.randn(2, 16, generator=g)

    def norm(v: Tensor) -> Tensor:
        return F.layer_norm(v, (16,), eps=1e-6)

    with torch.no_grad():
        m = block.norm1.linear(F.silu(temb)).unsqueeze(1).chunk(6, -1)  # shift, scale, gate; shift, scale, gate
        attended = x + m[2] * (norm(x) * (1 + m[1]) + m[0])
        expected = attended + m[5] * (norm(attended) * (1 + m[4]) + m[3])
        # the context lost its AdaLN: gate 1, shift and scale 0
        context = c + norm(c)
        context = context + block.ff_context(norm(context))
        names = [f"transformer_blocks.0.{part}" for part in ("attn", "ff", "norm1_context")]
        with BlockGraph.of(model).skip(names):
            context_out, hidden_out = block(hidden_states=x, encoder_hidden_states=c, temb=temb)
    torch.testing.assert_close(hidden_out, expected)
    torch.testing.assert_close(context_out, context)


def test_removed_parts_of_a_flux_single_block() -> None:
    model = flux()
    block, g = model.single_transformer_blocks[0], torch.Generator().manual_seed(2)
    x, c = torch.randn(2, 7, 16, generator=g), torch.randn(2, 3, 16, generator=g)
    temb = torch.randn(2, 16, generator=g)
    graph, both = BlockGraph.of(model), torch.cat([c, x], 1)
    stem = "single_transformer_blocks.0"
    with torch.no_grad():
        normed, gate = block.norm(both, emb=temb)
        attention = block.attn(hidden_states=normed)
        plain = F.layer_norm(both, (16,), eps=1e-6)
        for parts, expected in {
            ("mlp",): both + gate[:, None] * attention,
            ("mlp", "attn"): both + gate[:, None] * normed,
            ("norm", "mlp", "attn"): both + plain,
        }.items():
            with graph.skip(f"{stem}.{part}" for part in parts):
                found = torch.cat(block(hidden_states=x, encoder_hidden_states=c, temb=temb), 1)
            torch.testing.assert_close(found, expected)


def test_sd3_block_has_the_parameters_of_the_formula() -> None:
    """36 d^2 and the biases of an MMDiT block without query and key norms (Esser et al. 2024)."""
    d = 16
    config = dict(sd3().config) | {"qk_norm": None, "dual_attention_layers": (), "num_layers": 2}
    graph = BlockGraph.of(SD3Transformer2DModel.from_config(config))
    # per stream: AdaLN 6 d^2 + 6 d, four projections of attention, feed-forward 8 d^2 + 5 d
    assert graph["transformer_blocks.0"].parameters == 36 * d * d + 2 * (6 + 4 + 5) * d
    parts = {p.name.rpartition(".")[2]: p.parameters for p in graph.components("transformer_blocks.0")}
    assert parts == {
        "norm1": 6 * d * d + 6 * d,
        "norm1_context": 6 * d * d + 6 * d,
        "attn": 8 * d * d + 8 * d,
        "ff": 8 * d * d + 5 * d,
        "ff_context": 8 * d * d + 5 * d,
    }
    # the last block's context has two thirds of its AdaLN, no feed-forward and no output projection less
    assert graph["transformer_blocks.1"].parameters == 36 * d * d + 30 * d - (13 * d * d + (4 + 5 + 1) * d)


def test_dual_layers_and_processors_move_with_their_blocks() -> None:
    model = sd3()
    processors = [RepeatedTokenAttention(k + 2) for k in range(6)]
    for block, processor in zip(model.transformer_blocks, processors, strict=True):
        block.attn.set_processor(processor)
    BlockGraph.of(model).remove(["transformer_blocks.0", "transformer_blocks.1", "transformer_blocks.4.attn"])
    assert model.config.num_layers == 4
    assert list(model.config.dual_attention_layers) == [1]
    kept = [block.attn.processor for block in model.transformer_blocks]
    assert [kept[k] for k in (0, 1, 3)] == [processors[k] for k in (2, 3, 5)]
    # callers set processors on every block, also where the attention is gone (align.families.sd3)
    model.set_attn_processor(RepeatedTokenAttention(3))
    assert all(isinstance(p, RepeatedTokenAttention) for p in model.attn_processors.values())
    model.set_attn_processor(model.attn_processors)


def test_unet_configs_say_what_is_left() -> None:
    model = BlockGraph.of(sd15()).remove(PAIRS)
    assert (model.config.layers_per_block, model.config.mid_block_type) == ([1, 2, 2], "UNetMidBlock2DCrossAttn")
    drop = [f"down_blocks.{k}.pairs.1" for k in range(3)] + [f"up_blocks.{k}.pairs.1" for k in range(3)]
    model = BlockGraph.of(sd15()).remove([*drop, "mid_block"])
    assert (model.config.layers_per_block, model.config.mid_block_type) == (1, None)
    model = BlockGraph.of(sdxl()).remove(["down_blocks.1.attentions.0.transformer_blocks.0"])
    assert model.config.transformer_layers_per_block == [1, [1, 2], 3]
    assert model.config.reverse_transformer_layers_per_block == [3, 2, 1]
    drop = [f"down_blocks.1.attentions.{k}.transformer_blocks.0" for k in range(2)]
    drop += [f"up_blocks.1.attentions.{k}.transformer_blocks.1" for k in range(3)]
    model = BlockGraph.of(sdxl()).remove(drop)
    assert model.config.transformer_layers_per_block == [1, 1, 3]
    assert model.config.reverse_transformer_layers_per_block is None


# what may go
def test_all_violations_are_told_at_once() -> None:
    graph = BlockGraph.of(sd3())
    drop = [f"transformer_blocks.{i}" for i in range(6)] + ["transformer_blocks.2.ff", "transformer_blocks.9"]
    wrong = graph.check(drop)
    assert len(wrong) == 4
    told = "; ".join(wrong)
    for words in (
        "unknown block 'transformer_blocks.9'",
        "transformer_blocks.5 has to stay: SD3's last block",
        "transformer_blocks.2.ff is a part of transformer_blocks.2",
        "the model would be empty",
    ):
        assert words in told
    for refuse in (graph.remove, graph.moved, lambda d: graph.skip(d).__enter__()):
        with pytest.raises(UserError) as error:
            refuse(drop)
        assert all(text in str(error.value) for text in wrong)
    assert graph.denoiser.config.num_layers == 6


def test_flux_may_lose_anything_but_everything() -> None:
    graph = BlockGraph.of(flux())
    names = [block.name for block in graph.blocks]
    assert [block.position for block in graph.blocks] == list(range(5))
    assert "empty" in "".join(graph.check(names))
    assert graph.check(names[1:]) == [] == graph.check(names[:-1])


def test_a_torn_skip_connection_is_refused_with_its_partner_named() -> None:
    graph = BlockGraph.of(sd15())
    (wrong,) = graph.check(["down_blocks.0.pairs.1"])
    assert "up_blocks.2.pairs 0" in wrong and "there may go up_blocks.2.pairs.1, up_blocks.2.pairs.2" in wrong
    (wrong,) = graph.check(["up_blocks.0.pairs.1", "up_blocks.0.pairs.2", "down_blocks.2.pairs.0"])
    assert "down_blocks.2.pairs would lose 1 and up_blocks.0.pairs 2" in wrong


def test_pairs_that_change_channels_and_whole_stages_have_to_stay() -> None:
    graph = BlockGraph.of(sd15())
    told = graph.check(["down_blocks.1.pairs.0", "up_blocks.1.pairs.2"])
    assert [text.split(" has to stay")[0] for text in told] == ["down_blocks.1.pairs.0", "up_blocks.1.pairs.2"]
    assert "it takes 8 channels where a pair inside its stage takes 16" in told[0]
    told = graph.check(["down_blocks.0.pairs.0", "down_blocks.0.pairs.1", "up_blocks.2.pairs.1", "up_blocks.2.pairs.2"])
    assert told == ["nothing of down_blocks.0.pairs would be left; at least 1 has to stay"]
    names = {block.name for block in graph.blocks}
    assert not any("sampler" in name for name in names)
    assert "unknown block 'down_blocks.0.downsamplers.0'" in graph.check(["down_blocks.0.downsamplers.0"])[0]


def test_layers_that_a_stock_config_cannot_tell_apart_go_together_or_not_at_all() -> None:
    graph = BlockGraph.of(sdxl())
    (wrong,) = graph.check(["mid_block.attentions.0.transformer_blocks.0"])
    assert "down_blocks.2.attentions.0.transformer_blocks would keep 3" in wrong
    assert graph.check(["mid_block", "down_blocks.2.attentions.0.transformer_blocks.0"]) == []
    # without its first pair the stage begins with the next, and that one counts
    drop = ["down_blocks.2.pairs.0", "up_blocks.0.pairs.1", "down_blocks.2.attentions.1.transformer_blocks.0"]
    assert "down_blocks.2.attentions.1.transformer_blocks would keep 2" in graph.check(drop)[0]


@pytest.mark.parametrize("build", [sd3, flux, sd15, sdxl])
def test_units_can_go_and_blocks_outside_them_cannot(build: Build) -> None:
    graph = BlockGraph.of(build())
    units = graph.units(components=True)
    assert len(set(units)) == len(units)
    assert all(graph.check(unit) == [] for unit in units)
    assert [u for u in graph.units() if len(u) == 1] == [(b.name,) for b in graph.blocks if not graph.check([b.name])]
    # nothing smaller is hidden in a unit of two
    assert all(graph.check([name]) for unit in units if len(unit) > 1 for name in unit)
    names = {name for unit in graph.units() for name in unit}
    assert {b.name for b in graph.blocks} - names == {b.name for b in graph.blocks if _must_stay(graph, b.name)}


def _must_stay(graph: BlockGraph, name: str) -> bool:
    return any(text.startswith(f"{name} has to stay") for text in graph.check([name]))


def test_a_graph_does_not_outlive_its_denoiser() -> None:
    model = sd3()
    graph = BlockGraph.of(model)
    with graph.skip(["transformer_blocks.0"]), pytest.raises(RuntimeError, match="new BlockGraph"):
        graph.remove(["transformer_blocks.1"])
    graph.remove(["transformer_blocks.0"])
    with pytest.raises(RuntimeError, match="new BlockGraph"), graph.skip(["transformer_blocks.1"]):
        pass
    with pytest.raises(UserError, match="no block graph for Linear"):
        BlockGraph.of(nn.Linear(2, 2))


def test_skip_puts_everything_back_after_an_error() -> None:
    model = sd15()
    whole = out(model)
    with pytest.raises(ZeroDivisionError), BlockGraph.of(model).skip([*PAIRS, "mid_block"]):
        raise ZeroDivisionError
    assert torch.equal(out(model), whole)


# what blocks say
def test_tap_gives_both_streams_with_gradient() -> None:
    model = sd3().requires_grad_(True)
    graph, names = BlockGraph.of(model), [f"transformer_blocks.{i}" for i in (2, 5)]
    with graph.tap(names) as features, graph.tap(["transformer_blocks.3"], before=True) as into:
        assert features == {}
        model(**inputs(model))
    assert {n: set(f) for n, f in features.items()} == {names[0]: {"hidden", "context"}, names[1]: {"hidden"}}
    assert features[names[0]]["hidden"].shape == (2, 16, 16) and features[names[0]]["context"].shape == (2, 5, 16)
    for stream in ("hidden", "context"):
        assert torch.equal(into["transformer_blocks.3"][stream], features[names[0]][stream])
    features[names[0]]["context"].sum().backward()
    assert model.transformer_blocks[2].ff_context.net[2].weight.grad is not None
    assert model.transformer_blocks[3].ff.net[2].weight.grad is None
    kept = dict(features)
    model(**inputs(model))
    assert features[names[0]]["hidden"] is kept[names[0]]["hidden"]  # nothing listens any more


def test_tap_finds_pairs_parts_and_what_is_not_skipped() -> None:
    model = sd15()
    graph = BlockGraph.of(model)
    names = [block.name for block in graph.blocks]
    with torch.no_grad(), graph.tap(names) as after, graph.tap(names, before=True) as before, graph.skip(PAIRS):
        model(**inputs(model))
    assert set(after) == set(before) == set(names) - set(PAIRS)
    assert torch.equal(before["down_blocks.1.pairs.1"]["hidden"], after["down_blocks.1.pairs.0"]["hidden"])
    assert torch.equal(before["up_blocks.1.pairs.2"]["hidden"], after["up_blocks.1.pairs.1"]["hidden"])
    assert torch.equal(before["up_blocks.0.pairs.0"]["hidden"], after["mid_block"]["hidden"])
    graph = BlockGraph.of(model := flux())
    parts = [part.name for block in graph.blocks for part in graph.components(block.name)]
    with torch.no_grad(), graph.tap(parts) as after:
        model(**inputs(model))
    assert set(after) == set(parts)


# LoRA
def with_lora(model: Any, seed: int) -> dict[str, Tensor]:
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_out.0"]))
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=g) * 0.3
    return get_peft_model_state_dict(model)


@pytest.mark.parametrize(
    ("build", "prefix", "drop"),
    [
        (sd3, "transformer", ("transformer_blocks.0", "transformer_blocks.3")),
        (flux, "transformer", ("transformer_blocks.0", "single_transformer_blocks.1")),
        (sd15, "unet", ("down_blocks.0.pairs.0", "up_blocks.2.pairs.1", "mid_block")),
        pytest.param(
            sdxl,
            "unet",
            ("down_blocks.2.pairs.0", "up_blocks.0.pairs.0", "down_blocks.1.attentions.1.transformer_blocks.0"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_lora_of_kept_blocks_does_the_same_after_it_was_remapped(
    build: Build, prefix: str, drop: tuple[str, ...]
) -> None:
    model = build()
    layers = with_lora(model, 3)
    graph = BlockGraph.of(model)
    moved = graph.moved(drop)
    with graph.skip(drop):
        expected = out(model)
    plain = build()
    BlockGraph.of(plain).remove(drop)
    assert not torch.equal(out(plain), expected)
    keys = {f"{prefix}.{name}": tensor for name, tensor in layers.items()}
    keys["text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"] = torch.ones(1)
    with pytest.raises(UserError, match=r"removed: .*tensors") as error:
        remap_lora(keys, moved)
    gone = [path for path in moved if moved[path] is None and any(name.startswith(f"{path}.") for name in layers)]
    assert gone and str(error.value).count("tensors") >= 1
    new = remap_lora(keys, moved, allow_lost=True)
    assert new.pop("text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight").item() == 1
    with_lora(plain, 4)
    result = set_peft_model_state_dict(plain, {name.removeprefix(f"{prefix}."): t for name, t in new.items()})
    assert not result.unexpected_keys
    assert len(new) == len(get_peft_model_state_dict(plain))
    assert torch.equal(out(plain), expected)


def test_a_lora_that_does_not_belong_here_is_refused() -> None:
    moved = BlockGraph.of(sd3()).moved(["transformer_blocks.0", "transformer_blocks.1.attn"])
    lost = {
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(1),
        "transformer.transformer_blocks.1.attn.to_q.lora_A.weight": torch.ones(1),
        "transformer.transformer_blocks.1.ff.net.2.lora_A.weight": torch.ones(1),
        "transformer.transformer_blocks.7.attn.to_q.lora_A.weight": torch.ones(1),
    }
    with pytest.raises(UserError) as error:
        remap_lora(lost, moved)
    for words in (
        "never had, for example 'transformer.transformer_blocks.7.",
        "transformer_blocks.0 (1 tensors), transformer_blocks.1.attn (1 tensors)",
    ):
        assert words in str(error.value)
    del lost["transformer.transformer_blocks.7.attn.to_q.lora_A.weight"]
    assert list(remap_lora(lost, moved, True)) == ["transformer.transformer_blocks.0.ff.net.2.lora_A.weight"]
    with pytest.raises(UserError, match="not of diffusers' LoRA format"):
        remap_lora({"lora_unet_down_blocks_0_attentions_0.lora_down.weight": torch.ones(1)}, moved)
    with pytest.raises(UserError, match="nothing of the LoRA is left"):
        remap_lora({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(1)}, moved, True)


def test_new_names_are_those_of_the_smaller_graph() -> None:
    for build, drop in [*WHOLE.values(), *PARTS.values()]:
        graph = BlockGraph.of(build())
        names = graph.renamed(drop)
        small = BlockGraph.of(graph.remove(drop))
        for old, new in names.items():
            lost = sum(graph[name].parameters for name in drop if graph[name].part_of == old)
            assert (small[new].kind, small[new].parameters) == (graph[old].kind, graph[old].parameters - lost)
        assert len(set(names.values())) == len(names)
        assert [b.name for b in small.blocks] == [names[b.name] for b in graph.blocks if b.name in names]


# at full scale, and the embedded pipelines
def test_full_size_denoisers_on_the_meta_device() -> None:
    with torch.device("meta"):
        large = SD3Transformer2DModel(
            sample_size=128,
            num_layers=38,
            num_attention_heads=38,
            attention_head_dim=64,
            joint_attention_dim=4096,
            caption_projection_dim=2432,
            pooled_projection_dim=2048,
            in_channels=16,
            patch_size=2,
            pos_embed_max_size=192,
            qk_norm="rms_norm",
        )
        schnell = FluxTransformer2DModel(guidance_embeds=False)
        xl = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, 2, 10],
            cross_attention_dim=2048,
            attention_head_dim=[5, 10, 20],
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        sd = UNet2DConditionModel(cross_attention_dim=768)
    graph = BlockGraph.of(large)
    drop = [f"transformer_blocks.{i}" for i in (25, 26, 27, 28, 31, 32, 33, 34)]
    assert graph.parameters() == 8_056_627_520
    assert {graph[name].parameters for name in drop} == {212_999_680}
    assert graph.parameters(drop) == count(graph.remove(drop)) == 8_056_627_520 - 8 * 212_999_680
    graph = BlockGraph.of(schnell)
    assert (graph.parameters(), len(graph.blocks)) == (11_891_178_560, 57)
    assert BlockGraph.of(xl).parameters() == 2_567_463_684
    # BK-SDM's published U-Nets: base 0.58 B, small 0.49 B (its paper counts 482,346,884)
    drop = [f"{side}_blocks.{k}.pairs.1" for side in ("down", "up") for k in range(4)]
    assert BlockGraph.of(sd).parameters(drop) == 579_384_964
    assert count(BlockGraph.of(sd).remove([*drop, "mid_block"])) == 482_346_884


@pytest.mark.parametrize(
    ("name", "blocks", "drop"),
    [
        ("shapes-sd3", 12, ("transformer_blocks.4", "transformer_blocks.9")),
        # one pair in each stage: those have to stay
        pytest.param("shapes-sd", 7, ("mid_block",), marks=pytest.mark.slow),
    ],
)
def test_the_embedded_pipelines_load_pruned_in_stock_diffusers(
    name: str, blocks: int, drop: tuple[str, ...], tmp_path: Path
) -> None:
    family = families.load(name)
    graph = BlockGraph.of(family.denoiser)
    assert len(graph.blocks) == blocks
    assert len(graph.units()) == {"shapes-sd3": 11, "shapes-sd": 1}[name]
    x, t = initial_noise(family.latent_shape(), [1, 2]), family.grid(4).t[1].expand(2)
    with torch.no_grad():
        cond = family.encode(["two red stars", "a circle"])
        with graph.skip(drop):
            skipped = family.forward(x, t, cond)
        graph.remove(drop)
        assert torch.equal(family.forward(x, t, cond), skipped)
        family.denoiser.save_pretrained(tmp_path)
        loaded, info = type(family.denoiser).from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())
        if name == "shapes-sd3":
            # the family's own processor stands on every kept block, and is no part of the file
            for mine, theirs in zip(family.denoiser.transformer_blocks, loaded.transformer_blocks, strict=True):
                assert isinstance(mine.attn.processor, RepeatedTokenAttention)
                theirs.attn.set_processor(mine.attn.processor)
        assert torch.equal(family.forward(x, t, cond, denoiser=loaded), skipped)
