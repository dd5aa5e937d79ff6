"""How much a denoiser suffers from the loss of each block: leave-one-out on calibration trajectories.

For every unit that could go (:meth:`pruning.graph.BlockGraph.units`): the error of the denoiser's output without it on
the states that the full model went through, and the drop of a reward on images drawn without it (HierarchicalPrune's
contribution analysis, arXiv 2508.04663). For every block: how similar its output is to its input (SANA-1.5,
arXiv 2501.18427) and how long it takes. The full model draws every calibration trajectory once.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from align.common.errors import NonFinite, UserError
from align.diffusion.kernels import DDIM
from align.diffusion.process import Prediction
from align.families import Conditioning, Family
from align.sampling.loop import initial_noise, sample
from pruning.graph import BlockGraph, Streams
from pruning.plan import key
from rewards import RewardSum
from rewards.common.files import write_text

Measure = Literal["drop", "mse", "cosine"]
Profile = dict[str, Any]


@dataclass(frozen=True)
class Calibration:
    """What importance is measured on: image k, of ``prompts[k]``, starts from ``seed + k``; None is the pipeline's
    own."""

    prompts: Sequence[str]
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0
    batch_size: int = 8

    def of(self, family: Family) -> Calibration:
        """With the pipeline's own values in place of None."""
        guidance_scale = family.default_guidance_scale if self.guidance_scale is None else self.guidance_scale
        steps = self.num_inference_steps or family.default_num_inference_steps
        return replace(self, num_inference_steps=steps, guidance_scale=guidance_scale)


@torch.no_grad()
def profile(
    family: Family,
    calibration: Calibration,
    path: Path,
    units: Sequence[Sequence[str]] | None = None,
    reward: RewardSum | None = None,
) -> Profile:
    """Measure ``units`` (default: every whole block that can go); write and return the profile.

    With N prompts and T steps the full model is evaluated N*T times, and a unit N*T times on the full model's states;
    with a reward N*(T-1) times more, since its own trajectory begins with a state that was evaluated already.

    The file is written after the full model and after every unit. A run that finds one with the same settings goes on
    where it stopped, and its numbers are those of an uninterrupted run. It holds

    - ``settings``: what the numbers depend on;
    - ``full``: ``reward``, and ``seconds`` of one evaluation of a batch, the median;
    - ``blocks``: for every block and part ``position``, ``parameters``, ``seconds`` (its median share of that) and, for
      whole blocks that keep their width, ``cosine`` of the image stream in and out, mean over positions;
    - ``units``: ``mse`` in the network's own coordinate, ``reward``, and the ``drop`` of it.

    Raises :class:`UserError` for units that cannot go, no prompts, and a file with other settings.
    """
    graph, calibration = BlockGraph.of(family.denoiser), calibration.of(family)
    units = graph.units() if units is None else [tuple(unit) for unit in units]
    wrong = [text for unit in units for text in graph.check(unit)]
    wrong += [] if calibration.prompts else ["no prompts to calibrate on"]
    settings = {
        "model": family.source,
        "parameters": graph.parameters(),
        "dtype": str(family.denoiser.dtype),
        "prompts": list(calibration.prompts),
        "rewards": {name: (reward.weights or {}).get(name, 1.0) for name in reward.rewards} if reward else None,
        "steps": calibration.num_inference_steps,
        "guidance": calibration.guidance_scale,
        "seed": calibration.seed,
    }
    measured: Profile = read(path) if path.is_file() else {"settings": settings, "full": {}, "blocks": {}, "units": {}}
    if differ := [name for name, value in settings.items() if measured["settings"].get(name) != value]:
        wrong.append(f"{path} was measured with other {', '.join(differ)}; name another file or remove it")
    if wrong:
        raise UserError("profile: " + "; ".join(wrong))
    unmeasured = [unit for unit in units if key(unit) not in measured["units"]]
    if not unmeasured and measured["full"]:
        return measured

    trial = _Trial(family, graph, calibration, reward)
    full = trial.full()
    if not measured["full"]:  # a run that goes on keeps the times that it measured first
        measured |= full
        write_text(path, json.dumps(measured, indent=2) + "\n")
    for unit in tqdm(unmeasured, desc="importance", initial=len(units) - len(unmeasured), total=len(units)):
        with graph.skip(unit):
            mse, score = trial.without()
        if not math.isfinite(mse):
            raise NonFinite(f"without {key(unit)} the output is not finite; profile in bfloat16 or float32")
        drop = None if score is None else measured["full"]["reward"] - score
        measured["units"][key(unit)] = {"mse": mse, "reward": score, "drop": drop}
        write_text(path, json.dumps(measured, indent=2) + "\n")
    return measured


