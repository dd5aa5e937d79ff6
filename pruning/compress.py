"""Make an aligned pipeline small: analyze -> plan -> remove -> heal -> quantize -> tune -> report.

    python -m pruning.compress --config configs/compress_shapes_sd3.yaml
    python -m pruning.compress --config configs/compress_shapes_sd3.yaml --stages [report]

Every stage leaves its result in ``output_dir`` and is skipped where that is there already, so that a killed run goes on
and a stage can be run by itself: ``profile.json`` (``.png``), ``plan.json`` (``.png``), the pipelines ``pruned``,
``healed``, ``int4`` (the last of these, quantised), ``int4-alone`` (the original, quantised) and ``int4-tuned``
(``int4`` with its biases healed), and ``report.json``, ``report.md``, ``gallery.png``, ``gallery.html``. Results that
other settings made are refused, or made anew with ``--overwrite_output_dir`` (:mod:`pruning.results`). Pipelines of
whole-block plans load with stock ``DiffusionPipeline.from_pretrained``, quantised ones where there is a GPU;
:func:`pruning.load` reads all of them anywhere.
"""

from __future__ import annotations

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
from align.training.publish import publish
from pruning import importance, load, plots, reads
from pruning.graph import BlockGraph
from pruning.plan import Plan, from_ranges, key, parse_ranges, require_reachable, to_budget
from pruning.report import report
from pruning.results import FILES, MAKES, Results, recipes
from pruning.saving import card, sampling_settings, save_pipeline
from pruning.settings import DTYPES, STAGES, Compress, Stage
from rewards import RewardSum
from rewards.common.command import exit_status
from rewards.common.device import pick_device
from rewards.common.files import discard, locked, sweep

PIPELINES = ("pruned", "healed", "int4-alone", "int4", "int4-tuned")  # in the order of the report


def compress(config: Compress, resolved: str = "") -> Path:
    """Run the stages that are asked for and not done yet; returns ``output_dir``, where ``resolved``, the settings as
    YAML, is kept. Raises :class:`UserError`, before anything is written where that can be known, and where
    ``output_dir`` holds results of other settings."""
    config.check()
    prompts = read_prompts(config.prompts)[: config.calibration_prompts]
    stages = [stage for stage in STAGES if stage in config.stages]
    results = Results(config.output_dir, recipes(config, prompts), resolved)
    stale = results.require_fresh(config.overwrite_output_dir)
    _require_needed(config, results, stages, stale)
    _check_model(config, stages)
    repository = config.repository(config.output_dir)
    with locked(config.output_dir):
        sweep(config.output_dir)
        results.discard(stale)
        for stage in ("merge", *stages):
            _run(stage, config, results, prompts)
        if repository is not None:
            publish(repository, config.at(_last(results)))
    return config.output_dir


def _last(results: Results) -> str:
    """The last pipeline on the way, which is what the user wanted. Raises :class:`UserError` where there is none."""
    made = [name for name in PIPELINES if name != "int4-alone" and name in results.wanted and results.whole(name)]
    if not made:
        raise UserError(f"push_to_hub: {results.folder} has no pipeline yet; run the stages up to remove or quantize")
    return made[-1]


def _run(stage: str, config: Compress, results: Results, prompts: Sequence[str]) -> None:
    """One stage, where its result is not there yet."""
    source = config.source
    if stage == "merge" and config.weights is not None and not results.whole("merged"):
        _merge(config, results)
    elif stage == "analyze" and (config.blocks is None or config.heals_by_profile()):
        _analyze(config, _family(config, source), prompts, results)
    elif stage == "plan":
        _decide(config, results)
    elif stage == "remove" and not results.whole("pruned"):
        _remove(config, results)
    elif stage == "heal" and config.heal is not None and not results.whole("healed"):
        _heal(config, results, before="pruned", run="heal", after="healed")
    elif stage == "quantize":
        for origin, name in ((str(config.at(config.smallest)), "int4"), (source, "int4-alone")):
            if not results.whole(name):
                _quantize(config, results, origin, name)
    elif stage == "tune" and config.tune is not None and not results.whole("int4-tuned"):
        _heal(config, results, before="int4", run="tune", after="int4-tuned")
    elif stage == "report":
        names = [n for n in PIPELINES if n in results.wanted and results.whole(n)]
        folders = {"original": source} | {name: str(config.at(name)) for name in names}
        results.keep_settings()
        print(report(folders, config.report, config.output_dir))


