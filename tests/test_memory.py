"""Memory that is known before it is spent: the ghost device, families from config files, the trace and its advice."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from align import families
from align.common.command import parse
from align.common.errors import UserError
from align.families.blank import blank
from align.policy.policy import LoRA, Policy
from align.train import main
from align.training import advice
from align.training.config import TrainConfig
from align.training.ghost import GHOST, Ghost
from align.training.ledger import Bytes, Estimate, Part, Phase
from align.training.memory import trace
from tests import tiny_families
from tests.benchmarks import RESULTS
from tests.benchmarks import memory as benchmark

ROOT = Path(__file__).parents[1]
MIB = 1 << 20


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny FLUX.1-dev without a weight: its JSON files alone."""
    folder = tiny_families.save("flux-dev", tmp_path_factory.mktemp("flux") / "whole")
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    return folder


@pytest.fixture
def config(flux: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    def made(objective: str = "DPO", **settings: Any) -> TrainConfig:
        return benchmark.config_of(flux, objective, tmp_path, resolution=32, **settings)

    return made


# the device
def test_a_ledger_counts_a_storage_once_and_until_it_dies() -> None:
    ghost = Ghost()
    with ghost.present():
        x = torch.zeros(MIB // 4, device=GHOST)
        y = x.view(2, -1)[1]
        assert ghost.ledger.total == MIB
        z = x + 1
        assert ghost.ledger.total == ghost.ledger.most == 2 * MIB
        del x, y
        assert ghost.ledger.total == MIB and ghost.ledger.most == 2 * MIB
        del z
    assert ghost.ledger.total == 0


def test_the_host_is_real_and_small_values_are_known() -> None:
    with Ghost().present():
        sigma = torch.linspace(1, 0, 5)
        assert sigma.tolist() == [1, 0.75, 0.5, 0.25, 0]
        t = sigma.to(GHOST)[torch.tensor([1, 3]).to(GHOST)]
        assert t.is_meta and (t * 2).sum().item() == 2 and not bool((t > 0.8).any())
        assert torch.equal(t, t.clone()) and t.cpu().tolist() == [0.75, 0.25]
        big = torch.randn(1 << 20).to(GHOST)
        assert big.mean().item() == 1 and big.cpu().shape == big.shape  # what nobody knows
        assert (torch.tensor([True, False, True]).to(GHOST)).nonzero().shape == (2, 1)
        assert big.view(2, -1)[torch.tensor([False, True]).to(GHOST)].shape == (1, 1 << 19)


def test_autocast_is_a_gpus_and_a_checkpoint_computes_in_it_again() -> None:
    ghost = Ghost()
    with ghost.present():
        with GHOST:
            linear = nn.Linear(64, 64)
        with torch.autocast("meta", torch.bfloat16):
            x = linear(torch.randn(4, 64).to(GHOST))
            assert x.dtype == torch.bfloat16 and F.layer_norm(x, (64,)).dtype == torch.float32
            with torch.autocast("meta", enabled=False):
                assert linear(x.float()).dtype == torch.float32
            y = checkpoint(lambda x: linear(linear(x)).relu(), x, use_reentrant=False)
        ghost.backward(y.float().sum(), torch.bfloat16)
        assert linear.weight.grad is not None and linear.weight.grad.dtype == torch.float32


def test_attention_keeps_no_matrix_of_scores() -> None:
    ghost = Ghost()
    with ghost.present():
        query = torch.empty(1, 2, 1024, 8, device=GHOST, requires_grad=True)
        out = F.scaled_dot_product_attention(query, query, query)
        assert ghost.ledger.most < 4 * query.nbytes < 4 * 2 * 1024**2
        ghost.backward(out.sum(), torch.float32)
        assert query.grad is not None and query.grad.shape == query.shape


# families from config files
@pytest.mark.parametrize(
    "name", ["sdxl", *(pytest.param(n, marks=pytest.mark.slow) for n in ("flux2-klein", "chroma")), "sana"]
)
def test_a_blank_family_is_the_loaded_one_without_its_weights(name: str, tmp_path: Path) -> None:
    folder = tiny_families.save(name, tmp_path / name)
    whole = families.load(str(folder), torch.bfloat16)
    with Ghost().present():
        empty = blank(str(folder), torch.bfloat16)
        sizes = {key: (p.shape, p.dtype) for key, p in empty.denoiser.state_dict().items()}
        assert sizes == {key: (p.shape, p.dtype) for key, p in whole.denoiser.state_dict().items()}
        assert all(p.is_meta for p in empty.pipe.vae.parameters()) and empty.latent_shape() == whole.latent_shape()
        said = {key: tensor.shape for key, tensor in empty.uncond.tensors.items()}
    assert said == {key: tensor.shape for key, tensor in whole.uncond.tensors.items()}


# the trace
@pytest.mark.slow
def test_a_traced_peak_is_within_15_percent_of_the_measured_one(tmp_path: Path) -> None:
    tiny_families.save("flux-dev", tmp_path / "flux-dev")
    found = benchmark.compare("flux-dev", "PolicyGradient", "LoRA, checkpointing", tmp_path)
    assert abs(found["off"]) < 0.15 and abs(found["update_off"]) < 0.15, found


def test_the_published_comparison_holds() -> None:
    """``tests/benchmarks/memory.py`` of every combination, and of the H200."""
    found = json.loads((RESULTS / "memory.json").read_text())
    assert len(found["measured"]) == 36
    assert max(abs(entry["off"]) for entry in found["measured"].values()) < 0.15
    for entry in found["gpu"].values():
        assert all(abs(pair["traced_gib"] / pair["measured_gib"] - 1) < 0.15 for pair in entry.values())


@pytest.mark.slow
def test_what_saves_memory_is_seen_to(config: Callable[..., TrainConfig]) -> None:
    def update(**settings: Any) -> Phase:
        return next(phase for phase in trace(config(**settings)).phases if phase.name == "update")

    plain, full = update(), update(lora=None)
    assert plain.parts[Part.REFERENCE] == 0 < full.parts[Part.REFERENCE] == full.parts[Part.WEIGHTS]
    assert full.parts[Part.OPTIMIZER] > 10 * plain.parts[Part.OPTIMIZER]
    small = update(gradient_checkpointing=True, quantize="nf4", offload_idle=True)
    assert small.parts[Part.ACTIVATIONS] < 0.7 * plain.parts[Part.ACTIVATIONS]
    assert small.parts[Part.WEIGHTS] < 0.7 * plain.parts[Part.WEIGHTS]
    assert small.parts[Part.TEXT] == small.parts[Part.VAE] == 0 < plain.parts[Part.TEXT]


def test_a_trace_draws_nothing_from_the_process_and_leaves_its_config(config: Callable[..., TrainConfig]) -> None:
    asked = config("NFT", ema_decay=0.9)
    before = torch.random.get_rng_state(), repr(asked)
    found = trace(asked)
    assert torch.equal(torch.random.get_rng_state(), before[0]) and repr(asked) == before[1]
    assert [phase.name for phase in found.phases] == ["step", "encoding", "rollout", "update"]
    assert found.peak.parts[Part.AVERAGE] == found.peak.parts[Part.LORA] > 0


def test_shards_divide_what_is_trained_and_not_what_is_computed() -> None:
    phase = Phase("update", Bytes({Part.WEIGHTS: 800, Part.OPTIMIZER: 400, Part.ACTIVATIONS: 100, Part.VAE: 50}))
    assert Estimate((phase,)).peak.total == 1350
    assert Estimate((phase,), shards=4, gathered=20).peak.parts == Bytes(
        {Part.WEIGHTS: 200, Part.OPTIMIZER: 100, Part.ACTIVATIONS: 120, Part.VAE: 50}
    )


# advice
@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24 << 30), ("80 GiB", 80 << 30), ("512MB", 512 << 20), ("8", 8 << 30)]
)
def test_memory_is_read(text: str, size: int) -> None:
    assert advice.parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "much", "-3GB", "0GB", "24TB"])
