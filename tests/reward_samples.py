"""What the tests of reward models share: pictures of every size and mode, hard prompts, tiny random checkpoints."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from rewards.data.images import decode_tensor as decode

SIDE = 32
SIZES = [(33, 47), (64, 64), (101, 37), (31, 90), (257, 129), (1, 40), (200, 5), (32, 35), (180, 224), (35, 32)]
PROMPTS = [
    "a red fox in the snow",
    "",
    " ".join(f"word{number}" for number in range(300)),
    "🦊🔥 un renard élégant",
    "שועל אדום بساط أحمر",
    "  Capitals,\tand  it's 50% \"off\" -- isn't it?\n",
    "3 cats & 2 dogs",
    "ein Fuchs",
    "fox " * 40,
    "雪の中の狐",
]


def pictures(sizes: Sequence[tuple[int, int]], seed: int = 0) -> list[Image.Image]:
    """Half noise, half smooth, by (width, height)."""
    rng = np.random.default_rng(seed)
    found = []
    for width, height in sizes:
        noise, coarse = (rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((height, width), (3, 4)))
        smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        found.append(Image.blend(smooth, Image.fromarray(noise), 0.3))
    return found


def tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 255


def randomise(module: nn.Module, seed: int) -> None:
    """Weights large enough that pictures and prompts matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if not name.endswith("logit_scale"):
                scale = weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.1
                one = float("norm" in name or "ln_" in name) * float(name.endswith("weight"))
                weight.copy_(one + scale * torch.randn(weight.shape, generator=generator))


@dataclass(frozen=True)
class Sample:
    """A picture as ours get it, (1, 3, H, W) in [0, 1], the same as upstream's code gets it, and a prompt."""

    images: Tensor
    picture: Image.Image
    prompt: str


def samples(folder: Path) -> list[Sample]:
    """Every size with every prompt, then a file of every mode as the commands read it."""
    drawn = pictures(SIZES)
    read = [Image.fromarray(decode(path).permute(1, 2, 0).numpy()) for path in write_modes(folder)]
    prompts = PROMPTS + PROMPTS[: len(read)]
    return [Sample(tensor(picture), picture, prompt) for picture, prompt in zip(drawn + read, prompts, strict=True)]


def write_modes(folder: Path) -> list[Path]:
    """One file each: alpha, grey, grey with alpha, CMYK, turned by EXIF, palette, black and white, 1 wide, 16 bits."""
    folder.mkdir(exist_ok=True)
    one, other, thin = pictures([(41, 52), (60, 35), (1, 44)], seed=2)
    alpha = Image.linear_gradient("L").resize(one.size)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter to the right
    with_alpha = one.copy()
    with_alpha.putalpha(alpha)
    grey_alpha = other.convert("LA")
    grey_alpha.putalpha(alpha.resize(other.size))
    with_alpha.save(folder / "rgba.png")
    other.convert("L").save(folder / "grey.png")
    grey_alpha.save(folder / "grey_alpha.png")
    one.convert("CMYK").save(folder / "cmyk.jpg", quality=90)
    other.save(folder / "turned.jpg", quality=90, exif=exif)
    other.quantize(16).save(folder / "palette.png", transparency=3)
    one.convert("1").save(folder / "two.png")
    thin.save(folder / "thin.webp", lossless=True)
    (folder / "deep.png").write_bytes(deep_png(np.asarray(one).astype(np.uint16) * 257))
    names = ("rgba.png", "grey.png", "grey_alpha.png", "cmyk.jpg", "turned.jpg", "palette.png", "two.png")
    return [folder / name for name in (*names, "thin.webp", "deep.png")]


def deep_png(levels: np.ndarray) -> bytes:
    """A PNG file of (H, W, 3) or (H, W) levels of 16 bits, which Pillow can read in colour and not write."""
    height, width = levels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)  # 0: no filter

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, 2 if levels.ndim == 3 else 0, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


# -- tiny checkpoints --------------------------------------------------------------------------------------------


def new_clip(folder: Path) -> None:
    """A transformers checkpoint with CLIP's true vocabulary, which is inside open_clip's package."""
    words = SimpleTokenizer()
    rename = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocab = {rename.get(piece, piece): number for piece, number in words.encoder.items()}
    CLIPTokenizer(vocab=vocab, merges=list(words.bpe_ranks), model_max_length=77).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE).save_pretrained(folder)
    towers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        vision_config={**towers, "image_size": SIDE, "patch_size": 8, "projection_dim": 16},
        text_config={**towers, "vocab_size": len(vocab), "bos_token_id": 49406, "eos_token_id": 49407},
        projection_dim=16,
    )
    model = CLIPModel(config)
    randomise(model, 1)
    model.save_pretrained(folder)


TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def new_qwen(folder: Path) -> None:
    """A Qwen2-VL, and its processor, that spells in bytes."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    special += ["<|image_pad|>", "<|video_pad|>"]
    vocab = {piece: number for number, piece in enumerate([*sorted(ByteLevel.alphabet()), *special, "Yes"])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.add_tokens(["Yes"])
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=12 * 28 * 28),
        tokenizer,
        Qwen2VLVideoProcessor(),
        chat_template=TEMPLATE,
    )
    processor.save_pretrained(folder)
    numbers = {
        name: vocab[f"<|{name}|>"] for name in ("image_pad", "video_pad", "vision_start", "vision_end", "im_end")
    }
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 1, "vocab_size": len(vocab), "eos_token_id": numbers["im_end"]}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
    config = Qwen2VLConfig(
        text_config=text,
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
        image_token_id=numbers["image_pad"],
        video_token_id=numbers["video_pad"],
        vision_start_token_id=numbers["vision_start"],
        vision_end_token_id=numbers["vision_end"],
    )
    model = Qwen2VLForConditionalGeneration(config)
    randomise(model, 5)
    model.generation_config.eos_token_id = numbers["im_end"]
    model.save_pretrained(folder)


def mps_weights(clip: Path) -> dict[str, Tensor]:
    """Of an MPS on the CLIP of width 16 in ``clip``: its weights, and three layers that look at the prompt."""
    weights = {f"model.{name}": value for name, value in load_file(clip / "model.safetensors").items()}
    # hardly more than each token's own embedding, so that the condition hides some
    for name in weights:
        if name.startswith("model.text_model.encoder") and ("out_proj" in name or "fc2" in name):
            weights[name] *= 0.1
    weights["model.text_model.embeddings.position_embedding.weight"] *= 0.1
    generator, width, inner = torch.Generator().manual_seed(8), 16, 2 * 64
    shapes = {
        "0.fn.norm.weight": (width,),
        "0.fn.to_q.weight": (inner, width),
        "0.fn.to_kv.weight": (128, width),
        "0.fn.to_out.weight": (width, inner),
        "0.fn.ff.0.weight": (8 * width, width),
        "0.fn.ff.2.weight": (width, 4 * width),
        "1.fn.norm.weight": (width,),
        "1.fn.fused_attn_ff_proj.weight": (inner + 128 + 8 * width, width),
        "1.fn.attn_out.weight": (width, inner),
        "1.fn.ff_out.1.weight": (width, 4 * width),
    }
    for layer in range(3):
        for name, shape in shapes.items():
            value = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
            weights[f"cross_model.layers.{layer}.{name}"] = value * 3 if len(shape) > 1 else 1 + value
    return weights
