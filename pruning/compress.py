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
from pathlib import Path
from typing import Any

import torch

from align import families
from align.common.assets import locate
from align.common.command import command, parse
from align.common.errors import UserError
from align.data.prompts import read_prompts
from align.families import LORA_FILE, Family
from pruning import importance, load, plots, reads
from pruning.distill import Heal
from pruning.graph import BlockGraph
from pruning.plan import Plan, from_ranges, key, to_budget
from pruning.report import report
from pruning.saving import card, sampling_settings, save_pipeline
from pruning.settings import DTYPES, STAGES, Compress
from rewards import RewardSum
from rewards.common.files import claim, write_text


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
    if "analyze" in stages and (config.blocks is None or _heals_by_profile(config)):
        _analyze(config, _family(config, original), prompts)
    if "plan" in stages:
        _decide(config, _family(config, original))
    if "remove" in stages and not config.at("pruned").exists():
        _remove(config, original)
    if "heal" in stages and config.heal is not None and not config.at("healed").exists():
        _heal(config, before="pruned", run="heal", after="healed")
    if "quantize" in stages:
        smallest = config.at("healed" if config.at("healed").exists() else "pruned")
        for source, name in ((str(smallest), "int4"), (original, "int4-alone")):
            if not config.at(name).exists():
                _quantize(config, source, name)
    if "tune" in stages and config.tune is not None and not config.at("int4-tuned").exists():
        _heal(config, before="int4", run="tune", after="int4-tuned")
    if "report" in stages:
        known = ("pruned", "healed", "int4-alone", "int4", "int4-tuned")
        folders = {"original": original} | {n: str(config.at(n)) for n in known if config.at(n).exists()}
        print(report(folders, config.report, config.output_dir))
    return config.output_dir


