"""Public benches: what is drawn, how it is scored and what others have reported, a YAML file each in ``benches/``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from align.common.errors import UserError
from align.common.resolution import Resolution
from align.evaluation.intervals import Mean
from rewards.data.text import load_yaml


@dataclass(frozen=True)
class PromptList:
    """Where a bench's prompts come from; nothing of them is shipped. ``bytes`` and ``sha256`` are of the official file,
    ``files`` the SHA-256 of several in a folder, ``rows`` the prompts; None is not known to us. ``layout`` is how the
    files are read (:mod:`align.evaluation.bench_prompts`) where they are no plain records."""

    where: str
    licence: str
    column: str
    hub: str | None = None
    split: str | None = None
    layout: Literal["dpg", "oneig"] | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    rows: int | None = None
    bytes: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Protocol:
    """How a bench is drawn; None is the pipeline's own."""

    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    samples_per_prompt: int = 1
    resolution: Resolution = None


@dataclass(frozen=True)
class Published:
    """A figure that ``source`` reports of ``model``."""

    model: str
    reward: str
    value: float
    source: str


@dataclass(frozen=True)
class BenchSpec:
    """A bench. ``scale`` multiplies a reward's figures as its authors do; ``mean`` is over tasks or over prompts;
    ``canary`` is what the scorers have to heed: with the prompts (or their metadata) of other pictures, scores have to
    change. ``unlike`` says where our scorer is not the bench's, whatever it is run with."""

    name: str
    title: str
    about: str
    prompts: PromptList
    protocol: Protocol
    reward: Sequence[str | Mapping[str, Any]]
    canary: Literal["prompt", "metadata"]
    task_column: str | None = None
    mean: Mean = "tasks"
    unlike: Sequence[str] = ()
    scale: Mapping[str, float] = field(default_factory=dict)
    layout: Literal["geneval"] | None = None
    published: Sequence[Published] = ()


def names() -> list[str]:
    """The benches there are."""
    folder = files("align.evaluation").joinpath("benches")
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def load_spec(name: str) -> BenchSpec:
    """A bench by its name, or from a YAML file of the same keys. Raises :class:`UserError`."""
    if name in names():
        text = files("align.evaluation").joinpath("benches", f"{name}.yaml").read_text(encoding="utf-8")
    elif Path(name).suffix == ".yaml" and Path(name).is_file():
        text = Path(name).read_text(encoding="utf-8")
    else:
        raise UserError(f"there is no bench {name!r}; known are {', '.join(names())}, or a .yaml file of your own")
    try:
        raw = load_yaml(text)
        parts: dict[str, Any] = {
            "prompts": PromptList(**raw.pop("prompts")),
            "protocol": Protocol(**raw.pop("protocol")),
            "published": [Published(**row) for row in raw.pop("published", [])],
        }
        spec = BenchSpec(name=Path(name).stem, **parts, **raw)
        _require_kinds(spec)
        return spec
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"bench {name}: {' '.join(str(error).split())}; see {BenchSpec.__doc__}") from error


def _require_kinds(spec: BenchSpec) -> None:
    """Raise ValueError for a value of another kind than its key takes."""
    if isinstance(spec.reward, str) or not spec.reward:
        raise ValueError(f"reward is {spec.reward!r}; expected a list of rewards")
    choices: dict[str, tuple[str | None, ...]] = {
        "canary": ("prompt", "metadata"), "layout": (None, "geneval"), "mean": ("tasks", "prompts"),
        "prompts.layout": (None, "dpg", "oneig"),
    }  # fmt: skip
    given = {"canary": spec.canary, "layout": spec.layout, "mean": spec.mean, "prompts.layout": spec.prompts.layout}
    for key, known in choices.items():
        if given[key] not in known:
            raise ValueError(f"{key} is {given[key]!r}; expected {' or '.join(map(str, known))}")
    protocol = dataclasses.asdict(spec.protocol)
    numbers = {"scale": list(spec.scale.values()), "published": [row.value for row in spec.published]}
    numbers["protocol"] = [value for key, value in protocol.items() if value is not None and key != "resolution"]
    for key, values in numbers.items():
        if wrong := [value for value in values if isinstance(value, bool) or not isinstance(value, int | float)]:
            raise ValueError(f"{key} has {wrong[0]!r}; expected a number")
    for key in ("num_inference_steps", "samples_per_prompt"):
        if protocol[key] is not None and (not isinstance(protocol[key], int) or protocol[key] < 1):
            raise ValueError(f"protocol.{key} is {protocol[key]!r}; expected at least 1")


def differences(spec: BenchSpec, used: Mapping[str, Any]) -> list[str]:
    """Where what was ``used`` is not the bench's protocol."""
    official = dataclasses.asdict(spec.protocol)
    said = {None: "the pipeline's own"}
    return [
        f"{name} {said.get(used[name], used[name])}, {said.get(value, value)} in the bench"
        for name, value in official.items()
        if used[name] != value
    ]
