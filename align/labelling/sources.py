"""From what a user has to pictures of prompts: a rollout folder, a preference set, images with prompts, or models that
will draw."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from align.common.assets import locate
from align.common.errors import DataError, UserError
from align.data.trajectories import RolloutFolder
from align.evaluation.pictures import PictureFolder
from align.labelling.items import Item, Picture, Source, relative
from rewards import RewardConfig, RewardSum, parse_rewards
from rewards.agreement import Choices
from rewards.data.formats import open_input
from rewards.data.preferences import recognise
from rewards.data.records import RECORD_SUFFIXES, read_objects
from rewards.data.tables import LazyImage
from rewards.data.text import caption_fault, clean
from rewards.data.verdicts import number

logger = logging.getLogger(__name__)


def open_source(
    path: str,
    folder: Path,
    prompts: str | None = None,
    split: str | None = None,
    caption_column: str | None = None,
    image_root: Path | None = None,
) -> Source:
    """What ``path`` holds; an answers file in ``folder`` will name its pictures. Raises :class:`DataError` where that
    is neither a rollout, nor preferences, nor images."""
    place = locate(path)
    if (Path(place) / "rollout.json").is_file():
        return of_rollout(Path(place))
    if prompts is None:
        try:
            return replace(of_preferences(place, folder, split, caption_column, image_root), title=path)
        except DataError as error:
            refused = error
    try:
        return replace(of_images(place, folder, prompts, caption_column), title=path)
    except DataError as error:
        if prompts is not None or not Path(place).is_dir():
            raise error if prompts is not None else refused from error
        raise DataError(f"{error}; nor are these preferences: {refused}") from error


def of_rollout(path: Path) -> Source:
    """The pictures that ``align.rollout`` drew, under the names that its manifest gives them, with their scores."""
    rollout = RolloutFolder(path.expanduser().resolve()).read()
    folder, groups = rollout.folder.path, dict[int, list[Picture]]()
    for line in rollout.lines:
        picture = Picture(line.image, LazyImage(folder / line.image), scores=line.scores)
        groups.setdefault(line.prompt_index, []).append(picture)
    texts = {line.prompt_index: line.prompt for line in rollout.lines}
    items = [Item(texts[index], tuple(pictures)) for index, pictures in groups.items()]
    return Source(str(path), items, root=folder)


def of_preferences(
    path: str, folder: Path, split: str | None, caption_column: str | None, image_root: Path | None
) -> Source:
    """A preference set: its pairs with what it says of them, its pictures by prompt."""
    layout, _, rows, _ = recognise(path, split, caption_column, image_root)
    pairs, problems = list[Item](), list[str]()
    for row in rows:
        sides, fault = row.sides or row.tied, row.fault()
        if sides is None or fault or (fault := caption_fault(row.caption)):
            problems.append(f"{row.source}: {fault or row.unlabelled}")
            continue
        pictures = tuple(_picture(side, folder) for side in sides)
        pairs.append(Item(clean(str(row.caption)), pictures, (1.0, 0.0) if row.sides else (0.0, 0.0)))
    _tell(path, problems, "rows")
    if not pairs:
        raise DataError(f"{path} ({layout}) holds no pair that can be shown; the first: {(problems or ['nothing'])[0]}")
    every = ((pair.prompt, picture) for pair in pairs for picture in pair.pictures)
    logger.info("%s: %s", path, layout)
    return Source(path, _by_prompt(every), pairs)


def _picture(image: LazyImage, folder: Path) -> Picture:
    return Picture("" if image.table is not None else relative(image.file, folder), image)


def of_images(path: str, folder: Path, prompts: str | None, caption_column: str | None) -> Source:
    """Images with prompts; where folders within hold pictures of the same prompts, these are models."""
    source = open_input(path, prompts, caption_column)
    if source.total and not source.listed:
        raise DataError(f"{path} holds single images inside larger files; unpack them into a folder to choose between")
    place, problems, rows = Path(path).expanduser(), list[str](), list[tuple[str, str, Path]]()
    for row in source.listed:
        outside = place.is_dir() and not Path(os.path.abspath(place / row.file)).is_relative_to(place.absolute())
        fault = row.problem or ("lies outside the folder" if outside else "") or caption_fault(row.prompt or "")
        if fault or not isinstance(row.image, Path):
            problems.append(f"{row.file}: {fault or 'is no file of its own'}")
        else:
            rows.append((clean(str(row.prompt)), os.path.dirname(row.file), row.image))
    _tell(path, problems, "images")
    if not rows:
        first = f"; the first: {problems[0]}" if problems else ""
        raise DataError(f"{path} holds no image with a prompt{first}; name the prompts by --prompts FILE")
    parents: dict[str, set[str]] = {}
    for prompt, parent, _ in rows:
        parents.setdefault(prompt, set()).add(parent)
    models = any(len(each) > 1 for each in parents.values())
    if models and (alone := sum(len(each) == 1 for each in parents.values())):
        logger.warning(
            "%s: folders within are taken for models, since they hold pictures of the same prompts, and only those of "
            "different models are compared; %d of %d prompts have pictures in one folder alone",
            path, alone, len(parents),
        )  # fmt: skip
    every = [
        (prompt, Picture(relative(file, folder), LazyImage(file), (parent or ".") if models else ""))
        for prompt, parent, file in rows
    ]
    return Source(path, _by_prompt(every))


def of_models(drawn: Mapping[str, PictureFolder], folder: Path) -> Source:
    """Pictures that models are to draw of the same prompts and noise: the k-th of each is an item."""
    groups = [
        Item(wanted[0].prompt, tuple(_drawn(name, pictures, k, folder) for name, pictures in drawn.items()))
        for k, wanted in enumerate(zip(*(pictures.wanted for pictures in drawn.values()), strict=True))
    ]
    return Source(" against ".join(drawn), groups)


def _drawn(name: str, pictures: PictureFolder, k: int, folder: Path) -> Picture:
    return Picture(relative(pictures.file(k), folder), LazyImage(pictures.file(k)), name, awaited=True)


def _by_prompt(every: Iterable[tuple[str, Picture]]) -> list[Item]:
    """Distinct pictures of a prompt together; of several models, the k-th of each."""
    groups: dict[tuple[str, int], dict[str, Picture]] = {}
    counts: dict[tuple[str, str], int] = {}
    for prompt, picture in every:
        number = 0
        if picture.model:
            number = counts.get((prompt, picture.model), 0)
            counts[prompt, picture.model] = number + 1
        groups.setdefault((prompt, number), {}).setdefault(picture.place, picture)
    return [Item(prompt, tuple(pictures.values())) for (prompt, _), pictures in groups.items()]


def _tell(path: str, problems: Sequence[str], what: str) -> None:
    if problems:
        logger.warning("%s: %d %s are left out, the first: %s", path, len(problems), what, problems[0])


# Scores
def read_scores(path: Path) -> dict[str, dict[str, float]]:
    """{file: {reward: score}} from what ``rewards.score`` wrote, a folder or a table, or from JSONL or CSV with
    ``file`` (or ``image``) and a column for each reward. Raises :class:`DataError`."""
    if path.is_dir() or path.suffix == ".parquet":
        import pyarrow.parquet as pq

        try:
            rows = pq.read_table(path if path.is_file() else sorted(path.glob("scores-*.parquet"))).to_pylist()
        except (OSError, ValueError) as error:
            raise DataError(f"{path} holds no scores of python -m rewards.score: {error}") from error
    elif path.suffix.lower() in RECORD_SUFFIXES:
        rows = [row for _, row in read_objects(path)]
    else:
        raise DataError(f"{path} holds no scores; expected what python -m rewards.score wrote, JSONL or CSV")
    scores = {}
    for row in rows:
        values = {name: number(value) for name, value in row.items() if name not in ("row", "file", "image", "prompt")}
        scores[str(row.get("file", row.get("image")))] = {k: v for k, v in values.items() if v is not None}
    return scores


def with_scores(items: Sequence[Item], scores: Mapping[str, Mapping[str, float]], path: Path) -> list[Item]:
    """``items`` whose pictures have their ``scores``, by name, path, or file name where that is of one picture alone.
    Raises :class:`UserError` where none has."""
    names: dict[str, set[str]] = {}
    for item in items:
        for picture in item.pictures:
            names.setdefault(picture.image.file.name, set()).add(picture.place)

    def scored(picture: Picture) -> Picture:
        file = picture.image.file
        keys = [picture.name, str(file), f"{file.parent.name}/{file.name}"]
        keys += [file.name] if len(names[file.name]) == 1 else []
        found = next((scores[key] for key in keys if key in scores), None)
        return picture if found is None else replace(picture, scores={**picture.scores, **found})

    taken = [replace(item, pictures=tuple(map(scored, item.pictures))) for item in items]
    if not any(picture.scores for item in taken for picture in item.pictures):
        raise UserError(
            f"{path} has scores of {next(iter(scores), 'nothing')}, .., none of a picture that is shown here"
        )
    return taken


def with_rewards(items: Sequence[Item], rewards: Sequence[RewardConfig], device: str) -> list[Item]:
    """``items`` whose pictures these rewards have scored; NaN where one cannot be read."""
    from rewards.agree import score

    named = parse_rewards(rewards, weighted=False)
    places = {(picture.place, item.prompt): picture for item in items for picture in item.pictures}
    choices = Choices("pictures", [(picture.image, prompt) for (_, prompt), picture in places.items()], [], [], [], [])
    scores = score(choices, RewardSum.of(named, device), device, 32, 2, len(places))
    row = {place: number for number, place in enumerate(places)}

    def scored(picture: Picture, prompt: str) -> Picture:
        number = row[picture.place, prompt]
        return replace(picture, scores={**picture.scores, **{n: float(v[number]) for n, v in scores.items()}})

    return [replace(item, pictures=tuple(scored(one, item.prompt) for one in item.pictures)) for item in items]


def finite(scores: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in scores.items() if math.isfinite(value)}