def _family(config: Compress, original: str) -> Family:
    return families.load(original, device=config.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _pipeline(source: str, dtype: torch.dtype = torch.float32) -> Any:
    """The whole pipeline; a family may leave out parts that say nothing."""
    from diffusers import DiffusionPipeline

    if reads(locate(source)):
        return load(locate(source), dtype)
    return DiffusionPipeline.from_pretrained(locate(source), dtype=dtype, use_safetensors=True)


def _save(config: Compress, pipe: Any, name: str, what: str, details: str = "", *, whole: bool = False) -> None:
    """Keep the pipeline ``name``, which is ``what``, with its card; ``whole`` is one that no plan applies to."""
    plan = None if whole else Plan.load(config.at("plan.json"))
    text = card(config.pretrained_model_name_or_path, plan, what, config.at(name), DTYPES[config.dtype], details)
    save_pipeline(pipe, config.at(name), sampling_settings(config.source) | {"README.md": text})


def _original(config: Compress) -> str:
    """The original's name or folder, the LoRA merged into it."""
    from pruning.quantize import merge_lora

    source = config.pretrained_model_name_or_path
    if config.weights is not None and not config.at("merged").exists():
        pipe = _pipeline(source)
        merge_lora(pipe, config.weights)
        save_pipeline(pipe.to(DTYPES[config.dtype]), config.at("merged"), sampling_settings(source))
    return config.source


def _heals_by_profile(config: Compress) -> bool:
    """Whether healing wants the profile, though blocks are given by hand."""
    objectives = (config.run(run)[0].objective for run in config.healing())
    return any(isinstance(objective, Heal) and objective.sensitivity != "none" for objective in objectives)


def _analyze(config: Compress, family: Family, prompts: Sequence[str]) -> None:
    reward = RewardSum.of(config.reward) if config.reward else None
    sampling = config.num_inference_steps, config.guidance_scale, config.seed, config.batch_size
    units = BlockGraph.of(family.denoiser).units(config.components)
    calibration = importance.Calibration(prompts, *sampling)
    profile = importance.profile(family, calibration, config.at("profile.json"), units, reward)
    plots.heatmap(profile, config.at("profile.png"))


def _decide(config: Compress, family: Family) -> None:
    graph, source, path = BlockGraph.of(family.denoiser), family.source, config.at("plan.json")
    if config.blocks is not None:
        plan = from_ranges(graph, config.blocks, source)
    else:
        assert config.budget is not None
        profile = importance.read(config.at("profile.json"))
        units = {key(unit) for unit in graph.units(config.components)}  # the profile may know more
        measured = {unit: v for unit, v in importance.scores(profile, config.measure).items() if unit in units}
        times = importance.seconds(profile)
        plan = to_budget(graph, measured, config.budget, times, config.position_weighting, source)
    before = Plan.load(path) if path.is_file() else plan
    if before.dropped != plan.dropped and config.at("pruned").exists():
        raise UserError(
            f"{config.output_dir} was pruned by another plan ({', '.join(before.dropped)}); name another output_dir"
        )
    plan.save(path)
    plots.stack(plan, config.at("plan.png"))
    print(plan.text())


def _remove(config: Compress, original: str) -> None:
    plan, pipe = Plan.load(config.at("plan.json")), _pipeline(original)
    graph = BlockGraph.of(getattr(pipe, families.find(original).denoiser_name))
    plan.fits(graph)
    graph.remove(plan.dropped)
    _save(config, pipe.to(DTYPES[config.dtype]), "pruned", "pruned, not healed")


def _heal(config: Compress, *, before: str, run: str, after: str) -> None:
    """The pipeline ``after`` is ``before``, taught by the original in the run ``run``."""
    from align.training.trainer import train
    from pruning.quantize import merge_lora

    student, folder, dtype = str(config.at(before)), config.at(run), DTYPES[config.dtype]
    train(*config.run(run, student))
    lora, name = (folder / LORA_FILE).is_file(), families.find(student).denoiser_name
    pipe = _pipeline(student, torch.float32 if lora else dtype)
    if lora:
        merge_lora(pipe, folder)
        pipe.to(dtype)
    else:
        pipe.register_modules(**{name: load(folder / name, dtype)})
    _save(config, pipe, after, f"{before}, then healed by {config.healing()[run]}")
    shutil.rmtree(folder / name, ignore_errors=True)  # the healed pipeline has the same weights


def _check_skip(config: Compress) -> None:
    """Refuse a skip list that names nothing before a weight is loaded; of a model of the hub, when it is quantised."""
    from pruning.loading import outline

    folder = Path(locate(config.pretrained_model_name_or_path))
    if folder.is_dir():
        parts = [file.parent.name for file in sorted(folder.glob("*/config.json"))]
        _all_named(config, [outline(folder / part) for part in _components_to_quantize(config, str(folder), parts)])


def _all_named(config: Compress, models: Sequence[Any]) -> None:
    from pruning.quantize import unnamed

    if idle := unnamed(config.quantize, *models):
        kinds = ", ".join(dict.fromkeys(type(model).__name__ for model in models))
        raise UserError(f"quantize.skip: {', '.join(map(repr, idle))} names no Linear of {kinds}")


def _components_to_quantize(config: Compress, source: str, components: Sequence[str]) -> list[str]:
    """Which of a pipeline's components are put in 4 bit."""
    texts = [part for part in components if part.startswith("text_encoder")]
    return [families.find(source).denoiser_name, *(texts if config.text_encoders else [])]


def _quantize(config: Compress, source: str, name: str) -> None:
    from pruning.quantize import quantize, settings_for

    pipe, whole = _pipeline(source, DTYPES[config.dtype]), name == "int4-alone"
    parts = [part for part, component in pipe.components.items() if component is not None]
    models = [getattr(pipe, part) for part in _components_to_quantize(config, source, parts)]
    if whole:
        _all_named(config, models)  # what is pruned may lack what an entry names
    reports = [str(quantize(model, settings_for(model, config.quantize))) for model in models]
    print(*(text.splitlines()[0] for text in reports), sep="\n")
    _save(config, pipe, name, "4-bit NF4 weights (bitsandbytes)", "\n".join(reports), whole=whole)


def main(argv: Sequence[str] | None = None) -> int:
    config, resolved = parse(Compress, "pruning.compress", __doc__, argv)
    return command(lambda: compress(config, resolved), argv)


if __name__ == "__main__":
    sys.exit(main())