def test_memory_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="such as 24GB"):
        advice.parse_memory(text)


def made_up(config: TrainConfig, *_: object) -> Estimate:
    """A trace that takes no time: 100 MiB and what settings say."""
    held = 100 + 20 * (not config.offload_idle) + 40 * config.train_batch_size // (1 + config.gradient_checkpointing)
    return Estimate((Phase("update", Bytes({Part.ACTIVATIONS: held * MIB})),))


@pytest.mark.slow
def test_of_several_buckets_the_largest_is_traced(config: Callable[..., TrainConfig]) -> None:
    square, buckets = config(), config()
    square.data.resolution = "64x96"
    buckets.data.aspect_ratio_buckets = ["32x32", "64x96"]
    assert trace(buckets).peak.total == trace(square).peak.total
    buckets.data.aspect_ratio_buckets = True  # of which there are none at 32 pixels
    with pytest.raises(UserError, match="take smaller steps"):
        trace(buckets)


def test_advice_is_in_order_cumulative_and_ends_when_it_fits(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(advice, "trace", made_up)
    asked = config()
    found = made_up(asked)
    given = [(one.change, one.saves // MIB, one.peak // MIB) for one in advice.advise(asked, 1, found)]
    small = "train_batch_size: 1, gradient_accumulation_steps: 2 (the same updates)"
    assert given == [("offload_idle: true", 20, 180), ("gradient_checkpointing: true", 40, 140), (small, 20, 120)]
    assert [one.peak // MIB for one in advice.advise(asked, 206 * MIB, found)] == [180]  # of which an eighth is CUDA's
    assert not [*advice.advise(asked, 1 << 30, found)] and not asked.offload_idle
    asked.memory = "206MB"
    told = advice.report(asked)
    assert "does not fit 206MB, less 25.8 MiB for CUDA itself" in told and told.endswith("that fits")
    asked.memory = "20MB"
    assert advice.report(asked).endswith("take a smaller model")


def test_the_command_needs_no_weight_no_data_and_no_gpu(
    config: Callable[..., TrainConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config(use_8bit_adam=True, mixed_precision="fp16", dry_run=True, memory="24GB")
    assert main(["--config", str(tmp_path / "run.yaml")]) == 0
    told = capsys.readouterr().out
    assert re.search(r"peak memory, traced: [\d.]+ MiB per GPU, in encoding", told) and "fits 24GB" in told
    assert not (tmp_path / "run").exists()


def test_memory_without_dry_run_and_nf4_without_lora_are_refused(
    config: Callable[..., TrainConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config()
    for options in (["--memory", "24GB"], ["--quantize", "nf4", "--lora", "null", "--dry_run", "--memory", "24GB"]):
        assert main(["--config", str(tmp_path / "run.yaml"), *options]) == 2
    told = capsys.readouterr().err
    assert "set dry_run: true" in told and "quantize: nf4 is for a frozen denoiser" in told


# what the recipes are made of
def test_lora_trains_beside_a_denoiser_packed_at_load() -> None:
    family = families.load("shapes-sd3", quantize="nf4")
    packed = [p for p in family.denoiser.parameters() if p.dtype == torch.uint8]
    policy = Policy(family, LoRA(2), reference=False)
    x, t = torch.randn(2, *family.latent_shape()), torch.tensor([300.0, 700.0])
    policy.predict(x, t, family.encode(["a red circle", ""])).raw.square().mean().backward()
    assert packed and all(p.grad is not None for p in policy.parameters()) and not any(p.requires_grad for p in packed)


def test_idle_networks_rest_and_come_when_called() -> None:
    plain, resting = families.load("shapes-sd"), families.load("shapes-sd", offload_idle=True)
    moved: list[tuple[str, str]] = []
    hook = resting.pipe.vae._hf_hook.resting
    names = {id(part): name for name, part in resting.pipe.components.items()}
    hook.move = lambda module, device: moved.append((names[id(module)], str(device)))
    hook.device = torch.device("cuda")
    x = torch.randn(1, *plain.latent_shape())
    cond = resting.encode(["a red circle"])
    image = resting.to_image(x)
    assert moved == [("text_encoder", "cuda"), ("vae", "cuda")]
    raw = resting.forward(x, torch.tensor([500.0]), cond)
    assert moved[2:] == [("vae", "cpu"), ("text_encoder", "cpu")]
    assert torch.equal(image, plain.to_image(x))
    assert torch.equal(raw, plain.forward(x, torch.tensor([500.0]), plain.encode(["a red circle"])))


@pytest.mark.parametrize("path", benchmark.RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_the_peak_that_was_traced_and_fits(path: Path) -> None:
    found = json.loads((RESULTS / "memory.json").read_text())["recipes"][path.name]
    text = path.read_text()
    card = re.search(r"on one (\d+) GB GPU", text)
    assert card is not None and f"Traced peak: {found['peak'] / 2**30:.2f} GiB, in {found['phase']}," in text
    assert found["peak"] <= advice.room(advice.parse_memory(f"{card[1]}GB"))
    if path.name not in benchmark.BACKPROPAGATION:
        config, _ = parse(TrainConfig, "align.train", "", ["--config", str(path)])
        assert config.quantize == "nf4" and config.offload_idle and yaml.safe_load(text)["gradient_checkpointing"]
