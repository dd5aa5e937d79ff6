"""The embedded world: what is shipped loads in stock diffusers, and holds what the documents say."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image
from safetensors import safe_open

from align import families
from align.common.assets import locate
from align.sampling import generate
from align.sampling.loop import initial_noise, sample
from align.shapes.scripts import draw_preferences, pretrain
from align.shapes.scripts.draw_preferences import held_out
from align.shapes.scripts.pretrain import new_tokenizer
from align.shapes.world import COMBINATIONS, HELD_OUT, SEEN, TASKS, caption, held_out_prompts, render, training_prompts
from rewards.models.shapes import PALETTE, SHAPES, find, flawless, grade, judge, parse

PIPELINES = ("shapes-sd", "shapes-sd3")


def combinations(text: str) -> set[tuple[str, str]]:
    return {(thing.colour, thing.shape) for thing in parse(text).things if thing.colour}


def test_training_captions_and_pictures_never_show_a_held_out_combination() -> None:
    rng = np.random.default_rng(0)
    for k in range(300):
        text = caption(rng, TASKS[k % 6])
        assert combinations(text) <= set(SEEN), text
        image = torch.from_numpy(render(rng, text).copy()).permute(2, 0, 1) / 255
        found = find(image)
        for colour, shape in HELD_OUT:
            assert not flawless(grade(parse(f"a {colour} {shape}"), found))


def test_the_shipped_training_prompts() -> None:
    files = ("shapes-prompts", "shapes-prompts-more-counting")
    every, more = (Path(locate(name)).read_text().splitlines() for name in files)
    assert every == training_prompts()
    assert more == [prompt for prompt in every if parse(prompt).task == "counting"] * 2 + every
    assert not any(HELD_OUT & set(combinations(prompt)) for prompt in every)


def test_the_held_out_prompts() -> None:
    prompts = held_out_prompts()
    assert len(set(prompts)) == len(prompts) == 240
    tasks = [parse(prompt).task for prompt in prompts]
    assert {task: tasks.count(task) for task in TASKS} == dict.fromkeys(TASKS, 40)
    named = [combinations(prompt) for prompt in prompts if combinations(prompt)]
    assert len(named) == 160
    assert all(found & HELD_OUT for found in named)
    assert len(PALETTE) >= 6
    assert len(SHAPES) >= 4
    assert len(HELD_OUT) + len(SEEN) == len(COMBINATIONS)


def test_a_seed_names_the_picture() -> None:
    pictures = [render(np.random.default_rng(5), "two red stars") for _ in range(2)]
    assert np.array_equal(*pictures)
    assert pictures[0].shape == (64, 64, 3)


def test_every_caption_word_is_one_token() -> None:
    tokenizer = new_tokenizer()
    for prompt in held_out_prompts():
        ids = tokenizer(prompt).input_ids
        assert len(ids) == len(prompt.split()) + 2 <= tokenizer.model_max_length
    assert tokenizer.decode(tokenizer("grinning face").input_ids, skip_special_tokens=True).strip() == "grinning face"


@pytest.mark.parametrize("name", PIPELINES)
def test_stock_diffusers_loads_and_runs_the_folder(name: str) -> None:
    pipe = DiffusionPipeline.from_pretrained(locate(name))
    assert (
        type(pipe).__name__ == {"shapes-sd": "StableDiffusionPipeline", "shapes-sd3": "StableDiffusion3Pipeline"}[name]
    )
    images = pipe(["a red star", "two blue circles"], num_inference_steps=2, output_type="pt").images
    assert images.shape == (2, 3, 64, 64)
    assert torch.isfinite(torch.as_tensor(images)).all()


def test_shapes_sd3_has_twelve_blocks_and_needs_no_t5() -> None:
    whole = DiffusionPipeline.from_pretrained(locate("shapes-sd3"))
    without = DiffusionPipeline.from_pretrained(locate("shapes-sd3"), text_encoder_3=None, tokenizer_3=None)
    assert len(whole.transformer.transformer_blocks) >= 12
    x = initial_noise((4, 8, 8), [1])
    said = [
        pipe("a red star", latents=x.clone(), num_inference_steps=2, output_type="latent").images
        for pipe in (whole, without)
    ]
    assert torch.equal(*said)


@pytest.mark.parametrize("name", [pytest.param("shapes-sd", marks=pytest.mark.slow), "shapes-sd3"])
def test_our_sampler_draws_what_stock_diffusers_draws(name: str) -> None:
    family = families.load(name)
    stock = DiffusionPipeline.from_pretrained(locate(name))
    if name == "shapes-sd":
        stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config)
    prompts, x = ["a red star", "two blue circles"], initial_noise(family.latent_shape(), [1, 2])
    theirs = stock(
        prompts,
        latents=x.clone(),
        num_inference_steps=8,
        guidance_scale=family.default_guidance_scale,
        output_type="pt",
    ).images
    with torch.no_grad():
        latents = sample(family.predict, family.grid(8), family.encode(prompts), x, family.default_guidance_scale)
        torch.testing.assert_close(family.to_image(latents), theirs, atol=2e-4, rtol=1e-3)


def test_the_pipelines_are_small_safetensors_in_half_precision() -> None:
    files = [path for name in PIPELINES for path in Path(locate(name)).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 24e6
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) == 3 + 5
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pkl", ".ckpt")]
    for path in weights:
        with safe_open(path, "pt") as file:
            kinds = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
            assert kinds <= {"F16", "I64"}, path


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.slow
def test_the_reward_reads_what_the_autoencoder_gives_back(name: str) -> None:
    family = families.load(name)
    rng = np.random.default_rng(9)
    texts = [caption(rng, TASKS[k % 6], COMBINATIONS) for k in range(240)]
    images = torch.stack([torch.from_numpy(render(rng, text).copy()).permute(2, 0, 1) / 255 for text in texts])
    with torch.no_grad():
        again = torch.cat([family.to_image(family.to_latent(part)) for part in images.split(60)])
    right = [judge(text, image)[0] for text, image in zip(texts, again, strict=True)]
    assert np.mean(right) >= 0.98


@pytest.mark.parametrize(("name", "least"), [("shapes-preferences", 2000), ("shapes-preferences-sd3", 3000)])
@pytest.mark.slow
def test_the_preference_sets(name: str, least: int) -> None:
    folder = Path(locate(name))
    splits = {name: pq.read_table(folder / f"{name}.parquet").to_pylist() for name in ("train", "heldout")}
    assert len(splits["train"]) >= least
    assert len(splits["heldout"]) == 300
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8e6
    for split, rows in splits.items():
        assert list(rows[0]) == ["caption", "jpg_0", "jpg_1", "label_0", "label_1"]
        assert all(held_out(row["caption"]) == (split == "heldout") for row in rows)
        assert 0.45 < np.mean([row["label_0"] for row in rows]) < 0.55
        for row in rows[::7]:
            first, second = (
                judge(
                    row["caption"], torch.from_numpy(np.array(Image.open(io.BytesIO(row[key])))).permute(2, 0, 1) / 255
                )[1]
                for key in ("jpg_0", "jpg_1")
            )
            assert (first > second) == (row["label_0"] == 1.0)
            assert first != second
            assert combinations(row["caption"]) <= set(SEEN)


@pytest.mark.parametrize("name", PIPELINES)
def test_conditions_of_tokens_are_what_the_pipeline_encodes(name: str) -> None:
    family = families.load(name)
    texts = ["a red star", "three blue circles", ""]
    found = pretrain.conditions(family, pretrain.tokens(family.pipe.tokenizer, texts))
    expected = family.encode(texts)
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected.tensors)


@pytest.mark.slow
def test_pretraining_leaves_a_pipeline_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of each phase from rendered scenes; asked again, it trains nothing and writes the same weights."""
    monkeypatch.setattr(pretrain, "CHUNK", 8)
    command = [
        "pretrain",
        "--vae",
        f"{locate('shapes-sd3')}/vae",
        "--only",
        "shapes-sd3",
        "--work",
        str(tmp_path / "w"),
    ]
    phases = ["--sd3_steps", "2", "--sd3_shifted_steps", "1", "--sd3_sharp_steps", "1"]
    sizes = ["--scenes", "16", "--batch", "4", "--checkpointing_steps", "1"]
    for out in ("first", "again"):
        monkeypatch.setattr("sys.argv", [*command, *phases, *sizes, "--output", str(tmp_path / out)])
        pretrain.main()
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "first/shapes-sd3")
    assert pipe("a red star", num_inference_steps=2, output_type="np").images.shape == (1, 64, 64, 3)
    weights = "shapes-sd3/transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "first" / weights).read_bytes() == (tmp_path / "again" / weights).read_bytes()


