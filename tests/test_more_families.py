"""Every family beside Stable Diffusion 1 and 3 holds what :mod:`align.testing` asks, on tiny pipelines."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image
from torch import Tensor, nn

from align import evaluate, families, rollout, sample
from align.common.errors import UserError
from align.diffusion.process import Grid
from align.families import Conditioning, Family
from align.families.chroma import Chroma
from align.families.flow import Flow
from align.families.flux import Flux
from align.families.flux2 import Flux2Klein
from align.families.lumina2 import Lumina2
from align.families.pixart import PixArtSigma
from align.families.qwen_image import QwenImage
from align.families.sana import Sana
from align.families.sdxl import SDXL
from align.families.z_image import ZImage
from align.objectives import AWM, DGPO, NFT
from align.objectives.teachers import PipelineTeacher
from align.policy.initial_noise import InitialNoise
from align.policy.policy import LoRA, Policy
from align.sampling.generate import sample_images
from align.sampling.sampler import Sampler
from align.testing import CHECKS, FamilyCase, check_sampling
from align.train import main
from pruning.quantize import quantize
from pruning.saving import save_pipeline
from tests import tiny_families
from tests.helpers import lines, rolled, write
from tests.pipelines import Build
from tests.test_cards import run_snippets

# the contract at its core; the whole of it, and the siblings of a family, are slow
SIBLINGS = ("sdxl-turbo", "flux-schnell", "z-image-turbo", "flux2-klein", "flux2-dev")
CORE = ("check_sampling",)


class Flux2Case(FamilyCase):
    """The stock pipelines of FLUX.2 give latents otherwise than they take them."""

    def given(self, family: Family, latents: Tensor) -> Tensor:
        if not isinstance(family.pipe, Flux2KleinPipeline):
            return latents.flatten(2).transpose(1, 2)
        shift, scale = family.statistics()
        return family.pipe._unpatchify_latents(latents / scale + shift)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], FamilyCase]:
    root, made = tmp_path_factory.mktemp("families"), {}

    def of(name: str) -> FamilyCase:
        if name not in made:
            folder = tiny_families.save(name, root / name)
            made[name] = (Flux2Case if name.startswith("flux2") else FamilyCase)(folder)
        return made[name]

    return of


def cases() -> list[object]:
    return [
        pytest.param(name, check, marks=[] if name not in SIBLINGS and check.__name__ in CORE else pytest.mark.slow)
        for name in tiny_families.BUILD
        for check in CHECKS
    ]


@pytest.mark.parametrize(("name", "check"), cases())
def test_a_family_holds(name: str, check: Callable[[FamilyCase], None], case: Callable[[str], FamilyCase]) -> None:
    check(case(name))


# families that are wrong on purpose: each draws other images than stock diffusers, without an error
class EmptyPrompt(SDXL):
    def unconditional(self) -> Conditioning:
        return self.encode([""])


class GridOfTheSquare(Flux):
    def grid(self, steps: int, height: int | None = None, width: int | None = None) -> Grid:
        return super().grid(steps)


class ScaleOfOne(Flux):
    def call(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        unscaled = Conditioning(cond.tensors | {"guidance": t.new_ones(len(t))})
        return super().call(denoiser, x_t, t, unscaled)


class PlainGuidance(QwenImage):
    def guide(self, free: Tensor, bound: Tensor, guidance_scale: float) -> Tensor:
        return Family.guide(self, free, bound, guidance_scale)


class EmptyText(QwenImage):
    def unconditional(self) -> Conditioning:
        return self.encode([""])


class OneScaleForAllChannels(QwenImage):
    def statistics(self) -> tuple[Tensor, Tensor]:
        shift, scale = super().statistics()
        return shift.mean().expand_as(shift), scale.mean().expand_as(scale)


class CountsFromOne(ZImage):
    def guide(self, free: Tensor, bound: Tensor, guidance_scale: float) -> Tensor:
        return Family.guide(self, free, bound, guidance_scale)


class Backwards(ZImage):
    def call(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return -super().call(denoiser, x_t, t, cond)


class InstructsNothing(Sana):
    def unconditional(self) -> Conditioning:
        return self.encode([""])


class Unnormalized(Flux2Klein):
    def statistics(self) -> tuple[float, float]:  # type: ignore[override]
        return 0.0, 1.0


class Flux1Shift(Flux2Klein):
    def mu(self, steps: int, tokens: int) -> float:
        return Flow.mu(self, steps, tokens)


class AttendsToAll(Chroma):
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        cond = super().encode(prompts)
        return Conditioning(cond.tensors | {"mask": cond["mask"] * 0})


class Unrescaled(Lumina2):
    def guide(self, free: Tensor, bound: Tensor, guidance_scale: float) -> Tensor:
        return Family.guide(self, free, bound, guidance_scale)


class Unmasked(PixArtSigma):
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        cond = super().encode(prompts)
        return Conditioning(cond.tensors | {"mask": cond["mask"] * 0 + 1})


WRONG: list[tuple[str, type[Family]]] = [
    ("sdxl", EmptyPrompt),
    ("z-image", CountsFromOne),
    ("qwen-image", PlainGuidance),
    ("flux-dev", ScaleOfOne),
    ("flux-dev", GridOfTheSquare),
    ("qwen-image", EmptyText),
    ("qwen-image", OneScaleForAllChannels),
    ("z-image", Backwards),
    ("sana", InstructsNothing),
    ("flux2-klein-base", Unnormalized),
    ("flux2-klein-base", Flux1Shift),
    ("chroma", AttendsToAll),
    ("lumina2", Unrescaled),
    ("pixart-sigma", Unmasked),
]


@pytest.mark.parametrize(
    ("name", "wrong"), [pytest.param(*each, marks=[] if k == 1 else pytest.mark.slow) for k, each in enumerate(WRONG)]
)
def test_a_wrong_family_draws_otherwise(name: str, wrong: type[Family], case: Callable[[str], FamilyCase]) -> None:
    with pytest.raises(AssertionError, match=r"(latents|images), \d+ x \d+ px, guidance"):
        check_sampling(replace(case(name), family=wrong))


def test_few_step_models_are_told_apart(case: Callable[[str], FamilyCase]) -> None:
    """No 50 steps with guidance for a Turbo that nobody said anything about."""
    expected = {
        "sdxl-turbo": (4, 1.0), "flux-schnell": (4, 1.0), "z-image-turbo": (8, 0.0), "flux2-klein": (4, 1.0),
        "sdxl": (50, 5.0), "z-image": (50, 5.0),
    }  # fmt: skip
    for name, (steps, scale) in expected.items():
        family = case(name).load()
        assert (family.default_num_inference_steps, family.default_guidance_scale) == (steps, scale), name
        assert family.evaluations(family.default_guidance_scale) == (2 if steps == 50 else 1)


# every objective on every family
SAMPLER = {"num_inference_steps": 2, "batch_size": 4}
UPDATES: dict[str, dict[str, Any]] = {
    "DPO": {},
    "PolicyGradient": {"sampler": {"num_inference_steps": 3}, "images_per_prompt": 2, "beta": 0.1},
    "D3PO": {"sampler": {"num_inference_steps": 3}, "images_per_prompt": 2},
    "NFT": {"sampler": SAMPLER, "images_per_prompt": 2},
    "AWM": {"sampler": SAMPLER, "images_per_prompt": 2},
    "DGPO": {"sampler": SAMPLER, "images_per_prompt": 2},
    "FIND": {"sampler": SAMPLER, "images_per_prompt": 2},
    "ReNO": {"num_inference_steps": 2},
    "DirectReward": {"sampler": {"num_inference_steps": 2}, "last_steps": 2},
    "OPD": {"sampler": SAMPLER, "teachers": [{"class_path": "PipelineTeacher", "init_args": {"task": "*"}}]},
}


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        pytest.param(name, objective, marks=[] if (name, objective) == ("flux-dev", "FIND") else pytest.mark.slow)
        for name in tiny_families.BUILD
        for objective in UPDATES
    ],
)
def test_an_objective_trains(
    name: str, objective: str, case: Callable[[str], FamilyCase], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(case(name).folder)
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo blue stars\n")
    arguments = copy.deepcopy(UPDATES[objective])
    for teacher in arguments.get("teachers", []):
        teacher["init_args"]["path"] = folder
    config: dict[str, Any] = {
        "pretrained_model_name_or_path": folder,
        "objective": {"class_path": objective, "init_args": arguments},
        "data": {"class_path": "Prompts", "init_args": {"path": str(tmp_path / "prompts.txt")}},
        "output_dir": str(tmp_path / "run"),
        "lora": {"rank": 2} if case(name).load().lora_targets else None,
        "rollout_batch_size": 2,
        "train_batch_size": 2,
        "max_train_steps": 1,
        "checkpointing_steps": 0,
        "report_to": "none",
        "samples": {"prompts": []},
        "rewards": [{"name": "tests.helpers.Bright"}],
    }
    if objective == "DPO":
        config["data"] = {"class_path": "PreferencePairs", "init_args": pairs(tmp_path, case(name).load().resolution)}
        config |= {"rollout_batch_size": None, "rewards": []}
    if objective == "OPD":
        config["rewards"] = []
    assert main(["--config", write(config)]) == 0
    losses = [line["loss"] for line in lines(config["output_dir"]) if "loss" in line]
    assert losses and all(math.isfinite(loss) for loss in losses)
    if objective in ("FIND", "ReNO"):
        run_snippets(tmp_path / "run" / "README.md", monkeypatch)
        ours = sample_images(
            case(name).load().predict, family := case(name).load(), ["a red circle"], [0],
            initial=InitialNoise.load(tmp_path / "run").initial,
        )  # fmt: skip
        theirs = torch.from_numpy(np.array(Image.open(tmp_path / "run" / "0.png"))).permute(2, 0, 1) / 255
        assert (ours[0] - theirs).abs().max() < 1.5 / 255, family.source


def pairs(folder: Path, side: int) -> dict[str, str]:
    for k in range(4):
        pixels = torch.randint(0, 256, (side, side, 3), generator=torch.Generator().manual_seed(k), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{k}.png")
    rows = [{"caption": f"a picture {k}", "chosen": f"{k}.png", "rejected": f"{k + 1}.png"} for k in (0, 2)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(folder / "pairs.jsonl"), "cache_dir": str(folder / "cache")}


@pytest.mark.slow
@pytest.mark.parametrize("lora", [LoRA(2, targets=["to_q", "to_add_out", "txt_mlp.net.2"]), None])
def test_every_trained_weight_of_qwen_image_has_a_gradient(
    case: Callable[[str], FamilyCase], lora: LoRA | None
) -> None:
    """Several processes wait for the gradient of each; the last block's text goes nowhere."""
    policy = Policy(case("qwen-image").load(), lora, reference=False)
    policy.set_lr_scales(lambda _: 1.0)
    policy.predict(*case("qwen-image").inputs(policy.family)).raw.square().mean().backward()
    assert policy.parameters() and all(parameter.grad is not None for parameter in policy.parameters())


