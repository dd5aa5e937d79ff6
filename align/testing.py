"""What every :class:`align.families.Family` has to hold, as checks that whoever adds one runs over it::

    import pytest
    from align.testing import CHECKS, FamilyCase

    @pytest.mark.parametrize("check", CHECKS)
    def test_family(check, folder):  # a fixture: where a pipeline of the real class is saved
        check(FamilyCase(folder))

Without pytest: ``check_family(FamilyCase(folder))``. A check says nothing or raises; each stands for a mistake that
trains without an error and draws the wrong images. Weights may be random and few, so that all takes seconds; but fresh
networks often end in zeros: fill those with noise, or there is nothing to compare. Where the stock pipeline needs more
than :meth:`Family.stock_latents` and :meth:`Family.stock_arguments` to draw the same, subclass :class:`FamilyCase` and
write its ``draw`` or ``load_stock``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from align import families
from align.data.prompts import PromptBatch
from align.families import Conditioning, Family
from align.objectives import Context
from align.objectives.online.collect import collect
from align.objectives.online.replay import log_probs
from align.policy.policy import LoRA, Policy
from align.sampling.loop import Predictor, initial_noise, sample
from align.sampling.sampler import Sampler, grid_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class FamilyCase:
    """A pipeline to check a family on.

    Args:
        folder: the saved pipeline, in float32.
        family: its family; None is the one that is registered for its class.
        prompts: of different lengths, one of them empty.
        sizes: heights and widths in pixels; none are the model's own square, and two of these one on the other. Images
            are compared at the last, latents at all.
        num_inference_steps: of the sampler, at least 2.
        guidance_scale: with which guidance is on; it is off at :attr:`Family.unguided_scale`.
        tolerance: how far results of equal weights may differ, absolutely and relatively.
        disturbance: standard deviation of the noise that stands for training.
    """

    folder: Path
    family: type[Family] | None = None
    prompts: tuple[str, ...] = ("a red circle", "two blue stars left of a green square", "")
    sizes: tuple[tuple[int, int], ...] = ()
    num_inference_steps: int = 3
    guidance_scale: float = 5.0
    tolerance: float = 2e-5
    disturbance: float = 0.05

    def load(self) -> Family:
        """The family over a fresh pipeline."""
        source = str(self.folder)
        return families.load(source) if self.family is None else self.family(self.family.read(source, {}), source)

    def load_stock(self, family: Family) -> DiffusionPipeline:
        """The pipeline as diffusers loads it, with the scheduler by which ``family`` samples."""
        stock = type(family.pipe).from_pretrained(self.folder)
        stock.set_progress_bar_config(disable=True)
        stock.scheduler = family.stock_scheduler(stock.scheduler)
        return stock

    def draw(
        self, family: Family, stock: DiffusionPipeline, x: Tensor, guidance_scale: float, output_type: str
    ) -> Tensor:
        """What ``stock`` makes of the noise ``x`` (B, C, h, w): ``latent``, as :meth:`given` has them, or ``pt``,
        images (B, 3, H, W) in [0, 1]."""
        height, width = (side * family.cell for side in x.shape[-2:])
        arguments = family.stock_arguments(self.num_inference_steps, guidance_scale)
        if "negative_prompt" in arguments:
            arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(x)
        own = {"latents": family.stock_latents(x).clone(), "height": height, "width": width}
        return stock(prompt=list(self.prompts), output_type=output_type, **own, **arguments).images

    def given(self, family: Family, latents: Tensor) -> Tensor:
        """``latents`` in the form in which the stock pipeline gives them."""
        return family.stock_latents(latents)

    @torch.no_grad()
    def sample(self, family: Family, x: Tensor, guidance_scale: float, predict: Predictor | None = None) -> Tensor:
        """The family's latents from the noise ``x``; ``predict`` is a policy's."""
        grid, cond = grid_of(family, self.num_inference_steps, x), family.encode(self.prompts)
        return sample(predict or family.predict, grid, cond, x, guidance_scale)

    def noise(self, family: Family, height: int | None = None, width: int | None = None) -> Tensor:
        return initial_noise(family.latent_shape(height, width), range(len(self.prompts)))

    def close(self, ours: Tensor, theirs: Tensor, what: str) -> None:
        assert_close(ours, theirs, atol=self.tolerance, rtol=self.tolerance, msg=lambda text: f"{what}: {text}")

    def inputs(self, family: Family) -> tuple[Tensor, Tensor, Conditioning]:
        """A batch for the denoiser: states, a time for each, conditions."""
        t = family.sample_timesteps(torch.linspace(0.2, 0.8, len(self.prompts)))
        return self.noise(family), t, family.encode(self.prompts)

    def disturb(self, policy: Policy) -> None:
        """As if it had been trained."""
        generator = torch.Generator().manual_seed(3)
        for parameter in policy.parameters():
            parameter.data += self.disturbance * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def check_sampling(case: FamilyCase) -> None:
    """The same weights, noise and steps give the stock latents at two sizes, guidance off and on, and at the last of
    the sizes, by default no square, the stock images too."""
    family = case.load()
    stock = case.load_stock(family)
    side = family.resolution
    sizes = case.sizes or ((side, side), (2 * side, side))
    for (height, width), scale in itertools.product(sizes, (family.unguided_scale, case.guidance_scale)):
        x = case.noise(family, height, width)
        latents = case.sample(family, x, scale)
        theirs = case.draw(family, stock, x, scale, "latent")
        case.close(case.given(family, latents), theirs, f"latents, {height} x {width} px, guidance {scale:g}")
        # latents that are equal need decoding but once, and what is no square is all that a square is
        if scale == family.unguided_scale and (height, width) == sizes[-1]:
            images = case.draw(family, stock, x, scale, "pt")
            case.close(family.to_image(latents), images, f"images, {height} x {width} px, guidance {scale:g}")


@torch.no_grad()
def check_encoding(case: FamilyCase) -> None:
    """``to_latent`` is in the scale of ``to_image``: there and back is the VAE's own reconstruction."""
    family = case.load()
    side = family.resolution
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    plain = family.decode_pixels(family.encode_pixels(images * 2 - 1))
    latents = family.to_latent(images)
    assert latents.shape[1:] == family.latent_shape(), f"{tuple(latents.shape)}, not {family.latent_shape()} each"
    case.close(family.to_image(latents), (plain / 2 + 0.5).clamp(0, 1), "encoded and decoded")