def _require_needed(config: Compress, results: Results, stages: Sequence[Stage], stale: Sequence[str]) -> None:
    """Refuse stages whose input is neither there nor made by an earlier one of ``stages``."""
    profiled = (config.blocks is None, "plan"), (config.heals_by_profile(), "heal"), (config.heals_by_profile(), "tune")
    needs: dict[str, list[str]] = {stage: ["profile"] for by_profile, stage in profiled if by_profile}
    for stage, result in (
        ("remove", "plan"), ("heal", "plan"), ("heal", "pruned"), ("quantize", "plan"), ("quantize", config.smallest),
        ("tune", "plan"), ("tune", "int4"),
    ):  # fmt: skip
        needs.setdefault(stage, []).append(result)
    there = {name for name in FILES if results.whole(name) and name not in stale}
    wrong = []
    for stage in stages:
        if stage in config.healing() or stage not in ("heal", "tune"):
            wrong += [f"{stage} needs {name}" for name in needs.get(stage, []) if name not in there]
        there |= set(MAKES[stage]) & results.wanted.keys()
    if "report" in stages and not there & set(PIPELINES):
        wrong.append(f"report needs one of {', '.join(PIPELINES)}")
    if wrong:
        raise UserError(
            f"{'; '.join(wrong)}, which {config.output_dir} does not have: run the stages before as well, of "
            f"{', '.join(STAGES)}"
        )
    for name, read in (("profile", importance.read), ("plan", Plan.load)):
        if results.whole(name) and name not in stale:
            read(results.path(name))  # a broken one is refused before anything is done


def _family(config: Compress, original: str) -> Family:
    return families.load(original, device=pick_device(config.device))


def _pipeline(source: str, dtype: torch.dtype = torch.float32) -> Any:
    """The whole pipeline; a family may leave out parts that say nothing."""
    from diffusers import DiffusionPipeline

    if reads(locate(source)):
        return load(locate(source), dtype)
    return DiffusionPipeline.from_pretrained(locate(source), dtype=dtype, use_safetensors=True)


def _save(config: Compress, results: Results, pipe: Any, name: str, what: str, details: str = "") -> None:
    """Keep the pipeline ``name``, which is ``what``, with its card."""
    results.begin(name)
    plan = None if name == "int4-alone" else Plan.load(config.at("plan.json"))
    text = card(config.pretrained_model_name_or_path, plan, what, config.at(name), DTYPES[config.dtype], details)
    save_pipeline(pipe, config.at(name), sampling_settings(config.source) | {"README.md": text})


def _merge(config: Compress, results: Results) -> None:
    """The original with the LoRA in it."""
    from pruning.quantize import merge_lora

    assert config.weights is not None
    source = config.pretrained_model_name_or_path
    pipe = _pipeline(source)
    merge_lora(pipe, config.weights)
    results.begin("merged")
    save_pipeline(pipe.to(DTYPES[config.dtype]), config.at("merged"), sampling_settings(source))


def _analyze(config: Compress, family: Family, prompts: Sequence[str], results: Results) -> None:
    reward = RewardSum.of(config.reward) if config.reward else None
    sampling = config.num_inference_steps, config.guidance_scale, config.seed, config.batch_size
    units = BlockGraph.of(family.denoiser).units(config.components)
    calibration = importance.Calibration(prompts, *sampling)
    results.begin("profile")
    profile = importance.profile(family, calibration, config.at("profile.json"), units, reward)
    plots.heatmap(profile, config.at("profile.png"))


