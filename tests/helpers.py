"""What tests share: runs by the real command, processes to kill, rewards, contexts, and a policy of one number."""

from __future__ import annotations

import faulthandler
import functools
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from html.parser import HTMLParser
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from align import families
from align.data.prompts import PromptBatch, PromptSet
from align.diffusion.kernels import Gaussian, Kernel, Step
from align.diffusion.process import Grid, Prediction
from align.families import LORA_FILE, Conditioning, Family
from align.objectives import Context, Objective
from align.objectives.online.rewards import Scorer
from align.objectives.rows import Rows
from align.policy.policy import LoRA, Policy
from align.sampling.trajectory import Trajectories
from tests.mould import Mould
from tests.pipelines import Build, tokenizers
from tests.test_policy import disturb

TEXTS = ["two red stars", "a star", "a blue circle left of a green square", "a red circle"]


HOSTILE = (  # captions and names that would like to be more than text
    "<script>alert(1)</script>",
    '"><img src=x onerror="alert(1)">',
    "[a star](javascript:alert(1)) {{ 7 * 7 }} {% raw %}",
    "../../a 'red' & `blue` | star *and* </figcaption>",
)


def texts_of(page: str) -> list[str]:
    """What a page says, once it is seen to hold our own tags and attributes only, and no image from elsewhere."""
    texts = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag in (
                "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "div", "table", "thead", "tbody",
                "tr", "th", "td", "main", "article", "figure", "img", "figcaption", "span", "b",
            )  # fmt: skip
            given = {name: value or "" for name, value in attrs}
            if tag == "img":
                assert given.keys() == {"src", "alt"} and given["src"].startswith("data:image/jpeg;base64,")
                texts.append(given["alt"])
            elif tag != "meta":
                assert given.keys() <= {"lang", "class", "scope"}

        def handle_data(self, data: str) -> None:
            texts.append(data)

    Reader().feed(page)
    return texts


# runs by the command
DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # libyaml's, where PyYAML was built with it


def write(config: dict[str, Any], **changes: Any) -> str:
    """The config as a file beside its run folder."""
    config = config | changes
    path = Path(config["output_dir"]).parent / f"{Path(config['output_dir']).name}.yaml"
    path.write_text(yaml.dump(config, Dumper=DUMPER))
    return str(path)


def weights(folder: str | Path) -> dict[str, Tensor]:
    return load_file(Path(folder) / LORA_FILE)


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def lines(folder: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def untimed(folder: str | Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "time"} for line in lines(folder)]


def contents(folder: str | Path) -> dict[str, bytes]:
    """Every file under ``folder``: what must be the same where nothing is to be written."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def errors(text: str) -> list[str]:
    """What a user is told: the lines of ``text`` that begin with ``error:``."""
    return [line for line in text.splitlines() if line.startswith("error:")]


def command(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """What a process of :func:`launch` does. With ``HOLD_IN`` in its environment it stands still in the midst of saving
    into a folder that this pattern fits, so that a kill surely falls there."""
    os.environ.update(environment)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    torch.set_num_threads(1)
    from align.train import main
    from align.training import checkpoint

    whole = checkpoint.write_text

    def held(path: Path, text: str) -> None:
        if fnmatch(path.parent.name, environment.get("HOLD_IN", "")):
            time.sleep(60)
        whole(path, text)

    checkpoint.write_text = held
    sys.exit(main(list(arguments)))


def launch(
    arguments: Sequence[str], target: Callable[[Sequence[str], Mapping[str, str]], None] = command, **environment: str
) -> ForkServerProcess:
    """``align.train``, or another command, in a process of its own, forked from one that has the imports done."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.preloaded"])
    process = server.Process(target=target, args=(list(arguments), environment), daemon=True)
    process.start()
    return process


def kill_when(process: ForkServerProcess, folder: Path, seen: str) -> None:
    """SIGKILL as soon as ``folder`` holds a file that the pattern ``seen`` fits."""
    deadline = time.monotonic() + 120
    while not any(folder.glob(seen)):
        assert process.is_alive(), f"the run ended with {process.exitcode} before {seen} was there"
        assert time.monotonic() < deadline, "the run never got there"
        time.sleep(0.0005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}


