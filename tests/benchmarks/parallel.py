"""What several processes bring: images and rows a second, and the bytes that each holds.

    python tests/benchmarks/parallel.py --quick

``shapes-sd3``, on CPUs, one thread a process, the same run by one process and by two, which share a rollout's images
and rows: Flow-GRPO with a LoRA for speed, by data-parallel processes and with shared weights (FSDP2); DPO of all
weights with its frozen reference for the bytes of weights, reference and moments that each process keeps. The first
rollout is not timed. The speed is worth what the machine has free: its load stands beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks import record
from tests.helpers import FSDP2, launch_together, lines, write


def measured(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """``align.train``, which leaves in ``bytes-RANK.json`` beside the run folder what the process holds at its end."""
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    from torch.distributed.tensor import DTensor

    from align.policy.sharding import held
    from align.train import main
    from align.training.trainer import Trainer

    plain = Trainer._run

    def run(loop: Trainer) -> Path:
        folder = plain(loop)
        weights = loop.policy.weights
        moments = [
            value.to_local() if isinstance(value, DTensor) else value
            for entries in loop.optimizer.state.values()
            for value in entries.values()
            if isinstance(value, torch.Tensor) and value.ndim
        ]
        bytes_held = {
            "weights": held(weights.module),
            "reference": held(weights.frozen) if weights.frozen is not None else 0,
            "moments": sum(value.numel() * value.element_size() for value in moments),
        }
        rank = environment.get("RANK", "0")
        (folder.parent / f"bytes-{folder.name}-{rank}.json").write_text(json.dumps(bytes_held))
        return folder

    Trainer._run = run  # type: ignore[method-assign]
    sys.exit(main(list(arguments)))


def online(folder: Path, prompts: int, rollouts: int) -> dict[str, Any]:
    """Rollouts of ``prompts`` x 8 images, whose rows make one update."""
    sampler = {"num_inference_steps": 10, "guidance_scale": 1.0}
    return {
        "pretrained_model_name_or_path": "shapes-sd3",
        "data": {"class_path": "Prompts", "init_args": {"path": "shapes-prompts"}},
        "objective": {
            "class_path": "PolicyGradient",
            "init_args": {"sampler": sampler, "images_per_prompt": 8, "timestep_fraction": 0.5},
        },
        "rewards": [{"name": "Shapes"}],
        "output_dir": str(folder / "run"),
        "lora": {"rank": 8},
        "rollout_batch_size": prompts,
        "train_batch_size": 20,
        "gradient_accumulation_steps": prompts * 2,
        "max_train_steps": None,
        "max_rollouts": rollouts,
        "checkpointing_steps": 0,
        "report_to": "none",
    }


def speed(folder: Path, name: str, world: int, prompts: int, rollouts: int, **environment: str) -> dict[str, Any]:
    """Seconds a rollout with its update, and what that is in images and rows, of medians."""
    config = online(folder, prompts, rollouts) | {"output_dir": str(folder / name)}
    config["gradient_accumulation_steps"] //= world
    assert launch_together(["--config", write(config)], world, target=measured, **environment) == [0] * world
    logged = [line for line in lines(folder / name) if "rollout" in line]
    seconds = statistics.median(b["time"] - a["time"] for a, b in pairwise(logged))
    trained = logged[-1]["evaluations/trained"] - logged[0]["evaluations/trained"]  # without guidance, one a row
    images, rows = prompts * 8, trained / (len(logged) - 1)
    return {"seconds": round(seconds, 3), "images_s": round(images / seconds, 2), "rows_s": round(rows / seconds, 1)}


def memory(folder: Path, world: int, **environment: str) -> dict[str, int]:
    """The most bytes that any of ``world`` processes holds of all weights of DPO."""
    data = {"path": "shapes-preferences-sd3", "split": "train", "limit": 16}
    config = {
        "pretrained_model_name_or_path": "shapes-sd3",
        "data": {"class_path": "PreferencePairs", "init_args": data},
        "objective": {"class_path": "DPO"},
        "output_dir": str(folder / f"memory-{world}"),
        "lora": None,
        "train_batch_size": 4 // world,
        "max_train_steps": 1,
        "checkpointing_steps": 0,
        "report_to": "none",
    }
    assert launch_together(["--config", write(config)], world, target=measured, **environment) == [0] * world
    each = [json.loads((folder / f"bytes-memory-{world}-{rank}.json").read_text()) for rank in range(world)]
    return {name: max(one[name] for one in each) for name in each[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=9)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    prompts, rollouts = (2, 3) if args.quick else (args.prompts, args.rollouts)
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        load = os.getloadavg()[0]
        found: dict[str, Any] = {
            "images": prompts * 8,
            "rollouts": rollouts,
            "cores": os.cpu_count(),
            "load_before": round(load, 2),
            "one": speed(folder, "one", 1, prompts, rollouts),
            "ddp": speed(folder, "ddp", 2, prompts, rollouts),
            "fsdp2": speed(folder, "fsdp2", 2, prompts, rollouts, **FSDP2),
            "bytes_one": memory(folder, 1),
            "bytes_fsdp2": memory(folder, 2, **FSDP2),
        }
    for kind in ("ddp", "fsdp2"):
        found[f"{kind}_over_one"] = round(found[kind]["images_s"] / found["one"]["images_s"], 3)
    total = {kind: sum(found[f"bytes_{kind}"].values()) for kind in ("one", "fsdp2")}
    found["bytes_share"] = round(total["fsdp2"] / total["one"], 4)
    record("parallel", found, args.quick)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
