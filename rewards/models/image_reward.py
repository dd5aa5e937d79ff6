"""ImageReward (Xu et al. 2023, arXiv 2304.05977): BLIP, which looks at the picture while it reads the prompt."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from rewards.models.captions import CaptionLimit
from rewards.models.network import Network, find, loading, published_head, read_weights
from rewards.models.preprocess import normalise, square

MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072  # of the head's answers, as published
TOKENS = 35
VISION = {  # upstream's names in the picture's tower -> transformers'
    r"^cls_token$": "embeddings.class_embedding",
    r"^pos_embed$": "embeddings.position_embedding",
    r"^patch_embed\.proj\.": "embeddings.patch_embedding.",
    r"^blocks\.(\d+)\.attn\.qkv\.": r"encoder.layers.\1.self_attn.qkv.",
    r"^blocks\.(\d+)\.attn\.proj\.": r"encoder.layers.\1.self_attn.projection.",
    r"^blocks\.(\d+)\.norm": r"encoder.layers.\1.layer_norm",
    r"^blocks\.(\d+)\.mlp\.": r"encoder.layers.\1.mlp.",
    r"^norm\.": "post_layernorm.",
}


class ImageReward(Network):
    """``(head(t) - 0.16717) / 1.03334``, t the state of the first token in BLIP's text encoder, which sees the picture.

    Checkpoint: ``THUDM/ImageReward`` (Apache-2.0, 0.45 B, 1.8 GB), files ``med_config.json`` and ``ImageReward.pt``.
    Preprocessing: shorter edge to 224, bicubic, centre crop, CLIP's mean and deviation; lower-case BERT tokens, cut at
    **35**: what a long prompt says last is not read.
    Range: about normal, mean 0 and deviation 1; 98 % lie in [-2, 2].
    Differentiable.
    Caveats: trained on late and long, it is reported to corrupt pictures; keep a held-out reward.

    Args:
        model: folder or hub id that holds both files, the weights as safetensors.
        tokenizer: folder or hub id of a BERT tokenizer.
        device, dtype: default CUDA where there is any; of BLIP; the head is float32.
    """

    def __init__(
        self,
        model: str = "THUDM/ImageReward",
        tokenizer: str = "bert-base-uncased",
        device: str | None = None,
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        with loading("ImageReward", model):
            weights = read_weights(model, "ImageReward.pt")
            text = json.loads(find(model, "med_config.json").read_text("utf-8"))
            self.vision, self.text, self.head = build(weights, text)
        with loading("ImageReward", tokenizer):
            self.tokenizer = BertTokenizer.from_pretrained(tokenizer)
            self.tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)  # as BLIP does: the last of its rows
            if len(self.tokenizer) != text["vocab_size"]:  # transformers gives an empty one where it finds none
                raise ValueError(f"a tokenizer of {len(self.tokenizer)} tokens, not {text['vocab_size']}")
        self.limit = CaptionLimit.of("ImageReward", TOKENS, self.tokenizer)
        self.settle(device, dtype, self.vision, self.text)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = normalise(square(images, self.vision.config.image_size, "torchvision"))
        seen = self.vision(pixel_values=pixels.to(self.vision.dtype)).last_hidden_state
        self.limit.tell(prompts)
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        ).to(self.device)
        read = self.text(tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=seen)
        first = read.last_hidden_state[:, 0]
        return (self.head(first.to(self.head[0].weight.dtype)).squeeze(-1) - MEAN) / DEVIATION


def build(weights: Mapping[str, Tensor], text: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """BLIP's two towers and the head from upstream's state dict and ``med_config.json``."""
    vision_weights = {rename(name): value for name, value in below(weights, "blip.visual_encoder.").items()}
    _, positions, width = vision_weights["embeddings.position_embedding"].shape
    patch = vision_weights["embeddings.patch_embedding.weight"].shape[-1]
    vision = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=width,
            intermediate_size=vision_weights["encoder.layers.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=sum(name.endswith("self_attn.qkv.weight") for name in vision_weights),
            num_attention_heads=width // 64,  # so in every size of upstream's ViT
            image_size=patch * round((positions - 1) ** 0.5),
            patch_size=patch,
            layer_norm_eps=1e-6,  # upstream's; transformers' default is 1e-5
        )
    )
    vision.load_state_dict(vision_weights)

    names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    names += ["max_position_embeddings", "hidden_act", "layer_norm_eps", "pad_token_id"]
    reader = BlipTextModel(
        BlipTextConfig(**{name: text[name] for name in names}, encoder_hidden_size=width), add_pooling_layer=False
    )
    text_weights = below(weights, "blip.text_encoder.")
    text_weights.pop("embeddings.position_ids", None)  # no weight: 0, 1, 2, ...
    reader.load_state_dict(text_weights)

    head = published_head(text["hidden_size"])
    head.load_state_dict(below(weights, "mlp.layers."))
    return vision, reader, head


def below(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def rename(name: str) -> str:
    """A weight of upstream's picture tower, as transformers calls it."""
    for pattern, replacement in VISION.items():
        name = re.sub(pattern, replacement, name)
    return name
