"""``align.sample``: its pictures are the gallery's, their captions and seeds are kept, and what it refuses."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from align import families, sample
from align.common.errors import UserError
from align.evaluation import gallery
from align.policy.initial_noise import InitialNoise
from align.policy.policy import LoRA, Policy
from align.sample import main
from align.sampling import generate
from tests.helpers import TEXTS, errors, prompt_file
from tests.test_policy import disturb

QUICK = ["--num_inference_steps", "2", "--guidance_scale", "2.0"]


def drawn(folder: Path) -> Tensor:
    """(N, 3, H, W) of the pictures that the captions name, 8 bit."""
    return torch.stack([pil_to_tensor(Image.open(folder / row["file_name"])) for row in rows(folder)])


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def expected(source: str | Path, prompts: list[str], first: int = 0, **more: Any) -> Tensor:
    """What the gallery draws of ``prompts`` from the seeds ``first``, ``first + 1``, .."""
    family = families.load(str(source))
    if weights := more.pop("weights", None):
        family = families.tuned(family, str(weights))
    seeds = range(first, first + len(prompts))
    images = generate.sample_images(family.predict, family, prompts, seeds, 2, 2.0, **more)
    return (images * 255).round().byte()


def at_most_one_level(a: Tensor, b: Tensor) -> bool:
    """Batches of another size may round a pixel the other way."""
    return a.shape == b.shape and bool((a.int() - b.int()).abs().max() <= 1)


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_pictures_are_the_gallerys(tiny_folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """Of a prompt file, several of each prompt, in small batches; captions and seeds stand beside them."""
    file, out = prompt_file(tmp_path, TEXTS[:2]), tmp_path / "out"
    source = ["--pretrained_model_name_or_path", str(tiny_folders[kind]), "--batch_size", "4"]
    command = [*source, *QUICK, "--prompts", file, "--images_per_prompt", "3", "--seed", "7"]
    assert main([*command, "--output_dir", str(out)]) == 0
    texts = [TEXTS[0]] * 3 + [TEXTS[1]] * 3
    assert rows(out) == [{"file_name": f"{k:05d}.png", "prompt": text, "seed": 7 + k} for k, text in enumerate(texts)]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*(f"{k:05d}.png" for k in range(6)), "gallery.html", "metadata.jsonl"]
    )
    assert torch.equal(drawn(out), expected(tiny_folders[kind], texts, 7, batch_size=4))
    assert len(drawn(out).flatten(1).unique(dim=0)) == 6


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_half_precision(tiny_folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """States stay float32 while the network's weights are not: the pictures are nearly those of float32."""
    source = ["--pretrained_model_name_or_path", str(tiny_folders[kind]), "--output_dir", str(tmp_path / "out")]
    assert main([*source, *QUICK, "--prompts", TEXTS[0], "--mixed_precision", "bf16"]) == 0
    apart = (drawn(tmp_path / "out").float() - expected(tiny_folders[kind], TEXTS[:1]).float()).abs()
    assert 0 < apart.mean() < 4


