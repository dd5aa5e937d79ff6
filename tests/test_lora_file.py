"""LoRA files: every spelling adds the same to the weights, and what is not B · A or not this model's is refused."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor

from align import families
from align.common.errors import UserError
from align.families.lora_file import HEADER, LoRAFile, lora_path, read_lora
from align.objectives.teachers import LoRATeacher
from align.policy.policy import LoRA, Policy
from tests.pipelines import Build
from tests.test_policy import disturb

RANK, ALPHA = 4, 6.0


@pytest.fixture
def run(tiny: Build, tmp_path: Path) -> Path:
    """A LoRA run of alpha 6 at rank 4 whose every layer has moved."""
    policy = Policy(tiny("epsilon"), LoRA(RANK, ALPHA))
    disturb(policy, 1)
    policy.save(tmp_path)
    return tmp_path


def added(file: LoRAFile) -> dict[str, Tensor]:
    """What each layer adds to its weight."""
    return {name: layer.scale * layer.B @ layer.A for name, layer in file.layers.items()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


def header(settings: Mapping[str, Any]) -> dict[str, str]:
    return {HEADER: json.dumps({f"unet.{name}": value for name, value in settings.items()})}


def kohya(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    new = {}
    for key, tensor in state.items():
        path, _, part = key.removeprefix("unet.").rpartition(".lora_")
        name = f"lora_unet_{path.replace('.', '_')}"
        new[f"{name}.{'lora_down' if part == 'A.weight' else 'lora_up'}.weight"] = tensor
        new[f"{name}.alpha"] = torch.tensor(ALPHA)
    return new


def old(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers before 0.20: attention processors with layers of their own."""
    new = {}
    for key, tensor in state.items():
        path, _, part = key.rpartition(".lora_")
        attention, _, layer = path.removesuffix(".0").rpartition(".")
        new[f"{attention}.processor.{layer}_lora.{'down' if part == 'A.weight' else 'up'}.weight"] = tensor
    return new


def test_every_spelling_adds_the_same(tiny: Build, run: Path, tmp_path: Path) -> None:
    pipe, state = tiny("epsilon").pipe, load_file(run / "pytorch_lora_weights.safetensors")
    right = added(read_lora(run, pipe))
    assert len(right) == len(state) / 2 and all(tensor.any() for tensor in right.values())
    plain = {name: tensor * RANK / ALPHA for name, tensor in right.items()}
    peft = tmp_path / "peft"
    peft.mkdir()
    named = {k.replace("unet.", "base_model.model."): v for k, v in state.items()}
    save_file(named, peft / "adapter_model.safetensors")
    (peft / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA, "alpha_pattern": {}}))
    assert same(added(read_lora(peft, pipe)), right)
    (peft / "adapter_model.safetensors").rename(peft / "style.safetensors")
    assert same(added(read_lora(peft, pipe)), right)
    for spelled, expected in ((kohya(state), right), (old(state), plain), (dict(state), plain)):
        save_file({k: v.contiguous() for k, v in spelled.items()}, tmp_path / "other.safetensors")
        assert same(added(read_lora(tmp_path / "other.safetensors", pipe)), expected)
    first = next(iter(right)).removeprefix("unet.")
    settings = {"r": RANK, "lora_alpha": ALPHA, "alpha_pattern": {first: 2.0}, "use_rslora": True}
    save_file(state, tmp_path / "rs.safetensors", header(settings))
    layers = read_lora(tmp_path / "rs.safetensors", pipe).layers
    assert {layer.scale for layer in layers.values()} == {ALPHA / 2, 2.0 / 2}  # alpha / sqrt(4)
    assert layers[f"unet.{first}"].scale == 1.0


@pytest.mark.parametrize("alpha", [None, 6.0, pytest.param(2.0, marks=pytest.mark.slow)])
def test_a_run_starts_from_what_the_last_drew(tiny: Build, run: Path, alpha: float | None) -> None:
    family = tiny("epsilon")
    cond, x, t = family.encode(["two red stars"]), torch.ones(1, 4, 8, 8), torch.tensor([400.0])
    with torch.no_grad():
        base = family.forward(x, t, cond)
        stock = tiny("epsilon")
        stock.pipe.load_lora_weights(str(run))
        last = stock.forward(x, t, cond)
        first = Policy(family, LoRA(RANK, alpha), initial=run).predict(x, t, cond).raw
    assert (last - base).abs().max() > 1e-2
    torch.testing.assert_close(first, last, atol=3e-4, rtol=0)


