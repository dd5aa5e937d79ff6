"""Make an aligned pipeline small: analyze -> plan -> remove -> heal -> quantize -> tune -> report.

    python -m pruning.compress --config configs/compress_shapes_sd3.yaml
    python -m pruning.compress --config configs/compress_shapes_sd3.yaml --stages [report]

Every stage leaves its result in ``output_dir`` and is skipped where that is there already, so that a killed run goes on
and a stage can be run by itself: ``profile.json`` (``.png``), ``plan.json`` (``.png``), the pipelines ``pruned``,
``healed``, ``int4`` (the last of these, quantised), ``int4-alone`` (the original, quantised) and ``int4-tuned``
(``int4`` with its biases healed), and ``report.json``, ``report.md``, ``gallery.png``, ``gallery.html``. Pipelines of
whole-block plans load with stock ``DiffusionPipeline.from_pretrained``, quantised ones where there is a GPU;
:func:`pruning.load` reads all of them anywhere.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from align import families
from align.common.assets import locate
from align.common.command import command, parse
from align.common.errors import UserError
from align.data.prompts import read_prompts
from align.families import LORA_FILE, SAMPLING_FILE, Family
from align.training.config import TrainConfig
from pruning import importance, load, plots, reads
from pruning.distill import Heal
from pruning.graph import BlockGraph
from pruning.nf4 import NF4
from pruning.plan import Budget, Plan, by_hand, key, to_budget
from pruning.report import Reporting, report
from rewards import RewardSum
from rewards import load as load_reward
from rewards.common.files import claim, write_text

Stage = Literal["analyze", "plan", "remove", "heal", "quantize", "tune", "report"]
STAGES: tuple[Stage, ...] = ("analyze", "plan", "remove", "heal", "quantize", "tune", "report")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class Compress:
    """Prune, heal and quantize a diffusers pipeline.

    Args:
        pretrained_model_name_or_path: diffusers folder, hub id, ``shapes-sd`` or ``shapes-sd3``.
        weights: a LoRA run's folder, merged first, in full precision.
        output_dir: where every stage leaves its result.
        stages: which to run.
        prompts: a prompt file or ``shapes-prompts``, to measure importance on; the first ``calibration_prompts``.
        calibration_prompts: how many.
        num_inference_steps: sampler steps of calibration; null is the pipeline's own default.
        guidance_scale: guidance scale of calibration; null is the pipeline's own default.
        seed: of calibration's noise.
        batch_size: calibration pictures at once.
        reward: rewards whose drop is measured, where ``measure`` is ``drop``.
        measure: what decides: the ``drop`` of the reward, the ``mse`` of the output, or the ``cosine`` of what goes in
            and out of a block.
        components: choose among parts of blocks too; such a plan loads with pruning.load only.
        budget: how small the denoiser has to become.
        blocks: by hand instead, such as ``25-28,31-34``; closed ranges of positions from 0.
        position_weighting: protect early blocks.
        heal: a config of align.train with the objective pruning.distill.Heal; student, teacher, plan, profile and
            output_dir are filled in. null heals nothing.
        quantize: NF4 settings; an entry of ``skip`` has to name a Linear of the denoiser or of a text encoder.
        text_encoders: quantize those too.
        tune: a second such config, for what is not packed of the quantised pipeline: biases and skipped layers make up
            for the rounding. null leaves them as they are.
        dtype: of the saved pipelines.
        report: what the pipelines are compared by.
        device: where to run; null takes a GPU where there is one.
    """

    pretrained_model_name_or_path: str = "shapes-sd3"
    weights: Path | None = None
    output_dir: Path = Path("outputs/compress")
    stages: list[Stage] = field(default_factory=lambda: list(STAGES))
    prompts: str = "shapes-prompts"
    calibration_prompts: int = 32
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0
    batch_size: int = 16
    reward: list[str] = field(default_factory=list)
    measure: importance.Measure = "mse"
    components: bool = False
    budget: Budget | None = None
    blocks: str | None = None
    position_weighting: bool = True
    heal: Path | None = None
    quantize: NF4 = field(default_factory=NF4)
    text_encoders: bool = True
    tune: Path | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16"
    report: Reporting = field(default_factory=Reporting)
    device: str | None = None

    def check(self) -> None:
        """Everything that can be known to be wrong before a weight is loaded, at once."""
        wrong = []
        if (self.budget is None) == (self.blocks is None):
            wrong.append("give either a budget or blocks by hand")
        wrong += self.budget.check() if self.budget else []
        if self.measure == "drop" and not self.reward and self.blocks is None:
            wrong.append("measure: drop needs a reward")
        if self.calibration_prompts < 1:
            wrong.append(f"calibration_prompts must be at least 1, got {self.calibration_prompts}")
        for name, file in self.healing().items():
            if not file.is_file():
                wrong.append(f"{name}: no config {file}")
            elif {name, "analyze"} & set(self.stages):
                wrong += self._check_run(name)
        if self.weights is not None and not (self.weights / LORA_FILE).is_file():
            wrong.append(f"weights: no {LORA_FILE} in {self.weights}")
        if wrong:
            raise UserError("; ".join(wrong))
        families.find(self.pretrained_model_name_or_path)

    def _check_run(self, name: str) -> list[str]:
        try:
            settings, _ = self.run(name)
            settings.check()
        except UserError as error:
            return [f"{name}: {error}"]
        if name == "tune" and settings.lora is not None:
            return [f"tune: {self.tune} trains a LoRA, which cannot be merged into 4 bit; set lora: null"]
        return []

    def at(self, name: str) -> Path:
        return self.output_dir / name

    def healing(self) -> dict[str, Path]:
        """The runs that heal, with their configs."""
        return {run: file for run, file in (("heal", self.heal), ("tune", self.tune)) if file is not None}

    @property
    def source(self) -> str:
        """The original: the model's name, or the folder where the LoRA is merged into it."""
        return self.pretrained_model_name_or_path if self.weights is None else str(self.at("merged"))

    def run(self, name: str, student: str | None = None) -> tuple[TrainConfig, str]:
        """The settings of a run that heals, with what this command knows filled in, and their YAML; until there is a
        ``student`` the original stands in."""
        filled = {
            "pretrained_model_name_or_path": student or self.pretrained_model_name_or_path,
            "objective.init_args.teacher.path": self.source,
            "objective.init_args.plan_path": self.at("plan.json"),
            "output_dir": self.at(name),
            "resume_from_checkpoint": "latest",
        }
        if "analyze" in self.stages or self.at("profile.json").is_file():
            filled["objective.init_args.profile"] = self.at("profile.json")
        words = [word for key, value in filled.items() for word in (f"--{key}", str(value))]
        return parse(TrainConfig, "align.train", None, ["--config", str(self.healing()[name]), *words], leaves=False)


