"""``pruning.load``: dtypes by name and by ``.to``, damaged folders in a line; the snippets of the guide as pasted."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

import pruning
from align import families
from align.common.errors import UserError
from align.policy.policy import LoRA, Policy
from pruning import loading
from pruning.compress import compress
from pruning.linear4bit import STATE, Linear4bit
from pruning.nf4 import NF4
from pruning.settings import Compress

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def made(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned pipeline in bfloat16, and in 4 bit."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "prompts.txt").write_text("a star\n")
    source, quantize = str(tiny_folders["flow"]), NF4(double_quant=True)
    compress(
        Compress(
            source, output_dir=folder / "compress", blocks="1", prompts=str(folder / "prompts.txt"),
            stages=["plan", "remove", "quantize"], quantize=quantize,
        )
    )  # fmt: skip
    return folder / "compress"


def draw(pipe: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return torch.from_numpy(pipe("a star", num_inference_steps=2, generator=generator, output_type="np").images)


@pytest.mark.parametrize(
    "name", ["bfloat16", *(pytest.param(n, marks=pytest.mark.slow) for n in ("float32", "torch.float32"))]
)
def test_a_dtype_is_taken_by_name(made: Path, name: str) -> None:
    wanted = getattr(torch, name.removeprefix("torch."))
    by_name, by_dtype = pruning.load(made / "int4", name), pruning.load(made / "int4", wanted)
    assert by_name.transformer.proj_out.bias.dtype == by_name.vae.dtype == wanted
    assert torch.equal(draw(by_name), draw(by_dtype))
    assert pruning.load(made / "pruned/transformer", name).dtype == wanted


@pytest.mark.parametrize("dtype", ["float31", "", "cpu", "int8", torch.int8, 16, "cuda"])
def test_what_is_no_dtype_is_refused(made: Path, dtype: Any) -> None:
    for folder in (made / "int4", made / "int4/transformer"):
        with pytest.raises(UserError, match="dtype is .*expected 'bfloat16'"):
            pruning.load(folder, dtype)


@pytest.mark.parametrize("words", [(torch.bfloat16,), pytest.param(("cpu", torch.bfloat16), marks=pytest.mark.slow)])
@pytest.mark.parametrize("by_key", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_to_a_dtype_is_loading_in_it(made: Path, words: tuple[Any, ...], by_key: bool) -> None:
    pipe = pruning.load(made / "int4", "float32")
    other = copy.deepcopy(pipe)
    assert other.to(dtype=torch.bfloat16) is other if by_key else other.to(*words) is other
    expected = pruning.load(made / "int4", "bfloat16")
    assert torch.equal(draw(other), draw(expected))
    for part in (other.transformer, other.text_encoder, other.vae):
        floats = {t.dtype for n, t in part.named_parameters() if t.is_floating_point()}
        assert floats == {torch.bfloat16}
    assert isinstance(other.transformer.proj_out, torch.nn.Linear)
    assert {m.compute_dtype for m in other.transformer.modules() if isinstance(m, Linear4bit)} == {torch.bfloat16}
    assert pipe.vae.dtype == torch.float32 and pipe.transformer.proj_out.bias.dtype == torch.float32
    assert torch.equal(draw(pipe.to("cpu")), draw(pruning.load(made / "int4", "float32")))


# damage
def change(**pieces: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    """Change the first tensor of each of these pieces of a packed weight."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        for piece, edit in pieces.items():
            key = next(key for key in sorted(tensors) if key.endswith(f".{piece}"))
            tensors[key] = edit(tensors[key].clone()).contiguous()
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})

    return damage


def first(value: float) -> Callable[[Tensor], Tensor]:
    def edit(tensor: Tensor) -> Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return edit


def state(**changes: Any) -> Callable[[Path], None]:
    def edit(tensor: Tensor) -> Tensor:
        content = json.loads(bytes(tensor.tolist())) | changes
        return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)

    return change(**{STATE: edit})


