"""A step of ours beside the same step of the repositories that people train by: user CPU seconds and peak memory.

    git clone https://github.com/huggingface/diffusers; git clone https://github.com/kvablack/ddpo-pytorch
    git clone https://github.com/yifan123/flow_grpo
    python tests/benchmarks/peers.py diffusers ddpo-pytorch flow_grpo          # writes results/peers.json
    python tests/benchmarks/peers.py diffusers --quick                         # one short run; only printed

Takes checkouts, of which nothing is copied, and knows them by their files. Their scripts run as they are, ours is
``python -m align.train``, both in processes of their own, in turn, on one thread, with the torch, diffusers, peft and
accelerate that are installed, in float32. What their scripts ask for beside is put in its place by
:mod:`tests.benchmarks.peer_runs`: wandb and inflect, absl's flags (the settings are those of their ``config/base.py``
with the changes below), and for ddpo-pytorch the LoRA of diffusers 0.17.

A hook at every optimizer step, the same on both sides, reads the process's user CPU time; a figure is what passes from
the end of one iteration to the end of another some later, by their number. Start-up, encoding our cache and the first
iterations are not in it; ``whole`` has all of the process. Peak memory is the process's resident memory, libraries and
start-up with it. What either does a step:

- ``diffusers``, ``train_diffusion_dpo.py``, shapes-sd, rank 16 on the same four layers, batches of 16 pairs of 256,
  AdamW, clipping, loss logged each step. It decodes, encodes by VAE and text encoder at every step, which is what it
  is; we read these from the cache, which ``whole`` has the making of. Both then pass 32 rows through the reference and
  the policy, and back.
- ``ddpo-pytorch``, ``scripts/train.py``, shapes-sd, rank 4 (theirs). An iteration draws 32 pictures in 10 guided steps,
  16 at once, scores each JPEG's size, and trains on every step of every picture once, 16 guided rows at once, forward
  and back: two optimizer steps of 160 rows. Both normalise by prompt with a history of 16 scores.
- ``flow_grpo``, ``scripts/train_sd3.py``, shapes-sd3, rank 32, alpha 64 on the same eight layers, no KL. As above with
  16 pictures of 2 prompts, 8 at once, 9 of the 10 steps trained (``timestep_fraction`` 0.99): two optimizer steps of 72
  rows. Its captions are cut at the 12 tokens that shapes-sd3's CLIP has, as ours are. Its T5 is absent, and stands
  there with 128 zero tokens, where we have one that counts for 256; ``flow_grpo, one T5 token`` is the same but for
  those.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
SHAPES = ROOT / "align/shapes"
CHILD = Path(__file__).with_name("peer_runs.py")
PAIRS = 256


@dataclass(frozen=True)
class Peer:
    """A repository's script, and how it and ours are told to do the same.

    ``theirs`` and ``ours`` are command lines, ``settings`` changes to their config; ``{work}`` is a folder of the run.
    An iteration has ``updates`` optimizer steps; ``warm`` iterations come before those that count.
    """

    name: str
    script: str  # in its checkout
    updates: int
    warm: int
    counted: int
    ours: Sequence[str]
    theirs: Sequence[str] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    old_lora: bool = False
    tokens: dict[str, int] = field(default_factory=dict)  # that captions are cut at, by tokenizer class


def _online(
    objective: Sequence[str], model: str, lora: Sequence[str], steps: int, batch: int, prompts: int
) -> list[str]:
    """Options of ours for an iteration of twice ``batch`` pictures and two updates of ``steps`` rows of each."""
    return [
        *("--pretrained_model_name_or_path", model, *lora, "--rollout_batch_size", str(prompts)),
        *("--data", "Prompts", "--data.path", "{work}/train.txt", "--objective", "PolicyGradient", *objective),
        *("--objective.sampler.num_inference_steps", "10", "--objective.sampler.batch_size", str(batch)),
        *("--objective.images_per_prompt", str(2 * batch // prompts), "--rewards", "[JPEGCompressibility]"),
        *("--train_batch_size", str(batch), "--gradient_accumulation_steps", str(steps), "--max_rollouts", "1000"),
        *("--learning_rate", "3e-4", "--adam_weight_decay", "1e-4"),
    ]


ONLINE = {
    "mixed_precision": "no",
    "allow_tf32": False,
    "prompt_fn_kwargs": {},
    "logdir": "{work}/logs",
}
FLOW_GRPO = Peer(
    "flow_grpo",
    "scripts/train_sd3.py",
    updates=2,
    warm=1,
    counted=2,
    ours=_online(
        ["--objective.timestep_fraction", "0.99", "--objective.sampler.guidance_scale", "4.5"],
        str(SHAPES / "shapes-sd3"),
        ["--lora.rank", "32", "--lora.alpha", "64"],
        steps=9,
        batch=8,
        prompts=2,
    ),
    settings=ONLINE
    | {
        "pretrained": {"model": str(SHAPES / "shapes-sd3")},
        "dataset": "{work}",
        "prompt_fn": "general_ocr",
        "reward_fn": {"jpeg_compressibility": 1.0},
        "resolution": 64,
        "sample": {
            "num_steps": 10,
            "eval_num_steps": 1,
            "guidance_scale": 4.5,
            "train_batch_size": 8,
            "test_batch_size": 8,
            "num_image_per_prompt": 8,
            "num_batches_per_epoch": 2,
        },
        "train": {"batch_size": 8, "gradient_accumulation_steps": 1, "timestep_fraction": 0.99},
    },
    tokens={"CLIPTokenizer": 12},
)
PEERS = [
    Peer(
        "diffusers",
        "examples/research_projects/diffusion_dpo/train_diffusion_dpo.py",
        updates=1,
        warm=10,
        counted=30,
        ours=[
            *("--pretrained_model_name_or_path", str(SHAPES / "shapes-sd"), "--lora.rank", "16"),
            *("--data", "PreferencePairs", "--data.path", "{work}/pairs", "--data.cache_dir", "{work}/cache"),
            *("--objective", "DPO", "--objective.beta", "5000", "--objective.proportion_empty_prompts", "0"),
            *("--train_batch_size", "16", "--max_train_steps", "1000", "--learning_rate", "1e-4"),
        ],
        theirs=[
            *("--pretrained_model_name_or_path", str(SHAPES / "shapes-sd"), "--rank", "16", "--no_hflip"),
            *("--dataset_name", "{work}/pairs", "--dataset_split_name", "train", "--cache_dir", "{work}/datasets"),
            *("--resolution", "64", "--beta_dpo", "2500", "--train_batch_size", "16", "--max_train_steps", "1000"),
            *("--learning_rate", "1e-4", "--vae_encode_batch_size", "32", "--seed", "0", "--output_dir", "{work}/out"),
        ],
    ),
    Peer(
        "ddpo-pytorch",
        "scripts/train.py",
        updates=2,
        warm=1,
        counted=3,
        ours=_online(
            ["--objective.advantage", "history", "--objective.sampler.guidance_scale", "5"],
            str(SHAPES / "shapes-sd"),
            ["--lora.rank", "4"],
            steps=10,
            batch=16,
            prompts=8,
        ),
        settings=ONLINE
        | {
            "pretrained": {"model": str(SHAPES / "shapes-sd"), "revision": None},
            "sample": {"num_steps": 10, "guidance_scale": 5.0, "batch_size": 16, "num_batches_per_epoch": 2},
            "train": {"batch_size": 16, "gradient_accumulation_steps": 1},
            "prompt_fn": "ours",
        },
        old_lora=True,
    ),
    FLOW_GRPO,
    replace(FLOW_GRPO, name="flow_grpo, one T5 token", tokens={"CLIPTokenizer": 12, "T5Tokenizer": 1}),
]


def recognised(checkout: Path) -> list[Peer]:
    """What is compared with this checkout. Raises SystemExit with one line where it is none's."""
    # two have a scripts/train.py
    found = [peer for peer in PEERS if (checkout / peer.script).is_file() and not (checkout / "d3po_pytorch").is_dir()]
    if not found:
        known = ", ".join(dict.fromkeys(f"{peer.name.partition(',')[0]} ({peer.script})" for peer in PEERS))
        raise SystemExit(f"peers.py: {checkout} is no checkout that is known; expected one of {known}")
    return found


