"""OCR: does the picture show the words that the prompt puts in quotes (the text-rendering reward of Flow-GRPO)?"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from rewards import RewardError
from rewards.models.network import loading
from rewards.models.preprocess import to_pil

QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”')


class OCR:
    """``1 - min(d, n) / n``: d edits between what is read and what was asked for, n the length of the latter.

    Asked for is what stands between the prompt's first pair of double quotes, straight or curly. Both texts lose their
    spaces and their capitals; where the one asked for is part of what is read, d = 0. The formula is Flow-GRPO's (Liu
    et al. 2025, arXiv 2505.05470); its reader is PaddleOCR 2.9.1, ours the PP-OCR of RapidOCR, so that the scores are
    not the same. Flow-GRPO scores a picture on which the reader fails with 0; here that is an error.

    Weights: inside the package ``rapidocr`` (code and weights Apache-2.0), run by onnxruntime on the CPU.
    Preprocessing: RapidOCR's own, on the picture as an 8-bit file holds it, with PaddleOCR 2.9.1's limit for the
    detector (the longer edge to 960 where it is longer) and without its classifier of upside-down lines, as in
    Flow-GRPO; lines go from top to bottom, read lines with a confidence under 0.5 are dropped.
    Range: 0 to 1.
    Not differentiable.
    Caveats: hackable, alone it is reported to lead to text on dark or empty backgrounds: pair it with a reward of
    quality. Text beside the one asked for costs nothing where that one is whole.

    Args:
        threads: of onnxruntime for each network; -1 leaves it to onnxruntime.
    """

    differentiable: ClassVar[bool] = False
    needs_prompt: ClassVar[bool] = True

    def __init__(self, threads: int = -1) -> None:
        settings = {
            "Global.log_level": "critical",
            "Global.use_cls": False,
            "Det.limit_type": "max",  # RapidOCR's "min" makes a picture of 1 x 40 pixels one of 736 x 29440
            "Det.limit_side_len": 960,
            "EngineConfig.onnxruntime.intra_op_num_threads": threads,
        }
        with loading("OCR", "rapidocr"):
            package: Any = importlib.import_module("rapidocr")  # an optional dependency
            self.reader = package.RapidOCR(params=settings)

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        """(B, 3, H, W) in [0, 1] and prompts that each quote a text -> (B,) float32."""
        wanted = [target(prompt, row) for row, prompt in enumerate(prompts)]  # all of them before the slow part
        scores = [closeness(self.read(picture), text) for picture, text in zip(to_pil(images), wanted, strict=True)]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def read(self, picture: Image.Image) -> str:
        """Every line on the picture, one after another."""
        return "".join(self.reader(picture).txts or ())  # None where no line is found


def target(prompt: str, row: int | None = None) -> str:
    """The first quoted text of a prompt, without spaces and capitals."""
    quoted = QUOTED.search(prompt)
    text = plain(quoted[1] or quoted[2] or "") if quoted else ""
    if not text:
        raise RewardError(
            f'OCR: no text in double quotes in {prompt!r}; expected one like: a sign that says "OPEN"', row
        )
    return text


def closeness(read: str, wanted: str) -> float:
    """From 0 to 1; ``wanted`` as :func:`target` gives it."""
    read = plain(read)
    if wanted in read:
        return 1.0
    return 1 - min(edits(read, wanted), len(wanted)) / len(wanted)


def plain(text: str) -> str:
    """Without spaces and capitals."""
    return text.replace(" ", "").lower()


def edits(one: str, other: str) -> int:
    """Levenshtein distance: the fewest insertions, deletions and substitutions that make ``other`` of ``one``."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, start=1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(other, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]