@dataclass
class _Trajectory:
    """A batch of prompts, and what the full model was given and gave at every step (on the CPU)."""

    prompts: Sequence[str]
    cond: Conditioning
    states: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


class _Trial:
    """The full model's trajectories, and what a changed denoiser makes of them."""

    def __init__(self, family: Family, graph: BlockGraph, calibration: Calibration, reward: RewardSum | None) -> None:
        self.family, self.graph, self.calibration, self.reward = family, graph, calibration, reward
        assert calibration.num_inference_steps is not None and calibration.guidance_scale is not None
        self.grid, self.guidance_scale = family.grid(calibration.num_inference_steps), calibration.guidance_scale
        self.trajectories: list[_Trajectory] = []

    def full(self) -> dict[str, Any]:
        """Run the full model once over every prompt; keep its states and outputs, return its own measurements."""
        family, calibration = self.family, self.calibration
        whole = [block.name for block in self.graph.blocks]
        everything = [b for w in self.graph.blocks for b in (w, *self.graph.components(w.name))]
        similar: dict[str, list[float]] = {}
        scores: list[Tensor] = []
        with (
            self.graph.tap(whole, before=True) as before,
            self.graph.tap(whole) as after,
            _stopwatch(family.denoiser, {b.name: b.modules for b in everything}) as times,
        ):
            for start in tqdm(range(0, len(calibration.prompts), calibration.batch_size), desc="full model"):
                prompts = calibration.prompts[start : start + calibration.batch_size]
                run = _Trajectory(prompts, family.encode(prompts))
                self.trajectories.append(run)

                def predict(
                    x_t: Tensor, t: Tensor, cond: Conditioning, guidance_scale: float, run: _Trajectory = run
                ) -> Prediction:
                    prediction = family.predict(x_t, t, cond, guidance_scale)
                    run.states.append(x_t.cpu())
                    run.outputs.append(prediction.raw.float().cpu())
                    for name in whole:
                        if (value := _cosine(before[name], after[name])) is not None:
                            similar.setdefault(name, []).append(value)
                    return prediction

                seeds = range(calibration.seed + start, calibration.seed + start + len(prompts))
                noise = initial_noise(family.latent_shape(), list(seeds)).to(family.device)
                scores += self._score(sample(predict, self.grid, run.cond, noise, self.guidance_scale), prompts)
        # shares of one and the same call: a machine that others use too does not run evenly from call to call
        total = median(times["denoiser"])
        blocks = {
            b.name: {
                "position": b.position,
                "parameters": b.parameters,
                "cosine": fmean(similar[b.name]) if b.name in similar else None,
                "seconds": total * median(t / d for t, d in zip(times[b.name], times["denoiser"], strict=True)),
            }
            for b in everything
        }
        return {"full": {"reward": _mean(scores), "seconds": total}, "blocks": blocks}

    def without(self) -> tuple[float, float | None]:
        """Output error of the denoiser as it now stands on the full model's states, and the reward of its images."""
        family, grid = self.family, self.grid
        errors: list[Tensor] = []
        scores: list[Tensor] = []
        for run in self.trajectories:
            first: Prediction | None = None
            for i, (state, output) in enumerate(zip(run.states, run.outputs, strict=True)):
                x = state.to(family.device)
                prediction = family.predict(x, grid.t[i].to(x.device).expand(len(x)), run.cond, self.guidance_scale)
                errors.append((prediction.raw.float().cpu() - output).square().flatten(1).mean(1))
                first = first or prediction
            if self.reward is not None and first is not None:
                begun, rest = DDIM()(first, grid, 0).mean, range(1, len(grid))
                x0 = sample(family.predict, grid, run.cond, begun, self.guidance_scale, steps=rest)
                scores += self._score(x0, run.prompts)
        return torch.cat(errors).double().mean().item(), _mean(scores)

    def _score(self, x0: Tensor, prompts: Sequence[str]) -> list[Tensor]:
        if self.reward is None:
            return []
        return [self.reward.score(images=self.family.to_image(x0).cpu(), prompts=prompts)]


