"""CLIPScore, and the two kinds of CLIP checkpoint that it and other scorers read."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from rewards import RewardError
from rewards.models.captions import CaptionLimit, require_vocabulary
from rewards.models.network import Network, loading, pretrained, unit
from rewards.models.preprocess import normalise, square


class CLIPScore(Network):
    """How well picture and prompt agree in CLIP's embedding: ``max(scale * cos(image, prefix + prompt), 0)``.

    Hessel et al. 2021, arXiv 2104.08718. The defaults are torchmetrics' (scale 100, no prefix); the paper's are
    ``model="openai/clip-vit-base-patch32", scale=2.5, prefix="A photo depicts "``.

    Checkpoints: any CLIP in the layout of transformers, such as ``openai/clip-vit-large-patch14`` (MIT by
    OpenAI's repository, 0.43 B), or, with ``library="open_clip"``, any folder or hub repository with an
    ``open_clip_config.json``.
    Preprocessing: shorter edge to the network's size, bicubic, centre crop, the checkpoint's mean and deviation;
    prompts are cut at 77 tokens.
    Range: 0 to ``scale``, with scale 100 typically 20 to 35. Scores of different checkpoints are not comparable.
    Differentiable; where the cosine is negative the score is 0 and its gradient too.
    Caveats: trained on alone, it is reported to lead to weird textures.

    Args:
        model: folder or hub id.
        library: whose layout the checkpoint has.
        scale: of the cosine.
        prefix: put before every prompt.
        device, dtype: default CUDA where there is any; of the network; cosines are float32.
    """

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        library: Literal["transformers", "open_clip"] = "transformers",
        scale: float = 100.0,
        prefix: str = "",
        device: str | None = None,
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        if library not in ("transformers", "open_clip"):
            raise RewardError(f"CLIPScore: library is {library!r}; expected 'transformers' or 'open_clip'")
        self.clip = (TransformersCLIP if library == "transformers" else OpenCLIP.load)("CLIPScore", model)
        self.scale, self.prefix = scale, prefix
        self.settle(device, dtype, self.clip)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return (self.scale * self.clip.agreement(images, [self.prefix + prompt for prompt in prompts])).clamp(min=0)


class CLIP(nn.Module):
    """Both towers of a checkpoint."""

    def image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, D) of length one."""
        raise NotImplementedError

    def text(self, prompts: Sequence[str]) -> Tensor:
        """B prompts -> (B, D) of length one. Each is encoded once: the images of a group share theirs."""
        row = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
        return unit(self.embed(list(row)))[[row[prompt] for prompt in prompts]]

    def embed(self, prompts: list[str]) -> Tensor:
        """B prompts -> (B, D), of any length."""
        raise NotImplementedError

    def agreement(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The cosine of each image and its prompt: (B,)."""
        return (self.image(images) * self.text(prompts)).sum(-1)


class TransformersCLIP(CLIP):
    """Both towers of a transformers checkpoint; tokenizer and normalisation come from ``processor``."""

    def __init__(self, reward: str, model: str, processor: str | None = None) -> None:
        super().__init__()
        with loading(reward, model):
            self.network = pretrained(CLIPModel, model)
        self.logit_scale = self.network.logit_scale.exp().item()  # before any cast: bfloat16 would be 1 % off
        with loading(reward, processor or model):
            self.tokenizer = AutoTokenizer.from_pretrained(processor or model)
            require_vocabulary(self.tokenizer)
            settings = AutoImageProcessor.from_pretrained(processor or model)
        self.mean, self.std = settings.image_mean, settings.image_std
        self.limit = CaptionLimit.of(reward, self.network.config.text_config.max_position_embeddings, self.tokenizer)

    def image(self, images: Tensor) -> Tensor:
        side = self.network.config.vision_config.image_size
        pixels = normalise(square(images, side, "transformers"), self.mean, self.std).to(self.network.dtype)
        # transformers 5: an output object whose pooler_output is the projected embedding
        return unit(self.network.get_image_features(pixel_values=pixels).pooler_output)

    def embed(self, prompts: list[str]) -> Tensor:
        self.limit.tell(prompts)
        length = self.limit.tokens
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        return self.network.get_text_features(**tokens.to(self.network.device)).pooler_output


class OpenCLIP(CLIP):
    """Both towers of an open_clip model."""

    def __init__(self, reward: str, network: Any, tokenizer: Callable[..., Tensor]) -> None:
        super().__init__()
        self.network, self.tokenizer = network, tokenizer
        if hasattr(tokenizer, "tokenizer"):  # one of transformers; open_clip's own comes with the package
            require_vocabulary(tokenizer.tokenizer)
        self.limit = CaptionLimit(reward, network.context_length, self.is_longer)
        self.settings = network.visual.preprocess_cfg
        if (fit := (self.settings["resize_mode"], self.settings["interpolation"])) != ("shortest", "bicubic"):
            raise ValueError(f"its preprocessing is {fit}, where only 'shortest' and 'bicubic' are known")

    @classmethod
    def load(cls, reward: str, model: str) -> OpenCLIP:
        """From a folder or hub repository with an ``open_clip_config.json``."""
        name = f"{'local-dir' if Path(model).is_dir() else 'hf-hub'}:{model}"
        with loading(reward, model):
            open_clip: Any = importlib.import_module("open_clip")  # an optional dependency
            network = open_clip.create_model_from_pretrained(name, return_transform=False)
            return cls(reward, network, open_clip.get_tokenizer(name))

    @property
    def side(self) -> int:
        """Of the square that the image tower reads."""
        size = self.network.visual.image_size
        return int(size if isinstance(size, int) else size[0])

    def image(self, images: Tensor) -> Tensor:
        pixels = square(images, self.side, "torchvision")
        return self.encode(normalise(pixels, self.settings["mean"], self.settings["std"]))

    def encode(self, pixels: Tensor) -> Tensor:
        """Normalised pixels -> (B, D) of length one."""
        return unit(self.network.encode_image(pixels.to(next(self.parameters()).dtype)))

    def is_longer(self, prompt: str) -> bool:
        """Whether the tokens change where one more has room; open_clip's tokenizers count none."""
        length = self.limit.tokens
        return not self.tokenizer([prompt], length)[:, :length].equal(self.tokenizer([prompt], length + 1)[:, :length])

    def embed(self, prompts: list[str]) -> Tensor:
        self.limit.tell(prompts)
        return self.network.encode_text(self.tokenizer(prompts).to(next(self.parameters()).device))
