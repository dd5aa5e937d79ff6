"""Fine-tune a diffusers pipeline through an objective.

accelerate launch -m align.train --config configs/dpo_shapes.yaml --objective.beta 500
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from align.common.command import command, parse
from align.training.config import TrainConfig


def main(argv: Sequence[str] | None = None) -> int:
    config, resolved = parse(TrainConfig, "align.train", __doc__, argv)
    return command(lambda: run(config, resolved), argv)


def run(config: TrainConfig, resolved: str) -> None:
    from align.training.trainer import train  # accelerate: not for --help or a wrong key

    train(config, resolved)


if __name__ == "__main__":
    sys.exit(main())
