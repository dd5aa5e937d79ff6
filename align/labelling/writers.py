"""Answers in other tools' layouts: Pick-a-Pic's parquet, JSONL, an image folder, D3PO's own JSON.

Of several people's votes on a pair the majority decides, a tie is left out (but by Pick-a-Pic's layout, which has
them); ``votes`` says how they were. Pictures that were rated one by one give, as JSONL and as an image folder, unpaired
rows with ``label`` true or false, as Diffusion-KTO and TRL's KTO read them: thumbs by the majority, scores by a
threshold.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from PIL import Image

from align.common.errors import DataError, UserError
from align.data.trajectories import RolloutFolder
from align.labelling.answers import Answer
from align.labelling.decisions import Decision, counted, decisions
from align.labelling.items import Item, Picture, Task, relative
from rewards.common.errors import shortened
from rewards.common.files import atomic, write_text
from rewards.data.answers import standing
from rewards.data.images import BROKEN, UnreadableError
from rewards.data.records import Broken, read_records
from rewards.data.tables import LazyImage
from rewards.data.text import loads

logger = logging.getLogger(__name__)
Format = Literal["pickapic", "jsonl", "imagefolder", "d3po"]


@dataclass(frozen=True)
class Answered:
    """An answers file: the items that were answered, what was said of them, and where names of pictures start."""

    task: Task
    items: list[Item]
    answers: list[Answer]
    root: Path


def read_answers(path: Path) -> Answered:
    """What stands in an answers file. Raises :class:`DataError` where there is none, or nothing in it."""
    beside = path.with_suffix(".session.json")
    try:
        record: Any = loads(beside.read_text(encoding="utf-8"))
        task, root = record["task"], path.parent / record["root"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{beside} cannot be read ({error}); export the answers file that align.label wrote") from error
    items, answers = list[Item](), list[Answer]()
    for where, line in standing(read_records(path)):
        if isinstance(line, Broken) or not isinstance(line, dict):
            raise DataError(f"{where} is no answer of align.label")
        answer = Answer.of(line, where)
        names = line["images"] if "images" in line else [line[n] for n in ("image_a", "image_b", "image") if n in line]
        prompt, known = line.get("prompt"), isinstance(names, list) and all(isinstance(name, str) for name in names)
        if not isinstance(prompt, str) or not known or not names or len(names) != len(answer.worth or names):
            raise DataError(f"{where} is no answer of align.label: it is about {names} of the prompt {prompt!r}")
        items.append(Item(prompt, tuple(Picture(name, LazyImage(root / name)) for name in names)))
        answers.append(replace(answer, item=len(answers)))
    if not answers:
        raise DataError(f"{path} holds no answer that stands; skipped items and those taken back are none")
    return Answered(task, items, answers, root)


def export(answers: Path, to: Format, output: Path, threshold: float | None = None) -> int:
    """Write what stands in the file ``answers`` to ``output``; returns the number of rows. Raises :class:`UserError`
    where a layout cannot hold the task, and :class:`DataError` where a picture is gone."""
    read = read_answers(answers)
    if output.resolve() in (answers.resolve(), answers.with_suffix(".session.json").resolve()):
        raise UserError(f"--output {output} is what is read; name another file")
    if to == "d3po":
        return _d3po(read, output)
    if len(read.items[0].pictures) == 1 and to != "pickapic":
        rows: list[dict[str, Any]] = list(_rated(read, threshold))
        sides: tuple[str, ...] = ("image",)
    else:
        decided = decisions(read.items, read.answers)
        if to == "pickapic":
            return _pickapic(decided, output)
        won = [each.ordered for each in decided if not each.tie]
        rows = [
            {"prompt": d.prompt, "chosen": d.pictures[0], "rejected": d.pictures[1], "votes": [int(v) for v in d.votes]}
            for d in won
        ]
        sides = ("chosen", "rejected")
    if not rows:
        raise UserError(f"{answers}: all answers are ties, which {to} cannot hold; pickapic can")
    if to == "imagefolder":
        _folder(rows, sides, output)
    else:
        for row in rows:
            row |= {side: relative(_file(row[side]), output.resolve().parent) for side in sides}
        write_text(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return len(rows)


def _file(picture: Picture) -> Path:
    """Where it lies, by its own name also where that is a link, as in the hub's cache. Raises :class:`DataError` for
    what is gone, or no picture: whatever else a link leads to is not to be given away."""
    file = picture.image.file
    if not file.is_file():
        raise DataError(f"{file} is gone, which answers are about; put it back, or move the folders together")
    try:
        Image.open(file).close()
    except BROKEN as error:
        raise DataError(f"{file}, which answers are about, is no picture: {shortened(str(error))}") from error
    return file.parent.resolve() / file.name


def _rated(read: Answered, threshold: float | None) -> Iterator[dict[str, Any]]:
    if read.task == "score" and threshold is None:
        raise UserError("scores are good from some score on; say which: --threshold 4")
    least = 0.5 if threshold is None else threshold
    ratings: dict[tuple[str, str], list[float]] = {}
    pictures: dict[str, Picture] = {}
    for answer in counted(read.answers):
        item = read.items[answer.item]
        pictures[item.pictures[0].place] = item.pictures[0]
        ratings.setdefault((item.prompt, item.pictures[0].place), []).extend(answer.worth or ())
    for (prompt, place), values in ratings.items():
        if threshold is None and fmean(values) == least:
            continue  # as many thumbs up as down
        yield {"image": pictures[place], "prompt": prompt, "label": fmean(values) >= least}


def _folder(rows: Sequence[dict[str, Any]], sides: Sequence[str], output: Path) -> None:
    """``metadata.jsonl`` and copies of the pictures, in the layout of datasets' image folders."""
    if output.exists():
        raise UserError(f"{output} is there already; give another --output")
    columns = {"image": "file_name", "chosen": "file_name", "rejected": "rejected_file_name", "prompt": "text"}
    with atomic(output) as draft:
        draft.mkdir()
        lines = []
        for number, row in enumerate(rows):
            for side in sides:
                file = _file(row[side])
                row[side] = f"{number:05d}-{side}{file.suffix.lower()}"
                shutil.copyfile(file, draft / row[side])
            lines.append(json.dumps({columns.get(key, key): value for key, value in row.items()}, ensure_ascii=False))
        (draft / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _pickapic(decided: Sequence[Decision], output: Path) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not decided:
        raise UserError("pickapic holds pairs, and no prompt has two pictures that were rated; jsonl holds ratings")
    schema = pa.schema(
        [(name, pa.string()) for name in ("caption", "image_0_uid", "image_1_uid")]
        + [(name, pa.binary()) for name in ("jpg_0", "jpg_1")]
        + [(name, pa.float64()) for name in ("label_0", "label_1")]
        + [("votes", pa.list_(pa.float64())), ("has_label", pa.bool_()), ("are_different", pa.bool_())]
    )
    with atomic(output) as draft, pq.ParquetWriter(draft, schema) as writer:
        for start in range(0, len(decided), 64):  # pictures of so many pairs in memory
            writer.write_table(pa.Table.from_pylist([_pickapic_row(d) for d in decided[start : start + 64]], schema))
    return len(decided)


def _pickapic_row(decision: Decision) -> dict[str, Any]:
    one, other = decision.votes
    label = 0.5 if one == other else float(one > other)
    try:
        images = [LazyImage(_file(picture)).data() for picture in decision.pictures]
    except UnreadableError as error:
        raise DataError(str(error)) from error
    row: dict[str, Any] = {"caption": decision.prompt, "label_0": label, "label_1": 1 - label, "votes": [one, other]}
    row |= {f"jpg_{side}": image for side, image in enumerate(images)}
    row |= {f"image_{side}_uid": picture.name for side, picture in enumerate(decision.pictures)}
    return row | {"has_label": True, "are_different": True}


def _d3po(read: Answered, output: Path) -> int:
    """N lists, one a prompt of the rollout, of k numbers, one an image: its wins less its defeats, or its mean rating.
    A prompt of which not every picture is rated has zeros: no preference."""
    rollout = RolloutFolder(read.root).read()
    each = rollout.record.images_per_prompt
    numbers = {line.image: number for number, line in enumerate(rollout.lines)}
    values = [0.0] * len(rollout.lines)
    if len(read.items[0].pictures) > 1:
        for decision in decisions(read.items, read.answers):
            margin = (decision.votes[0] > decision.votes[1]) - (decision.votes[0] < decision.votes[1])
            for picture, sign in zip(decision.pictures, (1, -1), strict=True):
                values[numbers[picture.name]] += sign * margin
    else:
        ratings: dict[int, list[float]] = {}
        for answer in counted(read.answers):
            number = numbers[read.items[answer.item].pictures[0].name]
            ratings.setdefault(number, []).extend(answer.worth or ())
        whole = [range(at, at + each) for at in range(0, len(values), each)]
        whole = [group for group in whole if all(number in ratings for number in group)]
        for number in (number for group in whole for number in group):
            values[number] = fmean(ratings[number])
        if left := len(values) // each - len(whole):
            logger.warning("%d prompts with pictures that nobody rated have zeros, which prefer none", left)
    rows = [values[at : at + each] for at in range(0, len(values), each)]
    write_text(output, json.dumps(rows) + "\n")
    return len(rows)