def launch_together(
    arguments: Sequence[str], world: int = 2, target: Callable[..., None] = command, **environment: str
) -> list[int | None]:
    """The command in ``world`` processes that meet over gloo, as accelerate's launcher starts them; exit codes."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    common |= environment
    common["OMP_NUM_THREADS"] = "1"  # or accelerate gives each process as many threads as there are cores
    running = [launch(arguments, target, RANK=str(k), LOCAL_RANK=str(k), **common) for k in range(world)]
    for process in running:
        process.join(120)
        if process.exitcode is None:  # say where it stands, which is seen nowhere else
            os.kill(process.pid or 0, signal.SIGUSR1)
            process.join(2)
    return [process.exitcode for process in running]


def online(pipeline: Path, folder: Path, objective: str, **arguments: Any) -> dict[str, Any]:
    """The config of a small online run: three prompts a rollout; twelve rows an update, which is all of a rollout for
    two pictures a prompt and two trained steps; brightness is the reward."""
    return {
        "pretrained_model_name_or_path": str(pipeline),
        "data": {"class_path": "Prompts", "init_args": {"path": "shapes-prompts", "limit": 8}},
        "objective": {"class_path": objective, "init_args": arguments},
        "rewards": [{"name": "tests.helpers.Bright", "label": "bright"}],
        "output_dir": str(folder / "run"),
        "lora": {"rank": 2},
        "rollout_batch_size": 3,
        "train_batch_size": 12,
        "max_train_steps": 4,
        "learning_rate": 1e-3,
        "checkpointing_steps": 0,
        "report_to": "none",
    }


# rewards
class Bright:
    """How bright a picture is: cheap, and never the same for two pictures."""

    differentiable = True

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        return images.mean((1, 2, 3))


class Flat(Bright):
    """The same for every picture."""

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        return torch.full((len(images),), 0.5)


class Even(Bright):
    """Of one pixel, which differs more than rounding does, for prompts of an even number of letters; the same for all
    other pictures."""

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        odd = torch.tensor([len(prompt) % 2 == 1 for prompt in prompts])
        return torch.where(odd, 0.5, images[:, :, 0, 0].mean(1))


class Broken(Bright):
    """Fails at the prompts that begin with ``a``."""

    def __init__(self, how: str) -> None:
        self.how = how

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        if self.how == "raise":
            raise ZeroDivisionError("somebody else's bug")
        return torch.tensor([float("nan") if prompt.startswith("a") else 1.0 for prompt in prompts])


def bright() -> Scorer:
    return Scorer({"bright": Bright()}, {"bright": 1.0})


# an objective without the loop
def moved(tiny: Build, kind: str, lora: LoRA | None = LoRA(2), scale: float = 0.1) -> Policy:
    """A tiny policy whose weights are not those of its reference."""
    mould, state = _moved(tiny, kind, lora, scale)
    torch.set_rng_state(state)
    policy: Policy = mould.copy()
    return policy


@functools.cache
def _moved(tiny: Build, kind: str, lora: LoRA | None, scale: float) -> tuple[Mould, Tensor]:
    torch.manual_seed(0)
    policy = Policy(tiny(kind), lora)
    disturb(policy, scale)
    return Mould(policy, tokenizers(policy.family.pipe)), torch.get_rng_state()


def prompted(policy: Policy, count: int = 2, first: int = 0) -> PromptBatch:
    return PromptSet(policy.family, [{"prompt": text} for text in TEXTS]).batch(range(first, first + count))


def rolled(
    objective: Objective, policy: Policy, prompts: int = 2, step: int = 0, scorer: Scorer | None = None
) -> tuple[Context, Rows]:
    """A rollout as the loop asks for it: context and table."""
    ctx = Context(policy, 0, step, range(prompts * objective.needs.group_size), scorer or bright())
    with torch.no_grad():
        return ctx, objective.rollout(ctx, prompted(policy, prompts))


def gradients(policy: Policy, loss: Tensor) -> Tensor:
    """The gradient of ``loss``, all parameters in one vector."""
    found = torch.autograd.grad(loss, policy.parameters(), allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


class Heard:
    """Listens at a policy's denoiser: for every call, its times, and whether it is for a backward pass."""

    def __init__(self, policy: Policy) -> None:
        self.calls: list[tuple[list[float], bool]] = []
        policy.denoiser.register_forward_pre_hook(self._hear, with_kwargs=True)

    def _hear(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        t = args[1] if len(args) > 1 else kwargs["timestep"]
        self.calls.append((t.tolist(), torch.is_grad_enabled()))

    def rows(self, trained: bool) -> int:
        """Network evaluations with (``trained``) or without a backward pass."""
        return sum(len(t) for t, grad in self.calls if grad == trained)

    def times(self, trained: bool) -> set[float]:
        return {value for t, grad in self.calls if grad == trained for value in t}


# the shortest policy there is
class Fixed(Kernel):
    """N(what the network says, std^2)."""

    def __init__(self, std: float) -> None:
        self.std = std

    def __call__(self, prediction: Prediction, grid: Grid, i: Step) -> Gaussian:
        return Gaussian(prediction.raw, torch.tensor(self.std, dtype=torch.float64))


class Toy:
    """x' ~ N(theta, std^2) whatever the state: policy and family in one, float64. ``anchor`` is the reference's."""

    device = torch.device("cpu")
    prediction_type = "flow_prediction"  # as its grid has it
    default_guidance_scale = 1.0
    cell = 1

    def __init__(self, theta: float | Tensor, anchor: float = 0.0) -> None:
        self.theta = torch.as_tensor(theta, dtype=torch.float64).clone().requires_grad_()
        self.anchor, self._off = torch.tensor(anchor, dtype=torch.float64), False

    @property
    def family(self) -> Toy:
        return self

    def grid(self, steps: int, *_size: int) -> Grid:
        t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        return Grid(t, 1 - t, t)

    def predict(self, x_t: Tensor, t: Tensor, cond: Conditioning, guidance_scale: float = 1.0) -> Prediction:
        raw = (self.anchor if self._off else self.theta).expand_as(x_t)
        return Prediction(raw, x_t, 1 - t, t, "flow_prediction")

    @contextmanager
    def reference(self) -> Iterator[None]:
        self._off = True
        yield
        self._off = False

    def context(self, count: int) -> Context:
        return Context(self, 0, 0, range(count))

    def trajectories(self, y: Tensor) -> Trajectories:
        """Those of a rollout of one step that drew ``y`` (N, D)."""
        latents = torch.stack([torch.zeros_like(y), y], 1)[..., None, None]
        cond = Conditioning({"c": torch.zeros(1, 1)})
        return Trajectories(latents, torch.zeros(1, dtype=torch.long), torch.zeros(len(y), dtype=torch.long), cond)


# whole runs
def prompt_file(folder: Path, texts: Sequence[str], name: str = "prompts") -> str:
    """A prompt file of ``texts``."""
    path = folder / f"{name}.txt"
    path.write_text("".join(f"{text}\n" for text in texts))
    return str(path)


def families_loaded(monkeypatch: Any) -> list[Family]:
    """The families that are loaded from now on, in order, also those that a run loads for itself."""
    found: list[Family] = []
    plain = families.load

    def load(*arguments: Any, **named: Any) -> Family:
        found.append(plain(*arguments, **named))
        return found[-1]

    monkeypatch.setattr(families, "load", load)
    return found


def everything(family: Family) -> dict[str, Tensor]:
    """Every parameter and buffer of a pipeline; without adapters' own."""
    return {
        f"{part}.{name.replace('.base_layer', '')}": tensor.clone()
        for part, module in family.pipe.components.items()
        if isinstance(module, nn.Module)
        for name, tensor in module.state_dict().items()
        if "lora_" not in name
    }
