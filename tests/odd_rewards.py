"""Rewards that do what they should not; a module of its own, since processes import it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor


class Odd:
    """A reward that does ``what``; each is what somebody's reward did."""

    differentiable: ClassVar[bool] = False
    needs_prompt: ClassVar[bool] = False

    def __init__(self, what: str = "", token: str | None = None, model: str | None = None) -> None:
        self.what, self.token = what, token
        if what.startswith("never "):
            {"never exit": sys.exit, "never break": lambda: {}["absent"]}[what]()
        elif what == "begin elsewhere":
            os.chdir("/")

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        mean = images.mean((1, 2, 3))
        if self.what == "write":
            images.zero_()
        elif self.what == "write numpy":
            images.numpy()[:] = 0
        elif self.what == "write texts":
            prompts[0] = "another"  # type: ignore[index]
            (metadata or [{}])[0].clear()  # type: ignore[attr-defined]
        elif self.what == "hang":
            time.sleep(3600)
        elif self.what == "spin":
            while True:
                pass
        results: dict[str, Any] = {
            "elsewhere": lambda: (os.chdir("/"), mean)[1],
            "exit": lambda: sys.exit(0),
            "quit": lambda: exit("bye"),
            "raise": lambda: {}["absent"],
            "raise lines": lambda: (_ for _ in ()).throw(RuntimeError("first\n" + "line\n" * 50)),
            "complex": lambda: torch.complex(mean, mean),
            "nan": lambda: mean * float("nan"),
            "infinite": lambda: mean / 0,
            "beyond float32": lambda: mean.double() * 0 + 1e300,
            "column": lambda: mean[:, None],
            "scalar": lambda: mean.mean(),
            "one more": lambda: torch.cat([mean, mean[:1]]),
            "sparse": lambda: mean.to_sparse(),
            "meta": lambda: mean.to("meta"),
            "number": lambda: 3,
            "list": lambda: mean.tolist(),
            "array": lambda: mean.numpy(),
            "nothing": lambda: None,
            "whole": lambda: (mean * 10).round().long(),
            "truth": lambda: mean > 0.5,
        }
        return results.get(self.what, lambda: mean)()


class Mode:
    """Tells in which mode of torch it is asked, and whether a gradient can go through."""

    differentiable: ClassVar[bool] = True
    concurrent: ClassVar[bool] = False

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        half = torch.is_autocast_enabled("cpu")
        return images.mean((1, 2, 3)) + 10.0 * half + 100.0 * torch.is_grad_enabled()


class Counts:
    """Reads of a prompt's metadata, GenEval's, how many objects it asks for; without any it fails."""

    differentiable: ClassVar[bool] = False

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        assert metadata is not None, "the metadata did not come along"
        return torch.tensor([float(row["include"][0]["count"]) for row in metadata])


class Letters:
    """How long the prompt is."""

    differentiable: ClassVar[bool] = False

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        return torch.tensor([float(len(prompt)) for prompt in prompts])


class Tired(Odd):
    """Brightness, and from the second batch on ``what``."""

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 1:
            return images.mean((1, 2, 3))
        return torch.full((len(images),), {"nan": torch.nan, "flat": 0.5}[self.what])
