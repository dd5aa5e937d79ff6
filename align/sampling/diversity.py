"""How different the pictures of one prompt are: what a policy loses when it hacks its reward.

``diversity_features`` names what else than pixels they are compared by: a vision model that transformers loads, such as
``facebook/dinov2-base`` or a CLIP, or ``lpips:FILE``, with FILE as :mod:`rewards.models.lpips` writes it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from align.common.errors import UserError
from rewards.common.errors import one_line
from rewards.models import lpips

THUMBNAIL = 64  # pixels a side at which pictures are compared, so that grain does not count


def thumbnails(images: Tensor) -> Tensor:
    """(N, 3, H, W) to (N, 3, 64, 64), on the CPU."""
    return F.interpolate(images, (THUMBNAIL, THUMBNAIL), mode="area").cpu()


class Features:
    """Of pictures, by the source that ``diversity_features`` names: (N, 3, H, W) in [0, 1] to (N, D), on the CPU."""

    def __init__(self, source: str, device: torch.device | str = "cpu") -> None:
        kind, colon, file = source.partition(":")
        self.extract = Perceptual(file, device) if colon and kind == "lpips" else Semantic(source, device)
        self.power = self.extract.power

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return self.extract(images)


class Perceptual:
    """Features whose squared distance is LPIPS. They are of the thumbnails that pixels are compared by, which have the
    size of the patches LPIPS was fitted on."""

    power = 2

    def __init__(self, file: str, device: torch.device | str) -> None:
        self.device, self.network = device, lpips.load(file, device)

    def __call__(self, images: Tensor) -> Tensor:
        found = self.network.embed(thumbnails(images.float().clamp(0, 1)).to(self.device)).cpu()
        return found * found.shape[1] ** 0.5  # pairwise takes a mean over elements


class Semantic:
    """Unit-length features of a vision model: distances between them follow what is shown rather than where it
    stands."""

    power = 1

    def __init__(self, source: str, device: torch.device | str) -> None:
        from transformers import AutoConfig, AutoImageProcessor, AutoModel, CLIPVisionModelWithProjection

        try:
            clip = AutoConfig.from_pretrained(source).model_type == "clip"
            loader = CLIPVisionModelWithProjection if clip else AutoModel
            self.model = loader.from_pretrained(source, use_safetensors=True).to(device).eval().requires_grad_(False)
            self.processor = AutoImageProcessor.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise UserError(
                f"diversity_features: {source!r} is no vision model that can be loaded; expected a folder or a hub "
                f"id of DINOv2 or CLIP, or lpips:FILE ({one_line(error)})"
            ) from error

    def __call__(self, images: Tensor) -> Tensor:
        pixels = self.processor(images=images.float().cpu(), do_rescale=False, return_tensors="pt")["pixel_values"]
        out = self.model(pixel_values=pixels.to(self.model.device))
        found = out.image_embeds if "image_embeds" in out else out.pooler_output
        return F.normalize(found.float(), dim=1).cpu()


def pairwise(values: Tensor, groups: Tensor, power: int = 1) -> Tensor:
    """(G,) the mean distance of two members of each group that has at least two, in the order of group numbers.

    ``values`` is (N, ...), ``groups`` (N,). The distance is Euclidean over all but the first dimension, divided by
    the square root of their number: the root mean square difference of an element (a pixel, a latent, a feature). With
    ``power`` 2 it is the mean square difference.
    """
    flat = values.flatten(1).float()
    found = []
    for group in torch.unique(groups):
        members = flat[groups == group]
        if len(members) > 1:
            found.append(((torch.pdist(members) / flat.shape[1] ** 0.5) ** power).mean())
    return torch.stack(found) if found else torch.empty(0)
