"""What goes to the hub and what stays, against a stand-in of it; and what is said where it does not go."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from diffusers.loaders import lora_base
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file

from align import bench, evaluate, export, families
from align.common.errors import UserError
from align.common.hub import Publishing
from align.families import LORA_FILE
from align.policy.initial_noise import NOISE_FILE
from align.train import main
from align.training.model_card import ModelCard, license_in, license_of, picture
from align.training.publish import for_hub, pictured, weights_in
from pruning import compress
from tests.helpers import TEXTS, errors, online, prompt_file, write
from tests.stand_in_hub import Hub, Repo, running


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with running() as hub:
        for name, value in {
            "ENDPOINT": hub.address,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.address + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.address)
        monkeypatch.setattr(lora_base, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_writes")
        yield hub


def settings(pipeline: Path, folder: Path) -> dict[str, Any]:
    sampler = {"num_inference_steps": 2, "guidance_scale": 2.0}
    return online(pipeline, folder, "PolicyGradient", sampler=sampler, images_per_prompt=2) | {
        "max_train_steps": 2, "checkpointing_steps": 1, "report_to": "tensorboard",
        "samples": {"prompts": ["a star", "two red stars"], "num_inference_steps": 1},
    }  # fmt: skip


@pytest.fixture
def config(tiny_folders: dict[str, Path], tmp_path: Path) -> dict[str, Any]:
    return settings(tiny_folders["flow"], tmp_path) | {"push_to_hub": True, "hub_model_id": "me/tuned"}


@pytest.fixture(scope="module")
def trained(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    assert main(["--config", write(settings(tiny_folders["flow"], folder))]) == 0
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A run that went nowhere yet."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


RUN_FILES = {
    "README.md", LORA_FILE, "config.yaml", "run.json", "samples/step-000000.png", "samples/step-000002.png"
}  # fmt: skip


def snippet(card: bytes) -> dict[str, Any]:
    """Run the card's Python; what it leaves."""
    (block,) = re.findall(r"^```python\n(.*?)\n```$", card.decode(), re.DOTALL | re.MULTILINE)
    scope: dict[str, Any] = {}
    exec(block, scope)
    return scope