@torch.no_grad()
def check_rows(case: FamilyCase) -> None:
    """A row is predicted alone as it is in a batch, whatever the other prompts' lengths and times."""
    family = case.load()
    x, t, cond = case.inputs(family)
    whole = family.forward(x, t, cond, case.guidance_scale)
    for k, prompt in enumerate(case.prompts):
        row = slice(k, k + 1)
        alone = family.forward(x[row], t[row], family.encode([prompt]), case.guidance_scale)
        case.close(alone, whole[row], f"row {k}, {prompt!r}")


def check_path(case: FamilyCase) -> None:
    """``path`` at the grid's times is the grid, so that training sees the noise levels that sampling visits."""
    family = case.load()
    grid = family.grid(7)
    alpha, sigma = family.path(grid.t[:-1])
    case.close(alpha, grid.alpha[:-1], "alpha")
    case.close(sigma, grid.sigma[:-1], "sigma")


def check_training_times(case: FamilyCase) -> None:
    """``sample_timesteps`` gives times, not all the same, of which ``path`` knows alpha and sigma in [0, 1]."""
    family = case.load()
    t = family.sample_timesteps(torch.linspace(0, 1 - 1e-6, 65))
    assert t.shape == (65,), f"times of shape {tuple(t.shape)} for 65 uniform numbers"
    for name, values in zip(("alpha", "sigma"), family.path(t), strict=True):
        assert bool(((values >= 0) & (values <= 1)).all()), f"{name} outside [0, 1]: {values}"
        assert len(values.unique()) > 1, f"{name} is {values[0]} at every training time"


@torch.no_grad()
def check_reference(case: FamilyCase) -> None:
    """After training, LoRA or all weights, a policy's reference answers with the base's weights, bit by bit."""
    for lora in loras(case, LoRA(2)):
        family, policy = case.load(), Policy(case.load(), lora)
        inputs = case.inputs(family)
        base = family.predict(*inputs).raw
        assert torch.equal(policy.predict(*inputs).raw, base), f"{lora}: other than the base before training"
        case.disturb(policy)
        trained = policy.predict(*inputs).raw
        assert not torch.allclose(trained, base), f"{lora}: training changes nothing"
        with policy.reference():
            assert torch.equal(policy.predict(*inputs).raw, base), f"{lora}: the reference has moved"
        assert torch.equal(policy.predict(*inputs).raw, trained), f"{lora}: the reference leaves traces"


