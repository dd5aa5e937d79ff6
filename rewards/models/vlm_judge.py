"""Judges: vision-language models that reply in words, here on this machine or behind an OpenAI-compatible endpoint.

A reply that does not hold every score that was asked for, once and within its bounds, is an error and never a score.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from rewards import RewardError
from rewards.common.errors import shortened
from rewards.models.endpoint import Endpoint
from rewards.models.network import Network
from rewards.models.preprocess import to_pil
from rewards.models.vqa_score import Chat

QUESTION = (
    "This picture was made from the caption: {prompt}\n"
    "Rate from 1 to 5 how well it shows what the caption says and how well it is made. End with: Score: N"
)


@dataclass(frozen=True)
class Form:
    """What is asked, and how the score is read from a reply: the mean of its ``labels``, from ``low`` to ``high``."""

    question: str
    labels: Sequence[str]
    low: float
    high: float

    def __post_init__(self) -> None:
        if "{prompt}" not in self.question or not self.labels or not self.low < self.high:
            raise RewardError(
                f"judge: question {self.question!r}, labels {list(self.labels)}, {self.low} to {self.high}; "
                "expected {prompt} in the question, at least one label, and low < high"
            )

    def ask(self, prompt: str) -> str:
        """The question about one prompt."""
        return self.question.replace("{prompt}", prompt)

    def read(self, reply: str) -> float:
        """A reply's score, brought to [0, 1]; ``ValueError`` where it has none."""
        mean = sum(self.value(reply, label) for label in self.labels) / len(self.labels)
        return (mean - self.low) / (self.high - self.low)

    def value(self, reply: str, label: str) -> float:
        """The number after ``label``, which may be followed by a range in parentheses and by a colon."""
        # not the 1 of "Score: 1-5", and no part of a longer number
        number = r"(-?\d+(?:\.\d+)?)(?!\d|\.\d|\s*[-–]\s*\d)"
        numbers = re.findall(rf"{re.escape(label)}(?:\s*\([^()]*\))?[\s*_]*[:=][\s*_]*{number}", reply, re.IGNORECASE)
        values = {float(text) for text in numbers}
        if len(values) != 1:
            raise ValueError(f"expected one number after {label!r}, found {sorted(values) or 'none'}")
        if not self.low <= (value := values.pop()) <= self.high:
            raise ValueError(f"{label!r} is {value:g}; expected {self.low:g} to {self.high:g}")
        return value

    def score(self, reply: str, row: int) -> float:
        """:meth:`read`, where a failure names the row and shows the reply."""
        try:
            return self.read(reply)
        except ValueError as error:
            raise RewardError(f"judge: {error}; the reply was {shortened(reply)!r}", row) from error


class Judge(Network):
    """The score that a vision-language model of transformers writes, brought from ``low`` ... ``high`` to [0, 1].

    Checkpoints: any that :class:`rewards.models.vqa_score.VQAScore` loads. UnifiedReward's (Wang et al. 2025, arXiv
    2503.05236; MIT by its repository), such as ``CodeGoat24/UnifiedReward-2.0-qwen3vl-8b``, were trained on questions
    of their own: take it from the repository CodeGoat24/UnifiedReward, with ``{prompt}`` where the caption goes.
    Its point score is ``labels=["Final Score"]``, its three axes are ``labels=["Alignment Score", "Coherence Score",
    "Style Score"]``; both run from 1 to 5, so that the score of the latter is ``(mean - 1) / 4``. Version 1.5 of 7 B is
    in LLaVA's own layout, which transformers does not load.
    Preprocessing: the checkpoint's own, on the picture as an 8-bit file holds it; each picture alone.
    Formula: the most probable reply, token by token; the mean of the numbers after ``labels``.
    Range: 0 to 1, in few steps.
    Not differentiable.
    Caveats: an unreadable, contradictory or unfinished reply is an error; upstream counts it as 0. One reply per
    picture, so it is slow.

    Args:
        model: folder or hub id.
        question: with ``{prompt}`` where the prompt goes.
        labels: what stands before each number in the reply; case does not matter.
        low: least number allowed.
        high: greatest number allowed.
        tokens: most tokens of a reply.
        device, dtype: default CUDA where there is any; of the network.
    """

    differentiable: ClassVar[bool] = False

    def __init__(
        self,
        model: str = "Qwen/Qwen2.5-VL-7B-Instruct",
        question: str = QUESTION,
        labels: Sequence[str] = ("Score",),
        low: float = 1.0,
        high: float = 5.0,
        tokens: int = 1024,
        device: str | None = None,
        dtype: str = "bfloat16",
    ) -> None:
        super().__init__()
        self.form, self.tokens = Form(question, labels, low, high), tokens
        self.chat = Chat("Judge", model)
        self.settle(device, dtype, self.chat)

    @torch.no_grad()
    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        scores = []
        for row, (picture, prompt) in enumerate(zip(to_pil(images), prompts, strict=True)):
            reply, whole = self.chat.reply(picture, self.form.ask(prompt), self.tokens)
            if not whole:
                raise RewardError(f"judge: no end after {self.tokens} tokens of reply: {shortened(reply)!r}", row)
            scores.append(self.form.score(reply, row))
        return torch.tensor(scores)


@dataclass
class EndpointJudge:
    """The score that a model behind an OpenAI-compatible endpoint writes, brought from ``low`` ... ``high`` to [0, 1].

    Checkpoints and licence: the server's. Preprocessing: none here; the picture is sent as a PNG file, so without loss.
    Formula, range and caveats: those of :class:`Judge`; temperature 0, which no server promises to be repeatable.
    Not differentiable.
    Asked again, and given up, as :class:`rewards.models.endpoint.Endpoint` says.

    Args:
        url: up to and including the version: ``http://localhost:8000/v1``.
        model: the name that the server knows it by.
        question: with ``{prompt}`` where the prompt goes.
        labels: what stands before each number in the reply; case does not matter.
        low: least number allowed.
        high: greatest number allowed.
        tokens: most tokens of a reply.
        key_variable: environment variable that holds the key, where the server wants one.
        timeout: seconds without an answer after which an attempt is given up.
        attempts: at each question.
        pause: seconds before the second attempt.
        workers: questions under way at once.
    """

    url: str
    model: str
    question: str = QUESTION
    labels: Sequence[str] = ("Score",)
    low: float = 1.0
    high: float = 5.0
    tokens: int = 1024
    key_variable: str | None = None
    timeout: float = 60.0
    attempts: int = 4
    pause: float = 1.0
    workers: int = 8

    differentiable: ClassVar[bool] = False
    needs_prompt: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.tokens <= 0:
            raise RewardError(f"judge: tokens is {self.tokens}; it must be above 0")
        self.form = Form(self.question, self.labels, self.low, self.high)
        asking = self.key_variable, self.timeout, self.attempts, self.pause, self.workers
        self.endpoint = Endpoint(self.url, self.model, "judge", *asking)

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B,) float32; the first row that fails stops the rest."""
        rows = zip(to_pil(images), prompts, strict=True)
        scores = self.endpoint.at_once(self.one, [(row, *pair) for row, pair in enumerate(rows)])
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def one(self, row: int, picture: Image.Image, prompt: str) -> float:
        """One picture's score."""
        return self.form.score(self.endpoint.reply(row, picture, self.form.ask(prompt), self.tokens), row)
