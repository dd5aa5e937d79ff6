"""Makes a CUDA build of torchvision importable beside a CPU-only torch."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, FileFinder

import torch

_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_library: torch.library.Library | None = None  # the operators live exactly as long as this object


def ensure() -> None:
    """See to it that torchvision, where it is installed beside a CPU-only torch, can be imported.

    Some package indices carry torchvision only as a CUDA build. Its compiled operators do not load without CUDA,
    and the Python code that then describes ``torchvision::nms`` to torch dies with "operator torchvision::nms does
    not exist" - and with it every package that imports torchvision: transformers, open_clip, timm. None of the
    scorers calls these operators, so declaring their names (without an implementation) is enough.

    torchvision itself is not imported, which would bring torch's compiler along and take three seconds: whether its
    operators load is asked of their library, as torchvision will. A torch with CUDA is left alone.
    """
    global _library
    if torch.version.cuda is not None or "torchvision" in sys.modules or _library is not None:
        return
    package = importlib.util.find_spec("torchvision")
    if package is None or not package.submodule_search_locations:
        return
    finder = FileFinder(package.submodule_search_locations[0], (ExtensionFileLoader, EXTENSION_SUFFIXES))
    compiled = finder.find_spec("_C")
    try:
        if compiled is not None and compiled.origin is not None:
            torch.ops.load_library(compiled.origin)
            return
    except OSError:
        pass
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        _library.define(operator + _SIGNATURE)
