"""Families against stock diffusers: the same weights, noise and steps give the same latents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor

from align import families
from align.diffusion.kernels import DDIM
from align.families import Family, Unsupported
from align.sampling.loop import initial_noise, sample
from tests.pipelines import Build, tiny_sd3

PROMPTS = ["two red stars", "a blue circle left of a green square", ""]


def ours(family: Family, steps: int, guidance_scale: float, kernel: DDIM, x: Tensor, noises: list[Tensor]) -> Tensor:
    with torch.no_grad():
        cond = family.encode(PROMPTS)
        return sample(family.predict, family.grid(steps), cond, x, guidance_scale, kernel, lambda i: noises[i])


@pytest.mark.parametrize("kind", ["epsilon", "v"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_sd_sampling_is_the_stock_pipeline_with_ddim(
    tiny_folders: dict[str, Path], kind: str, eta: float, guidance_scale: float
) -> None:
    stock = DiffusionPipeline.from_pretrained(tiny_folders[kind])
    stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config)
    x = initial_noise((4, 8, 8), [1, 2, 3])
    generator = torch.Generator().manual_seed(9)
    noises = [torch.randn(x.shape, generator=generator) for _ in range(6)]
    theirs = stock(
        PROMPTS,
        latents=x.clone(),
        num_inference_steps=6,
        guidance_scale=guidance_scale,
        eta=eta,
        generator=torch.Generator().manual_seed(9),
        output_type="latent",
    ).images
    mine = ours(families.load(str(tiny_folders[kind])), 6, guidance_scale, DDIM(eta), x, noises)
    torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_sd3_sampling_is_the_stock_pipeline_with_euler(tiny_folders: dict[str, Path], guidance_scale: float) -> None:
    """Stock call with its own 256 zero tokens; ours counts one of them 256 times."""
    stock = DiffusionPipeline.from_pretrained(tiny_folders["flow"])
    x = initial_noise((4, 8, 8), [1, 2, 3])
    theirs = stock(
        PROMPTS, latents=x.clone(), num_inference_steps=6, guidance_scale=guidance_scale, output_type="latent"
    ).images
    mine = ours(families.load(str(tiny_folders["flow"])), 6, guidance_scale, DDIM(), x, [x] * 6)
    torch.testing.assert_close(mine, theirs, atol=5e-5, rtol=5e-5)


def test_repeated_token_attention_with_dual_attention_layers() -> None:
    family = tiny_sd3(dual=(0, 1))
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([900.0, 100.0])
    cond = family.encode(PROMPTS[:2])
    mine = family.forward(x, t, cond)

    for block in family.denoiser.transformer_blocks:
        block.attn.set_processor(JointAttnProcessor2_0())
    zeros = torch.zeros(2, 255, cond["prompt_embeds"].shape[2])
    full = torch.cat([cond["prompt_embeds"], zeros], 1)
    theirs = family.denoiser(x, full, cond["pooled"], t, return_dict=False)[0]
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v", "flow"])
def test_path_agrees_with_the_grid(tiny: Build, kind: str) -> None:
    family = tiny(kind)
    grid = family.grid(7)
    alpha, sigma = family.path(grid.t[:-1])
    torch.testing.assert_close(alpha, grid.alpha[:-1], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(sigma, grid.sigma[:-1], atol=1e-6, rtol=1e-6)


def test_training_times(tiny: Build) -> None:
    u = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    t = tiny("epsilon").sample_timesteps(u)
    assert t.min() == 0
    assert t.max() == 999
    assert torch.equal(t, t.round())
    sigma = tiny("flow").sample_timesteps(u) / 1000
    logit = torch.log(sigma / (1 - sigma))
    assert logit.mean().item() == pytest.approx(0, abs=0.02)
    assert logit.std().item() == pytest.approx(1, abs=0.02)


def test_latents_and_pictures_are_the_pipelines_own(tiny: Build) -> None:
    family = tiny("epsilon")
    vae, images = family.pipe.vae, torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        latents = family.to_latent(images)
        torch.testing.assert_close(latents, vae.encode(images * 2 - 1).latent_dist.mean * vae.config.scaling_factor)
        decoded = family.pipe.image_processor.postprocess(vae.decode(latents / 0.7).sample, output_type="pt")
        torch.testing.assert_close(family.to_image(latents), decoded)


def test_pictures_carry_gradients(tiny: Build) -> None:
    x0 = torch.randn(1, 4, 8, 8, requires_grad=True)
    tiny("flow").to_image(x0).mean().backward()
    assert x0.grad is not None
    assert x0.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("changed", "moves"),
    [("vae", {"pictures"}), ("text_encoder", {"captions"}), ("transformer", set())],
)
def test_what_cached_encodings_depend_on(tiny: Build, changed: str, moves: set[str]) -> None:
    family = tiny("flow")
    before = family.identity()
    with torch.no_grad():
        next(iter(family.pipe.components[changed].parameters())).add_(0.01)
    after = family.identity()
    assert {what for what in before if before[what] != after[what]} == moves


def test_unsupported_pipelines_are_named(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    with pytest.raises(Unsupported, match="KandinskyPipeline; supported pipelines: StableDiffusionPipeline"):
        families.load(str(tmp_path))
    with pytest.raises(Unsupported, match="no model_index.json"):
        families.load(str(tmp_path / "nowhere"))


def test_pickled_weights_are_refused(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "pickled"
    shutil.copytree(tiny_folders["epsilon"], folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    torch.save({}, folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        families.load(str(folder))


def test_an_installed_package_adds_a_family(
    tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by its entry point, without an edit of ours."""
    (tmp_path / "strangers.py").write_text(
        "from align.families.sd import SD\nclass Kandinsky(SD):\n    'A stranger.'\n", encoding="utf-8"
    )
    about = tmp_path / "strangers-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: strangers\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[t2i_align.families]\nKandinskyPipeline = strangers:Kandinsky\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    assert families.find(str(tmp_path / "model")).__name__ == "Kandinsky"