@torch.no_grad()
def check_saved_weights(case: FamilyCase) -> None:
    """What a policy saves, a LoRA or all weights, draws the same images in stock diffusers and by ``load_tuned``."""
    for lora in loras(case, LoRA(3, alpha=6.0)):
        policy = Policy(case.load(), lora, reference=False)
        family, name, scale = policy.family, policy.family.denoiser_name, case.guidance_scale
        x = case.noise(family)
        base = family.to_image(case.sample(family, x, scale))
        case.disturb(policy)
        images = family.to_image(case.sample(family, x, scale, policy.predict))
        assert not torch.allclose(images, base, atol=10 * case.tolerance), f"{lora}: training changes no image"
        with TemporaryDirectory() as folder:
            policy.save(Path(folder))
            stock, again = case.load_stock(family), families.tuned(case.load(), folder)
            if lora:
                stock.load_lora_weights(folder)
            else:
                stock.register_modules(**{name: type(family.denoiser).from_pretrained(folder, subfolder=name)})
        case.close(images, case.draw(family, stock, x, scale, "pt"), f"{lora} in stock diffusers")
        case.close(again.to_image(case.sample(again, x, scale)), images, f"{lora} by load_tuned")


@torch.no_grad()
def check_replay(case: FamilyCase) -> None:
    """The family's kernel draws every step but the last with noise, so images of a prompt differ, and replaying the
    rollout with the weights that drew it gives a likelihood ratio of 1."""
    policy = Policy(case.load(), loras(case, LoRA(2))[0], reference=False)
    case.disturb(policy)
    sampler = Sampler(case.num_inference_steps, case.guidance_scale, batch_size=4)
    ctx = Context(policy, 0, 0, range(2 * len(case.prompts)))
    batch = PromptBatch(list(case.prompts), policy.family.encode(case.prompts), [], list(range(len(case.prompts))))
    drawn = collect(ctx, sampler, batch, 2, range(case.num_inference_steps - 1)).trajectories
    one, other = drawn.latents[:2, 1] - drawn.latents[:2, 0]
    assert not torch.allclose(one, other), "two images of a prompt move alike"
    assert drawn.log_probs is not None
    ratio = (log_probs(ctx, sampler, drawn, 5) - drawn.log_probs).exp()
    assert bool(((ratio - 1).abs() < 1e-3).all()), f"likelihood ratio on replay: {ratio}, not 1"


@torch.no_grad()
def check_cache_keys(case: FamilyCase) -> None:
    """``identity`` outlasts a reload, and moves with the weights that cached latents and embeddings come from."""
    family = case.load()
    before = family.identity()
    assert case.load().identity() == before, "other keys for the same weights: nothing is ever found in the cache"
    for name, part in family.pipe.components.items():
        if not isinstance(part, nn.Module):
            continue
        next(part.parameters()).add_(0.01)
        after = family.identity()
        moved = {what for what in before if before[what] != after[what]}
        expected = {"vae": {"pictures"}, family.denoiser_name: set()}.get(name, {"captions"})
        assert moved == expected, f"other weights of {name} move the keys of {moved or 'nothing'}, not {expected}"
        before = after


def check_gradient_checkpointing(case: FamilyCase) -> None:
    """The trained weights have a gradient, and the same one with gradient checkpointing, the reference asked before."""
    lora = loras(case, LoRA(2))[0]
    policies = [Policy(case.load(), lora, gradient_checkpointing=yes) for yes in (False, True)]
    case.disturb(policies[0])
    policies[1].load_state(policies[0].state())
    for policy in policies:
        inputs = case.inputs(policy.family)
        with torch.no_grad(), policy.reference():
            policy.predict(*inputs)
        policy.predict(*inputs).raw.square().mean().backward()
    plain, checkpointed = ([p.grad for p in policy.parameters() if p.grad is not None] for policy in policies)
    assert any(bool(gradient.any()) for gradient in plain), "no trained weight has a gradient"
    for ours, theirs in zip(checkpointed, plain, strict=True):
        case.close(ours, theirs, "gradient with checkpointing")


def check_image_gradients(case: FamilyCase) -> None:
    """Gradients reach latents through ``to_image``, as training through a reward needs."""
    family = case.load()
    x0 = case.noise(family).requires_grad_()
    family.to_image(x0).mean().backward()
    assert x0.grad is not None and bool(x0.grad.flatten(1).any(1).all()), "latents without a gradient"


def loras(case: FamilyCase, lora: LoRA) -> tuple[LoRA | None, ...]:
    """How the denoiser trains: by ``lora``, where diffusers knows that for its class, and whole."""
    return (lora, None) if case.load().lora_targets else (None,)


CHECKS: tuple[Callable[[FamilyCase], None], ...] = tuple(
    value for name, value in list(globals().items()) if name.startswith("check_")
)


def check_family(case: FamilyCase) -> None:
    """All of :data:`CHECKS`; raises one AssertionError that lists those that fail."""
    faults = []
    for check in CHECKS:
        try:
            check(case)
        except Exception as error:  # a family may raise anything; say in which check
            faults.append(f"{check.__name__}: {type(error).__name__}: {error}")
    if faults:
        raise AssertionError(f"{len(faults)} of {len(CHECKS)} checks fail on {case.folder}\n" + "\n".join(faults))