def test_a_tuned_pipeline_takes_the_file_of_any_tool_at_its_strength(tiny: Build, run: Path, tmp_path: Path) -> None:
    state = load_file(run / "pytorch_lora_weights.safetensors")
    save_file({k: v.contiguous() for k, v in kohya(state).items()}, tmp_path / "style.safetensors")
    cond, x, t = tiny("epsilon").encode(["two red stars"]), torch.ones(1, 4, 8, 8), torch.tensor([400.0])
    with torch.no_grad():
        first = families.tuned(tiny("epsilon"), str(run)).forward(x, t, cond)
        other = families.tuned(tiny("epsilon"), str(tmp_path / "style.safetensors")).forward(x, t, cond)
    torch.testing.assert_close(first, other, atol=1e-5, rtol=0)


Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def without_b(state: dict[str, Tensor]) -> dict[str, Tensor]:
    gone = next(key for key in state if "lora_B" in key)
    return {key: tensor for key, tensor in state.items() if key != gone}


def with_key(name: str) -> Change:
    return lambda state: state | {name: torch.ones(4)}


def wider(state: dict[str, Tensor]) -> dict[str, Tensor]:
    key = next(key for key in state if "lora_A" in key)
    return state | {key: torch.ones(RANK, state[key].shape[1] + 1)}


def other_rank(state: dict[str, Tensor]) -> dict[str, Tensor]:
    key = next(key for key in state if "lora_A" in key)
    return state | {key: torch.ones(RANK + 1, state[key].shape[1])}


def not_finite(state: dict[str, Tensor]) -> dict[str, Tensor]:
    key = next(key for key in state if "lora_A" in key)
    return state | {key: state[key] / 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_b, "has A alone"),
        (
            lambda state: {k: v.to(torch.int32) for k, v in state.items()},
            "torch.int32, and a LoRA's are floating-point",
        ),
        (with_key("unet.mid_block.to_q.lora_magnitude_vector"), "DoRA, LoKr, LoHa"),
        pytest.param(with_key("unet.mid_block.to_q.lokr_w1"), "DoRA, LoKr, LoHa", marks=pytest.mark.slow),
        (with_key("unet.mid_block.weight"), "is no LoRA tensor"),
        (wider, "0 of its .* layers are not there and 1 have another size"),
        (other_rank, "whose ranks differ"),
        (not_finite, "NaN or infinite"),
        (lambda state: {k.replace("down_blocks", "blocks"): v for k, v in state.items()}, "made for another model"),
        pytest.param(
            lambda state: {k.replace("unet.", "transformer."): v for k, v in state.items()},
            "made for another model",
            marks=pytest.mark.slow,
        ),
        (lambda state: {k.replace("up_blocks", "output_blocks"): v for k, v in kohya(state).items()}, "another model"),
        (lambda state: {}, "has no LoRA layers"),
    ],
)
def test_what_does_not_fit_is_refused(tiny: Build, run: Path, tmp_path: Path, change: Change, message: str) -> None:
    state = change(load_file(run / "pytorch_lora_weights.safetensors"))
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=message):
        read_lora(tmp_path / "other.safetensors", tiny("epsilon").pipe)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("[1]", "no JSON object"),
        ("{", "no JSON object"),
        ("[" * 100_000, "no JSON object"),
        ('{"unet.lora_alpha": "many"}', "is no number"),
        ('{"unet.lora_alpha": 1e999}', "expected a finite number"),
        ('{"unet.lora_alpha": 1, "unet.alpha_pattern": {"(": 2}}', "is not read"),
        ('{"unet.lora_alpha": 1, "unet.alpha_pattern": {"(\\\\w+)+-": 2}}', "expected the name of a layer"),
        ('{"unet.lora_alpha": 1, "unet.alpha_pattern": {".*.*.*.*.*-": 2}}', "expected the name of a layer"),
        ('{"unet.lora_alpha": 1, "unet.alpha_pattern": {"w?w?w?w?w?w?www": 2}}', "expected the name of a layer"),
        ('{"unet.lora_alpha": 1, "unet.alpha_pattern": [2]}', "alpha_pattern in its settings is no JSON object"),
        ('{"unet.use_dora": true}', "DoRA"),
        ('{"unet.init_lora_weights": "pissa_niter_4"}', "changed the model's weights as well"),
    ],
)
def test_hostile_settings_are_refused(run: Path, tmp_path: Path, settings: str, message: str) -> None:
    save_file(load_file(run / "pytorch_lora_weights.safetensors"), tmp_path / "other.safetensors", {HEADER: settings})
    with pytest.raises(UserError, match=message):
        read_lora(tmp_path / "other.safetensors")


