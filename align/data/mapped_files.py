"""Files of tensors that are read where they lie."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from align.common.errors import DataError

MAPPED = 4096  # files at a time; a system allows a process some 65,000


class MappedFiles:
    """The tensors of safetensors files, each mapped when it is asked for, and the last :data:`MAPPED` of them kept;
    pages come when touched."""

    def __init__(self) -> None:
        self._mapped: OrderedDict[Path, tuple[int, dict[str, Tensor]]] = OrderedDict()

    def __getitem__(self, file: Path) -> dict[str, Tensor]:
        """Raises :class:`DataError` where the file was cut since: touching what is gone would kill the process."""
        if file not in self._mapped:
            self._mapped[file] = file.stat().st_size, load_file(file)
            if len(self._mapped) > MAPPED:
                self._mapped.popitem(last=False)
        self._mapped.move_to_end(file)
        whole, tensors = self._mapped[file]
        with contextlib.suppress(FileNotFoundError):  # one that was removed stays as long as it is mapped
            if file.stat().st_size < whole:
                raise DataError(f"{file} was cut while it was read; remove it and start again, which makes it anew")
        return tensors