def compress(config: Compress, resolved: str = "") -> Path:
    """Run the stages that are asked for and not done yet; returns ``output_dir``, where ``resolved``, the settings as
    YAML, is kept. Raises :class:`UserError`."""
    config.check()
    prompts = read_prompts(config.prompts)[: config.calibration_prompts]
    stages = [stage for stage in STAGES if stage in config.stages]
    if "quantize" in stages:
        _check_skip(config)
    claim(config.output_dir)
    if resolved:
        write_text(config.at("config.yaml"), resolved)
    original = _original(config)
    if "analyze" in stages and (config.blocks is None or _graded(config)):
        _analyse(config, _family(config, original), prompts)
    if "plan" in stages:
        _decide(config, _family(config, original))
    if "remove" in stages and not config.at("pruned").exists():
        _remove(config, original)
    if "heal" in stages and config.heal is not None and not config.at("healed").exists():
        _heal(config, before="pruned", run="heal", after="healed")
    if "quantize" in stages:
        last = config.at("healed" if config.at("healed").exists() else "pruned")
        for source, name in ((str(last), "int4"), (original, "int4-alone")):
            if not config.at(name).exists():
                _quantise(config, source, name)
    if "tune" in stages and config.tune is not None and not config.at("int4-tuned").exists():
        _heal(config, before="int4", run="tune", after="int4-tuned")
    if "report" in stages:
        known = ("pruned", "healed", "int4-alone", "int4", "int4-tuned")
        folders = {"original": original} | {n: str(config.at(n)) for n in known if config.at(n).exists()}
        print(report(folders, config.report, config.output_dir))
    return config.output_dir


