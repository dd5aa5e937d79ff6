"""A public bench: its prompts drawn by its protocol, scored, and set beside what others have reported.

    python -m align.bench --list
    python -m align.bench partiprompts --models stabilityai/sdxl-turbo --prompts PartiPrompts.tsv --dry_run
    python -m align.bench wise-verified --models outputs/mine --prompts WISE/data_verified \\
        --reward_args '{url: http://localhost:8000/v1, model: Qwen3.5-35B-A3B}'
    accelerate launch -m align.bench shapes --models [shapes-sd,outputs/demo]

Writes into ``output_dir``: ``images/MODEL/``, ``scores/``, ``bench.json``, ``bench.md``, ``chart.png`` (every model and
task, with intervals), ``gallery.html``; of GenEval also ``geneval/MODEL/``, which the official scorer reads. The same
command goes on after a kill. ``--shard 2/8`` draws and scores the second of eight shares, on a machine that sees the
same folder; the first writes the results.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from align import families
from align.common.assets import TakesPaths
from align.common.command import command, parse
from align.common.errors import UserError, require_at_least
from align.common.provenance import provenance
from align.common.resolution import Resolution, sides
from align.evaluate import is_pipeline, names, open_model
from align.evaluation import bench_spec as benches
from align.evaluation.bar_chart import chart
from align.evaluation.bench_cost import pace
from align.evaluation.bench_prompts import read_rows
from align.evaluation.bench_report import first_pictures, noise_pictures, panels, require_heed, results, write_geneval
from align.evaluation.bench_spec import BenchSpec
from align.evaluation.compare import Bench, Compared, Comparison, depends, draw_and_compare, table
from align.evaluation.gallery import save_png
from align.evaluation.intervals import task_intervals
from align.evaluation.pictures import Drawing
from align.families import Family
from align.families.blank import blank
from align.families.folder import Unsupported
from align.training.ghost import Ghost
from align.training.model_card import add_section
from align.training.run_folder import base_of
from rewards import RewardConfig, parse_rewards
from rewards.common.command import exit_status
from rewards.common.device import Launched, pick_device
from rewards.common.files import locked, write_text
from rewards.common.page import escape


@dataclass(kw_only=True)
class BenchRun(TakesPaths):
    """Run a bench.

    Args:
        name: the bench, or a YAML file of one; also the first word of the command.
        models: runs, LoRA folders or files, pipelines, hub ids; the first is the baseline.
        base: the pipeline that LoRA files go into; a run folder knows its own.
        prompts: the bench's prompt file, or a folder of one file a task; null is its hub id.
        reward: other scorers than the bench's, or its own with arguments: ``HPSv2:model=/models/hpsv2``.
        reward_args: arguments of all of the bench's scorers: ``{url: http://localhost:8000/v1, model: NAME}``.
        output_dir: where to write; default ``outputs/bench/NAME``.
        num_inference_steps: null is the bench's; another is said beside the figures, as is every other difference.
        guidance_scale: null is the bench's.
        samples_per_prompt: null is the bench's.
        resolution: null is the bench's.
        max_prompts: use evenly spaced prompts, so many at most.
        seed: another one is other noise.
        batch_size: pictures drawn at once.
        device: where to run; null takes a GPU where there is one.
        mixed_precision: of all models.
        shard: ``i/n``, the i-th of n shares.
        dry_run: say what would be drawn, with the network evaluations, and stop.
        measure: with ``dry_run``: also load each model and the scorers, draw and score a batch twice, and say how long
            all of it would take.
    """

    name: str = ""
    models: list[str] | str = field(default_factory=list)
    base: str | None = None
    prompts: str | None = None
    reward: list[RewardConfig] = field(default_factory=list)
    reward_args: dict[str, Any] | None = None
    output_dir: Path | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    samples_per_prompt: int | None = None
    resolution: Resolution = None
    max_prompts: int | None = None
    seed: int = 0
    batch_size: int = 16
    device: str | None = None
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    shard: str | None = None
    dry_run: bool = False
    measure: bool = False


def comparison(config: BenchRun, spec: BenchSpec) -> Comparison:
    """The bench's protocol but for what ``config`` sets."""
    given, official = config, spec.protocol
    if config.reward and config.reward_args:
        raise UserError("reward_args are of the bench's own scorers; give those of --reward with it: NAME:KEY=VALUE")
    rewards = config.reward or parse_rewards(list(spec.reward), weighted=False)
    return Comparison(
        reward=[replace(one, args=one.args | (config.reward_args or {})) for one in rewards],
        samples_per_prompt=given.samples_per_prompt or official.samples_per_prompt,
        num_inference_steps=given.num_inference_steps or official.num_inference_steps,
        guidance_scale=official.guidance_scale if given.guidance_scale is None else given.guidance_scale,
        seed=config.seed,
        batch_size=config.batch_size,
        max_prompts=config.max_prompts,
    )


