"""The human round: pictures drawn with their trajectories, labels in every layout, training on both."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from align import families, rollout, train
from align.common.errors import DataError, UserError
from align.data.annotations import LabelledRollout
from align.data.dataset import Setup
from align.diffusion.kernels import DDIM
from align.evaluation import rollout_writer
from align.objectives import Context
from align.objectives.online.replay import log_probs
from align.policy.policy import LoRA, Policy
from align.sampling.loop import initial_noise, sample
from align.sampling.sampler import Sampler
from tests.helpers import contents

PROMPTS = ["two red stars", "a blue circle", "a black square", "a star and a circle", "two red stars"]
K, T, GUIDANCE = 3, 3, 2.0
SAMPLER = {"num_inference_steps": T, "guidance_scale": GUIDANCE, "batch_size": 4}


def settings(pipeline: Path, output: Path, **changes: Any) -> list[str]:
    """A rollout's config as a file beside its folder."""
    prompts = output.parent / "prompts.txt"
    prompts.parent.mkdir(parents=True, exist_ok=True)
    prompts.write_text("\n".join(PROMPTS))
    found: dict[str, Any] = {
        "prompts": str(prompts),
        "pretrained_model_name_or_path": str(pipeline),
        "output_dir": str(output),
        "sampler": SAMPLER,
        "images_per_prompt": K,
        "prompts_per_shard": 2,
        "rewards": [{"name": "JPEGCompressibility"}],
    }
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(found | changes))
    return ["--config", str(file)]


