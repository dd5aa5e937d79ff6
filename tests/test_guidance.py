"""Guidance as stock diffusers has it: at or below 1 one conditional evaluation, an embedding where the network has one,
and the two answers mixed in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, UNet2DConditionModel

from align import families
from align.families import Conditioning
from align.objectives.opd import OPD
from align.objectives.policy_gradient import PolicyGradient
from align.objectives.reno import ReNO
from align.objectives.teachers import LoRATeacher
from align.policy.policy import Policy
from align.sampling.generate import sample_images
from align.sampling.sampler import Sampler
from tests.pipelines import Build

PROMPT = "two red stars"
FEW = ((0.0, "epsilon"), (0.0, "flow"), (1.0, "epsilon"), (1.5, "flow"))  # in the default run


@pytest.mark.parametrize(
    ("guidance_scale", "kind"),
    [
        pytest.param(scale, kind, marks=[] if (scale, kind) in FEW else pytest.mark.slow)
        for scale in (0.0, 0.7, 1.0, 1.5)
        for kind in ("epsilon", "flow")
    ],
)
def test_images_are_the_stock_pipelines_below_one_too(
    tiny_folders: dict[str, Path], kind: str, guidance_scale: float
) -> None:
    family = families.load(str(tiny_folders[kind]))
    stock = DiffusionPipeline.from_pretrained(tiny_folders[kind])
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    arguments = {"num_inference_steps": 3, "guidance_scale": guidance_scale}
    theirs = stock(PROMPT, latents=x.clone(), output_type="pt", **arguments).images
    mine = sample_images(family.predict, family, [PROMPT], [0], **arguments, initial=lambda _prompts, _noise: x)
    torch.testing.assert_close(mine, theirs, atol=5e-5, rtol=0)


@pytest.mark.parametrize(("guidance_scale", "count"), [(0.0, 1), (1.0, 1), (1.01, 2)])
def test_every_count_follows(tiny: Build, guidance_scale: float, count: int) -> None:
    family, sampler = tiny("epsilon"), Sampler(4, guidance_scale)
    policy, cond = Policy(family, reference=False), family.encode([PROMPT])
    with torch.no_grad():
        policy.predict(torch.zeros(1, 4, 8, 8), torch.tensor([500.0]), cond, guidance_scale)
    assert policy.evaluations["frozen"] == sampler.evaluations(family) == count
    assert PolicyGradient(sampler).cost(family, None).trained == 4 * count
    assert OPD([LoRATeacher()], sampler).cost(family, None).trained == 3 * count
    assert ReNO(guidance_scale=guidance_scale).cost(family, None).trained % count == 0


def test_a_network_that_takes_the_scale_as_input_is_the_stock_pipelines(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    """A latent consistency model: one evaluation, at any scale, and the scale matters."""
    stock = DiffusionPipeline.from_pretrained(tiny_folders["epsilon"])
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config({**stock.unet.config, "time_cond_proj_dim": 8})
    unet.load_state_dict(stock.unet.state_dict(), strict=False)
    stock.register_modules(unet=unet)
    stock.save_pretrained(tmp_path)
    family = families.load(str(tmp_path))
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    arguments = {"num_inference_steps": 3, "output_type": "pt"}
    drawn = {}
    for scale in (1.5, 8.5):
        assert family.evaluations(scale) == 1
        theirs = stock([PROMPT] * 2, latents=x.clone(), guidance_scale=scale, **arguments).images
        drawn[scale] = sample_images(
            family.predict, family, [PROMPT] * 2, [0, 1], 3, scale, initial=lambda _prompts, _noise: x
        )
        torch.testing.assert_close(drawn[scale], theirs, atol=5e-5, rtol=0)
    assert (drawn[1.5] - drawn[8.5]).abs().max() > 1e-3


def test_half_precision_answers_are_mixed_in_float32(tiny: Build) -> None:
    """Equal weights then have a KL of zero, though accelerate's wrapper gives float32 and the reference is bare."""
    policy = Policy(tiny("epsilon"), lora=None)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    policy.model = accelerator.prepare(policy.model)
    cond = Conditioning({"prompt_embeds": policy.family.encode([PROMPT])["prompt_embeds"].expand(4, -1, -1)})
    x, t = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.full((4,), 300.0)
    with torch.no_grad(), accelerator.autocast():
        answer = policy.predict(x, t, cond, 5.0).raw
        with policy.reference():
            reference = policy.predict(x, t, cond, 5.0).raw
    assert answer.dtype == reference.dtype == torch.float32
    assert torch.equal(answer, reference)