def _device(config: Compress) -> str:
    return config.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _family(config: Compress, original: str) -> Family:
    return families.load(original, device=_device(config))


def _pipeline(source: str, dtype: torch.dtype = torch.float32) -> Any:
    """The whole pipeline; a family may leave out parts that say nothing."""
    from diffusers import DiffusionPipeline

    if reads(locate(source)):
        return load(locate(source), dtype)
    return DiffusionPipeline.from_pretrained(locate(source), dtype=dtype, use_safetensors=True)


def _beside(source: str) -> dict[str, str]:
    """What else a folder says, and should go on saying."""
    path = Path(locate(source)) / SAMPLING_FILE
    return {SAMPLING_FILE: path.read_text()} if path.is_file() else {}


def _original(config: Compress) -> str:
    """The original's name or folder, the LoRA merged into it."""
    from pruning.quantize import merge_lora, save_pipeline

    source = config.pretrained_model_name_or_path
    if config.weights is not None and not config.at("merged").exists():
        pipe = _pipeline(source)
        merge_lora(pipe, config.weights)
        save_pipeline(pipe.to(DTYPES[config.dtype]), config.at("merged"), _beside(source))
    return config.source


def _graded(config: Compress) -> bool:
    """Whether healing wants the profile, though blocks are given by hand."""
    found = (config.run(run)[0].objective for run in config.healing())
    return any(isinstance(objective, Heal) and objective.sensitivity != "none" for objective in found)


def _analyse(config: Compress, family: Family, prompts: Sequence[str]) -> None:
    reward = RewardSum({name: load_reward(name) for name in config.reward}) if config.reward else None
    graph = BlockGraph.of(family.denoiser)
    found = importance.profile(
        family,
        prompts,
        config.at("profile.json"),
        graph.units(config.components),
        reward,
        config.num_inference_steps,
        config.seed,
        config.guidance_scale,
        config.batch_size,
    )
    plots.heatmap(found, config.at("profile.png"))


def _decide(config: Compress, family: Family) -> Plan:
    graph, source = BlockGraph.of(family.denoiser), family.source
    if config.blocks is not None:
        plan = by_hand(graph, config.blocks, source)
    else:
        assert config.budget is not None
        profile = importance.read(config.at("profile.json"))
        units = {key(unit) for unit in graph.units(config.components)}  # the profile may know more
        measured = {unit: v for unit, v in importance.scores(profile, config.measure).items() if unit in units}
        times = importance.seconds(profile)
        plan = to_budget(graph, measured, config.budget, times, config.position_weighting, source)
    before = Plan.load(config.at("plan.json")) if config.at("plan.json").is_file() else None
    if before is not None and before.dropped != plan.dropped and config.at("pruned").exists():
        raise UserError(
            f"{config.output_dir} was pruned by another plan ({', '.join(before.dropped)}); name another output_dir"
        )
    plan.save(config.at("plan.json"))
    plan.picture(config.at("plan.png"))
    print(plan.text())
    return plan


def _remove(config: Compress, original: str) -> None:
    from pruning.quantize import save_pipeline

    plan, pipe, name = Plan.load(config.at("plan.json")), _pipeline(original), families.find(original).denoiser_name
    graph = BlockGraph.of(getattr(pipe, name))
    plan.fits(graph)
    graph.remove(plan.dropped)
    card = _card(config, plan, "pruned, not healed")
    save_pipeline(pipe.to(DTYPES[config.dtype]), config.at("pruned"), _beside(original) | {"README.md": card})


