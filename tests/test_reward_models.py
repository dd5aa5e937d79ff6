"""Scorers that are networks: tiny random weights give what upstream's published code gives; gradients are right.

Every reference runs in float64, one PIL image at a time, as the published code does. PickScore's and CLIPScore's is
their own code on transformers and open_clip, HPSv2's is its transform and formula on open_clip, LAION's its few lines;
BLIP, on which ImageReward stands, is written out below from its published layers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
from torchvision.transforms import functional as TF
from transformers import (
    BertTokenizer,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
)

import rewards
from rewards import Reward, RewardError, load
from rewards.data.images import decode_tensor as decode
from rewards.models import preprocess
from rewards.models.aesthetic import Aesthetic, new_head
from rewards.models.hps import HPSv2
from rewards.models.network import Network, unit
from rewards.models.pick_score import PickScore
from tests.benchmarks.convert_weights import main, read_state
from tests.reward_samples import (
    PROMPTS,
    SIDE,
    SIZES,
    Sample,
    deep_png,
    new_clip,
    pictures,
    randomise,
    samples,
    tensor,
    write_modes,
)

PUBLISHED = Path(__file__).parents[2] / "shared/data/aesthetic"
# -- tiny checkpoints --------------------------------------------------------------------------------------------


TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def new_open_clip(folder: Path) -> None:
    folder.mkdir()
    (folder / "tiny-open-clip.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder / "tiny-open-clip.json")
    settings = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": settings}))
    model = open_clip.create_model("tiny-open-clip")
    randomise(model, 9)  # of these weights most cosines are positive: CLIPScore clips the others
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    for version, seed in {"v2": 29, "v2.1": 24}.items():  # no cosine near 0, where a relative error means nothing
        randomise(model, seed)
        torch.save({"epoch": 1, "state_dict": model.state_dict()}, folder / f"HPS_{version}_compressed.pt")


@dataclass(frozen=True)
class BlipSize:
    """Layers and widths of the picture's tower and of the reader, the picture's side and that of its patches."""

    layers: tuple[int, int] = (2, 2)
    widths: tuple[int, int] = (128, 32)
    side: int = SIDE
    patch: int = 8


def new_image_reward(folder: Path, size: BlipSize) -> None:
    """A state dict with upstream's names, its ``med_config.json``, and a BERT tokenizer that spells."""
    folder.mkdir()
    pieces = "abcdefghijklmnopqrstuvwxyz0123456789%&',-\"é狐שול"
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces, *(f"##{piece}" for piece in pieces)]
    BertTokenizer(vocab={piece: number for number, piece in enumerate(vocab)}).save_pretrained(folder)
    seen, read = size.widths
    config = {"vocab_size": len(vocab) + 2, "hidden_size": read, "intermediate_size": 4 * read}
    config |= {"num_hidden_layers": size.layers[1], "num_attention_heads": max(read // 64, 2)}
    config |= {"max_position_embeddings": 512, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "pad_token_id": 0}
    config |= {"type_vocab_size": 2, "add_cross_attention": True}
    (folder / "med_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(6)
    weights: dict[str, Tensor] = {}

    def add(name: str, *shape: int) -> None:
        weights[name] = torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    def affine(name: str, outputs: int, *inputs: int) -> None:
        if inputs:
            add(f"{name}.weight", outputs, *inputs)
        else:
            weights[f"{name}.weight"] = 1 + 0.1 * torch.randn(outputs, generator=generator)
        weights[f"{name}.bias"] = 0.1 * torch.randn(outputs, generator=generator)

    vision, text = "blip.visual_encoder", "blip.text_encoder"
    add(f"{vision}.cls_token", 1, 1, seen)
    add(f"{vision}.pos_embed", 1, (size.side // size.patch) ** 2 + 1, seen)
    affine(f"{vision}.patch_embed.proj", seen, 3, size.patch, size.patch)
    for block in (f"{vision}.blocks.{number}" for number in range(size.layers[0])):
        affine(f"{block}.norm1", seen)
        affine(f"{block}.attn.qkv", 3 * seen, seen)
        affine(f"{block}.attn.proj", seen, seen)
        affine(f"{block}.norm2", seen)
        affine(f"{block}.mlp.fc1", 4 * seen, seen)
        affine(f"{block}.mlp.fc2", seen, 4 * seen)
    affine(f"{vision}.norm", seen)
    add(f"{text}.embeddings.word_embeddings.weight", len(vocab) + 2, read)
    add(f"{text}.embeddings.position_embeddings.weight", 512, read)
    weights[f"{text}.embeddings.position_ids"] = torch.arange(512)[None]
    affine(f"{text}.embeddings.LayerNorm", read)
    for layer in (f"{text}.encoder.layer.{number}" for number in range(size.layers[1])):
        for attention, width in (("attention", read), ("crossattention", seen)):
            affine(f"{layer}.{attention}.self.query", read, read)
            affine(f"{layer}.{attention}.self.key", read, width)
            affine(f"{layer}.{attention}.self.value", read, width)
            affine(f"{layer}.{attention}.output.dense", read, read)
            affine(f"{layer}.{attention}.output.LayerNorm", read)
        affine(f"{layer}.intermediate.dense", 4 * read, read)
        affine(f"{layer}.output.dense", read, 4 * read)
        affine(f"{layer}.output.LayerNorm", read)
    affine("blip.vision_proj", 256, seen)  # in the published file, and of no use here
    affine("blip.text_proj", 256, read)
    for number, (outputs, inputs) in HEAD.items():
        affine(f"mlp.layers.{number}", outputs, inputs if inputs else read)
    torch.save(weights, folder / "ImageReward.pt")


HEAD = {
    0: (1024, 0),
    2: (128, 1024),
    4: (64, 128),
    6: (16, 64),
    7: (1, 16),
}  # number in the Sequential: outputs, inputs


def new_aesthetic_head(folder: Path, width: int = 16) -> None:
    folder.mkdir()
    generator = torch.Generator().manual_seed(7)
    shapes = {f"layers.{number}.weight": (outputs, inputs or width) for number, (outputs, inputs) in HEAD.items()}
    shapes |= {f"layers.{number}.bias": (outputs,) for number, (outputs, _) in HEAD.items()}
    weights = {n: torch.randn(shape, generator=generator) * shape[-1] ** -0.5 for n, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors")
    torch.save({"weight": weights["layers.0.weight"][:1], "bias": torch.ones(1)}, folder / "linear.pth")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    new_clip(root / "clip")
    new_open_clip(root / "open_clip")
    new_image_reward(root / "image_reward", BlipSize())
    new_aesthetic_head(root / "head")
    convert(root)
    return root


def convert(root: Path) -> None:
    """The torch files below ``root``, as published, to safetensors beside them, as a user does."""
    for file in sorted([*root.rglob("*.pt"), *root.rglob("*.pth")]):
        assert main(["state", str(file)]) == 0


# -- what upstream publishes -------------------------------------------------------------------------------------

Score = Callable[[Image.Image, str], float]


def clip_parts(folder: Path) -> tuple[Any, Callable[[Image.Image], Tensor], Callable[[str], Any]]:
    """As in PickScore's README: the processor's pixels and tokens, and the network."""
    processor, tokenizer = (cls.from_pretrained(folder) for cls in (CLIPImageProcessorPil, CLIPTokenizer))

    def pixels(picture: Image.Image) -> Tensor:
        return processor(picture, return_tensors="pt").pixel_values.double()

    def tokens(prompt: str) -> Any:
        return tokenizer(prompt, padding=True, truncation=True, max_length=77, return_tensors="pt")

    return CLIPModel.from_pretrained(folder).double(), pixels, tokens


def pick_score(folder: Path) -> Score:
    model, pixels, tokens = clip_parts(folder / "clip")

    def score(picture: Image.Image, prompt: str) -> float:
        image = model.get_image_features(pixel_values=pixels(picture)).pooler_output
        text = model.get_text_features(**tokens(prompt)).pooler_output
        image, text = image / image.norm(dim=-1, keepdim=True), text / text.norm(dim=-1, keepdim=True)
        return float(model.logit_scale.exp() * (text @ image.T)[0, 0])

    return score


def clip_score(folder: Path) -> Score:
    model, pixels, tokens = clip_parts(folder / "clip")

    def score(picture: Image.Image, prompt: str) -> float:  # logits_per_image is exp(logit_scale) times the cosine
        answer = model(pixel_values=pixels(picture), **tokens("A photo depicts " + prompt)).logits_per_image
        return 2.5 * max(float(answer / model.logit_scale.exp()), 0)

    return score


def open_clip_score(folder: Path) -> Score:
    name = f"local-dir:{folder / 'open_clip'}"
    model, transform = open_clip.create_model_from_pretrained(name)
    model, tokenizer = model.double(), open_clip.get_tokenizer(name)

    def score(picture: Image.Image, prompt: str) -> float:
        image, text, _ = model(transform(picture)[None].double(), tokenizer([prompt]))
        return max(100 * float(image @ text.T), 0)

    return score


def hps_score(folder: Path) -> Score:
    model = open_clip.create_model("tiny-open-clip")
    model.load_state_dict(load_file(folder / "open_clip/HPS_v2.1_compressed.safetensors"))
    model, tokenizer = model.double(), open_clip.get_tokenizer("tiny-open-clip")
    normalise = Normalize(preprocess.OPENAI_MEAN, preprocess.OPENAI_STD)

    def score(picture: Image.Image, prompt: str) -> float:
        pixels = ToTensor()(picture)
        scale = SIDE / max(pixels.shape[1:])
        if scale != 1:
            height, width = (max(round(extent * scale), 1) for extent in pixels.shape[1:])
            pixels = TF.resize(pixels, [height, width], InterpolationMode.BICUBIC)
        down, across = SIDE - pixels.shape[1], SIDE - pixels.shape[2]
        pixels = TF.pad(pixels, [across // 2, down // 2, across - across // 2, down - down // 2])
        image, text, _ = model(normalise(pixels)[None].double(), tokenizer([prompt]))
        return float(image @ text.T)

    return score


def openai_transform(picture: Image.Image) -> Tensor:
    """The transform of OpenAI's clip package, which LAION and ImageReward also have."""
    steps = [Resize(SIDE, InterpolationMode.BICUBIC), CenterCrop(SIDE), ToTensor()]
    return Compose([*steps, Normalize(preprocess.OPENAI_MEAN, preprocess.OPENAI_STD)])(picture)[None].double()


def aesthetic_score(folder: Path) -> Score:
    encoder = CLIPModel.from_pretrained(folder / "clip").double()
    layers = {name: value.double() for name, value in load_file(folder / "head/model.safetensors").items()}

    def score(picture: Image.Image, prompt: str) -> float:
        value = encoder.get_image_features(pixel_values=openai_transform(picture)).pooler_output
        value = value / value.norm()
        for number in HEAD:
            value = value @ layers[f"layers.{number}.weight"].T + layers[f"layers.{number}.bias"]
        return float(value)

    return score


@dataclass
class Blip:
    """BLIP's two towers, layer by layer (Li et al. 2022; vit.py and med.py of salesforce/BLIP)."""

    weights: dict[str, Tensor]

    def affine(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | float = 0.0) -> Tensor:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (q, k, v))
        weights = (q @ k.mT / q.shape[-1] ** 0.5 + mask).softmax(-1)
        return (weights @ v).transpose(0, 1).flatten(1)

    def see(self, pixels: Tensor) -> Tensor:
        name = "blip.visual_encoder"
        kernel, bias = (self.weights[f"{name}.patch_embed.proj.{part}"] for part in ("weight", "bias"))
        patches = F.conv2d(pixels, kernel, bias, stride=kernel.shape[-1])[0].flatten(1).T
        x = torch.cat([self.weights[f"{name}.cls_token"][0], patches]) + self.weights[f"{name}.pos_embed"][0]
        for block in (f"{name}.blocks.0", f"{name}.blocks.1"):
            q, k, v = self.affine(f"{block}.attn.qkv", self.norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
            x = x + self.affine(f"{block}.attn.proj", self.attend(q, k, v, heads=2))
            hidden = F.gelu(self.affine(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x, 1e-6)))
            x = x + self.affine(f"{block}.mlp.fc2", hidden)
        return self.norm(f"{name}.norm", x, 1e-6)

    def read(self, ids: Tensor, mask: Tensor, seen: Tensor) -> Tensor:
        name = "blip.text_encoder.embeddings"
        x = self.weights[f"{name}.word_embeddings.weight"][ids]
        x = x + self.weights[f"{name}.position_embeddings.weight"][: len(ids)]
        x = self.norm(f"{name}.LayerNorm", x, 1e-12)
        for layer in ("blip.text_encoder.encoder.layer.0", "blip.text_encoder.encoder.layer.1"):
            x = self.look(f"{layer}.attention", x, x, -10000.0 * (1 - mask.double()))
            x = self.look(f"{layer}.crossattention", x, seen)
            hidden = self.affine(f"{layer}.output.dense", F.gelu(self.affine(f"{layer}.intermediate.dense", x)))
            x = self.norm(f"{layer}.output.LayerNorm", hidden + x, 1e-12)
        return x

    def look(self, name: str, x: Tensor, at: Tensor, mask: Tensor | float = 0.0) -> Tensor:
        q, k, v = (self.affine(f"{name}.self.{p}", y) for p, y in (("query", x), ("key", at), ("value", at)))
        attended = self.affine(f"{name}.output.dense", self.attend(q, k, v, 2, mask))
        return self.norm(f"{name}.output.LayerNorm", attended + x, 1e-12)


def image_reward_score(folder: Path) -> Score:
    weights = load_file(folder / "image_reward/ImageReward.safetensors")
    blip = Blip({name: value.double() for name, value in weights.items() if value.is_floating_point()})
    tokenizer = BertTokenizer.from_pretrained(folder / "image_reward")

    def score(picture: Image.Image, prompt: str) -> float:
        tokens = tokenizer(prompt, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        read = blip.read(tokens.input_ids[0], tokens.attention_mask[0], blip.see(openai_transform(picture)))
        value = read[0]
        for number in HEAD:
            value = blip.affine(f"mlp.layers.{number}", value)
        return (float(value) - 0.16717362830052426) / 1.0333394966054072

    return score


# -- ours --------------------------------------------------------------------------------------------------------


def arguments(folder: Path) -> dict[str, dict[str, Any]]:
    clip, blip = str(folder / "clip"), str(folder / "image_reward")
    return {
        "CLIPScore": {"model": clip, "scale": 2.5, "prefix": "A photo depicts "},
        "CLIPScore/open_clip": {"model": str(folder / "open_clip"), "library": "open_clip"},
        "PickScore": {"model": clip, "processor": clip},
        "HPSv2": {"model": str(folder / "open_clip"), "architecture": "tiny-open-clip"},
        "Aesthetic": {"model": clip, "head": str(folder / "head")},
        "ImageReward": {"model": blip, "tokenizer": blip},
    }


UPSTREAM = {
    "CLIPScore": clip_score,
    "CLIPScore/open_clip": open_clip_score,
    "PickScore": pick_score,
    "HPSv2": hps_score,
    "Aesthetic": aesthetic_score,
    "ImageReward": image_reward_score,
}
each = pytest.mark.parametrize("name", list(UPSTREAM))


def new(name: str, folder: Path, **extra: Any) -> Network:
    scorer = load(name.partition("/")[0], {"device": "cpu", **arguments(folder)[name], **extra})
    assert isinstance(scorer, Network) and isinstance(scorer, Reward)
    return scorer


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    return samples(tmp_path_factory.mktemp("modes"))


@each
def test_scores_are_upstreams(name: str, folder: Path, drawn: list[Sample]) -> None:
    ours, upstream = new(name, folder), UPSTREAM[name](folder)
    scores = [float(ours.score(images=sample.images, prompts=[sample.prompt])) for sample in drawn]
    with torch.no_grad():
        expected = [upstream(sample.picture, sample.prompt) for sample in drawn]
    assert scores == pytest.approx(expected, rel=1e-4)
    assert len(set(expected)) > len(drawn) / 2  # not most of them clipped to 0


def test_files_of_every_mode_are_pictures(tmp_path: Path) -> None:
    """Upright and on white; where neither matters, as ``convert("RGB")``, with which upstream's scripts begin."""
    for path in write_modes(tmp_path):
        with Image.open(path) as opened:
            upright = opened.transpose(Image.Transpose.ROTATE_270) if path.stem == "turned" else opened
            rgba = np.asarray(upright.convert("RGBA"), dtype=np.float64)
        levels = decode(path).permute(1, 2, 0).numpy()
        alpha = rgba[..., 3:] / 255
        assert np.abs(levels - (rgba[..., :3] * alpha + 255 * (1 - alpha))).max() <= 1
        assert (alpha.min() < 1) == (path.stem in ("rgba", "grey_alpha", "palette"))
        if alpha.min() == 1:
            assert np.array_equal(levels, np.asarray(upright.convert("RGB")))
    (tmp_path / "deep_grey.png").write_bytes(deep_png(np.full((4, 5), 40000, dtype=np.uint16)))
    assert set(decode(tmp_path / "deep_grey.png").unique().tolist()) == {156}  # convert("RGB") would make it white


@each
def test_alone_or_in_a_batch_is_the_same(name: str, folder: Path) -> None:
    scorer = new(name, folder)
    images = torch.cat([tensor(picture) for picture in pictures([(50, 41)] * 4)])
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[2], PROMPTS[0]]  # of 5, 2 and 77 tokens, and one of them twice
    together = scorer.score(images=images, prompts=prompts)
    alone = [scorer.score(images=images[k : k + 1], prompts=prompts[k : k + 1]) for k in range(4)]
    assert together.dtype == torch.float32 and together.shape == (4,)
    assert not together.requires_grad
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)


@each
def test_the_gradient_is_the_slope(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the rounding to 8 bits it agrees with finite differences; the rounding changes it little."""
    scorer = new(name, folder).double()
    prompts = [PROMPTS[7], PROMPTS[8]]
    images = 0.2 + 0.6 * torch.cat([tensor(picture) for picture in pictures([(45, 38)] * 2, seed=3)]).double()
    images.requires_grad_()
    (rounded,) = torch.autograd.grad(scorer(images, prompts).sum(), images)
    with monkeypatch.context() as patch:
        patch.setattr(preprocess, "eight_bit", lambda levels: levels.clamp(0, 255))
        (gradient,) = torch.autograd.grad(scorer(images, prompts).sum(), images)
        direction = gradient + torch.randn(images.shape, generator=torch.Generator().manual_seed(4)) * gradient.std()
        step = 1e-5 * direction / direction.abs().max()
        with torch.no_grad():
            slope = (scorer(images + step, prompts) - scorer(images - step, prompts)).sum() / 2
    assert scorer.differentiable
    assert float(slope) == pytest.approx(float((gradient * step).sum()), rel=1e-4)
    assert float(slope) != 0
    assert F.cosine_similarity(rounded.flatten(), gradient.flatten(), dim=0) > 0.99
    assert not any(weight.requires_grad for weight in scorer.parameters())


@each
@pytest.mark.slow
def test_lower_precision_and_autocast(name: str, folder: Path) -> None:
    images, prompts = torch.cat([tensor(picture) for picture in pictures([(40, 40)] * 2)]), PROMPTS[7:9]
    scorer = new(name, folder)
    exact = scorer.score(images=images, prompts=prompts)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(scorer.score(images=images, prompts=prompts), exact)
    coarse = new(name, folder, dtype="bfloat16").score(images=images, prompts=prompts)
    assert coarse.dtype == torch.float32
    scale = {"CLIPScore": 2.5, "CLIPScore/open_clip": 100, "PickScore": 14, "HPSv2": 1}.get(name, 1)
    torch.testing.assert_close(coarse, exact, rtol=0, atol=0.03 * scale)
    assert not torch.equal(coarse, exact)
    with pytest.raises(RewardError, match=r"dtype is 'int8'; expected one of float32"):
        new(name, folder, dtype="int8")


# -- preprocessing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", ["transformers", "torchvision"])
def test_pixels_are_pils(crop: preprocess.Crop, folder: Path, drawn: list[Sample]) -> None:
    processor = CLIPImageProcessorPil.from_pretrained(folder / "clip", do_normalize=False)
    transform = Compose([Resize(SIDE, InterpolationMode.BICUBIC), CenterCrop(SIDE), ToTensor()])
    others = pictures([(34, 41), (500, 333), (48, 48), (SIDE, SIDE), (SIDE + 3, SIDE)])
    flat = [picture.quantize(6).convert("RGB") for picture in others]  # where a level often lies between two
    for picture in [*(sample.picture for sample in drawn), *others, *flat]:
        theirs = (
            processor(picture, return_tensors="pt").pixel_values[0] if crop == "transformers" else transform(picture)
        )
        levels = 255 * (preprocess.square(tensor(picture), SIDE, crop)[0] - theirs).abs()
        assert levels.max() < 0.01


def test_resize_is_pils_at_any_size() -> None:
    rng = np.random.default_rng(7)
    for number in range(40):
        width, height = sorted(rng.integers(1, 300, 2).tolist(), reverse=True)  # not tall: see resize()
        factor = 10 ** rng.uniform(-1, 0.5)
        size = (max(round(width * factor), 1), max(round(height * factor), 1))
        colours = rng.integers(0, 256, 256 if number % 2 else 2)  # of two, a level often lies between two
        levels = colours[rng.integers(0, len(colours), (height, width, 3))].astype(np.uint8)
        theirs = np.array(Image.fromarray(levels).resize(size, Image.Resampling.BICUBIC))
        ours = preprocess.resize(torch.from_numpy(levels).permute(2, 0, 1)[None].float(), size[1], size[0])
        assert torch.equal(ours[0].permute(1, 2, 0), torch.from_numpy(theirs).float()), (levels.shape, size)


def test_the_two_crops_are_a_pixel_apart() -> None:
    picture = tensor(pictures([(SIDE + 3, SIDE)])[0])
    assert torch.equal(preprocess.square(picture, SIDE, "transformers"), preprocess.to_levels(picture)[..., 1:33] / 255)
    assert torch.equal(preprocess.square(picture, SIDE, "torchvision"), preprocess.to_levels(picture)[..., 2:34] / 255)


def test_open_clips_transform(folder: Path) -> None:
    _, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder / 'open_clip'}")
    clip = new("CLIPScore/open_clip", folder).clip
    for picture in pictures(SIZES):
        ours = preprocess.square(tensor(picture), clip.side, "torchvision")
        ours = preprocess.normalise(ours, clip.settings["mean"], clip.settings["std"])
        assert (ours - transform(picture)[None]).abs().max() < 1.01 / 255 / 0.2


def test_letterbox_keeps_the_edges_that_a_crop_loses(folder: Path) -> None:
    wide = tensor(pictures([(90, 30)])[0])
    other = wide.clone()
    other[..., :10] = 1 - other[..., :10]
    change = {}
    for name in UPSTREAM:
        scorer = new(name, folder)
        one, two = (scorer(images, [PROMPTS[8]]) for images in (wide, other))
        change[name] = float((one - two).abs())
    assert {name for name, by in change.items() if by > 0} == {"HPSv2"}
    boxed = preprocess.letterbox(wide, SIDE, antialias=True)
    assert boxed[..., :10, :].abs().max() == boxed[..., 21:, :].abs().max() == 0  # 11 rows of picture between the bars


# -- traps -------------------------------------------------------------------------------------------------------


def test_pick_score_has_the_logit_scale(folder: Path) -> None:
    images, prompts = tensor(pictures([(40, 40)])[0]), [PROMPTS[7]]
    model = CLIPModel.from_pretrained(folder / "clip")
    cosine = new("CLIPScore", folder, scale=1.0, prefix="").score(images=images, prompts=prompts)
    assert cosine > 0.1
    torch.testing.assert_close(
        new("PickScore", folder).score(images=images, prompts=prompts), cosine * model.logit_scale.exp().detach()
    )
    # log(14.28) in bfloat16 would move every score by far more than the network does
    coarse = new("PickScore", folder, dtype="bfloat16")
    assert isinstance(coarse, PickScore)
    assert coarse.clip.logit_scale == pytest.approx(model.logit_scale.exp().item(), rel=1e-7)


def test_image_reward_reads_35_tokens(folder: Path) -> None:
    scorer, images = new("ImageReward", folder), tensor(pictures([(40, 40)])[0]).expand(4, -1, -1, -1)
    words = ["a"] * 33  # and the first and the last token, which every prompt has
    prompts = [words, [*words, "b", "c"], [*words[:32], "b"], words[:32]]
    full, longer, changed, shorter = scorer.score(images=images, prompts=[" ".join(text) for text in prompts]).tolist()
    assert full == longer
    assert len({full, changed, shorter}) == 3


def test_clip_reads_77_tokens(folder: Path) -> None:
    scorer, images = new("PickScore", folder), tensor(pictures([(40, 40)])[0]).expand(2, -1, -1, -1)
    one, two = scorer.score(images=images, prompts=["fox " * 75, "fox " * 75 + "cat"]).tolist()
    assert one == two


@pytest.mark.parametrize("name", [name for name in UPSTREAM if name != "Aesthetic"])
def test_a_caption_that_is_cut_is_told(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the first token too many on, and not before."""
    limit = 35 if name == "ImageReward" else 77
    scorer = new(name, folder, **({"prefix": ""} if name.startswith("CLIPScore") else {}))
    images = tensor(pictures([(40, 40)])[0])
    capsys.readouterr()
    scorer.score(images=images, prompts=["a " * (limit - 2)])
    assert capsys.readouterr().err == ""
    scorer.score(images=images, prompts=["a " * (limit - 1)])
    label = name.partition("/")[0]
    assert f"warning: {label} reads {limit} tokens of a caption, and cuts longer ones" in capsys.readouterr().err


def test_hps_versions_and_resize_differ(folder: Path) -> None:
    images, prompts = tensor(pictures([(90, 70)])[0]), [PROMPTS[0]]
    extras: list[dict[str, Any]] = [{}, {"version": "2.0"}, {"antialias": False}]
    assert len({float(new("HPSv2", folder, **extra).score(images=images, prompts=prompts)) for extra in extras}) == 3
    with pytest.raises(RewardError, match="version is '3'; expected '2.0' or '2.1'"):
        new("HPSv2", folder, version="3")
    direct = HPSv2(str(folder / "open_clip/HPS_v2_compressed.safetensors"), architecture="tiny-open-clip", device="cpu")
    again = direct.score(images=images, prompts=prompts)
    assert torch.equal(again, new("HPSv2", folder, version="2.0").score(images=images, prompts=prompts))


def test_aesthetic_takes_either_head_and_no_prompt(folder: Path) -> None:
    images = torch.cat([tensor(picture) for picture in pictures([(40, 40)] * 2)])
    scorer = new("Aesthetic", folder, head=str(folder / "head/linear.safetensors"))
    assert not rewards.needs_prompt(scorer)
    assert isinstance(scorer, Aesthetic) and isinstance(scorer.head, nn.Linear)
    one, two = scorer.score(images=images, prompts=["a", "b"]), scorer.score(images=images, prompts=["", ""])
    assert torch.equal(one, two) and one[0] != one[1]


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="LAION's heads and vectors are not in the repository")
@pytest.mark.parametrize(
    ("file", "expected"),
    [  # LAION's nine vectors of ratings 1 to 9, scored by the two heads as published
        ("sa_0_4_vit_l_14_linear.pth", [-0.14, 1.9, 3.58, 5.1, 6.47, 7.79, 9.05, 10.23, 11.3]),
        ("sac+logos+ava1-l14-linearMSE.pth", [2.36, 3.07, 3.67, 4.24, 4.7, 5.07, 5.37, 5.58, 5.75]),
    ],
)
def test_laions_heads_on_laions_vectors(file: str, expected: list[float]) -> None:
    vectors = torch.stack([torch.from_numpy(np.load(PUBLISHED / f"rating{k}.npy")).flatten() for k in range(1, 10)])
    head = new_head(768, read_state(PUBLISHED / file))
    with torch.no_grad():
        scores = head(unit(3.0 * vectors.float())).squeeze(-1)  # the length of an embedding does not matter
    assert scores.tolist() == pytest.approx(expected, abs=0.006)


# -- loading -----------------------------------------------------------------------------------------------------


def test_names() -> None:
    assert {"CLIPScore", "PickScore", "HPSv2", "ImageReward", "Aesthetic"} <= set(rewards.available())
    assert rewards.list() == rewards.available()


def test_a_wrong_checkpoint_is_one_sentence(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # or every unknown name waits for a reply
    clip, blip, heads = (str(folder / name) for name in ("clip", "image_reward", "head"))
    partial = tmp_path / "partial"
    new_clip(partial)
    weights = load_file(partial / "model.safetensors")
    save_file({name: value for name, value in weights.items() if "layers.1" not in name}, partial / "model.safetensors")
    (tmp_path / "pickle").mkdir()
    torch.save({"state_dict": {"weight": Path()}}, tmp_path / "pickle/HPS_v2.1_compressed.pt")
    mistakes: list[tuple[str, dict[str, Any], str]] = [
        ("PickScore", {"model": "nobody/nothing", "processor": clip}, "'nobody/nothing'"),
        ("PickScore", {"model": clip, "processor": blip}, "image_reward'"),
        ("PickScore", {"model": str(tmp_path / "absent"), "processor": clip}, "absent'"),
        ("CLIPScore", {"model": str(partial)}, "lacks 32 weights of a CLIPModel, such as text_model.encoder.layers.1"),
        ("CLIPScore", {"model": clip, "library": "open_clip"}, "clip'"),
        ("CLIPScore", {"model": clip, "library": "timm"}, "library is 'timm'; expected 'transformers' or 'open_clip'"),
        ("HPSv2", {"model": clip}, "there is no HPS_v2.1_compressed.pt in it"),
        ("HPSv2", {"model": str(tmp_path / "pickle"), "architecture": "tiny-open-clip"}, "Weights only"),
        ("Aesthetic", {"model": clip, "head": f"{heads}/nothing"}, "head/nothing'"),
        ("Aesthetic", {"model": clip, "head": str(folder / "clip/model.safetensors")}, "clip/model.safetensors'"),
        ("ImageReward", {"model": heads, "tokenizer": blip}, "there is no ImageReward.pt in it"),
        ("ImageReward", {"model": blip, "tokenizer": heads}, "head'"),
    ]
    for name, init_args, message in mistakes:
        with pytest.raises(RewardError) as caught:
            load(name, {"device": "cpu", **init_args})
        text = str(caught.value)
        print(text)
        assert text.startswith(name) and message in text, text
        assert "\n" not in text and not re.search(r"[.!?]\s", text) and len(text) < 400, text
