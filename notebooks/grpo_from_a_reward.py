"""Flow-GRPO from a reward of your own: about a minute of CPU.

    python notebooks/grpo_from_a_reward.py

A reward is any class with `score(images=, prompts=, metadata=)`: one number an image, higher is better. Flow-GRPO is
`PolicyGradient` on a flow model. Nothing but this reward holds the images: watch the ones that it draws.
"""

import argparse
from pathlib import Path

from align.data import Prompts
from align.objectives import PolicyGradient
from align.objectives.online.rewards import RewardConfig
from align.policy.policy import LoRA
from align.sampling.sampler import Sampler, SDEWindow
from align.training.config import Samples, TrainConfig
from align.training.trainer import train


class Redness:
    """How much redder than green and blue an image is."""

    differentiable = True

    def score(self, *, images, prompts, metadata=None):  # images (B, 3, H, W) in [0, 1]
        return (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=16, help="updates, two a rollout")
    parser.add_argument("--images", type=int, default=8, help="images of each prompt")
    parser.add_argument("--output", type=Path, default=Path("outputs/grpo_from_a_reward"))
    arguments = parser.parse_args()

    sampler = Sampler(num_inference_steps=10, guidance_scale=1.0, batch_size=64)
    config = TrainConfig(
        data=Prompts("shapes-prompts"),
        objective=PolicyGradient(sampler, arguments.images, clip_range=5e-3, window=SDEWindow(size=2, until=4)),
        rewards=[RewardConfig(f"{__name__}.Redness")],  # an import path: my_package.Redness
        pretrained_model_name_or_path="shapes-sd3",
        lora=LoRA(rank=8),
        rollout_batch_size=8,  # prompts
        train_batch_size=8 * arguments.images,
        max_train_steps=arguments.steps,
        learning_rate=2e-3,
        output_dir=arguments.output,
        checkpointing_steps=0,
        samples=Samples(prompts=["three red stars", "two green circles"], num_inference_steps=10, guidance_scale=1.0),
        report_to="none",
    )
    print(f"images before and after: {train(config) / 'samples'}")


if __name__ == "__main__":
    main()
