"""What a reward is, weighted sums of rewards, and loading one by name."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from rewards.common.errors import RewardError, RewardFailure, UserError, one_line, shortened
from rewards.config import RewardConfig, check_statistics, parse_rewards
from rewards.time_limit import TimeLimited

if TYPE_CHECKING:
    from typing_extensions import Self

BUILT_IN: dict[str, str] = {
    "Aesthetic": "rewards.models.aesthetic.Aesthetic",
    "BLIPVQA": "rewards.models.blip_vqa.BLIPVQA",
    "CLIPScore": "rewards.models.clip_score.CLIPScore",
    "ColorEntropy": "rewards.models.image_statistics.ColorEntropy",
    "DarkShare": "rewards.models.image_statistics.DarkShare",
    "EdgeDensity": "rewards.models.image_statistics.EdgeDensity",
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
    "QuestionGraph": "rewards.models.question_graph.QuestionGraph",
    "Remote": "rewards.models.remote.Remote",
    "Safety": "rewards.models.safety.Safety",
    "Shapes": "rewards.models.shapes.Shapes",
    "ShapesNet": "rewards.models.shapes_net.ShapesNet",
    "Sharpness": "rewards.models.image_statistics.Sharpness",
    "SoftTIFA": "rewards.models.soft_tifa.SoftTIFA",
    "VQAScore": "rewards.models.vqa_score.VQAScore",
    "WiScore": "rewards.models.wi_score.WiScore",
}
_SLACK = 1e-3  # how far outside [0, 1] rounding may carry a pixel; a picture in [-1, 1] or [0, 255] goes further


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


@contextlib.contextmanager
def _staying() -> Iterator[None]:
    """A reward that goes to another working directory, as some do for their files, does not take along a run, whose
    relative paths would lead elsewhere."""
    home = None
    with contextlib.suppress(OSError):  # the folder is gone
        home = os.getcwd()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if home is not None and os.getcwd() != home:
                os.chdir(home)


def checked(
    reward: Reward,
    name: str,
    images: Tensor,
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]] | None = None,
) -> Tensor:
    """Call ``reward`` and make sure that both sides kept the contract: (B,) float32, on the device of ``images``.

    The reward gets copies, so that one which writes into its images changes nobody else's, and the working directory is
    afterwards what it was. ``RewardError`` names the reward, what arrived and what was expected, and the row where
    there is one; it is a ``RewardFailure`` where the reward raised something else than a mistake of the user, or tried
    to end the process.
    """
    _check_input(name, images, prompts, metadata)
    copies = None if metadata is None else [dict(record) for record in metadata]
    try:
        with _staying():
            scores = reward.score(images=images.clone(), prompts=list(prompts), metadata=copies)
    except UserError:
        raise
    except SystemExit as error:  # which would end a run as if it had succeeded
        raise RewardFailure(f"reward {name!r} called sys.exit({error.code!r}); expected scores or an error") from error
    except Exception as error:  # anyone's reward may raise anything; say whose it was
        raise RewardFailure(f"reward {name!r} failed: {one_line(error)}") from error
    expected = f"expected a tensor of shape ({len(prompts)},)"
    if not isinstance(scores, Tensor):
        raise RewardError(f"reward {name!r} returned {type(scores).__name__}; {expected}")
    if scores.is_complex() or scores.layout != torch.strided or scores.is_quantized or scores.is_meta:
        kind = f"{scores.dtype}, {scores.device} {scores.layout}"
        raise RewardError(f"reward {name!r} returned {kind}; expected dense real numbers")
    if scores.shape != (len(prompts),):
        raise RewardError(f"reward {name!r} returned {tuple(scores.shape)}; {expected}")
    kept = scores.to(images.device, torch.float32)
    finite = torch.isfinite(kept)  # of what is kept: float32 has no room for 1e300
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise RewardError(
            f"reward {name!r} returned {scores[row].item()} for row {row} (prompt {prompts[row]!r}); "
            "expected a finite number",
            row=row,
        )
    return kept


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

    @classmethod
    def of(cls, configs: Sequence[RewardConfig], device: str | None = None) -> Self:
        """The rewards by label, networks on ``device``. ``RewardError`` says which cannot be had, and why."""
        rewards: dict[str, Reward] = {}
        for config in parse_rewards(configs):
            reward = load(config.name, config.arguments())
            if device is not None and isinstance(reward, torch.nn.Module):
                reward.to(device)
            limit = config.timeout
            rewards[config.title] = reward if limit is None else TimeLimited(reward, config.title, limit)
        normalize = {one.title: (one.normalize[0], one.normalize[1]) for one in configs if one.normalize is not None}
        return cls(rewards, {one.title: one.weight for one in configs}, dict(normalize))

    @property
    def differentiable(self) -> bool:
        """Whether every reward is differentiable."""
        return all(reward.differentiable for reward in self.rewards.values())

    @property
    def needs_prompt(self) -> bool:
        """Whether any reward reads the prompt."""
        return any(needs_prompt(reward) for reward in self.rewards.values())

    def scores(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> dict[str, Tensor]:
        """Every reward's own scores by name, neither normalized nor weighted: (B,) float32 each."""
        return {name: checked(reward, name, images, prompts, metadata) for name, reward in self.rewards.items()}

    def normalized(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``scores``, (B,) each, normalized where that is set."""
        return {name: _normalized(score, (self.normalize or {}).get(name)) for name, score in scores.items()}

    def total(self, scores: Mapping[str, Tensor]) -> Tensor:
        """(B,) the sum over the rewards in ``scores``: weight times score, normalized where that is set."""
        weights = self.weights or {}
        return functools.reduce(
            torch.add, [weights.get(name, 1.0) * score for name, score in self.normalized(scores).items()]
        )

    def components(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> dict[str, Tensor]:
        """:meth:`scores`, and their :meth:`total` as ``"total"``."""
        scores = self.scores(images=images, prompts=prompts, metadata=metadata)
        return scores | {"total": self.total(scores)}

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        """The weighted sum: (B,) float32."""
        return self.components(images=images, prompts=prompts, metadata=metadata)["total"]


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


def available() -> list[str]:
    """Names that :func:`load` knows."""
    return sorted(BUILT_IN)


@_staying()
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
    except (Exception, SystemExit) as error:  # anyone's module may do anything
        raise RewardFailure(f"cannot load reward {name!r}: {one_line(error)}") from error
    if not inspect.isclass(cls) or not callable(getattr(cls, "score", None)):
        raise RewardError(f"{name!r} is no reward: expected a class with a method 'score'")
    arguments = dict(init_args or {})
    signature = inspect.signature(cls)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise RewardError(f"reward {name!r}: {error}; its arguments are {signature}") from error
    try:
        reward: Any = cls(**arguments)
        sound = isinstance(reward, Reward)
    except UserError:
        raise
    except (TypeError, ValueError) as error:  # what constructors say to a wrong argument
        raise RewardError(f"reward {name!r}: {shortened(str(error), 400)}") from error
    except (Exception, SystemExit) as error:
        raise RewardFailure(f"reward {name!r} cannot be made: {one_line(error)}") from error
    if not sound:
        raise RewardError(f"{name!r} is no reward: it lacks the attribute 'differentiable'")
    return reward