def _heal(config: Compress, *, before: str, run: str, after: str) -> None:
    """The pipeline ``after`` is ``before``, taught by the original in the run ``run``."""
    from align.training.trainer import train
    from pruning.quantize import merge_lora, save_pipeline

    student, folder = config.at(before), config.at(run)
    settings, resolved = config.run(run, str(student))
    train(settings, resolved)
    lora, name = (folder / LORA_FILE).is_file(), families.find(str(student)).denoiser_name
    pipe = _pipeline(str(student), torch.float32 if lora else DTYPES[config.dtype])
    if lora:
        merge_lora(pipe, folder)
        pipe.to(DTYPES[config.dtype])
    else:
        pipe.register_modules(**{name: load(folder / name, DTYPES[config.dtype])})
    card = _card(config, Plan.load(config.at("plan.json")), f"{before}, then healed by `{config.healing()[run]}`")
    save_pipeline(pipe, config.at(after), _beside(config.source) | {"README.md": card})
    shutil.rmtree(folder / name, ignore_errors=True)  # the healed pipeline has the same weights


def _check_skip(config: Compress) -> None:
    """Refuse a skip list that names nothing before a weight is loaded; of a model of the hub, when it is quantised."""
    from pruning.loading import outline

    folder = Path(locate(config.pretrained_model_name_or_path))
    if folder.is_dir():
        parts = [file.parent.name for file in sorted(folder.glob("*/config.json"))]
        _all_named(config, [outline(folder / part) for part in _quantised(config, str(folder), parts)])


def _all_named(config: Compress, models: Sequence[Any]) -> None:
    from pruning.quantize import unnamed

    if idle := unnamed(config.quantize, *models):
        kinds = ", ".join(dict.fromkeys(type(model).__name__ for model in models))
        raise UserError(f"quantize.skip: {', '.join(map(repr, idle))} names no Linear of {kinds}")


def _quantised(config: Compress, source: str, components: Sequence[str]) -> list[str]:
    """Which of a pipeline's components are put in 4 bit."""
    texts = [part for part in components if part.startswith("text_encoder")]
    return [families.find(source).denoiser_name, *(texts if config.text_encoders else [])]


def _quantise(config: Compress, source: str, name: str) -> None:
    from pruning.quantize import quantize, save_pipeline, settings_for

    pipe = _pipeline(source, DTYPES[config.dtype])
    parts = [part for part, component in pipe.components.items() if component is not None]
    models = [getattr(pipe, part) for part in _quantised(config, source, parts)]
    if name == "int4-alone":
        _all_named(config, models)  # what is pruned may lack what an entry names
    said = []
    for model in models:
        said.append(str(quantize(model, settings_for(model, config.quantize))))
        print(said[-1].splitlines()[0])
    plan = Plan.load(config.at("plan.json")) if name == "int4" else None
    text = _card(config, plan, "4-bit NF4 weights (bitsandbytes)") + "\n```\n" + "\n".join(said) + "\n```\n"
    save_pipeline(pipe, config.at(name), _beside(source) | {"README.md": text})


def _card(config: Compress, plan: Plan | None, what: str) -> str:
    base = config.pretrained_model_name_or_path
    lines = [f"---\nbase_model: {base}\nlibrary_name: diffusers\npipeline_tag: text-to-image\n---\n"]
    lines += [f"# {base}, compressed by t2i-align\n", f"{what[0].upper()}{what[1:]}.\n"]
    if plan is not None:
        lines.append(f"Removed from the denoiser, by the original's names: {', '.join(plan.dropped)}.\n")
        lines.append(f"{plan.after:,} of {plan.before:,} parameters are left.\n")
    lines.append(
        '```python\nimport pruning\n\npipe = pruning.load("this folder")  # on a GPU stock diffusers does\n```\n'
    )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    config, resolved = parse(Compress, "pruning.compress", __doc__, argv)
    return command(lambda: compress(config, resolved))


if __name__ == "__main__":
    sys.exit(main())