def test_a_pattern_fits_where_pefts_does_and_as_many_as_layers_are_read_at_once(tmp_path: Path) -> None:
    """re remembers 512 of them: with more, reading took time by their square."""
    names = [f"down.{k}.attn{m}.to_q" for k in range(400) for m in (1, 2)]
    state = {f"unet.{n}.lora_{part}.weight": torch.ones(1, 1) for n in names for part in "AB"}
    patterns = {"^down.3.attn1.to_q": 5.0, r"down\.\d+5\.attn1": 99.0, r"7\d*\.attn2\.to_q": 3.0, "to_k": 99.0}
    patterns |= {f"{n}.k": 99.0 for n in names}
    own = {"r": 1, "lora_alpha": 2.0, "alpha_pattern": patterns}
    save_file(state, tmp_path / "one.safetensors", header(own))
    begun = time.perf_counter()
    layers = read_lora(tmp_path / "one.safetensors").of("unet")
    assert time.perf_counter() - begun < 3
    for name in (*names[:8], "down.35.attn1.to_q", "down.78.attn2.to_q"):  # peft takes its time
        assert layers[name].scale == patterns.get(get_pattern_key(patterns, name), 2.0), name


def test_which_file_of_a_folder_is_meant(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "loras"
    folder.mkdir()
    assert lora_path(folder) is None
    (folder / "pytorch_lora_weights.bin").touch()
    with pytest.raises(UserError, match="a pickle, which may run code"):
        lora_path(folder)
    (folder / "a.safetensors").touch()
    assert lora_path(folder) == folder / "a.safetensors"
    (folder / "b.safetensors").touch()
    with pytest.raises(UserError, match=r"2 \.safetensors files"):
        lora_path(folder)
    with pytest.raises(UserError, match="no whole safetensors file"):
        read_lora(folder / "a.safetensors")


def test_a_lora_that_moves_nothing_says_so(tiny: Build, run: Path, tmp_path: Path) -> None:
    Policy(tiny("epsilon"), LoRA(RANK)).save(tmp_path / "new")
    state = load_file(run / "pytorch_lora_weights.safetensors")
    save_file(state, tmp_path / "no-alpha.safetensors", header({"lora_alpha": 0}))
    for source in (tmp_path / "new", tmp_path / "no-alpha.safetensors"):
        with pytest.warns(UserWarning, match="changes nothing"):
            read_lora(source)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_file_of_8_bits_starts_a_run(tiny: Build, run: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    state = {k: v.to(dtype) for k, v in load_file(run / "pytorch_lora_weights.safetensors").items()}
    save_file(state, tmp_path / "small.safetensors", header({"lora_alpha": ALPHA}))
    policy = Policy(tiny("epsilon"), LoRA(RANK), initial=tmp_path / "small.safetensors")
    policy.save(tmp_path / "again")
    assert same(added(read_lora(tmp_path / "again")), added(read_lora(tmp_path / "small.safetensors")))


def test_an_alpha_of_zero_changes_nothing_and_says_so(run: Path, tmp_path: Path) -> None:
    save_file(
        load_file(run / "pytorch_lora_weights.safetensors"), tmp_path / "x.safetensors", header({"lora_alpha": 0})
    )
    with pytest.warns(UserWarning, match="changes nothing"):
        read_lora(tmp_path / "x.safetensors")


def test_weights_in_float8_are_read(tiny: Build, run: Path, tmp_path: Path) -> None:
    state = {k: v.to(torch.float8_e4m3fn) for k, v in load_file(run / "pytorch_lora_weights.safetensors").items()}
    save_file(state, tmp_path / "x.safetensors")
    right = {k: v.float() for k, v in state.items()}
    name, layer = next(iter(read_lora(tmp_path / "x.safetensors", tiny("epsilon").pipe).layers.items()))
    assert torch.equal(layer.A, right[f"{name}.lora_A.weight"]) and torch.equal(layer.B, right[f"{name}.lora_B.weight"])


def test_layers_of_text_encoders_start_no_run_and_teach_nobody(tiny: Build, run: Path, tmp_path: Path) -> None:
    """They would stay in the student's text encoder for good."""
    state = load_file(run / "pytorch_lora_weights.safetensors")
    modules = tiny("epsilon").pipe.text_encoder.named_modules()
    name, width = next((f"text_encoder.{k}", m.in_features) for k, m in modules if k.endswith("q_proj"))
    state |= {f"{name}.lora_A.weight": torch.ones(2, width), f"{name}.lora_B.weight": torch.ones(width, 2)}
    save_file(state, tmp_path / "both.safetensors")
    with pytest.raises(UserError, match="1 of the .* layers in .* are of text encoders"):
        Policy(tiny("epsilon"), LoRA(RANK), initial=tmp_path / "both.safetensors")
    policy = Policy(tiny("epsilon"), LoRA(RANK))
    before = policy.family.encode(["a star"])["prompt_embeds"]
    with pytest.raises(UserError, match="PipelineTeacher"):
        LoRATeacher(path=tmp_path / "both.safetensors").open(policy)
    assert torch.equal(policy.family.encode(["a star"])["prompt_embeds"], before)
    tuned = families.tuned(tiny("epsilon"), str(tmp_path / "both.safetensors"))
    assert not torch.allclose(tuned.encode(["a star"])["prompt_embeds"], before)
