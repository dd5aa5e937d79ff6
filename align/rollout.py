"""Draw pictures for people to compare, and keep the trajectories that made them.

    python -m align.rollout --prompts my_prompts.txt --output_dir outputs/round1

writes into ``output_dir``

- ``images/00000.png``: picture i of prompt j has the number k * j + i, with k ``images_per_prompt``;
- ``contact-sheet-00000.png``: the pictures of a shard with their numbers, a prompt a row;
- ``trajectories-00000.safetensors``: ``latents`` (n, T+1, C, h, w), every state once, and ``log_probs`` (n, T);
- ``manifest.jsonl``: a line a picture, see :class:`align.data.trajectories.ManifestLine`; ``rollout.json``: what all
  of that depends on.

Killed and called again it goes on at the first shard that is missing. ``align.label`` asks people, and what
they say is a file that :class:`align.data.annotations.LabelledRollout` reads; ``align.train`` trains on both.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from align import families
from align.common.command import command, parse
from align.common.errors import require_at_least
from align.common.resolution import sides
from align.data.prompts import Prompts, PromptSet
from align.data.trajectories import RolloutFolder
from align.evaluation.rollout_writer import RolloutSettings, RolloutWriter, record_of
from align.objectives.online.rewards import Scorer
from align.policy.policy import Policy
from rewards.common.command import exit_status
from rewards.common.device import pick_device
from rewards.common.files import locked


def rollout(config: RolloutSettings) -> Path:
    """Draw what ``config`` says and ``output_dir`` lacks; returns the folder."""
    require_at_least(2, config, "images_per_prompt")
    require_at_least(1, config, "prompts_per_shard", "limit")
    sides(config.resolution)
    rows = Prompts(config.prompts, config.limit).read()
    scorer = Scorer.of(config.rewards) if config.rewards else None
    with locked(config.output_dir):
        dtype = families.DTYPES[config.mixed_precision]
        family = families.load(config.pretrained_model_name_or_path, dtype, pick_device(config.device))
        if config.weights is not None:
            family = families.tuned(family, str(config.weights))
        policy = Policy(family, None, reference=False)
        policy.denoiser.requires_grad_(False).to(family.dtype)  # nothing trains here, so nothing has to be float32
        folder, record = RolloutFolder(config.output_dir), record_of(config, rows, family)
        RolloutWriter(folder, record, policy, PromptSet(family, rows), config.sampler, scorer).write()
    print(f"{record.images} pictures of {record.prompts} prompts in {folder.path}")
    return folder.path


@exit_status
def main(argv: Sequence[str] | None = None) -> int:
    config, _ = parse(RolloutSettings, "align.rollout", __doc__, argv)
    return command(lambda: rollout(config), argv)


if __name__ == "__main__":
    sys.exit(main())