@pytest.mark.slow
def test_preference_pairs_come_from_the_model_and_put_the_better_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = ["--train", "4", "--held_out", "1", "--batch", "6", "--seeds", "2", "--steps", "4"]
    folders = ["--output", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    monkeypatch.setattr("sys.argv", ["preferences", "--model", "shapes-sd", *counts, *folders])
    draw_preferences.main()
    rows = pq.read_table(tmp_path / "out/train.parquet").to_pylist()
    assert len(rows) == 4
    for row in rows:
        left, right = (judge(row["caption"], draw_preferences.seen(row[f"jpg_{side}"]))[1] for side in (0, 1))
        assert (left > right) == (row["label_0"] == 1) and left != right
    monkeypatch.setattr("sys.argv", ["preferences", "--model", "shapes-sd", *counts, *folders, "--guidance", "1"])
    with pytest.raises(SystemExit):  # what is there was drawn otherwise
        draw_preferences.main()
    assert "give another folder" in capsys.readouterr().err


def test_pictures_of_a_caption_take_turns_at_the_scales() -> None:
    family, texts = families.load("shapes-sd"), ["a red circle", "a blue star"]
    found = torch.from_numpy(draw_preferences.drawn(family, texts, 10, 3, 2, [1.0, 3.0]))
    for k, scale in enumerate((1.0, 3.0, 1.0, 1.0, 3.0, 1.0)):
        alone = generate.sample_images(family.predict, family, [texts[k // 3]], [10 + k], 2, scale)[0]
        torch.testing.assert_close(found[k // 3, k % 3], alone, atol=1e-4, rtol=0)


def test_more_scales_than_pictures_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["preferences", "--seeds", "2", "--guidance", "1", "2", "3"])
    with pytest.raises(SystemExit):
        draw_preferences.main()
    assert "--guidance: 3 scales for 2 pictures per caption" in capsys.readouterr().err
