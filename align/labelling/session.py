"""Who is shown what, and what was said: the one state of the page, changed under one lock.

Which side a picture stands on, in which order items come, and which come again belong to (seed, purpose, person, item)
as every random draw here does, so a restart shows the same. What is still to be answered is read off the answers alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from statistics import median
from typing import Any

import torch

from align.common.errors import DataError
from align.common.rng import generator, uniform
from align.labelling.answer_file import AnswerFile
from align.labelling.answers import ID, TAGS, Answer, Refused, said
from align.labelling.items import Item, Task, digest_of, sizes_of

LEASE = 120.0  # seconds for which an item that waits in somebody's browser is kept from others
GAP = 5  # answers between an item and its coming again, at least
VERSION = 1  # of the file's meaning


@dataclass(frozen=True)
class Rules:
    """How a session goes.

    Args:
        task: what people are asked.
        seed: names sides, order, and which items come again.
        per_item: people who are to answer each item.
        repeat: share of each person's items that come again as they were.
        swap: share that comes again in the other order.
    """

    task: Task = "pair"
    seed: int = 0
    per_item: int = 1
    repeat: float = 0.0
    swap: float = 0.0


@dataclass(frozen=True)
class Showing:
    """An item as it is shown to somebody: its pictures in the order ``shown``."""

    item: int
    check: str
    shown: tuple[int, ...]

    @property
    def key(self) -> str:
        return f"{self.item}.{self.check}" if self.check else str(self.item)


class Session:
    """The answers to ``items``. ``order`` is in which order they come, by chance where None; ``keep`` what answers call
    the pictures of an item; ``clock`` seconds, for leases."""

    def __init__(
        self,
        items: Sequence[Item],
        rules: Rules,
        file: AnswerFile,
        keep: Callable[[Item], Sequence[str]],
        order: Sequence[int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.items, self.rules, self.file, self._keep, self._clock = items, rules, file, keep, clock
        shuffled = torch.randperm(len(items), generator=generator(rules.seed, "label", "order")).tolist()
        self.order = list(shuffled if order is None else order)
        self.digest = digest_of(items)
        self._lock = threading.RLock()
        self._answers: dict[str, Answer] = {}  # that stand, in the order in which they came
        self._ids: set[str] = set()  # of every line
        self._slots: dict[tuple[str, int, str], str] = {}
        self._people: dict[int, set[str]] = {}  # who has answered an item
        self._own: dict[str, list[str]] = {}  # ids of a person's answers that stand
        self._leases: dict[int, dict[str, float]] = {}
        for line in file.lines:
            self._require_sound(line)
            self._take(line)

    @staticmethod
    def record(items: Sequence[Item], rules: Rules, source: str) -> dict[str, Any]:
        """What the numbers in an answers file mean, and so must not change between two starts."""
        settings = {"version": VERSION, "task": rules.task, "seed": rules.seed, "source": source}
        return settings | {"items": len(items), "digest": digest_of(items), "sizes of pictures": sizes_of(items)}

    def _require_sound(self, line: Mapping[str, Any]) -> None:
        """Raise :class:`DataError` for a line that this page has not written: somebody has edited the file."""
        fault = ""
        if not isinstance(line.get("id"), str) or line["id"] in self._ids or not isinstance(line.get("undo", ""), str):
            fault = f"the id {line.get('id')!r}, which is another line's or none"
        elif "undo" not in line:
            answer, count = Answer.of(line, str(self.file.path)), len(self.items)
            pictures = len(self.items[answer.item].pictures) if 0 <= answer.item < count else 0
            if answer.slot in self._slots:
                fault = f"item {answer.item}, which {answer.annotator} has answered before"
            elif not pictures or (answer.worth is not None and len(answer.worth) != pictures):
                fault = f"item {answer.item}, of which it says other than there is to say"
            elif sorted(answer.shown or range(pictures)) != list(range(pictures)) or not set(answer.why) <= TAGS.keys():
                fault = f"item {answer.item}, shown as {answer.shown} and tagged {answer.why}"
        if fault:
            raise DataError(
                f"{self.file.path} has a line of {fault}: it was edited; put it back as it was, or give another "
                "--output"
            )

    # what is shown
    def shown(self, annotator: str, item: int, check: str = "") -> tuple[int, ...]:
        """The order in which somebody sees the pictures of an item."""
        count = len(self.items[item].pictures)
        named = generator(self.rules.seed, "label", "sides", annotator, item)
        order = tuple(torch.randperm(count, generator=named).tolist())
        return order[::-1] if check == "swap" else order

    def check_of(self, annotator: str, item: int) -> str:
        """Whether, and how, an item comes again to somebody."""
        rules = self.rules
        if not rules.repeat and not rules.swap:
            return ""
        drawn = uniform([generator(rules.seed, "label", "check", annotator, item)]).item()
        return "repeat" if drawn < rules.repeat else "swap" if drawn < rules.repeat + rules.swap else ""

    def next(self, annotator: str, count: int, held: Sequence[str] = ()) -> list[Showing]:
        """The next items for somebody, ``count`` at most, without those that the page holds already (by ``key``), which
        are kept for them for another :data:`LEASE`."""
        with self._lock:
            now, holding = self._clock(), set(held)
            for key in holding:
                number = key.partition(".")[0]
                if number.isdecimal() and int(number) < len(self.items):
                    self._leases.setdefault(int(number), {})[annotator] = now + LEASE
            found: list[Showing] = []
            fresh = self._fresh(annotator, now, holding)
            for showing in self._again(annotator, holding, GAP):
                if len(found) < count:
                    found.append(showing)
            for item in fresh:
                if len(found) >= count:
                    break
                self._leases.setdefault(item, {})[annotator] = now + LEASE
                found.append(Showing(item, "", self.shown(annotator, item)))
            if not found and not holding:
                found = list(self._again(annotator, holding, 0))[:count]
            return found

    def _fresh(self, annotator: str, now: float, holding: set[str]) -> Iterator[int]:
        for item in self.order:
            people = self._people.get(item, set())
            if annotator in people or str(item) in holding or not self.items[item].ready:
                continue
            others = {name for name, until in self._leases.get(item, {}).items() if until > now and name != annotator}
            if len(people | others) < self.rules.per_item:
                yield item

    def _again(self, annotator: str, holding: set[str], gap: int) -> Iterator[Showing]:
        own = self._own.get(annotator, [])
        for identity in own[: max(0, len(own) - gap)]:
            answer = self._answers[identity]
            check = "" if answer.check or answer.worth is None else self.check_of(annotator, answer.item)
            showing = Showing(answer.item, check, self.shown(annotator, answer.item, check))
            if check and (annotator, answer.item, check) not in self._slots and showing.key not in holding:
                yield showing

    # what is said
    def submit(self, annotator: str, entry: Mapping[str, Any]) -> str:
        """Take what the page sends: ``stored`` when it is on the disk; ``known`` where it was there, sent once more;
        ``already`` where somebody has answered the item in another tab, which stands. Raises :class:`Refused`, or
        ``WriteError`` where the disk does not take it."""
        identity = entry.get("id")
        if not isinstance(identity, str) or not ID.fullmatch(identity):
            raise Refused(f"the id is {identity!r}; expected 8 to 64 letters, digits and hyphens")
        with self._lock:
            if identity in self._ids:
                return "known"
            if "undo" in entry:
                line = self._undo_line(annotator, entry["undo"])
                if line is None:
                    return "already"
            else:
                line = self._line(annotator, entry)
                if (annotator, line["item"], line.get("check", "")) in self._slots:
                    return "already"
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            line |= {"annotator": annotator, "id": identity, "time": now}
            self.file.append(line)
            self._take(line)
            return "stored"

    def _undo_line(self, annotator: str, undone: object) -> dict[str, Any] | None:
        if not isinstance(undone, str) or undone not in self._ids:
            raise Refused(f"there is no answer {str(undone)[:64]!r} to take back")
        answer = self._answers.get(undone)
        if answer is not None and answer.annotator != annotator:
            raise Refused("that answer is somebody else's")
        return None if answer is None else {"undo": undone}

    def _line(self, annotator: str, entry: Mapping[str, Any]) -> dict[str, Any]:
        number, check, why = entry.get("item"), entry.get("check", ""), entry.get("why", [])
        seconds = entry.get("seconds", 0)
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < len(self.items):
            raise Refused(f"the item is {str(number)[:64]!r}; expected 0 to {len(self.items) - 1}")
        if entry.get("session") != self.digest:
            raise Refused("the page is of another session; open its link anew")
        if check and check != self.check_of(annotator, number):
            raise Refused(f"the check is {str(check)[:64]!r}, and this item does not come again so")
        if not isinstance(why, list) or any(not isinstance(tag, str) or tag not in TAGS for tag in why):
            raise Refused(f"why is {str(why)[:64]!r}; expected a list of {', '.join(TAGS)}")
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < 1e7:
            raise Refused("seconds is no time that somebody took")
        item, shown = self.items[number], self.shown(annotator, number, check)
        line = said(self.rules.task, item, shown, entry.get("choice"), self._keep(item))
        line |= {"item": number} | ({"check": check} if check else {})
        line |= {"shown": list(shown)} if len(shown) > 1 else {}
        models = [picture.model for picture in item.pictures]
        return line | ({"models": models} if any(models) else {}) | {"why": why, "seconds": round(seconds, 2)}

    def _take(self, line: Mapping[str, Any]) -> None:
        """A line that is in the file."""
        self._ids.add(line["id"])
        if "undo" in line:
            if (gone := self._answers.pop(line["undo"], None)) is not None:
                del self._slots[gone.slot]
                self._own[gone.annotator].remove(gone.id)
                if not gone.check:
                    self._people[gone.item].discard(gone.annotator)
                self._leases.setdefault(gone.item, {})[gone.annotator] = self._clock() + LEASE
            return
        answer = Answer.of(line, str(self.file.path))
        self._answers[answer.id] = answer
        self._slots[answer.slot] = answer.id
        self._own.setdefault(answer.annotator, []).append(answer.id)
        if not answer.check:
            self._people.setdefault(answer.item, set()).add(answer.annotator)

    # what is told
    def answers(self) -> list[Answer]:
        """Those that stand."""
        with self._lock:
            return list(self._answers.values())

    def last(self, annotator: str, count: int) -> list[Answer]:
        """Somebody's last answers, the newest at the end: what they may take back."""
        with self._lock:
            return [self._answers[identity] for identity in self._own.get(annotator, [])[-count:]]

    def progress(self, annotator: str) -> dict[str, Any]:
        """Answers of all and those wanted, somebody's own, their pace (median seconds), and pictures still awaited."""
        with self._lock:
            own = [self._answers[identity] for identity in self._own.get(annotator, [])]
            done = sum(min(len(people), self.rules.per_item) for people in self._people.values())
            return {
                "done": done,
                "wanted": len(self.items) * self.rules.per_item,
                "own": len(own),
                "pace": median([answer.seconds for answer in own[-50:]]) if own else None,
                "undrawn": sum(not item.ready for item in self.items) if self._drawing() else 0,
            }

    def _drawing(self) -> bool:
        return not (self.items[0].ready and self.items[-1].ready)
