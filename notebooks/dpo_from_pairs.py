"""Diffusion-DPO from pairs of preferred and rejected images: about a minute of CPU.

    python notebooks/dpo_from_pairs.py

Give ``--pairs`` a path of your own (a folder of train.parquet, JSONL, images, ...), and put your pipeline in place of
"shapes-sd". The LoRA that comes out loads into stock diffusers.
"""

import argparse
from pathlib import Path

from align import families
from align.data import PreferencePairs
from align.objectives import DPO
from align.policy.policy import LoRA
from align.sampling.generate import sample_images
from align.training.config import TrainConfig
from align.training.trainer import train
from rewards import load

PROMPTS = ["three red stars", "two green circles", "a yellow star and a purple square", "four black triangles"] * 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="updates; 300 and an EMA give configs/dpo_shapes.yaml")
    parser.add_argument("--pairs", default="shapes-preferences", help="pairs of your own")
    parser.add_argument("--output", type=Path, default=Path("outputs/dpo_from_pairs"))
    arguments = parser.parse_args()

    config = TrainConfig(
        data=PreferencePairs(arguments.pairs, split="train"),
        objective=DPO(beta=200.0),
        pretrained_model_name_or_path="shapes-sd",
        lora=LoRA(rank=16),
        train_batch_size=32,
        max_train_steps=arguments.steps,
        learning_rate=1e-3,
        output_dir=arguments.output,
        checkpointing_steps=0,
        report_to="none",
    )
    folder = train(config)

    reward, family = load("Shapes"), families.load("shapes-sd")
    for name in ("base", "tuned"):
        if name == "tuned":
            family = families.tuned(family, str(folder))  # puts the LoRA in, as stock `pipe.load_lora_weights` does
        images = sample_images(family.predict, family, PROMPTS, range(len(PROMPTS)), num_inference_steps=10)
        print(f"{name}: mean reward {reward.score(images=images, prompts=PROMPTS).mean():.3f}")


if __name__ == "__main__":
    main()
