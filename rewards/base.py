"""What a reward is, weighted sums of rewards, and loading one by name."""

from __future__ import annotations

import builtins
import importlib
import inspect
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import yaml
from torch import Tensor

from rewards.common.errors import RewardError, UserError

logger = logging.getLogger(__name__)

BUILT_IN: dict[str, str] = {
    "Aesthetic": "rewards.models.aesthetic.Aesthetic",
    "CLIPScore": "rewards.models.clip_score.CLIPScore",
    "EndpointJudge": "rewards.models.vlm_judge.EndpointJudge",
    "GenEval-style": "rewards.models.gen_eval.GenEvalStyle",
    "HPSv2": "rewards.models.hps.HPSv2",
    "HPSv3": "rewards.models.hpsv3.HPSv3",
    "ImageReward": "rewards.models.image_reward.ImageReward",
    "JPEGCompressibility": "rewards.models.jpeg.JPEGCompressibility",
    "JPEGIncompressibility": "rewards.models.jpeg.JPEGIncompressibility",
    "Judge": "rewards.models.vlm_judge.Judge",
    "MPS": "rewards.models.mps.MPS",
    "OCR": "rewards.models.ocr.OCR",
    "OpenNSFW": "rewards.models.safety.OpenNSFW",
    "PickScore": "rewards.models.pick_score.PickScore",
    "Remote": "rewards.models.remote.Remote",
    "Safety": "rewards.models.safety.Safety",
    "Shapes": "rewards.models.shapes.Shapes",
    "VQAScore": "rewards.models.vqa_score.VQAScore",
}
EXPECTED = "expected NAME, NAME:KEY=VALUE,KEY=VALUE or '{name: NAME, weight: 1, label: LABEL, args: {KEY: VALUE}}'"
_SLACK = 1e-3  # how far outside [0, 1] rounding may carry a pixel; a picture in [-1, 1] or [0, 255] goes further


@dataclass
class RewardConfig:
    """One reward as a user names it, on a command line or in YAML.

    Args:
        name: a built-in reward's name, or an import path.
        weight: in a weighted sum; 0 only watches it, so that hacking of the others shows.
        args: the reward's own arguments.
        label: its name in logs and columns; default ``name``.
        normalize: [mean, std] of its scores, measured beforehand: (score - mean) / std is what ``weight`` is of.
    """

    name: str
    weight: float = 1.0
    args: dict[str, Any] = field(default_factory=dict)
    label: str | None = None
    normalize: builtins.list[float] | None = None

    @property
    def title(self) -> str:
        """The label, or the name where there is none."""
        return self.label or self.name

    def settings(self) -> dict[str, Any]:
        """What may be written down: a token authorises, it changes no score."""
        return {"name": self.name, "args": {key: value for key, value in self.args.items() if key != "token"}}


def parse_reward(given: str | Mapping[str, Any]) -> RewardConfig:
    """``NAME``, ``NAME:KEY=VALUE,KEY=VALUE``, or YAML or a mapping with the fields of :class:`RewardConfig`.

    A VALUE is a YAML scalar without commas. ``RewardError`` where it is none of these.
    """
    content: Any = given
    try:
        if isinstance(given, str) and not given.lstrip().startswith("{"):
            name, _, rest = given.partition(":")
            args: dict[str, Any] = {}
            for item in rest.split(",") if rest else []:
                key, equals, value = item.partition("=")
                if not equals or not key.isidentifier() or key in args:
                    raise RewardError(f"--reward {given}: {item!r} is no KEY=VALUE of its own; {EXPECTED}")
                args[key] = yaml.safe_load(value)
            content = {"name": name, "args": args}
        elif isinstance(given, str):
            content = yaml.safe_load(given)
    except yaml.YAMLError as error:
        raise RewardError(f"--reward {given} is not YAML ({' '.join(str(error).split())}); {EXPECTED}") from error
    known = {one.name for one in fields(RewardConfig)}
    if not isinstance(content, Mapping) or set(content) - known:
        keys = f"the keys {', '.join(map(str, content))}" if isinstance(content, Mapping) else "no keys"
        raise RewardError(f"--reward {given} has {keys}; {EXPECTED}")
    config = {key: value for key, value in content.items() if value is not None}
    name, label, arguments, weight = (config.get(key, usual) for key, usual in _USUAL.items())
    good = isinstance(name, str) and name and isinstance(label, str) and isinstance(arguments, dict)
    if not good or isinstance(weight, bool) or not isinstance(weight, int | float) or content.get("label") == "":
        raise RewardError(f"--reward {given}: {EXPECTED}")
    return RewardConfig(**config)