def share(config: BenchRun) -> Launched:
    """Which part this process does: of a launch, or by ``shard``. Raises :class:`UserError`."""
    here = Launched.here()
    if config.shard is None:
        return here
    match = re.fullmatch(r"(\d+)/(\d+)", config.shard)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"shard is {config.shard!r}; expected i/n with i from 1 to n, such as 2/8")
    if here.world > 1:
        raise UserError("shard is for machines that are started one by one; accelerate launch shares among its own")
    return Launched(int(match[1]) - 1, 0, int(match[2]))


def unlike(config: BenchRun, spec: BenchSpec, settings: Comparison, resolution: Resolution) -> list[str]:
    """Where the run's protocol and scorers are not the bench's."""
    used = {
        "num_inference_steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
        "samples_per_prompt": settings.samples_per_prompt,
        "resolution": resolution,
    }
    told = benches.differences(spec, used)
    if config.reward_args:
        told.append(f"scorers given {', '.join(f'{key} {value}' for key, value in config.reward_args.items())}")
    if not config.reward:
        return [*told, *spec.unlike]
    named = [one.name for one in parse_rewards(list(spec.reward))]
    given = [one.name for one in config.reward]
    return told + ([f"scored by {', '.join(given)}, {', '.join(named)} in the bench"] if given != named else [])


def evaluations(source: str, drawing: Drawing) -> int | None:
    """Network evaluations of a picture by the pipeline ``source``, sampler steps and twice as many where guidance asks
    twice; of it the config files alone are read, and None where they do not say it."""
    try:
        with Ghost().present():
            family = blank(source)
            drawn = drawing.resolved(family)
    except Unsupported:
        return None
    return int(drawn["num_inference_steps"]) * family.evaluations(drawn["guidance_scale"])


def notes_of(report: Mapping[str, Any]) -> list[str]:
    """What the figures depend on, and where that is not the bench's."""
    return [depends(report), *(f"not the bench's: {line}" for line in report["differences"])]


def write(spec: BenchSpec, bench: Bench, compared: Compared, report: dict[str, Any], output: Path) -> str:
    """Everything but pictures and scores; returns what ``bench.md`` holds."""
    samples = compared.settings.samples_per_prompt
    if spec.layout == "geneval":
        for label, pictured in compared.images.items():
            write_geneval(output / "geneval" / label, pictured, compared.scores[label], samples)
    for name, entry in report["rewards"].items():
        if bench.tasks is not None:
            values = {model: scores[name] for model, scores in compared.scores.items()}
            entry["task_ci"] = task_intervals(values, bench.tasks, samples)
    tables = [results(spec, report), table(report)]
    drawn = chart(panels(spec, report), f"{spec.title}: means and 95 % intervals")
    save_png(drawn, output / "chart.png")
    compared.show(output, spec.title, tables, [drawn])
    text = "\n\n".join(
        [f"# {spec.title}", spec.about, *(each.markdown() for each in tables), "; ".join(notes_of(report))]
    )
    write_text(output / "bench.md", text + "\n")
    write_text(output / "bench.json", json.dumps(report | provenance(), indent=2) + "\n")
    return text


