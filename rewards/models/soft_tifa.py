"""Soft-TIFA, by which GenEval2 scores (Kamath et al. 2025, arXiv 2512.16853): how probable the right answers are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from PIL import Image

from rewards import RewardError
from rewards.models.questions import Asked, Asking

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
YES = ("Yes", "yes", " yes", " Yes")


class SoftTIFA(Asking):
    """The mean over a picture's questions of the probability of the right answer.

    The metadata are those of GenEval2's ``geneval2_data.jsonl``: ``vqa_list``, pairs of question and answer.
    Formula: each question, with " Answer in one word." after it, is put to the model, and ``p`` is the sum, over the
    accepted forms of the answer, of the probability of the form's first token. A count ("How many ...") has the word as
    it is, with a capital, each with a blank before it, and the numeral with and without; anything else has Yes and yes,
    each with and without a blank. ``mean``: ``am``, (1/n) sum p, GenEval2's estimate of single atoms; or ``gm``,
    (prod p)^(1/n), of whole prompts. Forms that share their first token count it once each, as the official code has
    it, so that p may exceed what the model means.
    Checkpoints: ``Qwen/Qwen3-VL-8B-Instruct`` (Apache-2.0 by its card) is what GenEval2 reports with.
    Preprocessing: the checkpoint's own, by PIL; official: by what transformers takes.
    Range: 0 to 1 (times 100 in the paper).
    Caveats: of an endpoint, only forms among the 20 most probable tokens count, and the first token of a longer form
    does not. GenEval2's questions are CC BY-NC 4.0.

    Args:
        mean: ``am`` or ``gm``.
        model, url, key_variable, timeout, attempts, workers, device, dtype: as
            :class:`rewards.models.questions.Asking` has them.
    """

    expected: ClassVar[str] = "GenEval2's vqa_list, pairs of question and answer,"

    def __init__(
        self,
        mean: Literal["am", "gm"] = "gm",
        model: str = "Qwen/Qwen3-VL-8B-Instruct",
        url: str | None = None,
        key_variable: str | None = None,
        timeout: float = 60.0,
        attempts: int = 4,
        workers: int = 8,
        device: str | None = None,
        dtype: str = "bfloat16",
    ) -> None:
        if mean not in ("am", "gm"):
            raise RewardError(f"SoftTIFA: mean is {mean!r}; expected am or gm")
        super().__init__(model, url, key_variable, timeout, attempts, workers, device, dtype)
        self.mean = mean

    def read(self, prompt: str, data: Mapping[str, Any], row: int) -> list[tuple[str, str]]:
        pairs = data.get("vqa_list")
        try:
            found = [(question, answer) for question, answer in pairs or ()]
        except (TypeError, ValueError):
            found = []
        if not found or not all(isinstance(text, str) for pair in found for text in pair):
            raise RewardError(f"SoftTIFA: vqa_list is {pairs!r}; expected {self.expected}", row)
        return found

    def answer(self, pictures: Sequence[Image.Image], rows: Sequence[list[tuple[str, str]]]) -> list[float]:
        asked = [
            Asked(row, picture, f"{question} Answer in one word.")
            for row, (picture, pairs) in enumerate(zip(pictures, rows, strict=True))
            for question, _ in pairs
        ]
        found = self.questioner.probabilities(asked, [forms(*pair) for pairs in rows for pair in pairs])
        each = iter(found)
        return [mean_of([next(each) for _ in pairs], self.mean) for pairs in rows]


def forms(question: str, answer: str) -> tuple[str, ...]:
    """The forms of the right answer, GenEval2's; of a number above ten "other" is its numeral, as there."""
    if not question.startswith("How many"):
        return YES
    numeral = str(NUMBERS.index(answer) + 1) if answer in NUMBERS else "other"
    capital = answer.capitalize()
    return answer, capital, f" {answer}", f" {capital}", numeral, f" {numeral}"


def mean_of(values: Sequence[float], mean: Literal["am", "gm"]) -> float:
    """The arithmetic or the geometric mean; the latter is 0 where a value is."""
    if mean == "am":
        return math.fsum(values) / len(values)
    return math.exp(math.fsum(map(math.log, values)) / len(values)) if min(values) > 0 else 0.0
