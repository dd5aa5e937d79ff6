"""Files of tensors that are read where they lie."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from align.common.errors import DataError


class MappedFiles:
    """The tensors of safetensors files, each mapped when first asked for; pages come when touched."""

    def __init__(self) -> None:
        self._mapped: dict[Path, tuple[int, dict[str, Tensor]]] = {}

    def __getitem__(self, file: Path) -> dict[str, Tensor]:
        """Raises :class:`DataError` where the file was cut since: touching what is gone would kill the process."""
        size = file.stat().st_size if file.exists() else None  # one that was removed stays as long as it is mapped
        if file not in self._mapped:
            self._mapped[file] = size or 0, load_file(file)
        if size is not None and size < self._mapped[file][0]:
            raise DataError(f"{file} was cut while it was read; remove it and start again, which makes it anew")
        return self._mapped[file][1]
