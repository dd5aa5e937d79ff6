"""Prompts: from files, and as a model sees them, encoded when they are first asked for."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from align.common.assets import locate
from align.common.errors import DataError, require_at_least
from align.common.resolution import Resolution
from align.data.dataset import Data, Setup
from align.families import Conditioning, Family, tell_truncated
from rewards.data.records import Broken, caption_of, read_records
from rewards.data.text import brief, caption_fault, clean


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of :func:`read_prompt_rows`."""
    return [row["prompt"] for row in read_prompt_rows(path)]


def read_prompt_rows(path: str | Path) -> list[dict[str, Any]]:
    """{"prompt": its text (the first of ``caption``, ``prompt`` and ``text``), and what else stands there} from .jsonl,
    .json (objects or strings), .csv or .tsv, or from a text file with one prompt on each line.

    Raises:
        DataError: no such file, an entry without a prompt, or no prompt at all.
    """
    file = Path(locate(str(path))).expanduser()
    if not file.is_file():
        raise DataError(f'there is no prompt file {file}; expected .jsonl with {{"prompt": ..}}, or .txt, one a line')
    prompts = []
    for where, entry in read_records(file):
        words = caption_of(entry, None, file) if isinstance(entry, dict) else entry
        if isinstance(entry, Broken):
            raise DataError(f"{where}: {entry.reason}")
        if not isinstance(words, str) or not clean(words):
            raise DataError(f'{where}: expected {{"prompt": ".."}} or a string, found {brief(entry)}')
        if fault := caption_fault(words):
            raise DataError(f"{where}: {fault}")
        prompts.append((entry if isinstance(entry, dict) else {}) | {"prompt": clean(words)})
    if not prompts:
        raise DataError(f"{file} holds no prompt")
    return prompts


@dataclass(frozen=True)
class PromptBatch:
    """P prompts, their conditions, and what else the prompt file says of each (for rewards that read it)."""

    prompts: list[str]
    cond: Conditioning
    metadata: list[Mapping[str, Any]]
    ids: list[int]


@dataclass
class Prompts(Data):
    """Prompts to draw images of.

    Args:
        path: .jsonl with {"prompt"} and whatever rewards want to know, a JSON list, text with one on each line, or
            ``shapes-prompts``, the embedded world's.
        limit: use the first so many.
        resolution: of the images: pixels a side, or WIDTHxHEIGHT; default the model's own.
    """

    path: str
    limit: int | None = None
    resolution: Resolution = None

    batch_type: ClassVar[type] = PromptBatch

    def __post_init__(self) -> None:
        require_at_least(1, self, "limit")

    def check(self) -> None:
        self.read()

    def read(self) -> list[dict[str, Any]]:
        return read_prompt_rows(self.path)[: self.limit]

    def prepare(self, setup: Setup) -> PromptSet:
        return PromptSet(setup.family, self.read())


REMEMBERED = 4 << 30  # bytes of conditions: a caption takes 0.1 MiB of SD, and 15 of FLUX.2


class PromptSet:
    """Prompts whose conditions are encoded when first asked for, and kept, the last ``remember`` of them and no more
    than :data:`REMEMBERED`."""

    def __init__(self, family: Family, rows: list[dict[str, Any]], remember: int = 4096) -> None:
        self.family, self.rows, self.remember = family, rows, remember
        tell_truncated(family, [row["prompt"] for row in rows])
        self._kept: OrderedDict[str, Conditioning] = OrderedDict()  # the last that were asked for at the end
        self._bytes = 0

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps(self.rows, sort_keys=True).encode()).hexdigest()
        return f"{len(self.rows)} prompts {digest[:16]}"

    def _encode(self, prompt: str) -> Conditioning:
        if prompt not in self._kept:
            with torch.no_grad():
                self._kept[prompt] = self.family.encode([prompt]).to("cpu")
            self._bytes += self._kept[prompt].nbytes
            while len(self._kept) > 1 and (len(self._kept) > self.remember or self._bytes > REMEMBERED):
                self._bytes -= self._kept.popitem(last=False)[1].nbytes
        self._kept.move_to_end(prompt)
        return self._kept[prompt]

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Conditions of any prompts, remembered as those of the rows are."""
        return Conditioning.cat([self._encode(prompt) for prompt in prompts])

    def batch(self, indices: Sequence[int], variants: Sequence[int] | None = None) -> PromptBatch:
        rows = [self.rows[index] for index in indices]
        prompts = [row["prompt"] for row in rows]
        return PromptBatch(prompts, self.encode(prompts), list(rows), list(indices))


@dataclass
class TaskPrompts(Data):
    """Prompts of several tasks in equal shares: item k of a batch is of task k modulo their number.

    Args:
        tasks: a prompt file (see :class:`Prompts`) for each task; its name becomes ``task`` of its prompts' metadata.
        limit: use the first so many of each.
        resolution: of the images: pixels a side, or WIDTHxHEIGHT; default the model's own.
    """

    tasks: dict[str, str]
    limit: int | None = None
    resolution: Resolution = None

    batch_type: ClassVar[type] = PromptBatch

    def __post_init__(self) -> None:
        require_at_least(1, self, "limit")
        self.multiple = len(self.tasks)

    def check(self) -> None:
        if not self.tasks:
            raise DataError("tasks is empty; expected {task: prompt file, ..}")
        self.read()

    def read(self) -> list[list[dict[str, Any]]]:
        """The rows of each task."""
        return [
            [row | {"task": task} for row in read_prompt_rows(path)[: self.limit]] for task, path in self.tasks.items()
        ]

    def prepare(self, setup: Setup) -> TaskSet:
        return TaskSet(setup.family, self.read())


class TaskSet(PromptSet):
    """Items of the longest task's number; the place in a batch decides the task, the item its prompt."""

    def __init__(self, family: Family, tasks: list[list[dict[str, Any]]]) -> None:
        super().__init__(family, [row for rows in tasks for row in rows])
        self.tasks = tasks
        self._starts = [sum(map(len, tasks[:k])) for k in range(len(tasks))]

    def __len__(self) -> int:
        return max(map(len, self.tasks))

    def batch(self, indices: Sequence[int], variants: Sequence[int] | None = None) -> PromptBatch:
        tasks = [place % len(self.tasks) for place in range(len(indices))]
        return super().batch(
            [self._starts[task] + index % len(self.tasks[task]) for task, index in zip(tasks, indices, strict=True)]
        )
