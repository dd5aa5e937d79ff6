"""WiScore, by which WISE scores (Niu et al. 2025, arXiv 2503.07265): whether a picture shows what one has to know."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from PIL import Image

from rewards import RewardError
from rewards.models.questions import MODEL, Asked, Asking
from rewards.models.vlm_judge import Form

HEAD = (
    "A picture was made from a prompt whose answer has to be known or inferred.\n"
    'PROMPT: "{prompt}"\nEXPLANATION, which is the truth to judge by: "{explanation}"\n\n'
)
LEGACY = (
    HEAD + "Rate three things from 0 to 2, strictly; where you doubt, take the lower number.\n"
    "Consistency: 0 what was asked for is missing or contradicted, 1 it is there in part, 2 all of it is there.\n"
    "Realism: 0 impossible or plainly artificial, 1 small flaws, 2 not to be told from a photograph.\n"
    "Aesthetic Quality: 0 unappealing, 1 pleasant, 2 outstanding.\n"
    "Reply with three lines and nothing else, such as\nConsistency: 1\nRealism: 1\nAesthetic Quality: 0"
)
VERIFIED = (
    HEAD + "Is the picture right by prompt and explanation, with every object, state and relation that they need, and "
    "clear enough to be sure? Style and beauty do not count. Where you seriously doubt, it is 0.\n"
    "Reply with one line and nothing else: Score: 0 or Score: 1"
)


@dataclass(frozen=True)
class Rubric:
    """What is asked, and the weight of each label's number, which is between 0 and ``high``."""

    question: str
    weights: Mapping[str, float]
    high: float

    def read(self, reply: str) -> float:
        """sum over labels of weight * number / ``high``; ``ValueError`` where a number is missing."""
        form = Form("{prompt}", list(self.weights), 0.0, self.high)
        return sum(weight * form.value(reply, label) for label, weight in self.weights.items()) / self.high


RUBRICS = {
    "legacy": Rubric(LEGACY, {"Consistency": 0.7, "Realism": 0.2, "Aesthetic Quality": 0.1}, 2.0),
    "verified": Rubric(VERIFIED, {"Score": 1.0}, 1.0),
}


class WiScore(Asking):
    """A judge's score of a picture by its prompt and ``Explanation``, a key of WISE's metadata.

    Formula: ``legacy``, the paper's: (0.7 consistency + 0.2 realism + 0.1 aesthetic quality) / 2, each 0, 1 or 2;
    ``verified``, of WISE_Verified since April 2026: 0 or 1. The two do not compare.
    Checkpoints: WISE reports with GPT-4o-2024-05-13 (legacy) and Qwen3.5-35B-A3B behind vLLM (verified).
    Preprocessing: the checkpoint's own.
    Range: 0 to 1.
    Caveats: WISE has no licence, so its question is not here and the default is in words of ours: for figures to set
    beside WISE's, put the text of its ``gpt_eval.py`` or ``vllm_eval.py`` into a file, with {prompt} and {explanation},
    and give that as ``question``. Its system message is not sent. A reply without a score is an error; upstream asks
    again, then leaves the picture out.

    Args:
        rubric: ``legacy`` or ``verified``.
        question: a text or a file that holds one, with ``{prompt}`` and ``{explanation}``.
        tokens: most tokens of a reply.
        model, url, key_variable, timeout, attempts, workers, device, dtype: as
            :class:`rewards.models.questions.Asking` has them.
    """

    needs_prompt: ClassVar[bool] = True
    expected: ClassVar[str] = "WISE's Explanation"

    def __init__(
        self,
        rubric: Literal["legacy", "verified"] = "legacy",
        question: str | None = None,
        tokens: int = 500,
        model: str = MODEL,
        url: str | None = None,
        key_variable: str | None = None,
        timeout: float = 300.0,
        attempts: int = 4,
        workers: int = 8,
        device: str | None = None,
        dtype: str = "bfloat16",
    ) -> None:
        if rubric not in RUBRICS or tokens < 1:
            raise RewardError(f"WiScore: rubric {rubric!r}, {tokens} tokens; expected legacy or verified, 1 at least")
        self.rubric, self.tokens = RUBRICS[rubric], tokens
        self.question = self.rubric.question if question is None else text_of(question)
        if not all(part in self.question for part in ("{prompt}", "{explanation}")):
            raise RewardError("WiScore: expected {prompt} and {explanation} in question")
        super().__init__(model, url, key_variable, timeout, attempts, workers, device, dtype)

    def read(self, prompt: str, data: Mapping[str, Any], row: int) -> str:
        explanation = data.get("Explanation")
        if not isinstance(explanation, str) or not explanation.strip():
            raise RewardError(f"WiScore: Explanation is {explanation!r}; expected WISE's, a text", row)
        texts = {"{prompt}": prompt, "{explanation}": explanation}
        return re.sub(r"\{prompt\}|\{explanation\}", lambda place: texts[place[0]], self.question)

    def answer(self, pictures: Sequence[Image.Image], rows: Sequence[str]) -> list[float]:
        asked = [Asked(row, *pair) for row, pair in enumerate(zip(pictures, rows, strict=True))]
        scores = []
        for row, reply in enumerate(self.questioner.replies(asked, self.tokens)):
            try:
                scores.append(self.rubric.read(reply))
            except ValueError as error:
                raise RewardError(f"WiScore: {error}; the reply was {reply[:200]!r}", row) from error
        return scores


def text_of(question: str) -> str:
    """``question``, or what the file of that name holds. Raises :class:`RewardError` where it cannot be read."""
    if "\n" in question or "{" in question:
        return question
    try:
        return Path(question).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise RewardError(f"WiScore: question {question!r} has no {{prompt}} and is no file ({error})") from error
