"""Folders of shards, each whole or not there: a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from align.common.errors import DataError
from align.data.dataset import Setup
from align.data.mapped_files import MappedFiles
from rewards.common.files import atomic

logger = logging.getLogger(__name__)

FORMAT = 4  # raise it when the same inputs would give other files


class Shards:
    """Files of ``size`` rows each, in a folder that is named by what they depend on."""

    def __init__(self, home: Path, stem: str, count: int, size: int, depends: dict[str, object]) -> None:
        self.count, self.size = count, size
        self.key = hashlib.sha256(json.dumps({"format": FORMAT} | depends, sort_keys=True).encode()).hexdigest()
        self.folder = home / self.key[:24]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.stem, self.number = stem, -(-count // size)
        self._tensors = MappedFiles()

    def file(self, number: int) -> Path:
        return self.folder / f"{self.stem}-{number:05d}.safetensors"

    def span(self, number: int) -> slice:
        """The rows that belong in a shard."""
        return slice(number * self.size, min((number + 1) * self.size, self.count))

    def todo(self, setup: Setup) -> list[int]:
        """This process's share of the shards, a stretch of them so that sources are read forward, less what
        is there."""
        share = range(*(self.number * (setup.process_index + k) // setup.num_processes for k in (0, 1)))
        return [number for number in share if self.header(number) is None]

    def save(self, number: int, tensors: dict[str, Tensor], **header: object) -> None:
        """Write a shard whole or not at all; ``header`` is what it says of itself beside its key."""
        with atomic(self.file(number)) as draft:
            metadata = {name: json.dumps(value) for name, value in ({"key": self.key} | header).items()}
            save_file(tensors, draft, metadata=metadata)

    def require(self, number: int) -> dict[str, Any]:
        """What a shard says of itself; :class:`DataError` where it is not there."""
        if (header := self.header(number)) is None:
            raise DataError(f"{self.file(number)} is not there or not whole; all processes must share cache_dir")
        return header

    def tensors(self, number: int) -> dict[str, Tensor]:
        """The tensors of a shard; a batch reads only its own rows of them."""
        return self._tensors[self.file(number)]

    def header(self, number: int) -> dict[str, Any] | None:
        """None when a shard is missing, damaged or another's, and must be made again."""
        file = self.file(number)
        try:
            with safe_open(file, framework="pt") as opened:
                header = {name: json.loads(text) for name, text in (opened.metadata() or {}).items()}
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, json.JSONDecodeError) as error:
            logger.warning("%s is damaged (%s) and will be encoded again", file, error)
            return None
        if header.get("key") != self.key:
            logger.warning("%s belongs to other data and will be encoded again", file)
            return None
        return header
