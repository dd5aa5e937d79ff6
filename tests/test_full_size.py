"""The scorers' networks at their published sizes, random, on the CPU: float32 and bfloat16 agree; memory is recorded.

One at a time, under 8 GiB: a network is built once, scores, and becomes bfloat16 where it stands. Where a scorer would
read a checkpoint of gigabytes, it is handed the network; everything after that is its own. Qwen2-VL 7B (HPSv3,
VQAScore, judges) is too large for this.

Once, on a busy core of an AMD EPYC without AMX, where bfloat16 is slow: peaks of 4.4 (PickScore), 4.4 (HPSv2), 7.3
(MPS, whose weights are made here besides), 3.8 (ImageReward), 3.8 (Aesthetic), 3.0 (CLIPScore L/14) and 4.0 GiB
(SigLIP); 11 to 55 s for two pictures in float32 and 71 to 328 s in bfloat16; the scores 0.0004 to 0.0012 apart as
cosines, and 0.012 of ImageReward's deviation.

    pytest -n 0 -m slow -s tests/test_full_size.py
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import CLIPConfig, CLIPModel

from rewards.models.aesthetic import Aesthetic
from rewards.models.clip_score import CLIPScore, OpenCLIP
from rewards.models.hps import HPSv2
from rewards.models.image_reward import ImageReward
from rewards.models.mps import MPS
from rewards.models.network import Network
from rewards.models.pick_score import PickScore
from tests.reward_samples import new_clip, pictures, tensor
from tests.test_reward_models import BlipSize, convert, new_aesthetic_head, new_image_reward

LIMIT = 8.0  # GiB
PROMPTS = ["a red fox in the snow", "two cups left of a blue chair, " * 4]


def clip_config(vision: tuple[int, int, int], text: tuple[int, int, int], width: int, act: str) -> CLIPConfig:
    """Towers of (width, layers, heads), patches of 14 pixels, an embedding of ``width``."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    see, read = (dict(zip(names, tower, strict=True)) for tower in (vision, text))
    see |= {"intermediate_size": 4 * vision[0], "hidden_act": act, "patch_size": 14, "image_size": 224}
    read |= {"intermediate_size": 4 * text[0], "hidden_act": act, "vocab_size": 49408, "eos_token_id": 49407}
    return CLIPConfig(vision_config=see, text_config=read, projection_dim=width)


HUGE = clip_config((1280, 32, 16), (1024, 24, 16), 1024, "gelu")
LARGE = clip_config((1024, 24, 16), (768, 12, 12), 768, "quick_gelu")