def run(config: BenchRun) -> dict[str, Any] | None:
    """Draw, score, write; returns what ``bench.json`` holds, in the first process."""
    sides(config.resolution)
    require_at_least(1, config, "samples_per_prompt", "num_inference_steps", "max_prompts", "batch_size")
    spec, launched = benches.load_spec(config.name), share(config)
    sources = [Path(source) for source in ([config.models] if isinstance(config.models, str) else config.models)]
    if not sources:
        raise UserError("say which models: --models shapes-sd, or --models [BASE,outputs/run]")
    resolution = spec.protocol.resolution if config.resolution is None else config.resolution
    settings, device = comparison(config, spec), pick_device(config.device, launched.local)
    rows, told = read_rows(spec, config.prompts)
    needed = not config.dry_run or config.measure
    bench = settings.of(rows, spec.task_column, device, spec.mean) if needed else None
    total, count = len(rows), min(len(rows), config.max_prompts or len(rows))
    told += unlike(config, spec, settings, resolution) + ([f"{count} of {total} prompts"] if count < total else [])
    pictures = count * settings.samples_per_prompt
    print(f"{spec.title}: {count} prompts x {settings.samples_per_prompt} = {pictures} pictures of each of "
          f"{len(sources)} models; prompts {spec.prompts.licence}, from {spec.prompts.where}")  # fmt: skip
    print(f"protocol: {'not the bench: ' + '; '.join(told) if told else 'as the bench has it'}")
    output, dtype = config.output_dir or Path("outputs/bench") / spec.name, families.DTYPES[config.mixed_precision]
    for source in sources:
        if is_pipeline(source):
            families.find(str(source))
        elif config.base is None:
            base_of(source)
    labels = names(sources, ("base",) if len(sources) > 1 else ())
    loaders = [partial(open_model, source, config.base, dtype, device) for source in sources]
    if config.dry_run:
        drawing = Drawing(settings.num_inference_steps, settings.guidance_scale, resolution)
        for label, source, load in zip(labels, sources, loaders, strict=True):
            each = evaluations(str(source) if is_pipeline(source) else config.base or base_of(source), drawing)
            words = f"{pictures * each:,} network evaluations, {each} a picture" if each else "evaluations not known"
            print(f"{label}: {pictures:,} pictures, {words}")
            if bench is not None:
                print(f"{label}: {pace(load(), settings, bench, resolution).told(pictures, device)}")
        return None
    assert bench is not None
    if not launched.rank:
        require_heed(spec, bench, noise_pictures(settings.wanted(bench.rows)))

    def models() -> Iterator[tuple[str, Family]]:
        for label, load in zip(labels, loaders, strict=True):
            yield label, load()

    with locked(output) if launched.rank == 0 else contextlib.nullcontext():  # a shard passes by the first one's
        compared = draw_and_compare(models(), settings, bench, output, resolution, launched)
        if compared is None:
            return None
        require_heed(spec, bench, first_pictures(compared.images[labels[0]]))
        report = compared.report | {
            "bench": spec.name,
            "prompts": len(bench.rows),
            "samples_per_prompt": settings.samples_per_prompt,
            "noise": settings.noise,
            "seed": settings.seed,
            "scorers": [reward.record() for reward in settings.reward],
            "differences": told,
            "published": [vars(row) for row in spec.published],
            "gallery": str(output / "gallery.html"),
        }
        text = write(spec, bench, compared, report, output)
        figures = "\n\n".join([results(spec, report).markdown(), *map(escape, notes_of(report))])
        for source in sources:  # a run's card has its figures with their intervals
            if not is_pipeline(source):
                add_section(source / "README.md", f"Bench: {escape(spec.title)}", figures)
    print(text)
    return report


@exit_status
def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if "--list" in words:
        for name in benches.names():
            spec = benches.load_spec(name)
            print(f"{name:<16} {spec.title}: {spec.about}")
        return 0
    if words and not words[0].startswith("-"):
        words = [f"--name={words[0]}", *words[1:]]
    config, _ = parse(BenchRun, "align.bench", __doc__, words)

    def start() -> None:
        report = run(config)
        if report is not None:
            print(
                json.dumps({"bench": report["bench"], "report": str(Path(report["gallery"]).with_name("bench.json"))})
            )

    return command(start, words)


if __name__ == "__main__":
    sys.exit(main())
