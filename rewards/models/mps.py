"""MPS, Multi-dimensional Preference Score (Zhang et al. 2024, arXiv 2405.14705): CLIP-H asked about one aspect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoTokenizer, CLIPConfig, CLIPModel

from rewards.models.captions import CaptionLimit, require_vocabulary
from rewards.models.network import Network, loading, read_weights, unit
from rewards.models.preprocess import normalise, square

OVERALL = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
    "texture, quantity, attributes, position, number, location, word, things."
)
LEAST = 0.01  # a token of the prompt this close to the condition, relative to the closest, is looked at
HEAD = 64  # numbers in each attention head


class MPS(Network):
    """``exp(logit_scale) * cos(t, v)``: t CLIP's prompt embedding, v the picture's first token after it has attended
    to those tokens of the prompt that the condition is about.

    The softmax of the scores of several pictures for one prompt is the probability that each is the preferred one.

    Checkpoints: upstream (Kwai-Kolors/MPS, whose LICENSE is MIT) gives ``MPS_overall_checkpoint.pth``, a pickle of a
    whole model, which is code and is not loaded here. Load it once in an environment that you can throw away and store
    ``model.state_dict()`` as safetensors; names begin with ``model.`` and ``cross_model.``. About 1 B.
    Preprocessing: shorter edge to 224, bicubic, centre crop, CLIP's mean and deviation; prompt and condition are
    padded and cut at 77 tokens, and the padding is attended to as upstream does.
    Formula of the mask: the greatest dot product of each prompt token with any condition token, over the greatest of
    them all, above 0.01.
    Range: not documented; only differences for one prompt mean anything.
    Differentiable.
    Caveats: only the checkpoint for the overall condition was published. Upstream divides the mask's products by the
    greatest of the whole batch, which its examples keep to one prompt; here each prompt has its own, so that a score
    does not depend on the rest of the batch. The published code rounds pixels and mask to float16, which moved
    the scores of a tiny random network by up to 3.6e-3; here they stay as precise as the network.

    Args:
        model: the safetensors file, or a folder or hub id that holds ``file``.
        file: its name there.
        processor: folder or hub id of a CLIP's configuration, tokenizer and normalisation.
        condition: what is asked about.
        device, dtype: default CUDA where there is any; of the network; the cosine is float32.
    """

    def __init__(
        self,
        model: str,
        file: str = "model.safetensors",
        processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        condition: str = OVERALL,
        device: str | None = None,
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        with loading("MPS", processor):
            self.tokenizer = AutoTokenizer.from_pretrained(processor)
            require_vocabulary(self.tokenizer)
            settings = AutoImageProcessor.from_pretrained(processor)
            config = CLIPConfig.from_pretrained(processor)
        self.limit = CaptionLimit.of("MPS", config.text_config.max_position_embeddings, self.tokenizer)
        self.mean, self.std, self.condition = settings.image_mean, settings.image_std, condition
        with loading("MPS", model):
            weights = read_weights(model, file)
            clip = {name.removeprefix("model."): value for name, value in weights.items() if name.startswith("model.")}
            cross = {name: value for name, value in weights.items() if name.startswith("cross_model.layers.")}
            self.clip = CLIPModel(config)
            clip = {name: value for name, value in clip.items() if not name.endswith("position_ids")}  # 0, 1, 2, ...
            self.clip.load_state_dict(clip)
            layers = 1 + max(int(name.split(".")[2]) for name in cross)
            width = config.projection_dim
            heads = cross["cross_model.layers.0.0.fn.to_q.weight"].shape[0] // HEAD
            self.layers: Any = nn.ModuleList(
                nn.ModuleList([CrossAttention(width, heads), SelfAttention(width, heads)]) for _ in range(layers)
            )
            self.layers.load_state_dict(
                {
                    name.removeprefix("cross_model.layers.").replace(".fn.", "."): value
                    for name, value in cross.items()
                    if not name.endswith(("norm.bias", "inv_freq"))  # buffers: zeros, and what angles() computes
                }
            )
        self.logit_scale = self.clip.logit_scale.exp().item()  # before any cast: bfloat16 would be 1 % off
        self.settle(device, dtype, self.clip, self.layers)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        side = self.clip.config.vision_config.image_size
        pixels = normalise(square(images, side, "transformers"), self.mean, self.std).to(self.clip.dtype)
        seen = self.clip.visual_projection(self.clip.vision_model(pixel_values=pixels).last_hidden_state)
        self.limit.tell(prompts)
        words, whole = self.read(list(prompts))
        about, _ = self.read([self.condition])
        close = (words @ about[0].mT).float().amax(-1)  # (B, tokens)
        hidden = close / close.amax(-1, keepdim=True) <= LEAST
        mask = torch.zeros_like(close, dtype=seen.dtype).masked_fill(hidden, float("-inf"))[:, None, None]
        for cross_attention, self_attention in self.layers:
            seen = seen + cross_attention(seen, words, mask)
            seen = seen + self_attention(seen)
        return self.logit_scale * (unit(whole) * unit(seen[:, 0])).sum(-1)

    def read(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Embedding of every token, and of the whole text: (B, 77, D) and (B, D)."""
        length = self.limit.tokens
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        read = self.clip.text_model(input_ids=tokens.input_ids.to(self.device))
        return self.clip.text_projection(read.last_hidden_state), self.clip.text_projection(read.pooler_output)