@pytest.mark.parametrize("objective", [NFT, AWM, DGPO])
def test_images_train_at_the_scale_that_they_were_drawn_at(case: Callable[[str], FamilyCase], objective: Any) -> None:
    """Where the network takes it as an input; what trained was the model at the pipeline's default."""
    policy, heard = Policy(case("flux-dev").load(), LoRA(2)), set[float]()
    policy.denoiser.register_forward_pre_hook(lambda _m, _a, k: heard.update(k["guidance"].tolist()), with_kwargs=True)
    rolling = objective(Sampler(2, 1.5), images_per_prompt=2, kl_weight=0.1)
    ctx, rows = rolled(rolling, policy)
    rolling.loss(ctx, rows)
    assert heard == {1.5} != {policy.family.default_guidance_scale}


# commands, precision, memory
@pytest.mark.slow
@pytest.mark.parametrize("name", tiny_families.BUILD)
def test_commands_run(name: str, case: Callable[[str], FamilyCase], tmp_path: Path) -> None:
    """Sampling, rollout and evaluation of a LoRA trained in bfloat16 with an average and gradient checkpointing."""
    folder, prompts = str(case(name).folder), tmp_path / "prompts.txt"
    prompts.write_text("a red circle\ntwo blue stars, one of them larger\n")
    family = case(name).load()
    config = {
        "pretrained_model_name_or_path": folder,
        "objective": {"class_path": "DPO"},
        "data": {"class_path": "PreferencePairs", "init_args": pairs(tmp_path, family.resolution)},
        "output_dir": str(tmp_path / "run"),
        "lora": {"rank": 2} if family.lora_targets else None,
        "mixed_precision": "bf16",
        "gradient_checkpointing": True,
        "ema_decay": 0.5,
        "train_batch_size": 2,
        "max_train_steps": 2,
        "learning_rate": 1e-2,
        "checkpointing_steps": 1,
        "report_to": "none",
        "samples": {"prompts": ["a star"], "num_inference_steps": 2},
    }
    assert main(["--config", write(config)]) == 0
    assert (tmp_path / "run/samples/step-000002.png").is_file()
    again = ["--config", write(config), "--resume_from_checkpoint", "checkpoint-1"]
    assert main(again) == 0
    model = [f"--prompts={prompts}", "--num_inference_steps=2"]
    own = [f"--pretrained_model_name_or_path={folder}", f"--weights={tmp_path}/run"]
    assert sample.main([*model, *own, f"--output_dir={tmp_path}/drawn"]) == 0
    assert len(list((tmp_path / "drawn").rglob("*.png"))) >= 2
    judged = [*model, f"--tuned={tmp_path}/run", f"--output_dir={tmp_path}/judged", "--reward=tests.helpers.Bright"]
    assert evaluate.main([*judged, "--samples_per_prompt=1"]) == 0
    drawn = [f"--prompts={prompts}", *own, f"--output_dir={tmp_path}/rollout", "--sampler.num_inference_steps=3"]
    assert rollout.main([*drawn, "--images_per_prompt=2"]) == 0
    assert main(["--config", write(config, output_dir=str(tmp_path / "dry")), "--dry_run"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny_families.BUILD)
def test_a_lora_trains_on_four_bits(name: str, case: Callable[[str], FamilyCase], tmp_path: Path) -> None:
    family = case(name).load()
    if not family.lora_targets:
        pytest.skip("diffusers has no LoRA for it")
    quantize(family.denoiser)
    save_pipeline(family.pipe, tmp_path / "int4")
    shutil.copy(case(name).folder / "sampling.json", tmp_path / "int4")
    config = {
        "pretrained_model_name_or_path": str(tmp_path / "int4"),
        "objective": {"class_path": "DPO"},
        "data": {"class_path": "PreferencePairs", "init_args": pairs(tmp_path, family.resolution)},
        "output_dir": str(tmp_path / "run"),
        "lora": {"rank": 2},
        "train_batch_size": 2,
        "max_train_steps": 2,
        "learning_rate": 1e-2,
        "checkpointing_steps": 0,
        "report_to": "none",
        "samples": {"prompts": []},
    }
    assert main(["--config", write(config)]) == 0
    tuned = families.tuned(families.load(str(tmp_path / "int4")), str(tmp_path / "run"))
    inputs = case(name).inputs(tuned)
    with torch.no_grad():
        moved = tuned.forward(*inputs)
        plain = families.load(str(tmp_path / "int4")).forward(*inputs)
    assert not torch.allclose(moved, plain, atol=1e-5)


# what is refused in a line
def test_a_name_tells_of_a_few_step_model_and_no_folder_above_it(tmp_path: Path) -> None:
    folder = tiny_families.save("lumina2", tmp_path / "turbo-experiments" / "model")
    assert families.load(str(folder)).default_num_inference_steps == 30
    shutil.copytree(folder, tmp_path / "my-turbo")
    assert families.load(str(tmp_path / "my-turbo")).default_num_inference_steps == 4


@pytest.mark.parametrize(
    ("name", "part", "changes", "told"),
    [
        ("flux-dev", "scheduler/scheduler_config.json", {"max_shift": None}, "has a number that no model has"),
        ("flux-dev", "scheduler/scheduler_config.json", {"max_image_seq_len": 256}, "has a number that no model has"),
        ("qwen-image", "vae/config.json", {"latents_mean": [0.0]}, "statistics of 4 channels"),
        ("flux-dev", "model_index.json", {"text_encoder_2": [None, None]}, "is no whole pipeline"),
        ("sdxl", "model_index.json", {"text_encoder": [None, None]}, "SDXL's base model reads prompts by both"),
    ],
)
def test_a_broken_config_is_refused(
    name: str, part: str, changes: dict[str, Any], told: str, case: Callable[[str], FamilyCase], tmp_path: Path
) -> None:
    path = Path(shutil.copytree(case(name).folder, tmp_path / "model")) / part
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=told) as stopped:
        families.load(str(tmp_path / "model"))
    assert "\n" not in str(stopped.value)


