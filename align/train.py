"""Fine-tune a diffusers pipeline through an objective.

accelerate launch -m align.train --config configs/dpo_shapes.yaml --objective.beta 500
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from align.common.command import command, parse
from align.common.imports import uncollected
from align.training.config import TrainConfig
from rewards.common.command import exit_status


@exit_status
def main(argv: Sequence[str] | None = None) -> int:
    config, resolved = parse(TrainConfig, "align.train", __doc__, argv)
    return command(lambda: run(config, resolved), argv)


def run(config: TrainConfig, resolved: str) -> int:
    if config.memory is not None:
        from align.training.advice import report

        config.check()
        print(report(config))
        return 0
    from align.training.preemption import STATUS, Preempted
    from align.training.stop import STATUS as STOPPED
    from align.training.stop import Stopped

    with uncollected():
        from align.training.trainer import train  # accelerate: not for --help or a wrong key

    try:
        train(config, resolved)
    except Preempted:
        print(f"stopped by a signal; go on with --resume_from_checkpoint latest (status {STATUS})", file=sys.stderr)
        return STATUS
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return STOPPED
    return 0


if __name__ == "__main__":
    sys.exit(main())