def materials(work: Path) -> None:
    """The pairs and the prompts that both sides read."""
    import pyarrow.parquet as pq

    (work / "pairs").mkdir(parents=True)
    pq.write_table(pq.read_table(SHAPES / "shapes-preferences/train.parquet")[:PAIRS], work / "pairs/train.parquet")
    prompts = (SHAPES / "shapes-prompts.txt").read_text().splitlines()[:8]
    for name in ("train", "test"):
        (work / f"{name}.txt").write_text("\n".join(prompts) + "\n")


def filled(value: Any, work: Path) -> Any:
    """``value`` with ``{work}`` replaced by the folder, wherever it stands."""
    if isinstance(value, dict):
        return {key: filled(item, work) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [filled(item, work) for item in value]
    return value.replace("{work}", str(work)) if isinstance(value, str) else value


def measured(peer: Peer, checkout: Path, side: str, counted: int, more: Sequence[str]) -> dict[str, float]:
    """One run of one side: CPU seconds an iteration, of the whole, and peak memory in MB."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        materials(work)
        common = ["--output_dir", str(work / "run"), "--checkpointing_steps", "0", *more]
        asked: dict[str, Any] = {
            "side": side,
            "steps": (peer.warm + counted) * peer.updates,
            "checkout": str(checkout.resolve()),
            "script": peer.script,
            "argv": [*peer.ours, *common] if side == "ours" else list(peer.theirs),
            "old_lora": peer.old_lora,
            "tokens": peer.tokens,
        } | ({"settings": peer.settings} if peer.settings else {})
        (work / "work.json").write_text(json.dumps(filled(asked, work)))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        words = [sys.executable, str(CHILD), str(work / "work.json")]
        ended = subprocess.run(words, cwd=work, env=environment, capture_output=True, text=True, check=False)
        if not (work / "work.out").exists():
            raise SystemExit(f"peers.py: {peer.name}, {side}, ended with {ended.returncode}: {ended.stderr[-2000:]}")
        report = json.loads((work / "work.out").read_text())
    seconds = report["steps"]
    passed = seconds[-1] - seconds[peer.warm * peer.updates - 1]
    return {"seconds": passed / counted, "peak_mb": report["peak_bytes"] / 1e6, "whole": report["whole"]}


def compared(peer: Peer, checkout: Path, runs: int, counted: int, more: Sequence[str]) -> dict[str, Any]:
    """Medians over ``runs`` of each side, in turn."""
    found: dict[str, list[dict[str, float]]] = {"theirs": [], "ours": []}
    for _ in range(runs):
        for side, results in found.items():
            results.append(measured(peer, checkout, side, counted, more))
            print(f"{peer.name}, {side}: {results[-1]}", file=sys.stderr, flush=True)
    sides = {
        side: {key: round(median(each[key] for each in results), 4) for key in results[0]}
        for side, results in found.items()
    }
    ratios = {key: round(sides["ours"][key] / sides["theirs"][key], 4) for key in sides["ours"]}
    words = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    commit = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    return {"runs": runs, "iterations": counted, "commit": commit, **sides, "ratio": ratios, "options": list(more)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="+", type=Path, help="of diffusers, ddpo-pytorch, flow_grpo")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one short run of each side; only printed")
    parser.add_argument(
        "--ours", nargs="*", default=[], metavar="OPTION", help="more options for align.train, name=value"
    )
    args = parser.parse_args(argv)
    peers = [(peer, checkout) for checkout in args.checkouts for peer in recognised(checkout)]
    more = [f"--{option}" for option in args.ours]
    figures: dict[str, Any] = {}
    for peer, checkout in peers:
        runs, counted = (1, 1) if args.quick else (args.runs, peer.counted)
        figures[peer.name] = compared(peer, checkout, runs, counted, more)
        if not args.quick:
            keep(figures)
    print(json.dumps(figures))


def keep(figures: dict[str, Any]) -> None:
    """Put ``figures`` beside what ``results/peers.json`` has of other repositories."""
    from tests.benchmarks import RESULTS, record

    file = RESULTS / "peers.json"
    earlier = json.loads(file.read_text())["peers"] if file.exists() else {}
    record("peers", {"peers": earlier | figures})


if __name__ == "__main__":
    main()