def test_one_prompt_and_captions_in_any_script(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    source = ["--pretrained_model_name_or_path", str(tiny_folders["flow"]), "--output_dir", str(tmp_path / "out")]
    assert main([*source, *QUICK, "--prompts", "zwei rote Sterne, größer"]) == 0
    assert rows(tmp_path / "out") == [{"file_name": "00000.png", "prompt": "zwei rote Sterne, größer", "seed": 0}]
    assert "größer" in (tmp_path / "out" / "metadata.jsonl").read_text()


@pytest.mark.parametrize("name", ["p.csv", "P.TXT", "p.tsv", "prompts"])
def test_a_prompt_file_of_any_name_is_no_prompt(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("a cat\n" if name in ("P.TXT", "prompts") else "prompt\na cat\n")
    assert sample._prompts(str(tmp_path / name), None) == ["a cat"]
    with pytest.raises(UserError, match="there is no prompt file"):
        sample._prompts(str(tmp_path / "gone.csv"), None)


def test_resolution(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    source = ["--pretrained_model_name_or_path", str(tiny_folders["epsilon"]), "--output_dir", str(tmp_path / "out")]
    assert main([*source, *QUICK, "--prompts", "a star", "--resolution", "32"]) == 0
    assert drawn(tmp_path / "out").shape == (1, 3, 32, 32)


@pytest.mark.parametrize("lora", [LoRA(2), pytest.param(None, marks=pytest.mark.slow)])
def test_tuned_weights_draw(tiny_folders: dict[str, Path], tmp_path: Path, lora: LoRA | None) -> None:
    policy = Policy(families.load(str(tiny_folders["epsilon"])), lora)
    disturb(policy, 0.1)
    policy.save(tmp_path / "run")
    source = ["--pretrained_model_name_or_path", str(tiny_folders["epsilon"]), "--output_dir", str(tmp_path / "out")]
    assert main([*source, *QUICK, "--prompts", "a star", "--weights", str(tmp_path / "run")]) == 0
    assert torch.equal(drawn(tmp_path / "out"), expected(tiny_folders["epsilon"], ["a star"], weights=tmp_path / "run"))
    assert not at_most_one_level(drawn(tmp_path / "out"), expected(tiny_folders["epsilon"], ["a star"]))


@pytest.fixture
def noise(tiny_folders: dict[str, Path], tmp_path: Path) -> Path:
    """A run folder with noise for two prompts."""
    found = InitialNoise(TEXTS[:2], (4, 8, 8), str(tiny_folders["flow"]), "FlowMatchEulerDiscreteScheduler")
    generator = torch.Generator().manual_seed(0)
    for parameter in found.parameters():
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    return found.save(tmp_path).parent


def test_learned_noise_draws_its_own_prompts_with_its_own_model(
    tiny_folders: dict[str, Path], tmp_path: Path, noise: Path
) -> None:
    """File or folder; prompts and model are those it was learned for where none are given."""
    assert main(["--noise", str(noise), *QUICK, "--images_per_prompt", "2", "--output_dir", str(tmp_path / "out")]) == 0
    texts = [TEXTS[0]] * 2 + [TEXTS[1]] * 2
    assert [row["prompt"] for row in rows(tmp_path / "out")] == texts
    learned = InitialNoise.load(noise)
    assert torch.equal(drawn(tmp_path / "out"), expected(tiny_folders["flow"], texts, initial=learned.initial))
    assert not at_most_one_level(drawn(tmp_path / "out"), expected(tiny_folders["flow"], texts))
    one = ["--noise", str(noise / "find.safetensors"), "--prompts", TEXTS[1], "--seed", "2"]
    assert main([*one, *QUICK, "--output_dir", str(tmp_path / "one")]) == 0
    assert at_most_one_level(drawn(tmp_path / "one"), drawn(tmp_path / "out")[2:3])


@pytest.mark.parametrize("ending", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_half_a_folder_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: BaseException) -> None:
    save = gallery.save_png

    def ends(image: Image.Image, path: Path) -> None:
        if path.name == "00002.png":
            raise ending
        save(image, path)

    monkeypatch.setattr(gallery, "save_png", ends)
    with pytest.raises(type(ending)):
        gallery.save_folder(torch.zeros(4, 3, 8, 8), TEXTS, range(4), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "told"), [("00000.png", "holds pictures"), ("metadata.jsonl", "holds a metadata.jsonl")]
)
def test_a_folder_with_pictures_is_left_alone(
    tiny_folders: dict[str, Path], tmp_path: Path, name: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of .jpg too, whose captions those of ours would replace."""
    (tmp_path / name).write_text("mine")
    command = ["--pretrained_model_name_or_path", str(tiny_folders["flow"]), "--prompts", "a star", *QUICK]
    assert main([*command, "--output_dir", str(tmp_path)]) == 2
    (error,) = errors(capsys.readouterr().err)
    assert f"{told} already; give another output_dir" in error
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say what to draw"),
        (["--prompts", "a star", "--images_per_prompt", "0"], "images_per_prompt must be at least 1"),
        (["--prompts", "./gone.txt"], "there is no prompt file gone.txt"),
        (["--prompts", "./gone.csv"], "there is no prompt file gone.csv"),
        (["--prompts", "a star", "--weights", "./gone"], "nothing tuned in 'gone'"),
        (["--prompts", "a star", "--noise", "./gone"], "no noise at gone"),
        (["--noise", "NOISE", "--prompts", "another prompt"], "no noise was learned for 'another prompt'"),
        (["--noise", "NOISE", "--resolution", "32"], "latents of (4, 8, 8), not (4, 16, 16)"),
        (["--noise", "NOISE", "--pretrained_model_name_or_path", "EPSILON"], "this noise was learned for model"),
    ],
)
def test_mistakes_are_one_clear_line(
    tiny_folders: dict[str, Path],
    tmp_path: Path,
    noise: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    places = {"NOISE": str(noise), "EPSILON": str(tiny_folders["epsilon"])}
    given = [places.get(word, word) for word in arguments]
    if "--noise" not in given:
        given += ["--pretrained_model_name_or_path", str(tiny_folders["flow"])]
    assert main([*given, *QUICK, "--output_dir", str(tmp_path / "out")]) == 2
    (error,) = errors(capsys.readouterr().err)
    assert message in error
    assert not (tmp_path / "out").exists()
