"""LAION's aesthetic predictors: a head of linear maps on CLIP L/14's image embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn
from transformers import CLIPModel

from rewards.models.network import Network, loading, pretrained, published_head, read_weights, unit
from rewards.models.preprocess import normalise, square


class Aesthetic(Network):
    """``head(e / |e|)`` of CLIP's projected image embedding e; the prompt is not read.

    Heads: version 2, ``sac+logos+ava1-l14-linearMSE`` (Apache-2.0, christophschuhmann/improved-aesthetic-predictor;
    as safetensors in the hub repository ``ttj/sac-logos-ava1-l14-linearMSE``), five linear maps with nothing between
    them; and version 1, ``sa_0_4_vit_l_14_linear.pth`` (MIT, LAION-AI/aesthetic-predictor), a
    single one. The file shows which it is.
    Encoder: ``openai/clip-vit-large-patch14`` (MIT by OpenAI's repository, 0.43 B; its text tower is dropped).
    Preprocessing: shorter edge to 224, bicubic, centre crop, CLIP's mean and deviation, embedding to length one;
    forgetting the last gives scores of 20 to 30.
    Range: about 1 to 10.
    Differentiable.
    Caveats: blind to the prompt; trained on alone, every picture takes on one style. Three incompatible predictors
    share the name; version 2.5, on SigLIP, is not this one.

    Args:
        model: folder or hub id of the CLIP checkpoint, in the layout of transformers.
        head: file, or folder or hub id that holds ``head_file``.
        head_file: the head's name there.
        device, dtype: default CUDA where there is any; of the encoder; the head is float32.
    """

    needs_prompt: ClassVar[bool] = False

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        head: str = "ttj/sac-logos-ava1-l14-linearMSE",
        head_file: str = "model.safetensors",
        device: str | None = None,
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        with loading("Aesthetic", model):
            clip = pretrained(CLIPModel, model)
        self.vision, self.projection = clip.vision_model, clip.visual_projection
        with loading("Aesthetic", head):
            self.head = new_head(self.projection.out_features, read_weights(head, head_file))
        self.settle(device, dtype, self.vision, self.projection)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = normalise(square(images, self.vision.config.image_size, "torchvision"))
        seen = self.vision(pixel_values=pixels.to(self.projection.weight.dtype)).pooler_output
        return self.head(unit(self.projection(seen))).squeeze(-1)


def new_head(width: int, weights: Mapping[str, Tensor]) -> nn.Module:
    """A head on embeddings of ``width`` numbers with these weights, of either version."""
    if set(weights) == {"weight", "bias"}:
        head: nn.Module = nn.Linear(width, 1)
    else:
        head = published_head(width)
        weights = {name.removeprefix("layers."): value for name, value in weights.items()}
    head.load_state_dict(weights)
    return head
