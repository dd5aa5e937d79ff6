"""What the scorers that are networks share: where weights come from, and how a frozen network answers as a reward."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from rewards import RewardError

DTYPES = ("float32", "bfloat16", "float16")


class Network(nn.Module):
    """A frozen network behind :class:`rewards.Reward`.

    A subclass loads its weights in ``__init__``, ends it with :meth:`settle`, and defines
    ``forward(images, prompts) -> (B,)``. Gradients reach the images, never the weights.
    """

    differentiable: ClassVar[bool] = True
    needs_prompt: ClassVar[bool] = True

    def settle(self, device: str | None, dtype: str, *networks: nn.Module) -> None:
        """Freeze; put everything on ``device`` (default: CUDA where there is any) and ``networks`` into ``dtype``.

        What is not among ``networks``, small heads, stays float32: their arithmetic is the score itself.
        """
        if dtype not in DTYPES:
            raise RewardError(f"{type(self).__name__}: dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
        for network in networks:
            network.to(getattr(torch, dtype))
        self.eval().requires_grad_(False).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def concurrent(self) -> bool:
        """Whether scoring beside a sampler gains anything: not where both would share one GPU and its memory."""
        return self.device.type == "cpu"

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B,) float32 on the device of ``images``."""
        # a training loop's autocast must not change what a score is
        with torch.autocast(self.device.type, enabled=False):
            scores: Tensor = self(images.to(self.device), prompts)
        return scores.to(images.device, torch.float32)


@contextmanager
def loading(reward: str, source: str) -> Iterator[None]:
    """Whatever goes wrong while ``source`` is loaded becomes a :class:`RewardError` of one sentence."""
    try:
        yield
    except ImportError as error:
        raise RewardError(f"{reward} needs {error.name}: pip install 't2i-align[rewards]'") from error
    except Exception as error:  # every loader has exceptions of its own
        reason = re.split(r"[.!?:]\s", " ".join(str(error).split()), maxsplit=1)[0] or type(error).__name__
        raise RewardError(
            f"{reward}: {source!r} holds no checkpoint that fits ({reason}); expected a local folder or file, "
            "or a hub id that can be reached"
        ) from error


def find(source: str, name: str) -> Path:
    """The file ``name`` in the folder or hub repository ``source``, or ``source`` itself where that is a file.

    Where ``name`` is that of a torch file, as published, a .safetensors file of the same stem is taken first.
    """
    path = Path(source)
    names = dict.fromkeys((str(Path(name).with_suffix(".safetensors")), name))
    if path.is_file():
        return path
    if path.is_dir():
        if (found := next((path / one for one in names if (path / one).is_file()), None)) is None:
            raise FileNotFoundError(f"there is no {name} in it")
        return found
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    for one in names:
        try:
            return Path(hf_hub_download(source, one))
        except RemoteEntryNotFoundError:
            if one == name:
                raise
    raise FileNotFoundError(f"there is no {name} in it")


def read_weights(source: str, name: str) -> dict[str, Tensor]:
    """The state dict in the file that :func:`find` finds: safetensors, or a torch file as most scorers are published,
    of which tensors alone are taken (``weights_only``: nothing in it can run)."""
    path = find(source, name)
    if path.suffix == ".safetensors":
        return load_file(path)
    content = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError("it is no state dict")
    return dict(content)


def pretrained(cls: Any, source: str) -> Any:
    """A transformers model in float32; ``ValueError`` where any of its weights is not in the checkpoint."""
    model, report = cls.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):  # transformers only warns, and leaves them random
        raise ValueError(f"it lacks {len(missing)} weights of a {cls.__name__}, such as {missing[0]}")
    return model


def published_head(width: int) -> nn.Sequential:
    """The head that LAION's aesthetic predictor and ImageReward have in common: five linear maps, nothing between.

    The identities stand where training had dropout, so that the layers keep their numbers in the checkpoints.
    """
    return nn.Sequential(
        nn.Linear(width, 1024),
        nn.Identity(),
        nn.Linear(1024, 128),
        nn.Identity(),
        nn.Linear(128, 64),
        nn.Identity(),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )


def unit(features: Tensor) -> Tensor:
    """To length one, in float32 or finer."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