def rewritten(name: str, content: str | bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def cut(name: str, share: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return damage


def config(name: str, **changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


NAN, INF = float("nan"), float("inf")
PACKED = "diffusion_pytorch_model.safetensors"
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "NaN in scales": (change(nested_absmax=first(NAN)), rf"{PACKED}.*nested_absmax holds NaN"),
    "infinite scales": (change(nested_absmax=first(INF)), rf"{PACKED}.*nested_absmax holds NaN or inf"),
    "NaN in the code": (change(quant_map=first(NAN)), rf"{PACKED}.*quant_map holds NaN"),
    "NaN in the scales' code": (change(nested_quant_map=first(NAN)), rf"{PACKED}.*nested_quant_map holds NaN"),
    "NaN in a bias": (change(bias=first(NAN)), rf"{PACKED}.*bias holds NaN"),
    "NaN offset": (state(nested_offset=NAN), rf"{PACKED}.*{STATE} is damaged"),
    "state of another kind": (state(quant_type="fp4"), rf"{PACKED}.*{STATE} is damaged"),
    "state without a shape": (state(shape=None), rf"{PACKED}.*{STATE} is damaged"),
    "state of another shape": (state(shape=[1, 1]), rf"{PACKED}.*was \[1, 1\]"),
    "unread dtype": (state(dtype="load"), rf"{PACKED}.*{STATE} is damaged"),
    "garbage state": (change(**{STATE: lambda t: t[:9]}), rf"{PACKED}.*{STATE} is damaged"),
    "a cut scale": (change(absmax=lambda t: t[:-1]), rf"{PACKED}.*absmax holds"),
    "cut scales of scales": (change(nested_absmax=lambda t: t[:0]), rf"{PACKED}.*nested_absmax holds 0"),
    "scales of another dtype": (change(absmax=lambda t: t.float()), rf"{PACKED}.*absmax is torch.float32"),
    "a cut file": (cut(WEIGHTS, 0.9), rf"{PACKED} is no whole"),
    "a cut header": (cut(WEIGHTS, 0.01), rf"{PACKED} is no whole"),
    "an empty file": (rewritten(WEIGHTS, b""), rf"{PACKED} is no whole"),
    "garbage": (rewritten(WEIGHTS, b"\xff" * 99), rf"{PACKED} is no whole"),
    "no file": (lambda folder: (folder / WEIGHTS).unlink(), "no safetensors weights in"),
    "a broken config": (rewritten("transformer/config.json", "{"), "transformer/config.json is no JSON"),
    "a config of bytes": (rewritten("transformer/config.json", b"\xff\xfe"), "transformer/config.json is no JSON"),
    "a deep config": (rewritten("transformer/config.json", "[" * 99_999), "transformer/config.json is no JSON"),
    "a list for a config": (rewritten("transformer/config.json", "[]"), "transformer/config.json holds a list"),
    "a class of its own": (config("transformer/config.json", _class_name=["x"]), "names the class"),
    "a function for a class": (config("transformer/config.json", _class_name="__version__"), "names the class"),
    "an impossible number": (config("transformer/config.json", num_attention_heads="x"), "config.json makes no SD3"),
    "negative layers": (config("transformer/config.json", patch_size=0), "config.json makes no SD3"),
    "in 8 bit": (config("transformer/config.json", quantization_config={"load_in_8bit": True}), "quant_method"),
    "no mapping of parts": (config("transformer/config.json", pruning=[1]), "pruning is"),
    "parts of numbers": (config("transformer/config.json", pruning={"removed": [1]}), "pruning is"),
    "unknown parts": (config("transformer/config.json", pruning={"removed": ["x"]}), "unknown block 'x'"),
    "an index elsewhere": (
        rewritten(f"{WEIGHTS}.index.json", json.dumps({"weight_map": {"a": "../x.safetensors"}})), "no weight_map"),
    "an index of nothing": (rewritten(f"{WEIGHTS}.index.json", "[]"), "index.json holds a list"),
    "a broken model_index": (rewritten("model_index.json", "{"), "model_index.json is no JSON"),
    "a class that is none": (config("model_index.json", _class_name=3), "names the class"),
}  # fmt: skip


SLOW = (  # others of a kind with them are seen in the default run
    *("infinite scales", "NaN in the code", "NaN in the scales' code", "state without a shape", "garbage state"),
    *("a cut scale", "scales of another dtype", "a cut header", "garbage", "negative layers", "parts of numbers"),
)


@pytest.mark.parametrize("what", [pytest.param(w, marks=pytest.mark.slow) if w in SLOW else w for w in DAMAGE])
def test_a_damaged_folder_is_refused_in_a_line(made: Path, tmp_path: Path, what: str) -> None:
    damage, said = DAMAGE[what]
    shutil.copytree(made / "int4", tmp_path / "int4")
    damage(tmp_path / "int4")
    with pytest.raises(UserError) as error:
        pruning.load(tmp_path / "int4", "float32")
    assert re.search(said, str(error.value)) and "\n" not in str(error.value) and len(str(error.value)) < 1500
    if "model_index" not in said and what != "a class that is none":
        with pytest.raises(UserError):
            pruning.load(tmp_path / "int4/transformer", "float32")
        pruning.reads(tmp_path / "int4")


@pytest.mark.parametrize("what", ["NaN in scales", "NaN in a bias", "NaN offset", "a cut file"])
def test_damage_is_seen_where_stock_diffusers_reads(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    damage, said = DAMAGE[what]
    shutil.copytree(made / "int4", tmp_path / "int4")
    damage(tmp_path / "int4")
    monkeypatch.setattr(loading, "_gpu", lambda: True)  # what comes before the GPU is needed
    with pytest.raises(UserError, match=re.compile(PACKED + ".*" + said.split(".*")[-1].removeprefix(PACKED))):
        pruning.load(tmp_path / "int4")


# snippets
def test_the_guide_runs_as_pasted(
    made: Path, tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (Path(pruning.__file__).parent / "GUIDE.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert any("from_pretrained" in b for b in blocks) and any("remap_lora" in b for b in blocks)
    policy = Policy(families.load(str(tiny_folders["flow"])), LoRA(2, 4))
    for parameter in policy.parameters():
        parameter.data.normal_(std=0.1)
    policy.save(tmp_path / "outputs/mine")
    shutil.copytree(made, tmp_path / "outputs/compress")
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        scope: dict[str, Any] = {}
        exec(block.replace("my_model", str(tiny_folders["flow"])), scope)
        assert torch.isfinite(draw(scope["pipe"])).all()
        assert not re.search(r"(from_pretrained|pruning\.load)\([^,\n]*\)", block)  # each names a dtype


def test_a_pipeline_in_bfloat16_draws_by_stock_diffusers_that_is_told_so(made: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(made / "pruned", dtype=torch.bfloat16)
    assert {part.dtype for part in (pipe.transformer, pipe.vae, pipe.text_encoder)} == {torch.bfloat16}
    assert torch.equal(draw(pipe), draw(pruning.load(made / "pruned")))
