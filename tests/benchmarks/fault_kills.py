"""Runs that are killed at random moments and started again until they end: what they leave has to be what a run leaves
that nobody killed.

A job is killed and started again up to four times in one folder, then left to end; that is a chain, and chains are made
until there are kills enough. Moments are uniform over the time that the whole run takes, keyed by (seed, job, chain).
"""

from __future__ import annotations

import json
import math
import random
import shutil
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from align.training.preemption import STATUS
from tests.benchmarks import forked
from tests.benchmarks.fault_cases import CAPTIONS, MODEL, Place, Shared, changed, png, settings
from tests.helpers import Bright

KILLS_OF_A_CHAIN = 4
TERMINATED = (STATUS, -signal.SIGTERM, 0)  # a run that has a SIGTERM saves and says so, once it has begun
PATIENCE = 120.0  # seconds for a run of one or two to end
TOGETHER = 15.0  # seconds after which a process of a group follows one that ended badly, as under a launcher


class Slow(Bright):
    """Brightness, which takes its time."""

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        time.sleep(0.02)
        return super().score(images=images, prompts=prompts)


@dataclass(frozen=True)
class Job:
    """A run: its command, its settings for a folder, what of it has to be the same, and on how many processes."""

    command: str
    words: Callable[[Path], list[str]]
    result: Callable[[Path], Any]
    processes: int = 1
    share: float = 1.0  # of the kills


# the jobs
def tensors(*patterns: str) -> Callable[[Path], dict[str, bytes]]:
    """The bytes of all tensors in the files that match."""

    def read(folder: Path) -> dict[str, bytes]:
        return {
            f"{file.relative_to(folder)}:{name}": tensor.contiguous().view(torch.uint8).numpy().tobytes()
            for pattern in patterns
            for file in sorted(folder.glob(pattern))
            for name, tensor in load_file(file).items()
        }

    return read


def weights_and_metrics(folder: Path) -> Any:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in line.items() if not k.startswith("time")} for line in lines]
    return tensors("out/*.safetensors")(folder.parent), json.dumps(metrics)


def rows(folder: Path) -> Any:
    return [pq.read_table(file).to_pydict() for file in sorted(folder.glob("scores-*.parquet"))]


def small_pipelines(folder: Path) -> Any:
    """The pipelines that compress leaves, and what its plan drops."""
    plan = json.loads((folder / "plan.json").read_text())
    return tensors("pruned/**/*.safetensors", "healed/**/*.safetensors", "int4*/**/*.safetensors")(folder), plan


