"""Encode what a run trains on, and stop; ``align.train`` with the same config then finds its cache whole.

    accelerate launch -m align.encode --config configs/dpo_sdxl.yaml
    python -m align.encode --config configs/dpo_sdxl.yaml --engine ray --workers 8

``--engine ray`` hands shards of 256 examples to processes of the Ray cluster that ``RAY_ADDRESS`` names, or of a local
one; those that die are started again. All machines have to share ``cache_dir`` and see the data at the same path.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from align.common.command import command, parse
from align.common.errors import UserError, require_at_least
from align.data.captioned import EncodedData
from align.training.config import TrainConfig
from rewards.common.command import exit_status


@dataclass
class EncodeConfig(TrainConfig):
    """A training run's settings, of which those of its data, model and precision are used.

    Args:
        engine: ``local``: this process, or all of ``accelerate launch``; ``ray``: ``workers`` of a cluster.
        workers: with ``ray``, processes; null is one for each GPU of the cluster, or one.
    """

    engine: Literal["local", "ray"] = "local"
    workers: int | None = None


@exit_status
def main(argv: Sequence[str] | None = None) -> int:
    config, _ = parse(EncodeConfig, "align.encode", __doc__, argv)
    return command(lambda: run(config), argv)


def run(config: EncodeConfig) -> int:
    from align.training.launch import launch

    require_at_least(1, config, "workers")
    if config.engine == "local" and config.workers is not None:
        raise UserError("workers is for engine: ray; processes on this machine are accelerate's: accelerate launch")
    seeds = (config.data, config.seed), (config.validation_data, 0)  # held-out data is cut by seed 0 in a run
    data = [(each, seed) for each, seed in seeds if isinstance(each, EncodedData)]
    if not data:
        raise UserError(f"{type(config.data).__name__} has nothing to encode; expected pairs or captioned images")
    config.check()
    accelerator = launch(config)
    if config.engine == "ray":
        if accelerator.num_processes > 1:
            raise UserError(f"engine: ray with {accelerator.num_processes} processes; Ray starts workers of its own")
        try:
            from align.training import ray_encoding
        except ImportError as error:
            raise UserError(f"engine: ray needs {error.name}: pip install 't2i-align[ray]'") from error
        ray_encoding.encode(config, data, config.workers)
        return 0
    from align.data.dataset import Setup

    ranks = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    family = config.family(accelerator.device)
    for each, seed in data:
        each.prepare(Setup(family, seed, *ranks, accelerator.wait_for_everyone))
    return 0


if __name__ == "__main__":
    sys.exit(main())
