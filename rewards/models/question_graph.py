"""Yes-or-no questions that depend on one another, by which DPG-Bench and OneIG's alignment part score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from PIL import Image

from rewards import RewardError
from rewards.models.questions import MODEL, Asked, Asking


@dataclass(frozen=True)
class Question:
    """Question ``number`` and the numbers of those that it depends on."""

    number: int
    text: str
    parents: Sequence[int]


class QuestionGraph(Asking):
    """The share of a picture's questions that are answered yes and whose parents are too.

    The metadata say ``questions``, a list of ``{number, question, parents}``; parent 0 is none. ``align.bench`` makes
    them of the official files of DPG-Bench (Hu et al. 2024, arXiv 2403.05135) and OneIG-Bench (Chang et al. 2025, arXiv
    2506.07977).
    Formula: a question is 1 where the reply, without blanks and a full stop around it, is "yes" in any case, else 0; it
    is 0 too where one of its parents is 0; the score is the mean over the questions. With ``chained`` a parent counts
    as it stands after its own parents were looked at, in the order of the list: DPG-Bench's code, by which a no reaches
    grandchildren; without, as it was answered: OneIG's.
    Checkpoints: OneIG reports with ``Qwen/Qwen2.5-VL-7B-Instruct`` (Apache-2.0 by its card); DPG-Bench with mPLUG-large
    of ModelScope, which transformers does not load, so figures of any other model are not DPG-Bench's.
    Preprocessing: the checkpoint's own, by PIL.
    Range: 0 to 1.
    Caveats: a reply that is neither yes nor no counts as no, as in the official codes, of which OneIG's takes "Yes"
    alone and leaves black pictures out.

    Args:
        chained: whether a no reaches grandchildren.
        suffix: what follows every question.
        tokens: most tokens of a reply.
        model, url, key_variable, timeout, attempts, workers, device, dtype: as
            :class:`rewards.models.questions.Asking` has them.
    """

    expected: ClassVar[str] = "questions, a list of {number, question, parents},"

    def __init__(
        self,
        chained: bool = True,
        suffix: str = " Please answer 'Yes' or 'No' only.",
        tokens: int = 8,
        model: str = MODEL,
        url: str | None = None,
        key_variable: str | None = None,
        timeout: float = 60.0,
        attempts: int = 4,
        workers: int = 8,
        device: str | None = None,
        dtype: str = "bfloat16",
    ) -> None:
        if tokens < 1:
            raise RewardError(f"QuestionGraph: tokens is {tokens}; expected at least 1")
        super().__init__(model, url, key_variable, timeout, attempts, workers, device, dtype)
        self.chained, self.suffix, self.tokens = chained, suffix, tokens

    def read(self, prompt: str, data: Mapping[str, Any], row: int) -> list[Question]:
        try:
            entries = data["questions"]
            found = [Question(one["number"], one["question"], tuple(one["parents"])) for one in entries]
            numbers = [one.number for one in found]
            parents = {number for one in found for number in one.parents} - {0}
            whole = all(isinstance(one.text, str) and one.text.strip() for one in found)
            if whole and found and len(set(numbers)) == len(numbers) and parents <= set(numbers):
                return found
        except (LookupError, TypeError):
            pass
        told = f"{self.expected} each number once and every parent among them"
        raise RewardError(f"QuestionGraph: the metadata are {dict(data)}; expected {told}", row)

    def answer(self, pictures: Sequence[Image.Image], rows: Sequence[list[Question]]) -> list[float]:
        asked = [
            Asked(row, picture, one.text + self.suffix)
            for row, (picture, questions) in enumerate(zip(pictures, rows, strict=True))
            for one in questions
        ]
        each = iter(self.questioner.replies(asked, self.tokens))
        return [share([is_yes(next(each)) for _ in questions], questions, self.chained) for questions in rows]


def is_yes(reply: str) -> bool:
    """Whether ``reply`` is yes."""
    return reply.strip().removesuffix(".").casefold() == "yes"


def share(yes: Sequence[bool], questions: Sequence[Question], chained: bool) -> float:
    """The share of ``questions`` with a ``yes``, those apart that have a parent without."""
    counts = {one.number: answer for one, answer in zip(questions, yes, strict=True)}
    parents = counts if chained else dict(counts)
    for one in questions:
        if not all(parents[number] for number in one.parents if number):
            counts[one.number] = False
    return sum(counts.values()) / len(counts)