def _mean(scores: Sequence[Tensor]) -> float | None:
    return torch.cat(list(scores)).double().mean().item() if scores else None


def _cosine(before: Streams, after: Streams) -> float | None:
    """Mean cosine of the image stream over positions; None where the block changes its shape."""
    x, y = before["hidden"].float(), after["hidden"].float()
    return F.cosine_similarity(x, y, dim=1 if x.ndim == 4 else -1).mean().item() if x.shape == y.shape else None


@contextmanager
def _stopwatch(denoiser: nn.Module, modules: Mapping[str, Sequence[str]]) -> Iterator[dict[str, list[float]]]:
    """Seconds of every call of the modules of each name, summed over its modules, and of the ``denoiser``'s."""
    device = next(denoiser.parameters()).device
    laps: dict[str, list[list[float]]] = {}

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def start(times: list[float], *_: Any) -> None:
        times.append(-now())

    def stop(times: list[float], *_: Any) -> None:
        times[-1] += now()

    seconds: dict[str, list[float]] = {}
    with ExitStack() as hooks:
        for name, paths in ({"denoiser": [""]} | dict(modules)).items():
            for path in paths:
                module, times = denoiser.get_submodule(path), list[float]()
                laps.setdefault(name, []).append(times)
                hooks.enter_context(module.register_forward_pre_hook(partial(start, times)))
                hooks.enter_context(module.register_forward_hook(partial(stop, times)))
        yield seconds
    seconds |= {name: [sum(lap) for lap in zip(*times, strict=True)] for name, times in laps.items()}


def read(path: Path) -> Profile:
    """A profile from its file; :class:`UserError` for anything else."""
    try:
        profile = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the profile {path}: {error}") from error
    if not isinstance(profile, dict) or profile.keys() != {"settings", "full", "blocks", "units"}:
        raise UserError(f"{path} is no profile: expected the keys settings, full, blocks and units")
    return profile


def scores(profile: Profile, measure: Measure = "drop") -> dict[str, float]:
    """The importance of every measured unit, larger is worse to lose, for :func:`pruning.plan.to_budget`.

    ``drop`` of the reward, ``mse`` of the output, or ``cosine``: 1 minus the similarity of the unit's least similar
    block. Raises :class:`UserError` where the profile does not have the measure for all units.
    """
    if measure == "cosine":
        similarities = {name: [profile["blocks"][n]["cosine"] for n in name.split("+")] for name in profile["units"]}
        values = {name: None if None in cosines else 1 - min(cosines) for name, cosines in similarities.items()}
    else:
        values = {name: entry[measure] for name, entry in profile["units"].items()}
    if missing := [name for name, value in values.items() if value is None]:
        why = "it was measured without a reward" if measure == "drop" else "they change their width or are parts"
        raise UserError(f"the profile has no {measure} of {', '.join(missing[:5])}: {why}; choose another measure")
    return {name: float(value) for name, value in values.items() if value is not None}


def seconds(profile: Profile) -> dict[str, float]:
    """The measured time of every block and part, and of the whole as ``denoiser``, for one batch."""
    return {name: entry["seconds"] for name, entry in profile["blocks"].items()} | {
        "denoiser": profile["full"]["seconds"]
    }
