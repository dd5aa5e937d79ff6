"""Remove blocks of a pipeline and heal what is left by distillation: about a minute of CPU.

    python notebooks/prune_and_heal.py

Two whole blocks go here, chosen by hand, so stock diffusers loads both the pruned pipeline and the healed transformer.
`python -m pruning.compress` measures which blocks matter least, removes parts of blocks too, and quantizes to INT4.
"""

import argparse
from pathlib import Path

from align import families  # before diffusers, for a CUDA torchvision beside a CPU torch
from align.common.assets import locate
from align.objectives.teachers import PipelineTeacher
from align.sampling.generate import sample_images
from align.shapes.scenes import Scenes
from align.training.config import TrainConfig
from align.training.trainer import train
from pruning.distill import Heal
from pruning.graph import BlockGraph
from pruning.plan import from_ranges
from rewards import load

from diffusers import DiffusionPipeline  # isort: skip

PROMPTS = ["three red stars", "two green circles", "a yellow star and a purple square", "four black triangles"] * 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="updates of healing")
    parser.add_argument("--scenes", type=int, default=1024, help="captioned images to heal on")
    parser.add_argument("--output", type=Path, default=Path("outputs/prune_and_heal"))
    arguments = parser.parse_args()

    pipe = DiffusionPipeline.from_pretrained(locate("shapes-sd3"))
    graph = BlockGraph.of(pipe.transformer)
    plan = from_ranges(graph, "5-6", "shapes-sd3")
    graph.remove(plan.dropped)
    pipe.save_pretrained(arguments.output / "pruned")
    plan.save(arguments.output / "plan.json")

    heal = Heal(
        PipelineTeacher(path="shapes-sd3"), arguments.output / "plan.json", draws_per_image=2, sensitivity="none"
    )
    source, settings = str(arguments.output / "pruned"), {"lr_scheduler": "cosine", "report_to": "none"}
    sizes = {"rollout_batch_size": 32, "train_batch_size": 64, "max_train_steps": arguments.steps}
    run = TrainConfig(Scenes(limit=arguments.scenes), heal, pretrained_model_name_or_path=source, lora=None,
                      learning_rate=2e-3, output_dir=arguments.output / "healed", **sizes, **settings)  # fmt: skip
    healed = train(run)

    reward, family = load("Shapes"), families.load(source)
    for name in ("pruned", "healed"):
        family = families.tuned(family, str(healed)) if name == "healed" else family
        images = sample_images(family.predict, family, PROMPTS, range(len(PROMPTS)), num_inference_steps=10)
        print(f"{name}: mean reward {reward.score(images=images, prompts=PROMPTS).mean():.3f}")


if __name__ == "__main__":
    main()