class Quick(TorchFunctionMode):
    """Random numbers are read from a pool of two million: enough here, and initialisation takes no minutes."""

    def __init__(self) -> None:
        super().__init__()
        self.random = torch.Generator().manual_seed(0)
        self.pools = {
            Tensor.normal_: torch.randn(1 << 21, generator=self.random),
            Tensor.uniform_: torch.rand(1 << 21, generator=self.random),
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in self.pools:
            return func(*args, **(kwargs or {}))
        weight, *limits = args  # torch.nn.init gives both by position
        low, high = limits or (0.0, 1.0)
        start = int(torch.randint(1 << 20, (), generator=self.random))  # or what draws anew until it fits never ends
        pool = self.pools[func][start : start + (1 << 20)]
        for part in weight.detach().view(-1).split(len(pool)):
            part.copy_(pool[: len(part)])
        return weight.mul_(high if func is Tensor.normal_ else high - low).add_(low)


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Network]:
    """A scorer by name, with random weights."""
    new_clip(tmp_path / "clip")  # for its tokenizer
    clip = str(tmp_path / "clip")

    def huge() -> PickScore:
        monkeypatch.setattr("rewards.models.clip_score.pretrained", lambda cls, source: cls(HUGE))
        return PickScore(clip, clip, device="cpu")

    def large() -> CLIPScore:
        monkeypatch.setattr("rewards.models.clip_score.pretrained", lambda cls, source: cls(LARGE))
        return CLIPScore(clip, device="cpu")

    def aesthetic() -> Aesthetic:
        monkeypatch.setattr("rewards.models.aesthetic.pretrained", lambda cls, source: cls(LARGE))
        new_aesthetic_head(tmp_path / "head", 768)
        return Aesthetic(clip, str(tmp_path / "head"), device="cpu")

    def hps() -> HPSv2:
        new = open_clip.create_model
        monkeypatch.setattr(open_clip, "create_model_from_pretrained", lambda name, file, return_transform: new(name))
        (tmp_path / "HPS_v2.1_compressed.safetensors").touch()
        return HPSv2(str(tmp_path), device="cpu")

    def siglip() -> CLIPScore:
        network = open_clip.create_model("ViT-SO400M-14-SigLIP")

        def tokenizer(prompts: list[str], length: int = 16) -> Tensor:  # its own is on the hub
            return torch.tensor([[hash(prompt) % 32000] * length for prompt in prompts])

        monkeypatch.setattr(OpenCLIP, "load", lambda reward, model: OpenCLIP(reward, network, tokenizer))
        return CLIPScore("siglip", "open_clip", device="cpu")

    def blip() -> ImageReward:
        new_image_reward(tmp_path / "blip", BlipSize((24, 12), (1024, 768), 224, 16))
        convert(tmp_path / "blip")
        return ImageReward(str(tmp_path / "blip"), str(tmp_path / "blip"), device="cpu")

    def mps() -> MPS:
        HUGE.save_pretrained(tmp_path / "clip")
        weights = {f"model.{name}": value.bfloat16() for name, value in CLIPModel(HUGE).state_dict().items()}
        shapes = {
            "0.fn.norm.weight": (1024,),
            "0.fn.to_q.weight": (1024, 1024),
            "0.fn.to_kv.weight": (128, 1024),
            "0.fn.to_out.weight": (1024, 1024),
            "0.fn.ff.0.weight": (8192, 1024),
            "0.fn.ff.2.weight": (1024, 4096),
            "1.fn.norm.weight": (1024,),
            "1.fn.fused_attn_ff_proj.weight": (1024 + 128 + 8192, 1024),
            "1.fn.attn_out.weight": (1024, 1024),
            "1.fn.ff_out.1.weight": (1024, 4096),
        }
        for layer in range(4):
            for name, shape in shapes.items():
                value = torch.randn(shape) * shape[-1] ** -0.5 if len(shape) > 1 else torch.ones(shape)
                weights[f"cross_model.layers.{layer}.{name}"] = value.bfloat16()
        monkeypatch.setattr("rewards.models.mps.read_weights", lambda source, name: weights)
        (tmp_path / "model.safetensors").touch()
        scorer = MPS(str(tmp_path), processor=clip, device="cpu")
        weights.clear()
        return scorer

    makers: dict[str, Callable[[], Network]] = {"PickScore (CLIP H/14)": huge, "CLIPScore (CLIP L/14)": large}
    makers |= {"Aesthetic (CLIP L/14)": aesthetic, "HPSv2 (open_clip ViT-H-14)": hps, "MPS (CLIP H/14)": mps}
    makers |= {"CLIPScore (open_clip SigLIP so400m/14)": siglip, "ImageReward (BLIP L/16)": blip}
    return lambda name: makers[name]()


def peak() -> float:
    """Most GiB that this process has held since :func:`forget`."""
    (line,) = (row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def forget() -> None:
    """Free what can be freed and begin to measure anew."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parameters", "unit"),  # sizes in 1e9, ImageReward's without BERT's words; what a cosine of 1 is worth
    [
        ("PickScore (CLIP H/14)", 0.986, 14.3),
        ("HPSv2 (open_clip ViT-H-14)", 0.986, 1),
        ("MPS (CLIP H/14)", 1.105, 14.3),
        ("ImageReward (BLIP L/16)", 0.423, 1),
        ("Aesthetic (CLIP L/14)", 0.304, 1),
        ("CLIPScore (CLIP L/14)", 0.428, 100),
        ("CLIPScore (open_clip SigLIP so400m/14)", 0.877, 100),
    ],
)
def test_float32_and_bfloat16_agree(
    name: str, parameters: float, unit: float, build: Callable[[str], Network], record_property: Any
) -> None:
    forget()
    torch.manual_seed(0)
    with Quick():
        scorer = build(name)
    count = sum(weight.numel() for weight in scorer.parameters()) / 1e9
    images = torch.cat([tensor(picture) for picture in pictures([(300, 240)] * 2)])
    scores, seconds, most = [], [], []
    for dtype in ("float32", "bfloat16"):
        towers = [module for part, module in scorer.named_children() if part != "head"]
        scorer.settle("cpu", dtype, *towers)
        start = time.perf_counter()
        scores.append(scorer.score(images=images, prompts=PROMPTS))
        seconds.append(time.perf_counter() - start)
        most.append(peak())
        forget()
    difference = float((scores[1] - scores[0]).abs().max()) / unit
    figures = {"parameters": count, "peak_gib": most, "seconds": seconds, "difference": difference}
    for key, value in figures.items():
        record_property(key, value)
    print(f"\n{name}: {count:.3f} B; peak {most[0]:.2f} and {most[1]:.2f} GiB; ", end="")
    print(f"{seconds[0]:.1f} and {seconds[1]:.1f} s for 2 pictures; scores {scores[0].tolist()}, off {difference:.4f}")
    assert count == pytest.approx(parameters, rel=0.03)
    assert all(torch.isfinite(score).all() for score in scores)
    assert 0 < difference < 0.02  # of a cosine
    assert max(most) < LIMIT
