"""How fast PickScore, HPSv2.1 and ImageReward score on a GPU: ours against the loop that a user would write.

    python tests/benchmarks/gpu_scoring.py [--output PATH.json] [--deadline SECONDS]
    python tests/benchmarks/gpu_scoring.py --tiny    # on the CPU, small networks, the same lines

The networks have their published sizes and random weights, in bfloat16, and both sides run the same network. The plain
loop takes 64 PIL pictures, prepares one after the other on the CPU as upstream's code does, and scores the batch.

In memory: 64 decoded pictures are scored; ours begins with levels in the CPU's memory, like the plain loop, and also
with floats that are on the GPU, as a sampler leaves them. "Network alone" has its pixels prepared and on the GPU.

End to end: 512 JPEG files, by the command ``python -m rewards.score`` (in this process, without the start of Python and
the loading of weights) and by the plain loop, which reads with PIL. The share is of the command's wall time that passes
inside the scorer.

Scores: how far both sides are apart in bfloat16 and in float32, and what the GPU changes against the CPU in float32.

What fails or comes too late is noted in the file and costs nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import itertools
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

import rewards  # isort: skip  # noqa: F401  first of all: it makes torchvision importable beside a CPU torch

import open_clip  # type: ignore[import-untyped]
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
from torchvision.transforms import functional as TF
from transformers import (
    AutoProcessor,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPImageProcessorPil,
)

from align.common.provenance import provenance
from rewards.base import RewardSum
from rewards.models.hps import FILES, HPSv2
from rewards.models.image_reward import DEVIATION, MEAN, TOKENS, ImageReward
from rewards.models.network import Network, published_head
from rewards.models.pick_score import PickScore
from rewards.models.preprocess import OPENAI_MEAN, OPENAI_STD, letterbox, square
from rewards.models.shapes import PALETTE, SHAPES
from rewards.score import main as score
from tests import benchmarks
from tests.benchmarks.scoring import clocked
from tests.reward_samples import new_clip
from tests.test_full_size import HUGE, clip_config
from tests.test_reward_models import TINY, BlipSize, new_image_reward

EDGE = 224  # of the square that all three networks read
PACKAGES = ("open_clip_torch", "torchvision", "pillow", "tokenizers", "pyarrow")


@dataclass(frozen=True)
class Size:
    """What is measured: pictures in a batch and in all, the pictures' side, and the networks' layers and widths."""

    batch: int = 64
    count: int = 512
    side: int = 512
    clip: CLIPConfig = field(default_factory=lambda: HUGE)
    open_clip: str = "ViT-H-14"
    blip: BlipSize = BlipSize((24, 12), (1024, 768), EDGE, 16)  # noqa: RUF009  frozen
    budget: float = 2.0  # seconds for the repeats of one timing


def tiny(folder: Path) -> Size:
    """Networks of two layers, which read the same pixels."""
    config: dict[str, Any] = {**TINY}
    config["vision_cfg"] = {**config["vision_cfg"], "image_size": EDGE, "patch_size": 14}
    path = folder / "tiny-scoring.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    clip = clip_config((32, 2, 2), (32, 2, 2), 16, "gelu")
    return Size(2, 6, 320, clip, "tiny-scoring", BlipSize((2, 2), (128, 64), EDGE, 16), 0.05)


# What is measured with
@dataclass
class Report:
    """Measures one thing after the other and keeps the file up to date."""

    figures: dict[str, Any]
    save: Callable[[dict[str, Any]], None]
    deadline: float

    def measure(self, place: Sequence[str], call: Callable[[], Mapping[str, Any]]) -> None:
        """Puts down, at ``place``, what ``call`` returns, or why there is nothing."""
        start = time.perf_counter()
        if start > self.deadline:
            self.figures["skipped"].append(", ".join(place))
            print(f"skipped: {', '.join(place)}", flush=True)
        else:
            try:
                found = {**call(), "measured_in_seconds": round(time.perf_counter() - start, 1)}
            except Exception:  # whatever it is, the others are still to be measured
                lines = traceback.format_exc().strip().splitlines()
                found = {"error": [line for line in lines if set(line) - set(" ^~")][-5:]}
            where = self.figures["scorers"]
            for part in place[:-1]:
                where = where.setdefault(part, {})
            where[place[-1]] = found
            print(f"{', '.join(place)}: {json.dumps(found)}", flush=True)
        self.save(self.figures)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def wait() -> None:
    """Until the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(call: Callable[[], object], repeats: int, budget: float, warm: int = 2) -> float:
    """Median of ``repeats`` calls, after ``warm`` others; none is begun after ``budget`` seconds."""
    for _ in range(warm):
        call()
    taken: list[float] = []
    while len(taken) < repeats and sum(taken) < budget:
        wait()
        start = time.perf_counter()
        call()
        wait()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def apart(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """The largest difference, also as a part of the largest score and of the scores' deviation.

    Not of each score itself: cosines of random networks lie around zero.
    """
    one, other = (torch.tensor(scores, dtype=torch.float64) for scores in (ours, theirs))
    most = float((one - other).abs().max())
    return {
        "largest": float(f"{most:.3g}"),
        "relative_to_largest_score": float(f"{most / float(other.abs().max()):.3g}"),
        "relative_to_deviation": float(f"{most / float(other.std()):.3g}"),
    }


@dataclass(frozen=True, order=True)
class Run:
    """Seconds, the part of them inside the scorer, and the scores in the pictures' order."""

    span: float
    share: float
    scores: list[float]


def against(ours: Run | None, span: float, scores: Sequence[float]) -> dict[str, Any]:
    """How many times as fast ours was as a plain loop, and how far the scores are apart."""
    return {"ours_over_plain": round(span / ours.span, 3), "scores_apart": apart(ours.scores, scores)} if ours else {}


# What is scored
def photographs(folder: Path, size: Size) -> list[Path]:
    """JPEG files with structure of a few pixels, and a caption of its own for each in ``metadata.jsonl``."""
    folder.mkdir()

    def draw(number: int) -> Path:
        levels = np.random.default_rng(number).integers(0, 256, (size.side // 4, size.side // 4, 3), dtype=np.uint8)
        path = folder / f"{number:04d}.jpg"
        Image.fromarray(levels).resize((size.side, size.side), Image.Resampling.BICUBIC).save(path, quality=90)
        return path

    with ThreadPoolExecutor(16) as pool:
        paths = list(pool.map(draw, range(size.count)))
    lines = [{"file_name": path.name, "text": text} for path, text in zip(paths, captions(size.count), strict=True)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return paths


def captions(count: int) -> list[str]:
    things = itertools.cycle(itertools.product(PALETTE, SHAPES))
    return [
        f"a photograph of a {colour} {shape}, number {n}"
        for n, (colour, shape) in enumerate(itertools.islice(things, count))
    ]


def opened(paths: Sequence[Path]) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in paths]


# The scorers, and the loops that one would write without them
@dataclass(frozen=True)
class Plain:
    """``pixels`` of pictures for the network, and its ``scores`` of them."""

    pixels: Callable[[list[Image.Image]], Tensor]
    scores: Callable[[Tensor, list[str]], Tensor]

    @torch.no_grad()
    def __call__(self, pictures: list[Image.Image], prompts: list[str]) -> list[float]:
        return self.rest(self.pixels(pictures), prompts)

    @torch.no_grad()
    def rest(self, pixels: Tensor, prompts: list[str]) -> list[float]:
        found: list[float] = self.scores(pixels, prompts).float().tolist()
        return found


@dataclass(frozen=True)
class Subject:
    """A scorer, its parts that are in lower precision, how it prepares a batch, and plain loops over its network."""

    reward: Network
    towers: tuple[nn.Module, ...]
    prepare: Callable[[Tensor], Tensor]
    plain: dict[str, Plain]

    def score(self, images: Tensor, prompts: list[str]) -> list[float]:
        with torch.no_grad():
            return self.reward.score(images=images, prompts=prompts).tolist()


def drawn(make: Callable[[], Any], device: str) -> Any:
    """What ``make`` builds, on ``device`` from the start, with weights for which pictures and prompts matter."""
    with torch.device(device):
        network = make()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, weight[0].numel() ** -0.5)
            elif not name.endswith("logit_scale"):
                scales = name.endswith("weight") and ("norm" in name.lower() or "ln_" in name)
                weight.normal_(float(scales), 0.1)
    return network


def pick_score(size: Size, folder: Path, device: str) -> Subject:
    new_clip(folder)  # for its tokenizer
    CLIPImageProcessor().save_pretrained(folder)
    with patch("rewards.models.clip_score.pretrained", lambda cls, source: drawn(lambda: cls(size.clip), device)):
        reward = PickScore(str(folder), str(folder), device=device, dtype="bfloat16")
    network: Any = reward.clip.network
    scale = reward.clip.logit_scale  # from before the cast: the network's own would be 0.3 % off, and stay so
    processor = AutoProcessor.from_pretrained(folder)
    pil = CLIPImageProcessorPil.from_pretrained(folder)

    def scores(pixels: Tensor, prompts: list[str]) -> Tensor:
        words = processor(text=prompts, padding=True, truncation=True, max_length=77, return_tensors="pt").to(device)
        image = network.get_image_features(pixel_values=pixels.to(network.logit_scale)).pooler_output
        text = network.get_text_features(**words).pooler_output
        image, text = image / image.norm(dim=-1, keepdim=True), text / text.norm(dim=-1, keepdim=True)
        result: Tensor = scale * (image * text).sum(-1)
        return result

    def pixels(processor: Any, pictures: list[Image.Image], **where: str) -> Tensor:
        found: Tensor = processor(images=pictures, return_tensors="pt", **where)["pixel_values"]
        return found

    plain = {
        "AutoProcessor": Plain(partial(pixels, processor), scores),
        "CLIPImageProcessorPil": Plain(partial(pixels, pil), scores),
        "AutoProcessor, device=": Plain(partial(pixels, processor, device=device), scores),
    }
    return Subject(reward, (reward.clip,), partial(square, side=EDGE, crop="transformers"), plain)


def hps(size: Size, folder: Path, device: str) -> Subject:
    folder.mkdir()
    (folder / FILES["2.1"]).touch()

    def create(name: str, file: str, return_transform: bool) -> Any:
        return drawn(lambda: open_clip.create_model(name, device=device), device)

    with patch("open_clip.create_model_from_pretrained", create):
        reward = HPSv2(str(folder), architecture=size.open_clip, device=device, dtype="bfloat16")
    network: Any = reward.clip.network
    tokenizer = open_clip.get_tokenizer(size.open_clip)
    normal = Normalize(OPENAI_MEAN, OPENAI_STD)

    def pixels(picture: Image.Image) -> Tensor:  # upstream's transform: a tensor is resized, and bars are put around
        levels = ToTensor()(picture)
        height, width = (max(round(extent * EDGE / max(picture.size)), 1) for extent in levels.shape[1:])
        levels = TF.resize(levels, [height, width], InterpolationMode.BICUBIC)
        down, across = EDGE - height, EDGE - width
        found: Tensor = normal(TF.pad(levels, [across // 2, down // 2, across - across // 2, down - down // 2]))
        return found

    def scores(pixels: Tensor, prompts: list[str]) -> Tensor:
        image, text, _ = network(pixels.to(network.logit_scale), tokenizer(prompts).to(device))
        result: Tensor = (image * text).sum(-1)
        return result

    plain = {"upstream's transform": Plain(partial(each, pixels), scores)}
    return Subject(reward, (reward.clip,), partial(letterbox, side=EDGE, antialias=True), plain)


def image_reward(size: Size, folder: Path, device: str) -> Subject:
    new_image_reward(folder, BlipSize())  # for its tokenizer and its settings

    def build(nothing: Mapping[str, Tensor], settings: Mapping[str, Any]) -> tuple[Any, ...]:
        made: dict[str, Any] = {
            "vision": lambda: BlipVisionModel(vision_config(size.blip)),
            "text": lambda: BlipTextModel(text_config(size.blip, settings), add_pooling_layer=False),
            "head": lambda: published_head(size.blip.widths[1]),
        }
        return tuple(drawn(make, device) for make in made.values())

    with patch("rewards.models.image_reward.build", build):  # on the GPU, not from a file of gigabytes
        reward = ImageReward(str(folder), str(folder), device=device, dtype="bfloat16")
    steps = [Resize(EDGE, InterpolationMode.BICUBIC), CenterCrop(EDGE), ToTensor(), Normalize(OPENAI_MEAN, OPENAI_STD)]
    vision, text, head, tokenizer = reward.vision, reward.text, reward.head, reward.tokenizer

    def scores(pixels: Tensor, prompts: list[str]) -> Tensor:
        seen = vision(pixel_values=pixels.to(device, vision.dtype)).last_hidden_state
        options = {"padding": "max_length", "truncation": True, "max_length": TOKENS, "return_tensors": "pt"}
        words = tokenizer(prompts, **options).to(device)
        read = text(words.input_ids, attention_mask=words.attention_mask, encoder_hidden_states=seen)
        result: Tensor = (head(read.last_hidden_state[:, 0].float())[:, 0] - MEAN) / DEVIATION
        return result

    plain = {"upstream's transform": Plain(partial(each, Compose(steps)), scores)}
    return Subject(reward, (vision, text), partial(square, side=EDGE, crop="torchvision"), plain)


def vision_config(blip: BlipSize) -> BlipVisionConfig:
    width = blip.widths[0]
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=blip.layers[0],
        num_attention_heads=width // 64,
        image_size=blip.side,
        patch_size=blip.patch,
        layer_norm_eps=1e-6,
    )


def text_config(blip: BlipSize, settings: Mapping[str, Any]) -> BlipTextConfig:
    width = blip.widths[1]
    return BlipTextConfig(
        vocab_size=30524,  # upstream's; the tokenizer at hand, which spells, uses the first of them
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=blip.layers[1],
        num_attention_heads=width // 64,
        max_position_embeddings=512,
        hidden_act=settings["hidden_act"],
        layer_norm_eps=settings["layer_norm_eps"],
        pad_token_id=settings["pad_token_id"],
        encoder_hidden_size=blip.widths[0],
    )


def each(transform: Callable[[Image.Image], Tensor], pictures: list[Image.Image]) -> Tensor:
    return torch.stack([transform(picture) for picture in pictures])


Steps = dict[str, Callable[[], Mapping[str, Any]]]
SCORERS = {"PickScore": pick_score, "HPSv2": hps, "ImageReward": image_reward}


# What is measured
def build(subjects: dict[str, Subject], name: str, size: Size, folder: Path, device: str) -> dict[str, Any]:
    subjects[name] = SCORERS[name](size, folder, device)
    wait()
    reward = subjects[name].reward
    devices = sorted({str(part.device) for part in (*reward.parameters(), *reward.buffers())})
    return {"parameters": sum(weight.numel() for weight in reward.parameters()), "devices": devices}


def in_memory(subject: Subject, paths: Sequence[Path], size: Size, device: str) -> Steps:
    """Decoded pictures, and the parts of the scorer's time."""
    pictures, prompts = opened(paths[: size.batch]), captions(size.batch)
    levels = torch.stack([torch.from_numpy(np.array(one)).permute(2, 0, 1).contiguous() for one in pictures])
    runs: dict[str, Run] = {}

    def upload(levels: Tensor = levels) -> Tensor:  # as rewards.scoring.engine does it
        return levels.to(device, non_blocking=levels.is_pinned()).float().div_(255)

    def rate(call: Callable[[], object], repeats: int = 20, warm: int = 2) -> tuple[float, float]:
        span = seconds(call, repeats, size.budget, warm)
        return span, round(size.batch / span, 2)

    def ours() -> Mapping[str, Any]:
        images = upload()
        before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        _, floats = rate(lambda: subject.score(images, prompts))
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        span, whole = rate(lambda: subject.score(upload(), prompts))
        runs["ours"] = Run(span, 1.0, subject.score(images, prompts))
        found = {"images_per_second": whole, "images_per_second_from_floats_on_the_gpu": floats}
        return found | {"peak_gib_beside_weights_and_images": round((peak - before) / 2**30, 2)}

    def plain(one: Plain) -> Mapping[str, Any]:
        span, found = rate(partial(one, pictures, prompts), 5, warm=1)
        return {"images_per_second": found, **against(runs.get("ours"), span, one(pictures, prompts))}

    def network() -> Mapping[str, Any]:
        first = next(iter(subject.plain.values()))
        pixels = first.pixels(pictures).to(device)
        return {"images_per_second": rate(lambda: first.rest(pixels, prompts))[1]}

    def parts() -> Mapping[str, Any]:
        images, pinned = upload(), levels.pin_memory() if torch.cuda.is_available() else levels
        calls: dict[str, Callable[[], object]] = {
            "upload": upload,
            "upload of pinned levels": lambda: upload(pinned),
            "prepare": lambda: subject.prepare(images),
        }
        return {f"{name}, ms a batch": round(1e3 * rate(call)[0], 2) for name, call in calls.items()}

    loops = {f"plain, {name}": partial(plain, one) for name, one in subject.plain.items()}
    return {"ours": ours, **loops, "network alone": network, "parts": parts}


@dataclass(frozen=True)
class Finished:
    """The scorer, which waits for the GPU before it answers, so that a clock around it sees all of its work. What is
    done with the answer is to look at it, so this waits for nothing that is not waited for anyway."""

    reward: Network
    differentiable: ClassVar[bool] = True
    needs_prompt: ClassVar[bool] = True

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        scores = self.reward.score(images=images, prompts=prompts, metadata=metadata)
        wait()
        return scores


def command(subject: Subject, source: Path, size: Size, device: str, *options: str) -> Run:
    """``python -m rewards.score``, given the scorer."""
    said = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as place,
        patch.object(RewardSum, "of", lambda named, device: RewardSum({"score": Finished(subject.reward)})),
        clocked(Finished, "score") as inside,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(said),
    ):
        words = [str(source), "--reward", "score", "--output", f"{place}/out", "--batch_size", str(size.batch)]
        start = time.perf_counter()
        status = score([*words, "--device", device, *options])
        span = time.perf_counter() - start
        if status:
            raise RuntimeError(f"rewards.score ended with {status}: {said.getvalue()[-500:]}")
        table = pq.read_table(f"{place}/out/scores-00000.parquet")
    return Run(span, sum(end - start for start, end in inside) / span, table["score"].to_pylist())


def end_to_end(subject: Subject, paths: Sequence[Path], size: Size, device: str) -> Steps:
    """The command against the plain loops over the same files."""
    prompts, source = captions(size.count), paths[0].parent
    found: dict[str, Run] = {}

    def ours() -> Mapping[str, Any]:
        command(subject, source, size, device, "--limit", str(size.batch))  # warms up
        run = found["ours"] = sorted(command(subject, source, size, device) for _ in range(3))[1]
        return {
            "images_per_second": round(size.count / run.span, 2),
            "share_in_scorer": round(run.share, 4),
            "images_per_second_inside_scorer": round(size.count / run.span / run.share, 2),
        }

    def plain(one: Plain) -> Mapping[str, Any]:
        scores: list[float] = []

        def loop() -> None:
            scores.clear()
            for start in range(0, size.count, size.batch):
                part = slice(start, start + size.batch)
                scores.extend(one(opened(paths[part]), prompts[part]))

        one(opened(paths[: size.batch]), prompts[: size.batch])  # warms up
        span = seconds(loop, 3, 1.5 * size.budget, warm=0)
        return {
            "images_per_second": round(size.count / span, 2),
            **against(found.get("ours"), span, scores),
        }

    # the one with a device is for the comparison in memory
    loops = {name: one for name, one in subject.plain.items() if "device" not in name}
    return {"ours": ours, **{f"plain, {name}": partial(plain, one) for name, one in loops.items()}}


def float32(subject: Subject, paths: Sequence[Path], size: Size, device: str) -> Steps:
    """Ours against the plain loops, and against itself with the one operation exact that is TF32 unless told."""
    pictures, prompts = opened(paths[: size.batch]), captions(size.batch)
    runs: dict[str, Run] = {}

    def ours() -> Mapping[str, Any]:
        subject.reward.settle(device, "float32", *subject.towers)
        images = torch.stack([TF.to_tensor(picture) for picture in pictures]).to(device)
        span = seconds(lambda: subject.score(images, prompts), 3, size.budget, warm=1)
        runs["ours"] = Run(span, 1.0, subject.score(images, prompts))
        with exact():
            difference = apart(runs["ours"].scores, subject.score(images, prompts))
        return {
            "images_per_second_from_floats_on_the_gpu": round(size.batch / span, 2),
            "apart_from_ours_without_tf32_convolution": difference,
        }

    def plain(one: Plain) -> Mapping[str, Any]:
        subject.reward.settle(device, "float32", *subject.towers)
        return {"scores_apart": apart(runs["ours"].scores, one(pictures, prompts))}

    return {"ours": ours, **{f"plain, {name}": partial(plain, one) for name, one in subject.plain.items()}}


def gpu_and_cpu(subject: Subject, paths: Sequence[Path], size: Size, device: str) -> Steps:
    """The same pictures on both, in float32. The scorer stays on the CPU: this comes last."""

    def both() -> Mapping[str, Any]:
        subject.reward.settle(device, "float32", *subject.towers)
        images = torch.stack([TF.to_tensor(picture) for picture in opened(paths[:4])])
        prompts = captions(len(images))
        with exact():
            there, ready = subject.score(images.to(device), prompts), subject.prepare(images.to(device)).cpu()
        subject.reward.to("cpu")
        return {
            "scores_apart": apart(there, subject.score(images, prompts)),
            "prepared_pixels_apart": float((ready - subject.prepare(images)).abs().max()),
        }

    return {"float32": both}


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Convolutions of float32 in float32; matrix products are unless told otherwise."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


MEASUREMENTS = {"in_memory": in_memory, "end_to_end": end_to_end, "float32": float32, "gpu_and_cpu": gpu_and_cpu}


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="on the CPU, to try the script; writes with --output only")
    parser.add_argument("--output", type=Path, metavar="PATH.json", help="default: results/scoring_gpu.json")
    parser.add_argument("--deadline", type=float, default=85, help="seconds after which nothing further is begun")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        parser.error("there is no GPU; --tiny runs on the CPU")
    name, device = "scoring_gpu", "cpu" if args.tiny else "cuda"
    if args.output:
        benchmarks.RESULTS, name = args.output.resolve().parent, args.output.stem
    deadline = time.perf_counter() + args.deadline
    once = cache(provenance)  # it asks git, which takes its time
    with tempfile.TemporaryDirectory() as place, patch("tests.benchmarks.provenance", once):
        root = Path(place)
        size = tiny(root) if args.tiny else Size()
        paths = photographs(root / "photographs", size)
        figures: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "cuda": torch.version.cuda,
            "more_versions": {package: installed(package) for package in PACKAGES},
            "batch": size.batch,
            "images": size.count,
            "side": size.side,
            "mean_file_bytes": round(statistics.mean(path.stat().st_size for path in paths)),
            "scorers": {},
            "skipped": [],
        }
        quick = args.tiny and not args.output
        report = Report(figures, lambda found: benchmarks.record(name, found, quick), deadline)
        subjects: dict[str, Subject] = {}
        for scorer in SCORERS:
            report.measure((scorer, "build"), partial(build, subjects, scorer, size, root / scorer, device))
        for what, measurement in MEASUREMENTS.items():  # the least important for all scorers comes last
            for scorer, subject in subjects.items():
                for step, call in measurement(subject, paths, size, device).items():
                    report.measure((scorer, what, step), call)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
