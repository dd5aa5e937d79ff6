"""PickScore (Kirstain et al. 2023, arXiv 2305.01569): CLIP-H trained on the choices of Pick-a-Pic's users."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rewards.models.clip_score import TransformersCLIP
from rewards.models.network import Network


class PickScore(Network):
    """``exp(logit_scale) * cos(image, prompt)``.

    The softmax of the scores of several pictures for one prompt is the probability that each is the preferred one.

    Checkpoint: ``yuvalkirstain/PickScore_v1`` (MIT, about 1 B, 4 GB in float32).
    Preprocessing: shorter edge to 224, bicubic, centre crop, CLIP's mean and deviation; prompts are cut at 77 tokens.
    Range: about 17 to 24. Without the logit scale it would be a bare cosine, whose softmax is nearly uniform; others
    divide by 26 to come near [0, 1], which is cosmetic: here nothing is divided.
    Differentiable.
    Caveats: only scores for the same prompt compare. Pick-a-Pic holds unsafe prompts. Among the CLIP scorers it is
    reported as the hardest to hack; watch a held-out reward all the same.

    Args:
        model: folder or hub id of the network.
        processor: folder or hub id of the tokenizer and the normalisation.
        device, dtype: default CUDA where there is any; of the network; the score is float32.
    """

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        device: str | None = None,
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        self.clip = TransformersCLIP("PickScore", model, processor)
        self.settle(device, dtype, self.clip)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.clip.logit_scale * self.clip.agreement(images, prompts)