def jobs(shared: Shared) -> dict[str, Job]:
    """What is killed, by name."""
    saving = {"max_train_steps": 16, "checkpointing_steps": 3, "checkpoints_total_limit": 2}

    def configured(base: str, changes: Mapping[str, Any]) -> Callable[[Path], list[str]]:
        def words(folder: Path) -> list[str]:
            values = changed(settings(base, Place(folder, shared)), changes)
            (folder / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
            return ["--config", str(folder / "config.yaml")]

        return words

    def training(base: str, processes: int = 1, share: float = 1.0, **changes: Any) -> Job:
        own = {**saving, "resume_from_checkpoint": "latest", "ema_decay": 0.9, "lr_scheduler": "cosine", **changes}
        return Job("align.train", configured(base, own), weights_and_metrics, processes, share)

    def online(name: str, processes: int = 1, share: float = 1.0, **arguments: Any) -> Job:
        objective = {"class_path": name, "init_args": {"sampler": {"num_inference_steps": 2}, **arguments}}
        more = {"objective": objective, "train_batch_size": 6, "ema_decay": 0.0 if name == "FIND" else 0.9}
        return training("online", processes, share, **more)

    many = shared.root / "many.parquet"
    pairs = [
        {"caption": CAPTIONS[k % 5], "jpg_0": png(k % 90), "jpg_1": png(k % 90 + 1 + k % 7)}
        | {"label_0": k % 2, "label_1": 1 - k % 2}
        for k in range(1200)
    ]
    pq.write_table(pa.Table.from_pylist(pairs), many)
    images = shared.root / "many"
    images.mkdir()
    for k in range(240):
        (images / f"{k}.png").write_bytes(png(k % 90))
    (images / "metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": f"{k}.png", "text": f"{CAPTIONS[k % 5]} {k}"}) + "\n" for k in range(240))
    )
    heal = shared.root / "heal.yaml"
    heal.write_text(yaml.safe_dump(healing(shared["prompts.txt"])))
    encoded = {"data.init_args.path": str(many), "max_train_steps": 1, "checkpointing_steps": 0}
    scored = ["--reward", f"{__name__}.Slow", "--shard_size", "12", "--batch_size", "4", "--threads", "1"]
    compress = {"components": True, "blocks": None, "budget": {"parameters": 0.2}}
    return {
        "DPO": training("train"),
        "PolicyGradient": online("PolicyGradient", images_per_prompt=2),
        "D3PO": online("D3PO"),
        "FIND": online("FIND", images_per_prompt=2, replay=8),
        "DPO, two processes": training("train", 2, 0.5, train_batch_size=2),
        "PolicyGradient, two processes": online("PolicyGradient", 2, 0.5, images_per_prompt=2),
        "encoding": Job(
            "align.train", configured("train", encoded | {"resume_from_checkpoint": "latest"}),
            lambda folder: (tensors("cache/**/*.safetensors")(folder.parent), weights_and_metrics(folder)),
        ),
        "rewards.score": Job(
            "rewards.score", lambda folder: [str(images), "--output", str(folder / "out"), *scored], rows
        ),
        "healing": Job(
            "pruning.compress",
            configured("compress", {"heal": str(heal), "stages": ["analyze", "plan", "remove", "heal"]}),
            small_pipelines,
        ),
        "pruning.compress": Job("pruning.compress", configured("compress", compress), small_pipelines),
    }  # fmt: skip


def healing(prompts: Path) -> dict[str, Any]:
    """The config of a small run that heals."""
    arguments = {
        "teacher": {"path": "filled in"}, "plan_path": "filled in", "profile": "filled in",
        "sampler": {"num_inference_steps": 2, "guidance_scale": 1},
    }  # fmt: skip
    return {
        "objective": {"class_path": "pruning.distill.Heal", "init_args": arguments},
        "data": {"class_path": "Prompts", "init_args": {"path": str(prompts)}},
        MODEL: "filled in", "lora": None, "rollout_batch_size": 2, "train_batch_size": 4, "max_train_steps": 12,
        "checkpointing_steps": 3, "checkpoints_total_limit": 1, "learning_rate": 1e-3, "report_to": "none",
    }  # fmt: skip


# processes
class Group:
    """The processes of one start of a job."""

    def __init__(self, job: Job, folder: Path) -> None:
        self.errors = folder / "stderr"
        self.errors.unlink(missing_ok=True)
        environment: dict[str, str] = {}
        if job.processes > 1:
            with socket.socket() as one:
                one.bind(("127.0.0.1", 0))
                port = str(one.getsockname()[1])
            common = {"WORLD_SIZE": str(job.processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = common | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}  # or accelerate takes more
        words = [job.command, *job.words(folder)]
        ranks = [{"RANK": str(k), "LOCAL_RANK": str(k)} if environment else {} for k in range(job.processes)]
        self.processes = [forked.Started(words, folder, self.errors, **environment, **rank) for rank in ranks]

    @property
    def statuses(self) -> list[int | None]:
        return [process.status for process in self.processes]

    def ended(self) -> bool:
        return None not in self.statuses

    def wait(self, patience: float) -> None:
        """Until all have ended, as a launcher waits: where one ends badly the others are ended a while later. What has
        not ended after ``patience`` seconds is killed."""
        end, told = time.monotonic() + patience, False
        while not self.ended() and time.monotonic() < end:
            if any(self.statuses) and not told:
                end, told = min(end, time.monotonic() + TOGETHER), True
            time.sleep(0.005)
        for process in self.processes:
            process.kill()

    def said(self) -> str:
        lines = self.errors.read_text(errors="replace").splitlines() if self.errors.exists() else []
        return "\n".join(lines[-4:])


@dataclass
class Tally:
    """What became of the kills of one job."""

    seconds: float
    kills: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)  # of what had a SIGTERM
    chains: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)

    def json(self) -> dict[str, Any]:
        return {
            "seconds": round(self.seconds, 1), "SIGKILL": self.kills["SIGKILL"], "SIGTERM": self.kills["SIGTERM"],
            "statuses": dict(self.statuses), "chains": self.chains, "failures": self.failures,
        }  # fmt: skip