_USUAL: dict[str, Any] = {"name": None, "label": "", "args": {}, "weight": 1.0}


def parse_rewards(given: Sequence[str | Mapping[str, Any]]) -> builtins.list[RewardConfig]:
    """:func:`parse_reward` of each; ``RewardError`` where two have the same label."""
    found = [parse_reward(one) for one in given]
    check_labels(found)
    for one in found:
        if one.title in ("file", "prompt"):
            raise RewardError(f"a reward cannot be called {one.title!r}, which is another column; give another label")
    return found


def check_labels(configs: Sequence[RewardConfig]) -> None:
    """``RewardError`` where two rewards have the same label."""
    labels = [one.title for one in configs]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise RewardError(
            f"two rewards are called {twice[0]!r}; give one a label of its own: '{{name: .., label: .., args: ..}}'"
        )


@runtime_checkable
class Reward(Protocol):
    """Scores images. ``differentiable`` (an attribute will do) says whether gradients flow from score to images."""

    @property
    def differentiable(self) -> bool: ...

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        """images (B, 3, H, W) float in [0, 1], one prompt and at most one metadata row each -> (B,) float32."""
        ...


def checked(
    reward: Reward,
    name: str,
    images: Tensor,
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]] | None = None,
) -> Tensor:
    """Call ``reward`` and make sure that both sides kept the contract: (B,) float32, on the device of ``images``.

    ``RewardError`` names the reward, what arrived and what was expected, and the row where there is one.
    """
    _check_input(name, images, prompts, metadata)
    scores = reward.score(images=images, prompts=prompts, metadata=metadata)
    if not isinstance(scores, Tensor) or scores.shape != (len(prompts),):
        arrived = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise RewardError(f"reward {name!r} returned {arrived}; expected a tensor of shape ({len(prompts)},)")
    finite = torch.isfinite(scores)
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise RewardError(
            f"reward {name!r} returned {scores[row].item()} for row {row} (prompt {prompts[row]!r}); "
            "expected a finite number",
            row=row,
        )
    return scores.to(images.device, torch.float32)


def _check_input(
    name: str, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None
) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
        raise RewardError(f"reward {name!r} got images of shape {tuple(images.shape)}; expected (B, 3, H, W), B > 0")
    if not images.is_floating_point():
        raise RewardError(f"reward {name!r} got {images.dtype} images; expected float in [0, 1]: divide by 255")
    if isinstance(prompts, str) or len(prompts) != len(images):
        arrived = "one string" if isinstance(prompts, str) else f"{len(prompts)} prompts"
        raise RewardError(f"reward {name!r} got {arrived} for {len(images)} images; expected one prompt per image")
    if metadata is not None and len(metadata) != len(images):
        raise RewardError(f"reward {name!r} got {len(metadata)} metadata rows for {len(images)} images")
    flat = images.detach().flatten(1)
    low, high = flat.amin(1), flat.amax(1)
    outside = ~((low >= -_SLACK) & (high <= 1 + _SLACK))  # written so that NaN counts as outside
    if outside.any():
        row = int(outside.nonzero()[0])
        raise RewardError(
            f"reward {name!r} got an image with values from {low[row].item():.4g} to {high[row].item():.4g} "
            f"in row {row}; expected [0, 1]",
            row=row,
        )


