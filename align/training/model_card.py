"""The model card beside weights that this project made: of a run, of a compressed pipeline, of what was exported.

A card lies beside its weights and loads them there (``weights = 'outputs/mine'``); :mod:`align.training.publish` makes
of it the one that goes to the hub.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import yaml

from align.common.assets import EMBEDDED, locate
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
    through :func:`rewards.common.page.escape` or :func:`code`. ``load`` is Python that loads the weights, from
    ``folder`` by the name ``weights``; a card without it has no such section."""

    title: str
    base_model: str | None
    introduction: str
    load: str = ""
    folder: str = ""
    sections: Mapping[str, str] = field(default_factory=dict)
    tags: Sequence[str] = ()
    datasets: Sequence[str] = ()

    def text(self) -> str:
        """The file: metadata that the hub reads, then the card."""
        import huggingface_hub

        terms: dict[str, Any] = license_of(self.base_model) if self.base_model else {}
        data = huggingface_hub.ModelCardData(
            base_model=self.base_model,
            library_name="diffusers",
            pipeline_tag="text-to-image",
            tags=["diffusers", "text-to-image", *self.tags],
            datasets=list(self.datasets) or None,
            **terms,
        )
        sections = {**self.sections, "License": license_text(self.base_model, terms)}
        if self.load:
            sections["Load"] = code(set_weights(self.load, self.folder), "python")
        card = huggingface_hub.ModelCard.from_template(
            data,
            template_str=_TEMPLATE,
            heading=escape(self.title),
            introduction=self.introduction,
            sections=sections,
        )
        return f"{card.content.rstrip()}\n"


def set_weights(load: str, folder: str) -> str:
    """The Python ``load`` with the line that says where its ``weights`` lie, after its imports."""
    return load.replace("\n\n", f"\n\nweights = {folder!r}\n", 1) if folder else load


def license_of(base: str) -> dict[str, str]:
    """The keys of a card's metadata that say under which terms ``base`` may be used: those of its own card, in its
    folder or the hub's cache; an embedded pipeline's are ours. None where that says nothing."""
    if base in EMBEDDED:
        return {"license": "apache-2.0"}
    path: Any = Path(locate(base)) / "README.md"
    if not path.is_file():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            path = try_to_load_from_cache(base, "README.md")
        except HFValidationError:
            path = None
    if not isinstance(path, str | Path):
        return {}
    from huggingface_hub import metadata_load

    try:
        return license_in(metadata_load(path) or {}, base)
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def license_in(metadata: Mapping[str, Any], base: str) -> dict[str, str]:
    """:func:`license_of` of the metadata of the card of ``base``; what the hub would not take is left out."""
    found = {key: metadata.get(key) for key in ("license", "license_name", "license_link")}
    terms = {key: value for key, value in found.items() if isinstance(value, str) and value}
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", terms.get("license", "")):
        return {}
    if "license_link" in terms and not terms["license_link"].startswith("https://"):  # a file beside that card
        terms["license_link"] = f"https://huggingface.co/{base}/blob/main/{terms['license_link']}"
        if not is_hub_id(base):
            del terms["license_link"]
    return terms


def license_text(base: str | None, terms: Mapping[str, str]) -> str:
    """What a card says of the terms of its base."""
    if not terms:
        of = f" of {escape(base)}" if base else ""
        return f"Unknown: look at the terms of the base model{of} before you share these weights."
    name = terms.get("license_name", terms["license"])
    return f"{escape(name)}: the base model's terms, since these weights are made of it."


def is_hub_id(name: str) -> bool:
    """Whether ``name`` can be a repository of the hub, and no file or folder here is called so."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)) and not Path(name).exists()


def picture(text: str, path: str) -> str:
    """A picture in a card; ``path`` from the card's folder."""
    return f"![{escape(text)}]({quote(path)})"