def _decide(config: Compress, results: Results) -> None:
    path = config.at("plan.json")
    if not path.is_file():
        family = _family(config, config.source)
        graph, source = BlockGraph.of(family.denoiser), family.source
        if config.blocks is not None:
            plan = from_ranges(graph, config.blocks, source)
        else:
            assert config.budget is not None
            profile = importance.read(config.at("profile.json"))
            units = {key(unit) for unit in graph.units(config.components)}  # the profile may know more
            measured = {unit: v for unit, v in importance.scores(profile, config.measure).items() if unit in units}
            times = importance.seconds(profile)
            plan = to_budget(graph, measured, config.budget, times, config.position_weighting, source)
        results.begin("plan")
        plan.save(path)
    plan = Plan.load(path)
    plots.stack(plan, config.at("plan.png"))
    print(plan.text())


def _remove(config: Compress, results: Results) -> None:
    original = config.source
    plan, pipe = Plan.load(config.at("plan.json")), _pipeline(original)
    graph = BlockGraph.of(getattr(pipe, families.find(original).denoiser_name))
    plan.fits(graph)
    graph.remove(plan.dropped)
    _save(config, results, pipe.to(DTYPES[config.dtype]), "pruned", "pruned, not healed")


def _heal(config: Compress, results: Results, *, before: str, run: str, after: str) -> None:
    """The pipeline ``after`` is ``before``, taught by the original in the run ``run``."""
    from align.training.trainer import train
    from pruning.quantize import merge_lora

    student, folder, dtype = str(config.at(before)), config.at(run), DTYPES[config.dtype]
    results.begin(after)  # its checkpoints are of these settings too
    train(*config.run(run, student))
    lora, name = (folder / LORA_FILE).is_file(), families.find(student).denoiser_name
    pipe = _pipeline(student, torch.float32 if lora else dtype)
    if lora:
        merge_lora(pipe, folder)
        pipe.to(dtype)
    else:
        pipe.register_modules(**{name: load(folder / name, dtype)})
    _save(config, results, pipe, after, f"{before}, then healed by {config.healing()[run]}")
    discard(folder / name)  # the healed pipeline has the same weights


def _check_model(config: Compress, stages: Sequence[Stage]) -> None:
    """Refuse blocks, a budget and a skip list that do not fit the model before a weight is loaded; of a model of the
    hub, when they are used."""
    from pruning.loading import outline

    folder = Path(locate(config.pretrained_model_name_or_path))
    if not folder.is_dir():
        return
    if "plan" in stages:
        graph = BlockGraph.of(outline(folder / families.find(str(folder)).denoiser_name))
        if config.blocks is not None:
            graph.need(parse_ranges(config.blocks, graph))
        elif config.budget is not None:
            require_reachable(graph, config.budget, config.components)
    if "quantize" in stages:
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


def _quantize(config: Compress, results: Results, source: str, name: str) -> None:
    from pruning.quantize import quantize, settings_for

    pipe = _pipeline(source, DTYPES[config.dtype])
    parts = [part for part, component in pipe.components.items() if component is not None]
    models = [getattr(pipe, part) for part in _components_to_quantize(config, source, parts)]
    if name == "int4-alone":
        _all_named(config, models)  # what is pruned may lack what an entry names
    reports = [str(quantize(model, settings_for(model, config.quantize))) for model in models]
    print(*(text.splitlines()[0] for text in reports), sep="\n")
    _save(config, results, pipe, name, "4-bit NF4 weights (bitsandbytes)", "\n".join(reports))


@exit_status
def main(argv: Sequence[str] | None = None) -> int:
    config, resolved = parse(Compress, "pruning.compress", __doc__, argv)
    return command(lambda: _until_stopped(config, resolved), argv)


def _until_stopped(config: Compress, resolved: str) -> int:
    from align.training.preemption import STATUS, Preempted

    try:
        compress(config, resolved)
    except Preempted:  # healing saved a checkpoint
        print(f"stopped by a signal; the same command goes on (status {STATUS})", file=sys.stderr)
        return STATUS
    return 0


if __name__ == "__main__":
    sys.exit(main())