@dataclass
class RewardSum:
    """Weighted sum of rewards, itself a reward.

    Args:
        rewards: by name.
        weights: of what is summed; a reward that is not named has weight 1.
        normalize: how a reward is brought to a scale that can be summed with others'; one that is not named is taken as
            it is. ``(mean, std)``, measured beforehand (``summary.json`` of ``rewards.score`` has both), gives
            (score - mean) / std: an image's score is the same alone and in a batch. ``"batch"`` takes mean and standard
            deviation (over n) of the batch at hand, so by definition an image's score depends on its batch mates; it
            is 0 for an image alone, and where all scores are equal.
    """

    rewards: dict[str, Reward]
    weights: dict[str, float] | None = None
    normalize: dict[str, tuple[float, float] | Literal["batch"]] | None = None

    def __post_init__(self) -> None:
        if not self.rewards:
            raise RewardError("RewardSum got no rewards; expected at least one")
        if "total" in self.rewards:
            raise RewardError("RewardSum: 'total' is the name of the weighted sum; give that reward another name")
        for what, named in {"weights": self.weights, "normalize": self.normalize}.items():
            if unknown := sorted(set(named or {}) - set(self.rewards)):
                raise RewardError(f"RewardSum got {what} for {unknown}; the rewards are {sorted(self.rewards)}")
        for name, how in (self.normalize or {}).items():
            if how != "batch":
                check_statistics(name, how)

    @property
    def differentiable(self) -> bool:
        """Whether every reward is differentiable."""
        return all(reward.differentiable for reward in self.rewards.values())

    @property
    def needs_prompt(self) -> bool:
        """Whether any reward reads the prompt."""
        return any(needs_prompt(reward) for reward in self.rewards.values())

    def components(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> dict[str, Tensor]:
        """Every reward's own score by name, neither normalised nor weighted, and their weighted sum as ``"total"``;
        each (B,) float32."""
        scores = {name: checked(reward, name, images, prompts, metadata) for name, reward in self.rewards.items()}
        weights, normalize = self.weights or {}, self.normalize or {}
        parts = [weights.get(name, 1.0) * _normalized(score, normalize.get(name)) for name, score in scores.items()]
        return scores | {"total": torch.stack(parts).sum(0)}

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        """The weighted sum: (B,) float32."""
        return self.components(images=images, prompts=prompts, metadata=metadata)["total"]


def check_statistics(name: str, statistics: Sequence[float]) -> None:
    """``RewardError`` unless these are the mean and the standard deviation of the scores of the reward ``name``."""
    numbers = [value for value in statistics if isinstance(value, int | float) and math.isfinite(value)]
    if len(statistics) != 2 or len(numbers) != 2 or numbers[1] <= 0:
        raise RewardError(
            f"reward {name!r} is to be normalized by {statistics}; expected (mean, std), finite, std above 0"
        )


def _normalized(scores: Tensor, how: tuple[float, float] | Literal["batch"] | None) -> Tensor:
    if how is None:
        return scores
    if how != "batch":
        return (scores - how[0]) / how[1]
    exact = scores.double()  # in which the mean of equal float32 numbers is that number
    centred = exact - exact.mean()
    spread = centred.square().mean().sqrt()
    return (centred / spread if spread > 0 else centred).float()


def needs_prompt(reward: Reward) -> bool:
    """What the reward declares; one that declares nothing is taken to read the prompt."""
    return bool(getattr(reward, "needs_prompt", True))


def available() -> builtins.list[str]:
    """Names that :func:`load` knows."""
    return sorted(BUILT_IN)


list = available  # ``rewards.list()``; kept out of ``__all__``, where it would hide the built-in


def load_rewards(configs: Sequence[RewardConfig], device: str | None = None) -> dict[str, Reward]:
    """The rewards by label, networks on ``device``. ``RewardError`` says which one cannot be had, and why."""
    found = {}
    for one in configs:
        try:
            reward = load(one.name, one.args)
        except TypeError as error:  # what constructors say to a wrong argument
            raise RewardError(f"reward {one.title!r}: {error}") from error
        if device is not None and isinstance(reward, torch.nn.Module):
            reward.to(device)
        found[one.title] = reward
    return found


def load(name: str, init_args: Mapping[str, Any] | None = None) -> Reward:
    """A built-in reward by name ("Shapes"), or any other by import path ("package.module.Class").

    ``RewardError`` says which names there are, or what is wrong with the path, the arguments or the class.
    """
    module_name, _, class_name = BUILT_IN.get(name, name).rpartition(".")
    if not module_name:
        raise RewardError(f"unknown reward {name!r}; known are {', '.join(available())}, or package.module.Class")
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise RewardError(f"cannot load reward {name!r}: {error}; known are {', '.join(available())}") from error
    if not inspect.isclass(cls) or not callable(getattr(cls, "score", None)):
        raise RewardError(f"{name!r} is no reward: expected a class with a method 'score'")
    arguments = dict(init_args or {})
    signature = inspect.signature(cls)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise RewardError(f"reward {name!r}: {error}; its arguments are {signature}") from error
    try:
        reward = cls(**arguments)
    except UserError:
        raise
    except ValueError as error:
        raise RewardError(f"reward {name!r}: {error}") from error
    if not isinstance(reward, Reward):
        raise RewardError(f"{name!r} is no reward: it lacks the attribute 'differentiable'")
    return reward