@pytest.fixture(scope="module")
def round1(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole rollout, not to be changed."""
    folder = tmp_path_factory.mktemp("round") / "rollout"
    assert rollout.main(settings(tiny_folders["epsilon"], folder)) == 0
    return folder


@pytest.fixture
def copy(round1: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    return shutil.copytree(round1, tmp_path / "copy")


def manifest(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a refused command says."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    return lines[0]


# the rollout folder
def test_the_folder_has_its_layout(round1: Path) -> None:
    record = json.loads((round1 / "rollout.json").read_text())
    assert record["sampler"] == {
        "num_inference_steps": T,
        "guidance_scale": GUIDANCE,
        "kernel": {"class_path": "align.diffusion.kernels.DDIM", "init_args": {"eta": 1.0}},
    }
    assert (record["prompts"], record["images_per_prompt"], record["images"], record["shards"]) == (5, K, 5 * K, 3)
    assert record["latent_shape"] == [4, 8, 8]
    assert record["made_with"]["versions"]["torch"].startswith(torch.__version__[:4])
    lines = manifest(round1)
    for number, line in enumerate(lines):
        assert line["image"] == f"images/{number:05d}.png"
        assert line["trajectory"] == f"{number:05d}"
        assert (line["prompt_index"], line["prompt"]) == (number // K, PROMPTS[number // K])
        assert (line["shard"], line["row"]) == (number // (2 * K), number % (2 * K))
        assert line["scores"]["JPEGCompressibility"] < 0
        assert Image.open(round1 / line["image"]).size == (16, 16)
    assert len(lines) == len(list((round1 / "images").iterdir())) == 5 * K
    for shard in range(3):
        assert Image.open(round1 / f"contact-sheet-{shard:05d}.png").width > 128 * K
        stored = load_file(round1 / f"trajectories-{shard:05d}.safetensors")
        rows = 2 * K if shard < 2 else K
        assert {name: tuple(v.shape) for name, v in stored.items()} == {  # every state once: T + 1, not 2 T
            "latents": (rows, T + 1, 4, 8, 8),
            "log_probs": (rows, T),
        }
        assert stored["latents"].dtype == torch.float32
        first = stored["latents"][:, 0].reshape(-1, K, 4, 8, 8)
        assert torch.equal(first, first[:, :1].expand_as(first))  # one starting noise a prompt, bit for bit
        assert not torch.equal(first[:1], first[-1:]) or len(first) == 1
        assert not torch.equal(stored["latents"][0, 1], stored["latents"][1, 1])
    assert not list(round1.rglob("*.tmp*"))


def test_the_picture_is_the_last_state(round1: Path, tiny_folders: dict[str, Path]) -> None:
    family = families.load(str(tiny_folders["epsilon"]))
    latents = load_file(round1 / "trajectories-00001.safetensors")["latents"]
    with torch.no_grad():
        images = family.to_image(latents[:, -1])
    seen = np.stack([np.asarray(Image.open(round1 / f"images/{2 * K + row:05d}.png")) for row in range(2 * K)])
    wanted = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    assert np.abs(seen.astype(int) - wanted.astype(int)).max() <= 1


@pytest.mark.parametrize(
    "cut",
    [
        *(pytest.param(cut, marks=pytest.mark.slow) for cut in ("last shard", "a picture")),
        *("first shard", "torn shard", "before the manifest"),
    ],
)
def test_an_interrupted_rollout_ends_as_the_whole_one(
    copy: Path, round1: Path, tiny_folders: dict[str, Path], cut: str
) -> None:
    if cut == "last shard":
        (copy / "trajectories-00002.safetensors").unlink()
        (copy / "images/00013.png").unlink()
    elif cut == "first shard":
        (copy / "trajectories-00000.safetensors").unlink()
    elif cut == "torn shard":
        (copy / "trajectories-00001.safetensors").write_bytes(b"half")
    elif cut == "a picture":
        (copy / "images/00004.png").unlink()
    else:
        (copy / "manifest.jsonl").unlink()
        (copy / ".trajectories-00002.safetensors.host.1.tmp").write_bytes(b"half")
    untouched = (copy / "trajectories-00001.safetensors").stat().st_mtime_ns
    arguments = settings(tiny_folders["epsilon"], round1)  # the very same settings, but for where
    assert rollout.main([*arguments, "--output_dir", str(copy)]) == 0
    assert contents(copy) == contents(round1)
    if "shard" in cut and cut != "torn shard":
        assert (copy / "trajectories-00001.safetensors").stat().st_mtime_ns == untouched


def test_an_interrupt_leaves_whole_shards(
    round1: Path, tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while the second shard is drawn: status 130, the first shard is there and listed, no other."""
    arguments = [*settings(tiny_folders["epsilon"], round1), "--output_dir", str(tmp_path / "cut")]
    real, calls = rollout_writer.collect, []

    def interrupted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(rollout_writer, "collect", interrupted)
        assert rollout.main(arguments) == 130
    assert [p.name for p in sorted((tmp_path / "cut").glob("traj*"))] == ["trajectories-00000.safetensors"]
    assert len(manifest(tmp_path / "cut")) == 2 * K
    with pytest.raises(DataError, match=r"lists 6 images, but 5 prompts x 3 make 15; run align.rollout"):
        LabelledRollout(str(tmp_path / "cut"), ["x.json"]).check()
    assert rollout.main(arguments) == 0
    files = contents(tmp_path / "cut")
    assert files == contents(round1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", "1"], "seed 0, now 1"),
        (["--sampler.num_inference_steps", "4"], "'num_inference_steps': 3"),
        (["--limit", "2"], "prompts 5, now 2"),
    ],
)
def test_other_settings_do_not_finish_a_folder(
    round1: Path, tiny_folders: dict[str, Path], capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    before = contents(round1)
    assert rollout.main([*settings(tiny_folders["epsilon"], round1), *options]) == 2
    error = error_of(capsys)
    assert "other settings" in error and message in error and "output_dir" in error
    assert contents(round1) == before


def test_the_draws_do_not_depend_on_the_shards(round1: Path, tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    options = {"prompts_per_shard": 5, "sampler": SAMPLER | {"batch_size": 15}, "half": True}
    assert rollout.main(settings(tiny_folders["epsilon"], tmp_path / "one", **options)) == 0
    one = load_file(tmp_path / "one/trajectories-00000.safetensors")
    three = [load_file(round1 / f"trajectories-{shard:05d}.safetensors") for shard in range(3)]
    latents = torch.cat([part["latents"] for part in three])
    assert one["latents"].dtype == torch.float16
    assert torch.equal(one["latents"][:, 0], latents[:, 0].half())
    torch.testing.assert_close(one["latents"].float(), latents, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(one["log_probs"], torch.cat([part["log_probs"] for part in three]))


def test_unshared_noise(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    arguments = settings(tiny_folders["epsilon"], tmp_path / "own", shared_noise=False, limit=1)
    assert rollout.main(arguments) == 0
    first = load_file(tmp_path / "own/trajectories-00000.safetensors")["latents"][:, 0]
    assert not any(torch.equal(first[a], first[b]) for a, b in combinations(range(K), 2))


@pytest.mark.parametrize("kind", ["epsilon", pytest.param("flow", marks=pytest.mark.slow)])
def test_log_probs_replay(tiny_folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """The stored trajectories under the weights that drew them: every likelihood ratio is 1, bit for bit where the
    network is asked in the same batches."""
    folder = tmp_path / "rollout"
    one = SAMPLER | {"batch_size": 1}
    assert rollout.main(settings(tiny_folders[kind], folder, limit=2, sampler=one)) == 0
    family = families.load(str(tiny_folders[kind]))
    data = LabelledRollout(str(folder), [scored(tmp_path, range(2 * K))]).prepare(Setup(family))
    batch = data.batch(range(len(data)))
    assert len(batch.names) == 2 * K
    ctx = Context(Policy(family, LoRA(2)), 0, 0, range(2 * K))
    sampler = Sampler(**SAMPLER)
    batch.require(sampler, family)
    stored = batch.trajectories.log_probs
    assert isinstance(stored, Tensor)
    assert torch.equal(log_probs(ctx, sampler, batch.trajectories, 1), stored)
    again = log_probs(ctx, sampler, batch.trajectories, 2 * K * T)
    torch.testing.assert_close((again - stored).exp(), torch.ones_like(stored), atol=1e-5, rtol=0)


# label files
def scored(folder: Path, scores: Any, name: str = "scores.json") -> str:
    """D3PO's own JSON."""
    (folder / name).write_text(json.dumps(np.reshape(list(scores), (-1, K)).tolist()))
    return str(folder / name)


def table(folder: Path, rows: list[dict[str, Any]], name: str) -> str:
    with (folder / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(folder / name)


def lines_of(folder: Path, rows: list[Any], name: str = "pairs.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def choice(a: int, b: int, label: object, **more: Any) -> dict[str, Any]:
    return {"image_a": f"images/{a:05d}.png", "image_b": f"{b:05d}", "label": label, **more}


def pairs_of(folder: Path, *labels: str) -> list[tuple[int, int]]:
    return LabelledRollout(str(folder), list(labels)).read()[1].pairs


SCORES = [0, -1, 0, 1, 2, 3, 0, 0, 0, 0.5, 0.25, 0.5, -1, -1, 0]
EXPECTED = [(0, 1), (2, 1), (4, 3), (5, 3), (5, 4), (9, 10), (11, 10), (14, 12), (14, 13)]


def test_every_layout_gives_the_same_pairs(round1: Path, tmp_path: Path) -> None:
    within = [pair for prompt in range(5) for pair in combinations(range(prompt * K, prompt * K + K), 2)]
    verdict = {1: "a", -1: "b", 0: "tie"}
    choices = [choice(a, b, verdict[int(np.sign(SCORES[a] - SCORES[b]))]) for a, b in within]
    swapped = [
        {"prompt": PROMPTS[b // K], "image_a": f"{b:05d}.png", "image_b": str(round1 / f"images/{a:05d}.png")}
        | {"label": {"a": "b", "b": "a", "tie": "tie"}[row["label"]]}
        for (a, b), row in zip(within, choices, strict=True)
    ]
    scores = [{"image": f"images/{number:05d}.png", "score": score} for number, score in enumerate(SCORES)]
    found = [
        scored(tmp_path, SCORES),
        table(tmp_path, scores, "scores.csv"),
        lines_of(tmp_path, scores[::-1], "scores.jsonl"),
        lines_of(tmp_path, choices),
        lines_of(tmp_path, swapped[::-1], "swapped.jsonl"),
        table(tmp_path, choices, "pairs.csv"),
    ]
    assert [pairs_of(round1, file) for file in found] == [EXPECTED] * len(found)
    assert pairs_of(round1, *found) == EXPECTED


def test_annotators_are_averaged_and_their_votes_kept(round1: Path, tmp_path: Path) -> None:
    """Three people score: the mean decides, and only a strict difference of means makes a pair."""
    zeros = [0] * 12
    files = [
        scored(tmp_path, [*scores, *zeros], f"{name}.json")
        for name, scores in {"ann": [1, 0, 0], "ben": [0, 1, 0], "cem": [1, 0, 1]}.items()
    ]
    _, labels = LabelledRollout(str(round1), files).read()
    assert labels.pairs == [(0, 1), (0, 2)]  # means 2/3, 1/3, 1/3
    assert labels.ties == 1 + 4 * 3
    assert [(v.annotator, v.a, v.value) for v in labels.votes if v.a < 2] == [
        ("ann.json", 0, 1.0), ("ann.json", 1, 0.0), ("ben.json", 0, 0.0),
        ("ben.json", 1, 1.0), ("cem.json", 0, 1.0), ("cem.json", 1, 0.0),
    ]  # fmt: skip
    assert len(labels.votes) == 3 * 15
    rows = [
        {"image": f"{number:05d}", "score": score, "annotator": name}
        for name, scores in {"ann": [1, 0, 0], "ben": [0, 1, 0], "cem": [1, 0, 1]}.items()
        for number, score in enumerate(scores)
    ]
    one = LabelledRollout(str(round1), [table(tmp_path, rows, "all.csv")]).read()[1]
    assert one.pairs == labels.pairs
    assert {vote.annotator for vote in one.votes} == {"ann", "ben", "cem"}


def test_votes_on_a_pair_are_summed_with_their_weights(round1: Path, tmp_path: Path) -> None:
    votes = [
        *(choice(0, 1, "a", annotator=name) for name in ("ann", "ben")),
        choice(1, 0, "a", annotator="cem"),
        choice(3, 4, "a", annotator="ann"),
        choice(3, 4, "b", annotator="ben"),
        choice(6, 7, "a", annotator="ann", weight=0.5),
        choice(6, 7, "b", annotator="ben", weight=2),
        choice(9, 10, "tie", annotator="ann"),
        choice(9, 10, "b", annotator="ben"),
    ]
    labels = LabelledRollout(str(round1), [lines_of(tmp_path, votes)]).read()[1]
    assert labels.pairs == [(0, 1), (7, 6), (10, 9)]
    assert labels.ties == 1
    assert [vote.value for vote in labels.votes] == [1, 1, 1, 1, -1, 0.5, -2, 0, -1]
    assert labels.votes[2].source.endswith("pairs.jsonl:3")


def test_votes_and_scores_that_contradict_each_other_are_a_tie(round1: Path, tmp_path: Path) -> None:
    votes = lines_of(tmp_path, [choice(0, 1, "b"), choice(3, 4, "b"), choice(6, 7, "a"), choice(9, 10, "tie")])
    assert pairs_of(round1, votes, scored(tmp_path, SCORES)) == [
        pair for pair in sorted([*EXPECTED, (6, 7)], key=sorted) if pair != (0, 1)
    ]


def test_limit_keeps_the_first_pairs(round1: Path, tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    data = LabelledRollout(str(round1), [scored(tmp_path, SCORES)], limit=4)
    assert len(data.prepare(Setup(families.load(str(tiny_folders["epsilon"]))))) == 4


def bad_files(folder: Path) -> dict[str, tuple[str, str]]:
    """A file of each mistake, and what is said of it."""
    full = [[0, 1, 0]] * 5
    jsonl = {
        "outside": (choice(0, 15, "a"), "00015' is unknown to .*no trajectory .*DPO on PreferencePairs"),
        "elsewhere": (choice(0, 1, "a", image_b="/pictures/00001.png"), "unknown to"),
        "two prompts": (choice(2, 3, "a"), "of two prompts, 'two red stars' and 'a blue circle'"),
        "same text": (choice(0, 12, "a"), "of two prompts"),
        "itself": (choice(2, 2, "a"), "twice; expected two images of one prompt"),
        "other rollout": (choice(0, 1, "a", prompt="a dog"), "says the prompt 'a dog', but .* 'two red stars'; give"),
        "label": (choice(0, 1, "nice"), "label is 'nice'; expected a, b or tie"),
        "number label": (choice(0, 1, 0), "label is 0; expected a, b or tie"),
        "weight": (choice(0, 1, "a", weight=-1), "weight is -1; expected 0 or more"),
        "weight text": (choice(0, 1, "a", weight="much"), "weight is 'much', which is not a number"),
        "no label": ({"image_a": "00000", "image_b": "00001"}, "expected image_a, image_b, label, as in"),
        "not an object": ("a", "expected image_a, image_b, label"),
    }
    found = {
        name: (lines_of(folder, [choice(0, 1, "a"), row], f"{name}.jsonl"), message)
        for name, (row, message) in jsonl.items()
    }
    matrices: dict[str, tuple[Any, str]] = {
        "few lists": (full[:4], "holds 4 lists; expected 5, one for each of the 5 prompts, each of 3 numbers"),
        "many lists": (full * 2, "holds 10 lists; expected 5"),
        "few numbers": ([*full[:4], [1, 0]], r"\[4\] holds 2 numbers; expected a list of 3"),
        "no list": ([*full[:4], 1], r"\[4\] holds 1; expected a list of 3"),
        "text": ([*full[:4], [0, "good", 1]], "a score is 'good', which is not a number"),
        "null": ([*full[:4], [0, None, 1]], "a score is None, which is not a number"),
        "true": ([*full[:4], [0, True, 1]], "a score is True, which is not a number"),
        "nan": ([*full[:4], [0, math.nan, 1]], "a score is nan, which is not a number"),
        "object": ({"a": 1}, "begins with {'a': 1}; expected .jsonl or .csv"),
        "empty": ([], "begins with None; expected"),
        "ties": ([[1, 1, 1]] * 5, "15 votes of 1 annotators prefer no image, 15 ties; label more"),
    }
    for name, (value, message) in matrices.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
        found[name] = (str(folder / f"{name}.json"), message)
    csvs = {
        "csv score": ({"image": "00001", "score": "fine"}, "csv:2: score is 'fine', which is not a number"),
        "csv nothing": ({"image": "00001", "score": ""}, "score is '', which is not a number"),
        "csv columns": ({"file": "00001", "stars": "3"}, "begins with {'file'"),
        "csv unknown": ({"image": "cat.png", "score": "3"}, "'cat.png' is unknown to"),
    }
    for name, (row, message) in csvs.items():
        found[name] = (table(folder, [row], f"{name}.csv"), message)
    (folder / "broken.jsonl").write_text(json.dumps(choice(0, 1, "a")) + '\n{"image_a": ')
    found["broken"] = (str(folder / "broken.jsonl"), "jsonl:2: not a JSON object")
    (folder / "broken.json").write_text("[[1, 2")
    found["broken list"] = (str(folder / "broken.json"), "is not a JSON list")
    found["nowhere"] = (str(folder / "nowhere.csv"), "there is no label file")
    (folder / "notes.txt").write_text("00001 is good")
    found["notes"] = (str(folder / "notes.txt"), "expected .jsonl or .csv")
    return found


def test_every_mistake_in_a_label_file_is_one_sentence(round1: Path, tmp_path: Path) -> None:
    for name, (file, message) in bad_files(tmp_path).items():
        with pytest.raises(DataError, match=message) as stopped:
            LabelledRollout(str(round1), [file]).check()
        assert "\n" not in str(stopped.value), name
    with pytest.raises(DataError, match="labels is empty"):
        LabelledRollout(str(round1), []).check()


def test_every_mistake_in_a_rollout_folder_is_one_sentence(copy: Path, tmp_path: Path) -> None:
    data = LabelledRollout(str(copy), [scored(tmp_path, SCORES)])
    data.check()
    shard = copy / "trajectories-00001.safetensors"
    stored, listed = load_file(shard), (copy / "manifest.jsonl").read_text()

    def refused(message: str) -> None:
        with pytest.raises(DataError, match=message) as stopped:
            data.check()
        assert "\n" not in str(stopped.value)

    for wrong in (
        {"latents": stored["latents"][:-1], "log_probs": stored["log_probs"][:-1]},
        {"latents": stored["latents"][:, 1:], "log_probs": stored["log_probs"]},
        {"latents": stored["latents"][..., :4], "log_probs": stored["log_probs"]},
        {"latents": stored["latents"], "log_probs": stored["log_probs"][:, 1:]},
    ):
        save_file({name: tensor.contiguous() for name, tensor in wrong.items()}, shard)
        refused(r"00001.safetensors holds .* but rollout.json says .* run align.rollout")
    save_file({"latents": stored["latents"]}, shard)
    refused("00001.safetensors is damaged")
    shard.write_bytes(b"half")
    refused("00001.safetensors is damaged")
    shard.unlink()
    refused("00001.safetensors is missing; run align.rollout with its settings again")
    save_file(stored, shard)
    data.check()

    texts = listed.splitlines(keepends=True)
    (copy / "manifest.jsonl").write_text("".join(texts[:-1]))
    refused("lists 14 images, but 5 prompts x 3 make 15; run")
    (copy / "manifest.jsonl").write_text("".join([texts[1], texts[0], *texts[2:]]))
    refused("manifest.jsonl:1 is of prompt 0, shard 0, row 1, but image 0")
    (copy / "manifest.jsonl").write_text("".join([*texts[:-1], '{"image": ']))
    refused("manifest.jsonl:15 is not as align.rollout wrote it")
    (copy / "manifest.jsonl").write_text(listed)
    (copy / "rollout.json").write_text("{}")
    refused("rollout.json is not as align.rollout wrote it")
    (copy / "rollout.json").unlink()
    refused("no .*rollout.json; expected a folder that python -m align.rollout made")


# batches
def test_a_batch_holds_each_trajectory_once(
    round1: Path, tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = families.load(str(tiny_folders["epsilon"]))
    data = LabelledRollout(str(round1), [scored(tmp_path, SCORES)]).prepare(Setup(family))
    encoded: list[str] = []
    real = type(family).encode
    monkeypatch.setattr(type(family), "encode", lambda self, texts: encoded.extend(texts) or real(self, texts))
    assert len(data) == len(EXPECTED)
    for indices in ([4], [2, 3, 4], [8, 0, 1, 7], range(9)):
        batch = data.batch(indices, [0] * len(indices))
        numbers = [int(name.rpartition("/")[2]) for name in batch.names]
        assert numbers == sorted({number for index in indices for number in EXPECTED[index]})
        assert [tuple(numbers[row] for row in pair) for pair in batch.pairs.tolist()] == [EXPECTED[k] for k in indices]
        assert batch.ids == list(indices)
        latents, prompt, cond = (getattr(batch.trajectories, name) for name in ("latents", "prompt_index", "cond"))
        assert latents.shape == (len(numbers), T + 1, 4, 8, 8)
        for row, number in enumerate(numbers):
            stored = load_file(round1 / f"trajectories-{number // (2 * K):05d}.safetensors")["latents"]
            assert torch.equal(latents[row], stored[number % (2 * K)])
            wanted = real(family, [PROMPTS[number // K]])["prompt_embeds"][0]
            assert torch.equal(cond["prompt_embeds"][prompt[row]], wanted)
    assert sorted(encoded) == sorted(set(PROMPTS) - {"a black square"})  # once each, and only where it is needed


def test_require_says_what_to_set(round1: Path, tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    family = families.load(str(tiny_folders["epsilon"]))
    batch = LabelledRollout(str(round1), [scored(tmp_path, SCORES)]).prepare(Setup(family)).batch([0])
    batch.require(Sampler(**SAMPLER), family)
    batch.require(Sampler(T, GUIDANCE, DDIM(eta=1.0), 64, "cpu"), family)
    cases = [
        (
            Sampler(4, GUIDANCE),
            "sampler has num_inference_steps 4, but .* set in objective.sampler num_inference_steps: 3$",
        ),
        (Sampler(T), "has guidance_scale 7.5, but .* guidance_scale: 2.0$"),
        (Sampler(T, GUIDANCE, DDIM(0.5)), "'eta': 0.5.* kernel: .*align.diffusion.kernels.DDIM.*'eta': 1.0"),
        (
            Sampler(4, 3.0),
            "has num_inference_steps 4, guidance_scale 3.0, but .* num_inference_steps: 3, guidance_scale: 2.0$",
        ),
    ]
    for sampler, message in cases:
        with pytest.raises(UserError, match=message):
            batch.require(sampler, family)
    family.denoiser.register_to_config(sample_size=16)
    with pytest.raises(UserError, match=r"latents of shape \[4, 16, 16\], but .* have \[4, 8, 8\]; set pretrained"):
        batch.require(Sampler(**SAMPLER), family)


# training
def training(pipeline: Path, folder: Path, labels: list[str], output: Path, **changes: Any) -> list[str]:
    arguments = {"sampler": SAMPLER, "beta": 0.1, "clip_range": 0.1} | changes.pop("objective", {})
    found: dict[str, Any] = {
        "pretrained_model_name_or_path": str(pipeline),
        "data": {"class_path": "LabelledRollout", "init_args": {"path": str(folder), "labels": labels}},
        "objective": {"class_path": "D3PO", "init_args": arguments},
        "output_dir": str(output),
        "lora": {"rank": 2},
        "rollout_batch_size": 3,
        "train_batch_size": 3,
        "gradient_accumulation_steps": 3,
        "max_train_steps": 6,
        "learning_rate": 1e-3,
        "checkpointing_steps": 0,
        "report_to": "none",
    }
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(found | changes))
    return ["--config", str(file)]


def measured(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"objective": {"sampler": SAMPLER | {"num_inference_steps": 5}}},
            "sampler has num_inference_steps 5, but .* num_inference_steps: 3$",
        ),
        pytest.param(
            {"objective": {"sampler": SAMPLER | {"guidance_scale": 5.0}}},
            "has guidance_scale 5.0, but .* guidance_scale: 2.0$",
            marks=pytest.mark.slow,
        ),
        (
            {"objective": {"sampler": SAMPLER | {"kernel": {"class_path": "DDIM", "init_args": {"eta": 0.7}}}}},
            "'eta': 0.7",
        ),
        ({"objective": {"window": {"size": 1}}}, "window chooses steps of images to be drawn"),
        ({"data": {"class_path": "PreferencePairs", "init_args": {"path": "x"}}}, "data: PreferencePairs gives Pair"),
    ],
)
def test_what_does_not_fit_is_refused_by_the_training(
    round1: Path,
    tiny_folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    labels = [scored(tmp_path, SCORES)]
    assert train.main(training(tiny_folders["epsilon"], round1, labels, tmp_path / "run", **changes)) == 2
    assert re.search(message, error_of(capsys))


def test_labels_are_not_for_dpo_and_unknown_pictures_stop_before_a_model_loads(
    round1: Path, tiny_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = scored(tmp_path, SCORES), lines_of(tmp_path, [choice(0, 99, "a")])
    dpo = {"class_path": "DPO", "init_args": {"beta": 10.0}}
    arguments = training(tiny_folders["epsilon"], round1, [good], tmp_path / "run")
    config = yaml.safe_load(Path(arguments[1]).read_text()) | {"objective": dpo}
    Path(arguments[1]).write_text(yaml.safe_dump(config))
    assert train.main(arguments) == 2
    assert "DPO trains on PairBatch, but data: LabelledRollout gives TrajectoryBatch" in error_of(capsys)
    assert train.main(training(tiny_folders["epsilon"], round1, [bad], tmp_path / "run")) == 2
    assert "the objective DPO on PreferencePairs" in error_of(capsys)
    assert not (tmp_path / "run").exists()


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many rows the reference is asked about, call by call."""
    rows: list[int] = []
    real = Policy.predict

    def predict(self: Policy, x_t: Tensor, *args: Any, **options: Any) -> Any:
        if self.answering is not None:
            rows.append(len(x_t))
        return real(self, x_t, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Policy, "predict", predict)
        yield rows


def test_the_reference_is_asked_once_for_every_trajectory(
    round1: Path, tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three epochs over the pairs, and the held-out pairs of the same folder at either end."""
    labels = [scored(tmp_path, SCORES)]
    held_out = {"class_path": "LabelledRollout", "init_args": {"path": str(round1), "labels": labels, "limit": 4}}
    changes = {"max_train_steps": 9, "validation_data": held_out}
    with counted(monkeypatch) as rows:
        assert train.main(training(tiny_folders["epsilon"], round1, labels, tmp_path / "run", **changes)) == 0
    assert sum(rows) == len({number for pair in EXPECTED for number in pair}) * T
    found = measured(tmp_path / "run")
    assert [line["step"] for line in found if "loss" in line] == list(range(1, 10))
    assert found[0]["validation/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert all(0.68316 <= line["loss"] <= 0.70323 for line in found if "loss" in line)


def brightness(file: Path) -> float:
    return float(np.asarray(Image.open(file), dtype=float).mean())


def person(folder: Path, file: Path) -> str:
    """Answers as a person would: looks at two pictures of a prompt at a time and takes the brighter."""
    rows = []
    for a, b in combinations(manifest(folder), 2):
        if a["prompt_index"] == b["prompt_index"]:
            one, other = (brightness(folder / line["image"]) for line in (a, b))
            label = "tie" if one == other else "a" if one > other else "b"
            rows.append({"prompt": a["prompt"], "image_a": a["image"], "image_b": b["image"], "label": label})
    return lines_of(file.parent, rows, file.name)


@pytest.mark.slow
def test_two_whole_rounds(tiny_folders: dict[str, Path], round1: Path, tmp_path: Path) -> None:
    """Rollout, labels, training, stock diffusers; then again from there, with that as the reference."""
    pipeline = tiny_folders["epsilon"]
    first, second = tmp_path / "first", tmp_path / "second"
    labels = [person(round1, tmp_path / "answers.jsonl")]
    options = {"max_train_steps": 10, "learning_rate": 1e-2}
    assert train.main(training(pipeline, round1, labels, first, **options)) == 0
    found = [line for line in measured(first) if "loss" in line]
    assert found[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert found[0]["ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert np.mean([line["implicit_acc"] for line in found[-3:]]) > 0.6

    stock = StableDiffusionPipeline.from_pretrained(pipeline)
    stock.load_lora_weights(first)
    stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config)
    options_of = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "pt"}
    theirs = stock(PROMPTS[:2], latents=initial_noise((4, 8, 8), [5, 6]), **options_of).images
    family = families.load(str(pipeline))
    base = families.load(str(pipeline))
    policy = Policy(family, LoRA(2), initial=first)
    with torch.no_grad():
        x = initial_noise((4, 8, 8), [5, 6])
        mine, before = (
            who.to_image(sample(predict, who.grid(4), who.encode(PROMPTS[:2]), x, 3.0))
            for who, predict in ((family, policy.predict), (base, base.predict))
        )
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(mine, before, atol=1e-3)

    again = tmp_path / "rollout2"
    assert rollout.main(settings(pipeline, again, weights=str(first))) == 0
    one, two = (json.loads((folder / "rollout.json").read_text()) for folder in (round1, again))
    assert two["weights"] == str(first)
    assert one["digest"] != two["digest"]
    states = [load_file(folder / "trajectories-00000.safetensors")["latents"] for folder in (round1, again)]
    assert torch.equal(states[0][:, 0], states[1][:, 0])
    assert not torch.allclose(states[0][:, -1], states[1][:, -1], atol=1e-3)

    labels = [person(again, tmp_path / "answers2.jsonl")]
    more = {"initial_weights": str(first), "objective": {"reference": "start"}, "max_train_steps": 2}
    assert train.main(training(pipeline, again, labels, second, **more)) == 0
    start = measured(second)[0]
    assert start["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert start["ratio_max"] == pytest.approx(1, abs=1e-5)
    # and against the pipeline itself the first round's weights have already moved
    more["objective"] = {"reference": "base"}
    assert train.main(training(pipeline, again, labels, tmp_path / "third", **more)) == 0
    assert abs(measured(tmp_path / "third")[0]["ratio_max"] - 1) > 1e-3


def test_the_stored_log_probs_are_those_of_the_tuned_weights(
    tiny_folders: dict[str, Path], round1: Path, tmp_path: Path
) -> None:
    pipeline = tiny_folders["epsilon"]
    labels = [scored(tmp_path, SCORES)]
    options = {"max_train_steps": 3, "learning_rate": 1e-2}
    assert train.main(training(pipeline, round1, labels, tmp_path / "run", **options)) == 0
    assert rollout.main(settings(pipeline, tmp_path / "tuned", weights=str(tmp_path / "run"))) == 0
    family = families.load(str(pipeline))
    batch = LabelledRollout(str(tmp_path / "tuned"), labels).prepare(Setup(family)).batch(range(9))
    stored = batch.trajectories.log_probs
    assert stored is not None
    ctx = Context(Policy(family, LoRA(2), initial=tmp_path / "run"), 0, 0, range(9))
    again = log_probs(ctx, Sampler(**SAMPLER), batch.trajectories, 8)
    torch.testing.assert_close((again - stored).exp(), torch.ones_like(stored), atol=1e-5, rtol=0)
    base = log_probs(ctx, Sampler(**SAMPLER), batch.trajectories, 8, reference=True)
    assert not torch.allclose(base, stored, atol=1e-4)