def test_what_a_model_cannot_do_is_told(case: Callable[[str], FamilyCase], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no LoRA for a PixArtTransformer2DModel; set lora: null"):
        Policy(case("pixart-sigma").load(), LoRA(2))
    Policy(case("sana").load(), LoRA(2), reference=False).save(tmp_path)
    with pytest.raises(UserError, match="no LoRA for PixArtSigmaPipeline"):
        families.tuned(case("pixart-sigma").load(), str(tmp_path))
    with pytest.raises(UserError, match="1000 is too many for the spacing"):
        case("sdxl").load().grid(1000)


@pytest.mark.parametrize(
    ("kind", "changes", "steps", "told"),
    [
        ("epsilon", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, 4, "epsilon, which says nothing"),
        ("flow", {"shift_terminal": 0.02}, 1, "take 2 steps or more"),
    ],
)
def test_a_schedule_without_numbers_draws_nothing(
    tiny: Build, kind: str, changes: dict[str, Any], steps: int, told: str
) -> None:
    """Both gave NaN, and pictures of it."""
    pipe = tiny(kind).pipe
    pipe.register_modules(scheduler=type(pipe.scheduler).from_config(pipe.scheduler.config, **changes))
    with pytest.raises(UserError, match=told):
        type(tiny(kind))(pipe, "mine").grid(steps)


@pytest.mark.parametrize(("student", "teacher"), [("sdxl", "pixart-sigma"), ("lumina2", "qwen-image")])
def test_a_teacher_of_other_states_is_refused(student: str, teacher: str, case: Callable[[str], FamilyCase]) -> None:
    """Also where prediction and latents are of the same shape."""
    policy = Policy(case(student).load(), None, reference=False)
    asked = PipelineTeacher(task="*", path=str(case(teacher).folder))
    with pytest.raises(UserError, match="cannot be asked about the student's states: its (noise levels|autoencoder)"):
        asked.open(policy)
    PipelineTeacher(task="*", path=str(case(student).folder)).open(policy)
