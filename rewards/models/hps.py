"""HPSv2, Human Preference Score v2 (Wu et al. 2023, arXiv 2306.09341): CLIP-H trained on ranked pictures."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from rewards import RewardError
from rewards.models.clip_score import OpenCLIP
from rewards.models.network import Network, find, loading
from rewards.models.preprocess import letterbox, normalise

FILES = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}  # as published


class HPSv2(Network):
    """``cos(image, prompt)``, without any logit scale; the paper's tables are 100 times that.

    Checkpoints: ``xswu/HPSv2`` (Apache-2.0, about 1 B), a torch file for each version; upstream's ``score()`` takes 2.0
    and its ``evaluate()`` 2.1 unless told, and the two are not comparable.
    Preprocessing: longer edge to 224 and black bars, not a crop; a bicubic of floats; CLIP's mean and deviation;
    prompts are cut at 77 tokens.
    Range: about 0.20 to 0.35.
    Differentiable.
    Caveats: upstream says that only scores for the same prompt compare. Training on 2.1 is reported to end in
    over-saturated, glossy pictures. Upstream resizes a tensor with torchvision's default, which is antialiased since
    torchvision 0.17 and was not before; ``antialias=False`` is the older arithmetic.

    Args:
        model: folder or hub id that holds the version's file, as safetensors, or the file itself.
        version: "2.0" or "2.1".
        antialias: of the resize.
        architecture: an open_clip model name.
        device, dtype: default CUDA where there is any; of the network; the cosine is float32.
    """

    def __init__(
        self,
        model: str = "xswu/HPSv2",
        version: Literal["2.0", "2.1"] = "2.1",
        antialias: bool = True,
        architecture: str = "ViT-H-14",
        device: str | None = None,
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        if version not in FILES:
            raise RewardError(f"HPSv2: version is {version!r}; expected '2.0' or '2.1'")
        with loading("HPSv2", model):
            open_clip: Any = importlib.import_module("open_clip")  # an optional dependency
            file = str(find(model, FILES[version]))
            network = open_clip.create_model_from_pretrained(architecture, file, return_transform=False)
            self.clip = OpenCLIP("HPSv2", network, open_clip.get_tokenizer(architecture))
        self.antialias = antialias
        self.settle(device, dtype, self.clip)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = normalise(letterbox(images, self.clip.side, self.antialias))
        return (self.clip.encode(pixels) * self.clip.text(prompts)).sum(-1)