def code(text: str, language: str = "") -> str:
    """``text`` as a block of code that nothing within it ends."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def run_card(
    config: TrainConfig,
    policy: Policy,
    resolved: Mapping[str, Any],
    plan: str,
    steps: int,
    held_out: Mapping[str, float],
    samples: Mapping[str, str],
) -> ModelCard:
    """Of what a run trained: objective and its numbers, data, base model, seed, held-out metrics. ``resolved`` is the
    run's ``config.yaml``, ``plan`` what it says of its batches, ``samples`` its grids: when to path."""
    objective, base = type(config.objective).__name__, config.pretrained_model_name_or_path
    kind = policy.family.denoiser_name if policy.weights.kind == "full" else policy.weights.kind
    data = str(getattr(config.data, "path", type(config.data).__name__))
    objective_yaml = yaml.safe_dump(resolved.get("objective", {}), sort_keys=False)
    packed = f" The base was in {config.quantize} while it trained." if config.quantize else ""
    shown = "\n\n".join(f"{when}:\n\n{picture(f'Samples, {when}', path)}" for when, path in samples.items())
    sections = {"Samples": f"The same prompts and seeds.\n\n{shown}"} if samples else {}
    sections["Settings"] = f"{code(plan)}\n\n{code(objective_yaml, 'yaml')}"
    if held_out:
        rows = [(name, f"{value:.4f}") for name, value in held_out.items()]
        sections["Held-out data, after training"] = Table(("metric", "value"), rows).markdown()
    return ModelCard(
        title=f"{objective} {kind} of {base}",
        base_model=base,
        introduction=f"Made by t2i-align on {escape(data)}, {steps} steps, seed {config.seed}. `config.yaml` in this "
        f"folder reruns the training; `run.json` has the versions and the commit.{packed}",
        load=load_run(config, policy),
        folder=str(config.output_dir),
        sections=sections,
        tags=["diffusers-training", objective.lower(), *(["lora"] if policy.lora else [])],
        datasets=[data] if is_hub_id(data) else [],
    )


def load_run(config: TrainConfig, policy: Policy) -> str:
    """Python that loads what a run trained from ``weights``: by stock diffusers, where that reads the base by its
    name."""
    from align import families

    family, base = policy.family, config.pretrained_model_name_or_path
    dtype = f"dtype={families.DTYPES[config.precision]}"
    named = {"revision": config.revision, "variant": config.variant}
    which = ", ".join([repr(base), dtype, *(f"{key}={value!r}" for key, value in named.items() if value)])
    if policy.trained is not None or locate(base) != base or families.reader(base) is not None:
        loaded = f"families.load({which})"
        if policy.trained is None:
            loaded = f"families.tuned({loaded}, weights)"
        after = f"\n{policy.trained.usage(family)}" if policy.trained is not None else ""
        return f"import torch\nfrom align import families\n\npipe = {loaded}.pipe{after}"
    pipeline, denoiser, name = type(family.pipe).__name__, type(family.denoiser).__name__, family.denoiser_name
    if policy.lora:
        head = f"import torch\nfrom diffusers import {pipeline}\n\npipe = {pipeline}.from_pretrained({which})"
        return f"{head}\npipe.load_lora_weights(weights)"
    return (
        f"import torch\nfrom diffusers import {denoiser}, {pipeline}\n\n"
        f"{name} = {denoiser}.from_pretrained(weights, subfolder={name!r}, {dtype})\n"
        f"pipe = {pipeline}.from_pretrained({which}, {name}={name})"
    )


def add_section(path: Path, title: str, text: str) -> None:
    """Put a section into a model card, replacing its older self; without a card, nothing."""
    if path.is_file():
        write_text(path, with_section(path.read_text(encoding="utf-8"), title, text))


def with_section(card: str, title: str, text: str) -> str:
    """The text of ``card`` with this section at its end, and no older one of that title."""
    kept = re.sub(rf"\n## {re.escape(title)}\n.*?(?=\n## |\Z)", "", card, flags=re.DOTALL)
    return f"{kept.rstrip()}\n\n## {title}\n\n{text}\n"
