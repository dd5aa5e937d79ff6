"""Families against stock diffusers: the checks that every family has to pass, what is true of one alone, and families
that are wrong on purpose, each of which fails."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor, nn

from align import families
from align.common.errors import UserError
from align.diffusion.kernels import DDIM, Kernel
from align.families import Conditioning, Unsupported
from align.families.sd import SD
from align.sampling.loop import initial_noise, sample
from align.testing import CHECKS, FamilyCase, check_family
from tests.pipelines import Build, tiny_sd3

PROMPTS = ["two red stars", "a blue circle left of a green square", ""]


@pytest.mark.parametrize("kind", ["epsilon", pytest.param("v", marks=pytest.mark.slow), "flow"])
@pytest.mark.parametrize("check", CHECKS)
def test_our_families(check: Callable[[FamilyCase], None], tiny_folders: dict[str, Path], kind: str) -> None:
    check(FamilyCase(tiny_folders[kind]))


# families that are wrong on purpose
class OtherUncond(SD):
    @property
    def uncond(self) -> Conditioning:
        return self.encode(["a star"])


class Negated(SD):
    def call(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return -super().call(denoiser, x_t, t, cond)


class DecodesUnscaled(SD):
    def to_image(self, x0: Tensor) -> Tensor:
        return super().to_image(x0 * self.pipe.vae.config.scaling_factor)


class EncodesUnscaled(SD):
    def to_latent(self, images: Tensor) -> Tensor:
        return super().to_latent(images) / self.pipe.vae.config.scaling_factor


class MixesRows(SD):
    def call(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return super().call(denoiser, x_t, t.max().expand(len(t)), cond)


class StepsAside(SD):
    def path(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return super().path((t + 20).clamp(max=999))


class OneTime(SD):
    def sample_timesteps(self, uniform: Tensor) -> Tensor:
        return torch.full_like(uniform, 999.0)


class KeepsToItsNetwork(SD):
    """Asks the denoiser that trains, whichever it is given."""

    def call(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return super().call(self.denoiser, x_t, t, cond)


class AsksACopy(SD):
    """Never asks the denoiser that trains."""

    def __init__(self, pipe: DiffusionPipeline, source: str) -> None:
        super().__init__(pipe, source)
        self.first = copy.deepcopy(pipe.unet)

    def call(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return super().call(self.first, x_t, t, cond)


class IgnoresNoise(SD):
    @property
    def kernel(self) -> Kernel:
        return DDIM(0.0)


class Forgetful(SD):
    """Another function of the state at every call, as with dropout in the denoiser."""

    calls = 0

    def call(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        self.calls += 1
        return super().call(denoiser, x_t, t, cond) * (1 + 0.01 * self.calls)


class OneKeyForAll(SD):
    def identity(self) -> Mapping[str, Mapping[str, object]]:
        return {"pictures": {"family": "SD"}, "captions": {"family": "SD"}}


class KeyOfTheObject(SD):
    def identity(self) -> Mapping[str, Mapping[str, object]]:
        return {what: {**parts, "pipe": id(self.pipe)} for what, parts in super().identity().items()}


class WithoutGradient(SD):
    @torch.no_grad()
    def call(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return super().call(denoiser, x_t, t, cond)


class RoughGradient(SD):
    """Cheats where gradients are checkpointed."""

    def call(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        rough = 1.1 if denoiser.is_gradient_checkpointing else 1.0
        return super().call(denoiser, x_t, t, cond) * rough


class ImagesWithoutGradient(SD):
    @torch.no_grad()
    def to_image(self, x0: Tensor) -> Tensor:
        return super().to_image(x0)


WRONG: Sequence[tuple[type[SD], str, str]] = [  # the family, the check that has to fail, and what it has to say
    (OtherUncond, "check_sampling", "latents, 16 x 16 px, guidance 5"),
    (Negated, "check_sampling", "latents, 16 x 16 px, guidance 1"),
    (DecodesUnscaled, "check_sampling", "images, 32 x 16 px, guidance 1"),
    (EncodesUnscaled, "check_encoding", "encoded and decoded"),
    (MixesRows, "check_rows", "row 0, 'a red circle'"),
    (StepsAside, "check_path", "alpha"),
    (OneTime, "check_training_times", "alpha is 0.0.* at every training time"),
    (KeepsToItsNetwork, "check_reference", "None: the reference has moved"),
    (AsksACopy, "check_saved_weights", "training changes no image"),
    (IgnoresNoise, "check_replay", "without noise"),
    (Forgetful, "check_replay", "likelihood ratio on replay"),
    (OneKeyForAll, "check_cache_keys", "other weights of vae move the keys of nothing"),
    (KeyOfTheObject, "check_cache_keys", "other keys for the same weights"),
    (WithoutGradient, "check_gradient_checkpointing", "does not require grad"),
    (RoughGradient, "check_gradient_checkpointing", "gradient with checkpointing"),
    (ImagesWithoutGradient, "check_image_gradients", "does not require grad"),
]


def test_every_check_has_a_family_that_fails_it() -> None:
    assert {name for _, name, _ in WRONG} == {check.__name__ for check in CHECKS}


@pytest.mark.parametrize(("wrong", "name", "said"), WRONG, ids=lambda value: getattr(value, "__name__", None))
def test_a_wrong_family_fails_its_check(tiny_folders: dict[str, Path], wrong: type[SD], name: str, said: str) -> None:
    check = next(check for check in CHECKS if check.__name__ == name)
    with pytest.raises((AssertionError, UserError, RuntimeError), match=said):
        check(FamilyCase(tiny_folders["epsilon"], wrong))


def test_weights_of_another_order_have_another_key(tiny: Build) -> None:
    """Also where what has changed cancels in a sum."""
    family = tiny("flow")
    before = family.identity()["captions"]
    with torch.no_grad():
        first = next(family.pipe.text_encoder.parameters())
        first.copy_(first.flip(0))
    assert family.identity()["captions"] != before


@pytest.mark.slow
def test_only_the_checks_that_fail_are_listed(tiny_folders: dict[str, Path]) -> None:
    with pytest.raises(AssertionError, match="check_encoding: AssertionError: encoded and decoded") as stopped:
        check_family(FamilyCase(tiny_folders["epsilon"], EncodesUnscaled))
    assert [name.__name__ for name in CHECKS if f"{name.__name__}:" in str(stopped.value)] == ["check_encoding"]


# what is true of one family alone
@pytest.mark.parametrize(
    ("guidance_scale", "kind"),
    [
        *((1.0, "v"), (5.0, "epsilon")),
        *(pytest.param(*both, marks=pytest.mark.slow) for both in ((1.0, "epsilon"), (5.0, "v"))),
    ],
)
def test_stochastic_ddim_of_sd_is_the_stock_pipelines(
    tiny_folders: dict[str, Path], kind: str, guidance_scale: float
) -> None:
    stock = DiffusionPipeline.from_pretrained(tiny_folders[kind])
    stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config)
    x, steps = initial_noise((4, 8, 8), [1, 2, 3]), 6
    generator = torch.Generator().manual_seed(9)
    noises = [torch.randn(x.shape, generator=generator) for _ in range(steps)]
    theirs = stock(
        PROMPTS,
        latents=x.clone(),
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        eta=1.0,
        generator=torch.Generator().manual_seed(9),
        output_type="latent",
    ).images
    family = families.load(str(tiny_folders[kind]))
    with torch.no_grad():
        cond, grid = family.encode(PROMPTS), family.grid(steps)
        ours = sample(family.predict, grid, cond, x, guidance_scale, DDIM(1.0), lambda i: noises[i])
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


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


def test_unsupported_pipelines_are_named(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    with pytest.raises(Unsupported, match="KandinskyPipeline; supported pipelines: StableDiffusionPipeline"):
        families.load(str(tmp_path))
    with pytest.raises(Unsupported, match="no model_index.json"):
        families.load(str(tmp_path / "nowhere"))


def test_pickled_weights_are_refused(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_folders["epsilon"], folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    torch.save({}, folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(Unsupported, match=r"diffusion_pytorch_model.bin alone, a pickle.*use_safetensors=False"):
        families.load(str(folder))