def chain(job: Job, root: Path, moments: random.Random, tally: Tally, expected: Any, most: int) -> None:
    """Kill and start again, ``most`` times at most, then let it end and look at what it leaves."""
    root.mkdir()
    history, failure = list[str](), ""
    for _ in range(most):
        group = Group(job, root)
        moment, term = moments.uniform(0, tally.seconds), moments.random() < 0.5
        time.sleep(moment)
        if group.ended():
            break
        victims = [moments.choice(group.processes)] if moments.random() < 0.5 else group.processes
        name = "SIGTERM" if term else "SIGKILL"
        for victim in victims:
            victim.signal(signal.SIGTERM if term else signal.SIGKILL)
        group.wait(PATIENCE)
        history.append(f"{name} after {moment:.2f} s: {group.statuses}")
        if all(status == 0 for status in group.statuses):
            break  # it was over before it heard
        tally.kills[name] += 1
        if term:
            tally.statuses[", ".join(sorted({str(status) for status in group.statuses}))] += 1
            # of several, one that has not heard the signal ends for want of the other
            if job.command == "align.train" and job.processes == 1 and group.statuses[0] not in TERMINATED:
                failure = f"{name} gave {group.statuses}"
    else:
        group = Group(job, root)
    group.wait(PATIENCE)
    tally.chains += 1
    if failure:
        pass  # seen on the way
    elif any(group.statuses):
        failure = f"ended with {group.statuses}"
    elif job.result(root / "out") != expected:
        failure = "another result"
    elif drafts := sorted(str(path.relative_to(root)) for path in root.rglob(".*.tmp")):
        failure = f"drafts are left: {', '.join(drafts)}"
    if failure:
        tally.failures.append({"what": failure, "history": history, "stderr": group.said()})
    else:
        shutil.rmtree(root)


def measure(shared: Shared, root: Path, total: int, seed: int, workers: int) -> dict[str, Any]:
    """Kill every job until there were ``total`` kills; what became of them, by job."""
    known, tallies = jobs(shared), dict[str, Tally]()
    shares = sum(job.share for job in known.values())
    lock, begin = threading.Lock(), time.monotonic()

    def one(name: str) -> None:
        job, folder = known[name], root / name.replace(" ", "-")
        folder.mkdir()
        (folder / "whole").mkdir()
        start = time.monotonic()
        group = Group(job, folder / "whole")
        group.wait(PATIENCE)
        tally = tallies[name] = Tally(time.monotonic() - start)
        if any(group.statuses):
            tally.failures.append({"what": f"unkilled it ended with {group.statuses}", "stderr": group.said()})
            return
        expected = job.result(folder / "whole/out")
        wanted, number = math.ceil(total * job.share / shares), 0
        while (done := sum(tally.kills.values())) < wanted and number < 10 * wanted and len(tally.failures) < 10:
            moments = random.Random(f"{seed}/{name}/{number}")
            chain(job, folder / str(number), moments, tally, expected, min(KILLS_OF_A_CHAIN, wanted - done))
            number += 1
        with lock:
            print(json.dumps({"job": name} | {k: v for k, v in tally.json().items() if k != "failures"}), flush=True)
            for failure in tally.failures:
                print(json.dumps(failure), flush=True)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, known))
    seconds = round(time.monotonic() - begin)
    return {"seed": seed, "seconds": seconds, "jobs": {name: tallies[name].json() for name in known}}
