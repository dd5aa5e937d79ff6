"""The page on which people choose between pictures; what they say is a file that ``align.train`` reads.

    python -m align.label shapes-preferences --split heldout                  # a preference set, to check or relabel
    python -m align.label outputs/round1 --output outputs/round1.jsonl        # what align.rollout drew
    python -m align.label my_images/ --prompts prompts.txt --task thumbs
    python -m align.label --models shapes-sd outputs/run --prompts my_prompts.txt   # drawn while people choose
    python -m align.label export answers.jsonl --to pickapic --output pairs.parquet

``--task`` is ``pair`` (1, 2, tie, both bad), ``best`` (a grid: the best, or an order), ``thumbs`` (good or bad) or
``score`` (1 to 5). Every answer is a line of ``--output``, on the disk before the page hears so; killed and called
again it goes on. Addresses: ``/`` who is choosing, ``/annotate/NAME`` a person's page, ``/summary``. It listens on this
machine alone unless ``--host`` says otherwise, and then asks for a token, from ``--token_file`` or ``T2I_ALIGN_TOKEN``:
it prints a link for each of ``--annotators``. It speaks plain HTTP: over a network that others read, put a proxy with
TLS before it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from align.common.command import command, parse
from align.common.errors import UserError, require_at_least
from align.common.resolution import Resolution, sides
from align.labelling.items import MOST, Source, Task, relative, uncertainty
from align.labelling.writers import Format, export
from rewards import RewardConfig
from rewards.common.command import exit_status, status
from rewards.common.device import pick_device
from rewards.serve import token_from

if TYPE_CHECKING:
    from align.evaluation.pictures import Drawing
    from align.families import Family
    from align.labelling.drawing import Background
    from align.labelling.server import Server

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Label:
    """Ask people.

    Args:
        source: a rollout folder, a preference set in any layout, or a folder of images with prompts; also the first
            word of the command. Not with ``models``.
        models: pipelines, runs, LoRA folders or files, that draw while people choose.
        prompts: of ``models``; or of a folder of images, one a line in the order of their names.
        output: the answers, JSONL; pictures that lie inside tables are written beside it.
        task: what people are asked.
        k: pictures of a grid at most; null is all of a prompt, up to 9.
        limit: use the first so many items.
        seed: names sides, order, and what comes again.
        per_item: how many people each item is for.
        repeat: share of each person's items that come again, to see whether they say the same.
        swap: share that comes again in the other order.
        first: by chance, or first what rewards tell little of or contradict each other on (``scores``, ``reward``).
        scores: what ``rewards.score`` wrote of these pictures, or JSONL or CSV; a rollout has its own.
        reward: score the pictures first, by one or two rewards.
        annotators: who may; null is anybody on this machine, who says a name.
        split: of a preference set.
        caption_column: default: the first of caption, prompt, text that is there.
        image_root: folder that relative paths of a preference set start from.
        num_inference_steps: of ``models``; null is each pipeline's own.
        guidance_scale: of ``models``; null is each pipeline's own.
        resolution: of ``models``: pixels a side, or WIDTHxHEIGHT; null is the model's own.
        batch_size: pictures that a model draws at once.
        device: where to run; null takes a GPU where there is one.
        mixed_precision: of all models.
        host: where to listen.
        port: 0 takes one that is free.
        token_file: holds the token from which those of people's links are made.
    """

    source: str | None = None
    models: list[str] = field(default_factory=list)
    prompts: str | None = None
    output: Path = Path("answers.jsonl")
    task: Task = "pair"
    k: int | None = None
    limit: int | None = None
    seed: int = 0
    per_item: int = 1
    repeat: float = 0.0
    swap: float = 0.0
    first: Literal["random", "uncertain"] = "random"
    scores: Path | None = None
    reward: list[RewardConfig] = field(default_factory=list)
    annotators: list[str] = field(default_factory=list)
    split: str | None = None
    caption_column: str | None = None
    image_root: Path | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    resolution: Resolution = None
    batch_size: int = 4
    device: str | None = None
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    host: str = "127.0.0.1"
    port: int = 8080
    token_file: str | None = None

    def check(self) -> None:
        """Raises :class:`UserError` for what cannot be."""
        require_at_least(1, self, "limit", "per_item", "num_inference_steps", "batch_size")
        require_at_least(2, self, "k")
        sides(self.resolution)
        if bool(self.models) == (self.source is not None):
            raise UserError(
                "say what is to be judged: a rollout folder, a preference set or images, such as "
                "t2i-align label shapes-preferences --split heldout; or --models A B --prompts FILE"
            )
        if self.models and (self.prompts is None or self.scores or self.reward):
            raise UserError("--models draws of --prompts FILE, and has no pictures yet for --scores or --reward")
        if self.k is not None and (self.k > MOST or self.task != "best"):
            raise UserError(f"k is {self.k}; expected 2 to {MOST}, with --task best")
        if min(self.repeat, self.swap) < 0 or self.repeat + self.swap > 1:
            raise UserError(f"repeat and swap are {self.repeat} and {self.swap}; expected shares of at most 1 together")
        if self.swap and self.task in ("thumbs", "score"):
            raise UserError(f"--task {self.task} shows one picture, which cannot be swapped; give --repeat")
        from align.labelling.answers import NAME

        if wrong := [name for name in self.annotators if not NAME.fullmatch(name)]:
            raise UserError(f"annotators has {wrong[0]!r}; expected 1 to 40 letters, digits, ., _ and -")


@dataclass(kw_only=True)
class Export:
    """Write answers in another tool's layout.

    Args:
        answers: the answers file; also the word after ``export``.
        to: ``pickapic`` (parquet), ``jsonl`` (prompt, chosen, rejected; of ratings image, prompt, label),
            ``imagefolder`` (the same as a folder with the pictures), ``d3po`` (its own JSON, of a rollout).
        output: the file or folder to write.
        threshold: from which mean score on a picture is good, of ``--task score``.
    """

    answers: Path
    to: Format
    output: Path
    threshold: float | None = None


def drawn(config: Label, folder: Path) -> tuple[Source, Background]:
    """What ``models`` are to draw, and what will draw it. Raises :class:`UserError`."""
    from align import families
    from align.data.prompts import read_prompt_rows
    from align.evaluate import is_pipeline, names, open_model
    from align.evaluation.pictures import PictureFolder, Wanted, noise_seed
    from align.families.blank import blank
    from align.families.folder import Unsupported
    from align.labelling.drawing import Background
    from align.labelling.sources import of_models
    from align.training.ghost import Ghost
    from align.training.run_folder import base_of

    rows = read_prompt_rows(str(config.prompts))[: config.limit]
    wanted = [Wanted(row["prompt"], noise_seed(row["prompt"], 0, config.seed), {}) for row in rows]
    sources = [Path(model) for model in config.models]
    pictures: dict[str, PictureFolder] = {}
    models: dict[str, Callable[[], Family]] = {}
    bases = [str(source) for source in sources if is_pipeline(source)]
    device, dtype = pick_device(config.device), families.DTYPES[config.mixed_precision]
    home, answers = folder / f"{config.output.stem}-drawn", folder / config.output.name
    judged = answers.is_file() and answers.stat().st_size > 0
    for name, source in zip(names(sources), sources, strict=True):
        if is_pipeline(source):
            families.find(str(source))
            base = None
        elif (source / "config.yaml").is_file():
            base = base_of(source)
        elif bases:
            base = bases[0]
        else:
            raise UserError(f"{source} does not say which model it is of; give that one among --models too")
        with contextlib.suppress(Unsupported), Ghost().present():  # now, not on a page that waits for pictures
            drawing(config).resolved(blank(base or str(source)))
        pictures[name] = PictureFolder(home / name, wanted, config.batch_size, judged)
        models[name] = partial(open_model, source, base, dtype, device)
    return of_models(pictures, folder), Background(models, pictures)


def drawing(config: Label) -> Drawing:
    from align.evaluation.pictures import Drawing

    return Drawing(config.num_inference_steps, config.guidance_scale, config.resolution)


def serve(config: Label) -> Server:
    """The server of what ``config`` says, about to run. Raises :class:`UserError`."""
    config.check()
    try:
        import krippendorff

        from align.labelling.server import Page, Server
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn", "krippendorff"):
            raise
        raise UserError(f"the page needs {error.name}; pip install 't2i-align[label]'") from error
    from align.labelling.access import Access
    from align.labelling.answer_file import AnswerFile
    from align.labelling.session import Rules, Session
    from align.labelling.sources import open_source, read_scores, with_rewards, with_scores
    from rewards.serving.server import check_token

    assert krippendorff
    token = token_from(config.token_file)
    check_token(config.host, token)
    output = config.output.expanduser().absolute()
    background = None
    if config.models:
        source, background = drawn(config, output.parent)
    else:
        how = config.prompts, config.split, config.caption_column, config.image_root
        source = open_source(str(config.source), output.parent, *how)
    items = source.items(config.task, config.k, config.limit)
    order = None
    if config.scores is not None:
        items = with_scores(items, read_scores(config.scores), config.scores)
    if config.reward:
        items = with_rewards(items, config.reward, pick_device(config.device))
    if config.first == "uncertain":
        order = (-uncertainty(items)).argsort(kind="stable").tolist()
    rules = Rules(config.task, config.seed, config.per_item, config.repeat, config.swap)
    root = "." if source.root is None else relative(source.root, output.parent)
    record = Session.record(items, rules, source.title) | {"root": root}
    if config.models:
        how_drawn = (config.models, config.num_inference_steps, config.guidance_scale, config.resolution)
        record |= dict(zip(("models", "num_inference_steps", "guidance_scale", "resolution"), how_drawn, strict=True))
    file, kept = AnswerFile(output, record), output.parent / f"{output.stem}-pictures"
    session = Session(items, rules, file, lambda item: [one.keep(kept) for one in item.pictures], order)
    access = Access(token, config.annotators)
    page = Page(session, access, source.title, lambda: background.fault if background else "", local=token is None)
    server = Server(page, config.host, config.port, background.stop if background else lambda: None)
    if background is not None:
        background.start(drawing(config))
    return server


def links(server: Server, config: Label) -> list[str]:
    """What to open, a line each."""
    host = f"[{config.host}]" if ":" in config.host else config.host
    base, access = f"http://{host}:{server.port}", server.page.access
    people = [f"{name}: {base}{access.link(f'/annotate/{name}', name)}" for name in config.annotators]
    return [*people, f"summary: {base}{access.link('/summary')}", f"open {base}{access.link('/')}"]


def words_of(argv: Sequence[str] | None) -> list[str]:
    """``SOURCE --task best`` as ``--source SOURCE --task best``, and ``--models A B`` as the list that it is."""
    given, words = list(sys.argv[1:] if argv is None else argv), list[str]()
    if given and not given[0].startswith("-"):
        given = ["--source", *given]
    while given:
        words.append(given.pop(0))
        if words[-1] in ("--models", "--annotators"):
            listed = list(takewhile(lambda word: not word.startswith("-"), given))
            del given[: len(listed)]
            words.append(listed[0] if len(listed) == 1 and listed[0].startswith("[") else json.dumps(listed))
    return words


@exit_status
def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["export"]:
        words = given[1:]
        words = ["--answers", *words] if words and not words[0].startswith("-") else words
        out, _ = parse(Export, "align.label export", __doc__, words)
        return status(
            lambda: print(f"{export(out.answers, out.to, out.output, out.threshold)} rows in {out.output}"), words
        )
    words = words_of(given)
    config, _ = parse(Label, "align.label", __doc__, words)

    def run() -> None:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        server = serve(config)
        print(*links(server, config), sep="\n", flush=True)
        server.run()
        print(f"stopped; the answers are in {config.output}")

    # models alone need diffusers, whose loading takes seconds
    return command(run, words) if config.models else status(run, words)


if __name__ == "__main__":
    sys.exit(main())
