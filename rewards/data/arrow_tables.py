"""Tables of the `datasets` library: saved to disk, or from the hub."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewards.common.errors import DataError
from rewards.data.hub_files import not_there
from rewards.data.tables import VALUES, Table, columns_of, text_columns

logger = logging.getLogger(__name__)

WHOLE = "train"  # the split that `datasets` takes a file or folder for which names none


@dataclass(frozen=True)
class Spread:
    """A table whose lists of images are columns of their own, ``name[0]``, ``name[1]``, .."""

    table: Table
    name: str

    def record(self, row: int) -> dict[str, Any]:
        images = self.table.record(row)[self.name]
        return {f"{self.name}[{place}]": image for place, image in enumerate(images)}


class ArrowTable:
    """A split of a `datasets` data set, memory-mapped by that library; images stay undecoded."""

    def __init__(self, dataset: Any, split: str) -> None:
        self.dataset, self.split = dataset, split
        self.names: list[str] = list(dataset.column_names)
        self.files = [Path(part["filename"]) for part in dataset.cache_files]
        self.texts, self.problems = text_columns(dataset.features.arrow_schema), dict[int, str]()
        self._selected = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def fingerprint(self) -> str:
        return str(self.dataset._fingerprint)

    def select(self, images: Sequence[str], others: bool) -> None:
        from datasets import Image as Encoded

        columns = columns_of(self.dataset.features.arrow_schema, self.names, images, others)
        self._selected = self.dataset.select_columns(columns)
        for name in images:
            if isinstance(self.dataset.features[name], Encoded):
                self._selected = self._selected.cast_column(name, Encoded(decode=False))

    def column(self, name: str, limit: int | None = None) -> list[Any]:
        return list(self.dataset.select_columns([name])[:limit][name])

    def values(self, name: str) -> Iterator[Any]:
        for batch in self.dataset.select_columns([name]).iter(VALUES):
            yield from batch[name]

    def home(self, row: int) -> Path:
        return self.files[0] if self.files else Path()

    def where(self, row: int) -> str:
        return f"{self.home(row)} row {row}"

    def record(self, row: int) -> dict[str, Any]:
        return dict(self._selected[row])


def is_saved(folder: Path) -> bool:
    """Whether ``datasets`` wrote ``folder`` with ``save_to_disk``."""
    return any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json"))


def saved_table(folder: Path, split: str | None) -> ArrowTable:
    """What ``datasets`` wrote with ``save_to_disk``. ``DataError`` where it has several splits and none is named."""
    from datasets import DatasetDict, load_from_disk

    dataset = load_from_disk(str(folder))
    splits = dict(dataset) if isinstance(dataset, DatasetDict) else {str(dataset.split or WHOLE): dataset}
    if split is None and len(splits) == 1:
        split = next(iter(splits))
    if split not in splits:
        raise DataError(f"{folder} holds the splits {sorted(map(str, splits))}; say which with split, not {split!r}")
    return ArrowTable(splits[split], str(split))


def is_hub_id(name: str) -> bool:
    """Whether ``name`` can be the id of a data set on the hub, and no mistyped file."""
    files = (".parquet", ".json", ".jsonl", ".csv", ".tsv", ".txt")
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)) and not name.endswith(files)


def hub_table(name: str, split: str | None) -> ArrowTable:
    """A data set of the hub, by default its split train."""
    from datasets import load_dataset

    split = split or WHOLE
    logger.info("%s is no file or folder here; asking the hub for it", name)
    try:
        return ArrowTable(load_dataset(name, split=split), split)
    except (OSError, ValueError, RuntimeError) as error:  # not found, no network, no such split, needs code to run
        raise not_there(name, f"a hub data set of split {split}", error) from error