def test_a_run_goes_without_its_checkpoints_and_loads_from_there(
    hub: Hub, config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Must show: card, weights and pictures, and no checkpoint."""
    assert main(["--config", write(config, hub_private=True)]) == 0
    folder, repo = tmp_path / "run", hub.repos["me/tuned"]
    assert {"checkpoint-1", "metrics.jsonl", "t2i-align"} <= {path.name for path in folder.iterdir()}
    assert set(repo.files) == RUN_FILES and repo.private
    assert repo.files[LORA_FILE] == (folder / LORA_FILE).read_bytes()
    card = repo.files["README.md"].decode()
    assert "](samples/step-000000.png)" in card and "](samples/step-000002.png)" in card
    assert repo.card["tags"][-2:] == ["policygradient", "lora"] and "license" not in repo.card
    assert "base_model" not in repo.card, "a folder of this machine is no model of the hub"
    assert "hf_writes" not in str(repo.files) + "".join(map(str, capsys.readouterr()))
    pipe = snippet(repo.files["README.md"])["pipe"]
    adapters = {name: value for name, value in pipe.transformer.state_dict().items() if "lora_" in name}
    written = load_file(folder / LORA_FILE)
    assert adapters and torch.equal(
        torch.stack([value.double().norm() for value in adapters.values()]).sort().values,
        torch.stack([value.double().norm() for value in written.values()]).sort().values,
    )
    assert str(folder) in (folder / "README.md").read_text(), "the card here loads what lies here"


def test_every_weight_loads_from_there(hub: Hub, config: dict[str, Any], tmp_path: Path) -> None:
    assert main(["--config", write(config, lora=None, samples={})]) == 0
    repo, name = hub.repos["me/tuned"], "transformer/diffusion_pytorch_model.safetensors"
    assert set(repo.files) == {"README.md", "config.yaml", "run.json", "transformer/config.json", name}
    pipe = snippet(repo.files["README.md"])["pipe"]
    written = load_file(tmp_path / "run" / name)
    assert all(torch.equal(value, written[key]) for key, value in pipe.transformer.state_dict().items())


def test_a_run_is_uploaded_once_more_and_for_other_programs(
    hub: Hub, config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A commit that fails leaves the run whole, and the command that is named then uploads it; what arrived before is
    not sent again."""
    hub.fails = {"POST .*/commit/": 403}
    assert main(["--config", write(config)]) == 2
    (line,) = errors(capsys.readouterr().err)
    assert "403" in line and not hub.repos["me/tuned"].files
    arguments = re.search(r"python -m align.export (.*) uploads it once more", line)
    assert arguments and weights_in(tmp_path / "run")
    hub.fails.clear()
    sent = hub.asked("PUT /blobs/")
    assert export.main(arguments[1].split()) == 0
    assert set(hub.repos["me/tuned"].files) == RUN_FILES
    assert hub.asked("PUT /blobs/") == sent == 3
    # a second push, with a file for another program
    target = ["--to", "comfyui", "--output", str(tmp_path / "mine.safetensors")]
    assert export.main([str(tmp_path / "run"), *target, "--push_to_hub", "--hub_model_id", "tuned"]) == 0
    repo = hub.repos["me/tuned"]
    assert set(repo.files) == RUN_FILES | {"mine.safetensors"} and len(repo.commits) == 2
    assert "ComfyUI/models/loras" in repo.files["README.md"].decode()
    assert snippet(repo.files["README.md"])["pipe"].transformer.peft_config


@pytest.mark.slow
def test_a_merged_pipeline_loads_from_there(hub: Hub, run: Path, tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    target = ["--to", "diffusers", "--merge", "--output", str(tmp_path / "whole")]
    assert export.main([str(run), *target, "--push_to_hub", "--hub_model_id", "club/whole"]) == 0
    repo = hub.repos["club/whole"]
    assert {"model_index.json", "transformer/config.json", "vae/config.json"} <= set(repo.files)
    assert LORA_FILE not in repo.files and "samples/step-000002.png" in repo.files
    pipe = snippet(repo.files["README.md"])["pipe"]
    theirs = families.tuned(families.load(str(tiny_folders["flow"])), str(run)).pipe
    theirs.fuse_lora()
    theirs.unload_lora_weights()
    ours = dict(pipe.transformer.named_parameters())
    assert all(torch.allclose(ours[name], value, atol=1e-6) for name, value in theirs.transformer.named_parameters())


def test_a_lora_file_is_uploaded_with_a_card(
    hub: Hub, run: Path, tiny_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((run / LORA_FILE).read_bytes())
    for name in ("config.yaml", "run.json"):  # which are of something else here
        (tmp_path / name).write_text("{}")
    base = ["--pretrained_model_name_or_path", str(tiny_folders["flow"])]
    target = ["--to", "kohya", "--output", str(tmp_path / "kohya.safetensors"), "--push_to_hub"]
    hub.fails = {"POST .*/commit/": 403}
    assert export.main([str(alone), *base, *target]) == 2
    again = re.search(r"python -m align.export (.*) uploads it once more", capsys.readouterr().err)
    hub.fails.clear()
    assert again and export.main(again[1].split()) == 0
    assert set(hub.repos["me/alone"].files) == {"README.md", "kohya.safetensors"}
    assert not hub.repos["me/alone"].private


def test_a_compressed_pipeline_goes_with_its_figures(hub: Hub, tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    base, out = str(tiny_folders["flow"]), tmp_path / "out"
    prompts = prompt_file(tmp_path, TEXTS)
    report = {"prompts": prompts, "num_inference_steps": 1, "memory": False, "repeats": 1}
    report["reward"] = [{"name": "tests.helpers.Bright"}]
    compressing = {
        "pretrained_model_name_or_path": base, "output_dir": str(out), "blocks": "1", "prompts": prompts, "heal": None,
        "dtype": "float32", "report": report, "push_to_hub": True, "hub_model_id": "me/small", "hub_private": True,
    }  # fmt: skip
    (tmp_path / "compress.yaml").write_text(yaml.safe_dump(compressing))
    assert compress.main(["--config", str(tmp_path / "compress.yaml"), "--stages", "[plan,remove,report]"]) == 0
    repo = hub.repos["me/small"]
    assert repo.private and {"model_index.json", "transformer/config.json", "gallery.png", "README.md"} <= set(
        repo.files
    )
    assert not [name for name in repo.files if name.startswith(("plan", "stages", "images", ".")) or "/." in name]
    card = repo.files["README.md"].decode()
    assert "](gallery.png)" in card and "Bright" in card and "95 % interval" in card
    assert "](../gallery.png)" in (out / "pruned/README.md").read_text()
    pipe = snippet(repo.files["README.md"])["pipe"]
    assert len(pipe.transformer.transformer_blocks) == 2
    # the same command again, and the folder by itself
    assert compress.main(["--config", str(tmp_path / "compress.yaml"), "--stages", "[plan,remove]"]) == 0
    assert export.main([str(out / "pruned"), "--push_to_hub", "--hub_model_id", "me/small"]) == 0
    assert len(repo.commits) == 3


COMMANDS = ("train", "export", "compress")


def told(command: str, config: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str], **more: Any) -> str:
    """What a command says of a repository that it cannot write; nothing is begun."""
    hubbed = {"push_to_hub": True, "hub_model_id": "me/tuned"} | more
    if command == "train":
        status = main(["--config", write(config, **hubbed)])
    elif command == "export":
        (folder / "lora").mkdir(exist_ok=True)
        (folder / "lora" / LORA_FILE).touch()
        words = [word for key, value in hubbed.items() for word in (f"--{key}", str(value))]
        status = export.main([str(folder / "lora"), *words])
    else:
        pruned = {"pretrained_model_name_or_path": config["pretrained_model_name_or_path"], "blocks": "1", **hubbed}
        pruned |= {"output_dir": str(folder / "run"), "prompts": prompt_file(folder, TEXTS)}
        status = compress.main(["--config", write(pruned)])
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert status == 2 and line.startswith("error: ") and len(line) < 400
    assert not (folder / "run").exists()
    return line


def test_a_repository_that_nothing_is_pushed_to_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert Publishing(hub_model_id="me/tuned").repository(tmp_path) is None
    assert "but not push_to_hub" in caplog.text


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_token_is_one_line_before_anything_begins(
    hub: Hub,
    config: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    line = told(command, config, tmp_path, capsys)
    assert "refuses the token in HF_TOKEN" in line and "hf_wrong" not in line
    assert not hub.repos


@pytest.mark.parametrize(
    ("token", "more", "expected"),
    [
        (None, {}, "there is no token"),
        ("hf_reads", {}, "cannot write to me/tuned as me .namespaces: me, club.: 403"),
        ("hf_writes", {"hub_model_id": "strangers/tuned"}, "cannot write to strangers/tuned"),
        ("hf_writes", {"hub_model_id": "a/b/c"}, "cannot be a repository's name .*NAMESPACE/NAME"),
        ("hf_writes", {"hub_model_id": "me/ what"}, "cannot be a repository's name"),
        ("hf_writes", {"hub_model_id": "me/open", "hub_private": True}, "me/open is there already, and public"),
        ("hf_writes", {"hub_model_id": "strangers/open"}, "cannot write to strangers/open"),
    ],
)
def test_what_cannot_be_written_is_one_line(
    hub: Hub,
    config: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    token: str | None,
    more: dict[str, Any],
    expected: str,
) -> None:
    hub.repos |= {"me/open": Repo(), "strangers/open": Repo()}
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    assert re.search(expected, told("train", config, tmp_path, capsys, **more))
    assert not any(repo.commits for repo in hub.repos.values())


def test_no_hub_is_one_line(hub: Hub, config: dict[str, Any], tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "HF_HUB_OFFLINE is set" in told("train", config, tmp_path, capsys)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot ask http://127.0.0.1:9" in told("train", config, tmp_path, capsys)


def test_a_dry_run_asks_whose_the_token_is_and_makes_nothing(hub: Hub, config: dict[str, Any], tmp_path: Path) -> None:
    assert main(["--config", write(config, dry_run=True)]) == 0
    assert hub.asked("whoami") == 1 and not hub.repos


def test_other_processes_ask_nothing(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RANK", "1")
    assert Publishing(push_to_hub=True, hub_model_id="me/tuned").repository(tmp_path) is None
    assert not hub.requests
    monkeypatch.setenv("RANK", "0")
    found = Publishing(push_to_hub=True).repository(tmp_path / "mine.safetensors")
    assert found is not None and found.id == "me/mine"


def test_only_what_a_model_is_loaded_from_is_listed(tmp_path: Path) -> None:
    for name in (
        "checkpoint-5/unet/config.json", "checkpoint-5/unet/diffusion_pytorch_model.safetensors", ".lock",
        "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "unet/.x.tmp", "unet/optimizer.bin",
        "wandb/run/files/config.json", "t2i-align/events.out.tfevents.1", "rollout/shard-0.safetensors", NOISE_FILE,
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert set(weights_in(tmp_path)) == {
        "unet/config.json", "unet/diffusion_pytorch_model.safetensors", NOISE_FILE
    }  # fmt: skip
    for name in ("model_index.json", "transformer/a.safetensors", "private/a.json", "../a.json"):
        (tmp_path / "whole" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "whole" / name).write_text(
            '{"_class_name": "P", "transformer": ["diffusers", "T"], "..": ["x", "y"]}'
        )
    assert set(weights_in(tmp_path / "whole")) == {"model_index.json", "transformer/a.safetensors"}
    with pytest.raises(UserError, match="no weights to upload"):
        weights_in(tmp_path / "rollout")


def test_a_card_shows_pictures_of_its_folder_and_of_no_other_place(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    for path in (folder / "a b.png", folder.parent / "gallery.png", tmp_path / "private.png"):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(path)
    names = ("a b.png", "../gallery.png", "../../private.png", "gone.png")
    card, found = pictured("\n\n".join(picture("x", name) for name in names), folder)
    assert sorted(found) == ["a b.png", "gallery.png"]
    assert card.split() == ["![x](a%20b.png)", "![x](gallery.png)"]


def test_the_terms_are_the_bases_or_none(hub: Hub, tmp_path: Path) -> None:
    def of(head: str) -> dict[str, str]:
        (tmp_path / "README.md").write_text(f"---\n{head}\n---\n")
        return license_of(str(tmp_path))

    assert of("license: openrail++") == {"license": "openrail++"}
    assert of("tags: [a]") == of("license: Some Terms of Ours") == of("license: [mit") == of("license: [mit]") == {}
    other = {"license": "other", "license_name": "flux", "license_link": "LICENSE.md"}
    assert of(yaml.safe_dump(other)) == {"license": "other", "license_name": "flux"}
    link = {"license_link": "https://huggingface.co/x/y/blob/main/LICENSE.md"}
    assert license_in(other, "x/y") == other | link
    assert license_of("shapes-sd") == {"license": "apache-2.0"}
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert "\nlicense: mit\n" in ModelCard(title="t", base_model=str(tmp_path), introduction="").text()


def test_the_hub_is_asked_for_terms_that_are_not_known_here(hub: Hub) -> None:
    hub.repos["x/base"] = Repo(files={"README.md": b"---\nlicense: openrail++\n---\n"})
    text = ModelCard(title="t", base_model="x/base", introduction="i").text()
    assert "license:" not in text and "Unknown" in text
    card = for_hub(text, "me/tuned")
    assert "\nlicense: openrail++\n" in card and "openrail++: the base" in card and "Unknown" not in card
    assert "\nbase_model: x/base\n" in card
    unknown = for_hub(ModelCard(title="t", base_model="x/gated", introduction="i").text(), "me/tuned")
    assert "license:" not in unknown and "Unknown" in unknown


def test_what_was_judged_stands_on_the_card(hub: Hub, run: Path, tmp_path: Path) -> None:
    prompts = prompt_file(tmp_path, TEXTS)
    drawn = ["--num_inference_steps", "1", "--reward", "tests.helpers.Bright"]
    assert evaluate.main(["--tuned", str(run), "--prompts", prompts, *drawn]) == 0
    assert export.main([str(run), "--push_to_hub", "--hub_model_id", "me/tuned"]) == 0
    repo = hub.repos["me/tuned"]
    assert set(repo.files) == RUN_FILES | {"evaluation/gallery.png"}
    card = repo.files["README.md"].decode()
    assert re.search(r"\| tests\.helpers\.Bright \|.*\(.*–.*\)", card) and "1 steps; guidance" in card
    assert json.loads(repo.files["run.json"])["versions"]


@pytest.mark.slow
def test_a_bench_stands_on_the_card(run: Path, tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    base = tiny_folders["flow"]
    out = ["--output_dir", str(tmp_path / "bench"), "--max_prompts", "4", "--num_inference_steps", "1"]
    assert bench.main(["shapes", "--models", f"[{base},{run}]", *out]) == 0
    card = (run / "README.md").read_text()
    assert "## Bench: Shapes\n" in card and re.search(r"\| Shapes \| run \| [\d.]+ \([\d.]+–[\d.]+\) \|", card)