class SwiGLU(nn.Module):
    """SwiGLU: the first half, times SiLU of the second."""

    def forward(self, x: Tensor) -> Tensor:
        x, gate = x.chunk(2, dim=-1)
        return F.silu(gate) * x


class CrossAttention(nn.Module):
    """Cross-attention of many query heads on one head of keys and values, and a feed-forward of what came in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, bias=False)
        self.to_q = nn.Linear(width, heads * HEAD, bias=False)
        self.to_kv = nn.Linear(width, 2 * HEAD, bias=False)
        self.to_out = nn.Linear(heads * HEAD, width, bias=False)
        self.ff = nn.Sequential(
            nn.Linear(width, 8 * width, bias=False), SwiGLU(), nn.Linear(4 * width, width, bias=False)
        )

    def forward(self, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        x = self.norm(x)
        k, v = self.to_kv(context).chunk(2, dim=-1)
        return self.to_out(attend(self.to_q(x), k, v, mask)) + self.ff(x)


class SelfAttention(nn.Module):
    """Self-attention of the same kind, with rotary positions, and a feed-forward beside it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, bias=False)
        self.parts = [heads * HEAD, HEAD, HEAD, 8 * width]
        self.fused_attn_ff_proj = nn.Linear(width, sum(self.parts), bias=False)
        self.attn_out = nn.Linear(heads * HEAD, width, bias=False)
        self.ff_out = nn.Sequential(SwiGLU(), nn.Linear(4 * width, width, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, ff = self.fused_attn_ff_proj(self.norm(x)).split(self.parts, dim=-1)
        cos, sin = angles(x)
        q = rotate(q.unflatten(-1, (-1, HEAD)), cos[:, None], sin[:, None]).flatten(-2)
        return self.attn_out(attend(q, rotate(k, cos, sin), v, None)) + self.ff_out(ff)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """q (B, N, heads * HEAD) on k, v (B, M, HEAD), which all heads share -> (B, N, heads * HEAD)."""
    many = q.unflatten(-1, (-1, HEAD)).transpose(1, 2)
    return F.scaled_dot_product_attention(many, k[:, None], v[:, None], attn_mask=mask).transpose(1, 2).flatten(2)


def angles(x: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles of x (B, N, D): (N, HEAD) each."""
    fine = torch.promote_types(x.dtype, torch.float32)
    speed = 10000.0 ** (-torch.arange(0, HEAD, 2, device=x.device, dtype=fine) / HEAD)
    angle = torch.outer(torch.arange(x.shape[1], device=x.device, dtype=fine), speed).repeat(1, 2)
    return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (k, k + HEAD / 2) of the last dimension."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
