"""Makes a CUDA build of torchvision importable beside a CPU-only torch."""

from __future__ import annotations

import importlib
import importlib.util
import sys

import torch

_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_library: torch.library.Library | None = None  # the operators live exactly as long as this object


def ensure() -> None:
    """Import torchvision where it is installed beside a CPU-only torch, repairing the one way in which that fails.

    Some package indices carry torchvision only as a CUDA build. Its compiled operators do not load without CUDA,
    and the Python code that then describes ``torchvision::nms`` to torch dies with "operator torchvision::nms does
    not exist" - and with it every package that imports torchvision: transformers, open_clip, timm. None of the
    scorers calls these operators, so declaring their names (without an implementation) is enough. A torch with
    CUDA, and a torchvision that imports, are left alone; any other error is raised as it is.
    """
    global _library
    if torch.version.cuda is not None or "torchvision" in sys.modules:
        return
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            _library.define(operator + _SIGNATURE)
        importlib.import_module("torchvision")
