"""The model card beside weights that this project made: of a run, and of a compressed pipeline."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rewards.common.files import write_text
from rewards.common.page import Table, escape

if TYPE_CHECKING:
    from align.policy.policy import Policy
    from align.training.config import TrainConfig

_TEMPLATE = """---
{{ card_data }}
---

# {{ heading }}

{{ introduction }}
{% for title, text in sections.items() %}

## {{ title }}

{{ text }}
{% endfor %}
"""


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What a card says. ``introduction`` and ``sections``, heading to text, are Markdown: what users wrote stands there
    through :func:`rewards.common.page.escape` or :func:`code`. ``load`` is Python that loads the weights."""

    title: str
    base_model: str
    introduction: str
    load: str
    sections: Mapping[str, str] = field(default_factory=dict)
    tags: Sequence[str] = ()

    def text(self) -> str:
        """The file: metadata that the hub reads, then the card."""
        import huggingface_hub

        data = huggingface_hub.ModelCardData(
            base_model=self.base_model,
            library_name="diffusers",
            license="other",  # the base model's
            pipeline_tag="text-to-image",
            tags=["diffusers", "text-to-image", *self.tags],
        )
        card = huggingface_hub.ModelCard.from_template(
            data,
            template_str=_TEMPLATE,
            heading=escape(self.title),
            introduction=self.introduction,
            sections={**self.sections, "Load": code(self.load, "python")},
        )
        return f"{card.content.rstrip()}\n"


def code(text: str, language: str = "") -> str:
    """``text`` as a block of code that nothing within it ends."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def run_card(
    config: TrainConfig, policy: Policy, resolved: Mapping[str, Any], plan: str, steps: int, held_out: dict[str, float]
) -> ModelCard:
    """Of what a run trained: objective and its numbers, data, base model, seed, held-out metrics. ``resolved`` is the
    run's ``config.yaml``, ``plan`` what it says of its batches."""
    objective, base = type(config.objective).__name__, config.pretrained_model_name_or_path
    kind = policy.family.denoiser_name if policy.weights.kind == "full" else policy.weights.kind
    data = str(getattr(config.data, "path", type(config.data).__name__))
    objective_yaml = yaml.safe_dump(resolved.get("objective", {}), sort_keys=False)
    packed = f" The base was in {config.quantize} while it trained." if config.quantize else ""
    sections = {"Settings": f"{code(plan)}\n\n{code(objective_yaml, 'yaml')}"}
    if held_out:
        rows = [(name, f"{value:.4f}") for name, value in held_out.items()]
        sections["Held-out data, after training"] = Table(("metric", "value"), rows).markdown()
    return ModelCard(
        title=f"{objective} {kind} of {base}",
        base_model=base,
        introduction=f"Made by t2i-align on {escape(data)}, {steps} steps, seed {config.seed}. `config.yaml` in this "
        f"folder reruns the training; `run.json` has the versions and the commit.{packed}",
        load=load_run(config, policy),
        sections=sections,
        tags=["diffusers-training", objective.lower(), *(["lora"] if policy.lora else [])],
    )


def load_run(config: TrainConfig, policy: Policy) -> str:
    """Python that loads what a run trained: by stock diffusers, where that reads the base by its name."""
    from align import families
    from align.common.assets import locate

    family, folder, base = policy.family, str(config.output_dir), config.pretrained_model_name_or_path
    dtype = f"dtype={families.DTYPES[config.precision]}"
    named = {"revision": config.revision, "variant": config.variant}
    which = ", ".join([repr(base), dtype, *(f"{key}={value!r}" for key, value in named.items() if value)])
    if policy.trained is not None or locate(base) != base or families.reader(base) is not None:
        loaded = f"families.load({which})"
        if policy.trained is None:
            loaded = f"families.tuned({loaded}, {folder!r})"
        after = f"\n{policy.trained.usage(folder, family)}" if policy.trained is not None else ""
        return f"import torch\nfrom align import families\n\npipe = {loaded}.pipe{after}"
    pipeline, denoiser, name = type(family.pipe).__name__, type(family.denoiser).__name__, family.denoiser_name
    if policy.lora:
        head = f"import torch\nfrom diffusers import {pipeline}\n\npipe = {pipeline}.from_pretrained({which})"
        return f"{head}\npipe.load_lora_weights({folder!r})"
    return (
        f"import torch\nfrom diffusers import {denoiser}, {pipeline}\n\n"
        f"{name} = {denoiser}.from_pretrained({folder!r}, subfolder={name!r}, {dtype})\n"
        f"pipe = {pipeline}.from_pretrained({which}, {name}={name})"
    )


def add_section(path: Path, title: str, text: str) -> None:
    """Put a section into a model card, replacing its older self; without a card, nothing."""
    if path.is_file():
        card = path.read_text(encoding="utf-8")
        kept = re.sub(rf"\n## {re.escape(title)}\n.*?(?=\n## |\Z)", "", card, flags=re.DOTALL)
        write_text(path, f"{kept.rstrip()}\n\n## {title}\n\n{text}\n")
