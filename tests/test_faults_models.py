"""Pipelines as people have them: of any scheduler, VAE and precision, or incomplete. Each works as stock diffusers does
or is refused in one line that names the part."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderTiny, DiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from align import families
from align.common.errors import UserError
from align.data.prompts import PromptSet
from align.data.trajectories import RolloutFolder
from align.diffusion.kernels import DDIM
from align.evaluation.rollout_writer import RolloutSettings, record_of
from align.families import Family, Unsupported
from align.families.captions import token_limits
from align.families.identity import draws
from align.objectives.d3po import D3PO
from align.objectives.policy_gradient import PolicyGradient
from align.policy.initial_noise import NOISE_FILE, InitialNoise
from align.policy.policy import LoRA, Policy
from align.sampling.generate import sample_images
from align.sampling.loop import initial_noise, sample
from align.sampling.sampler import Sampler, SDEWindow
from rewards import RewardConfig
from tests.helpers import TEXTS, rolled
from tests.pipelines import Build

SCHEDULERS = ["Euler", "EulerAncestral", "DPM++", "UniPC", "DEIS", "LCM", "PNDM", "LMS", "Heun", "DDPM", "TCD", "DDIM"]
FEW = ("Euler", "DPM++", "LCM")  # in the default run: one of a kind
CLASSES = {"DPM++": "DPMSolverMultistep", "UniPC": "UniPCMultistep", "DEIS": "DEISMultistep"}
CLASSES |= {name: f"{name}Discrete" for name in ("Euler", "EulerAncestral", "LMS", "Heun")}
FLOWS: dict[str, dict[str, Any]] = {
    "FlowMatchHeunDiscrete": {"shift": 3.0},
    "FlowMatchLCM": {"shift": 3.0},
    "DPMSolverMultistep": {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
    "UniPCMultistep": {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
}
FEW_FLOWS = ("FlowMatchHeunDiscrete", "DPMSolverMultistep")  # of both ways of saying the shift


@pytest.fixture
def copy(tiny_folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda kind: Path(shutil.copytree(tiny_folders[kind], tmp_path / f"{kind} model"))


def saved_with(folder: Path, name: str, **settings: Any) -> Path:
    """``folder`` with the scheduler class ``name`` and its defaults, saved as diffusers saves it."""
    shutil.rmtree(folder / "scheduler")
    getattr(diffusers, f"{CLASSES.get(name, name)}Scheduler")(**settings).save_pretrained(folder / "scheduler")
    return change(folder / "model_index.json", scheduler=["diffusers", f"{CLASSES.get(name, name)}Scheduler"]).parent


def change(path: Path, **values: Any) -> Path:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return path


# schedulers
@pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in SCHEDULERS]
)
def test_stock_draws_what_we_draw_whatever_scheduler_a_pipeline_has(copy: Callable[[str], Path], name: str) -> None:
    """By the scheduler of the printed snippet, also where a config lacks ``clip_sample``; 1000 is no multiple of 6."""
    folder = saved_with(copy("epsilon"), name)
    family, stock = families.load(str(folder)), DiffusionPipeline.from_pretrained(folder)
    stock.scheduler = families.stock_scheduler(stock)
    x = initial_noise((4, 8, 8), [1, 2])
    noise = InitialNoise(TEXTS, (4, 8, 8), family.source, family.scheduler_name)
    assert torch.equal(noise.latents(stock, TEXTS[0], [1, 2]), x)
    with torch.no_grad():
        ours = sample(family.predict, family.grid(6), family.encode(TEXTS[:2]), x, 5.0)
    theirs = stock(TEXTS[:2], latents=x.clone(), num_inference_steps=6, guidance_scale=5.0, output_type="latent").images
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


def trains(family: Family, objective: PolicyGradient | D3PO) -> int:
    """One loss of the objective, which is asserted to be finite and to train; the steps of an image that train."""
    policy = Policy(family, LoRA(2))
    ctx, rows = rolled(objective, policy)
    loss, metrics = objective.loss(ctx, rows)
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in policy.parameters())
    assert metrics["ratio_max"] == pytest.approx(1, abs=1e-4) if "ratio_max" in metrics else True
    count = len(rows.trajectories.kept_steps)  # type: ignore[attr-defined]
    assert objective.cost(family, None).trained == count * family.evaluations(family.default_guidance_scale)
    return count


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("DPM++", PolicyGradient),
        *(pytest.param(name, PolicyGradient, marks=pytest.mark.slow) for name in SCHEDULERS[::2] if name != "DPM++"),
        ("Euler", D3PO),
    ],
)
def test_online_objectives_train_whatever_scheduler_a_pipeline_has(
    copy: Callable[[str], Path], name: str, objective: type[PolicyGradient | D3PO]
) -> None:
    family = families.load(str(saved_with(copy("epsilon"), name)))
    assert trains(family, objective(Sampler(4), images_per_prompt=2)) in (3, 4)


@pytest.mark.parametrize(
    "name", [name if name in FEW_FLOWS else pytest.param(name, marks=pytest.mark.slow) for name in FLOWS]
)
def test_flows_of_any_scheduler_train_on_eulers_grid(copy: Callable[[str], Path], name: str) -> None:
    family = families.load(str(saved_with(copy("flow"), name, **FLOWS[name])))
    assert len(family.grid(6)) == 6
    u = torch.rand(2000, generator=torch.Generator().manual_seed(0))
    sigma = family.path(family.sample_timesteps(u))[1]
    assert torch.log(sigma / (1 - sigma)).median().item() == pytest.approx(torch.tensor(3.0).log().item(), abs=0.1)
    assert trains(family, PolicyGradient(Sampler(4), images_per_prompt=2)) == 4


def test_dynamic_shifting_is_the_stock_pipelines(copy: Callable[[str], Path]) -> None:
    folder = saved_with(copy("flow"), "FlowMatchEulerDiscrete", use_dynamic_shifting=True)
    family, stock = families.load(str(folder)), DiffusionPipeline.from_pretrained(folder)
    for side in (16, 32):
        x = initial_noise(family.latent_shape(side), [1])
        with torch.no_grad():
            ours = sample(family.predict, family.grid(5, side), family.encode(TEXTS[:1]), x, 3.0)
        theirs = stock(TEXTS[0], height=side, width=side, latents=x.clone(), num_inference_steps=5, guidance_scale=3.0,
                       output_type="latent").images  # fmt: skip
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)
    assert family.sample_timesteps(torch.tensor([0.5])).item() != 500
    assert trains(family, PolicyGradient(Sampler(4), images_per_prompt=2)) == 4


@pytest.mark.parametrize(
    ("kind", "name", "settings", "said"),
    [
        ("epsilon", "DDIM", {"prediction_type": "sample"}, "predicts 'sample'; supported: epsilon, v_prediction"),
        ("epsilon", "FlowMatchEulerDiscrete", {}, "FlowMatchEulerDiscreteScheduler has no betas"),
        ("epsilon", "EDMEuler", {}, "EDMEulerScheduler has no betas"),
        ("epsilon", "DDIM", {"beta_start": -1.0}, "betas that are no schedule"),
        ("flow", "DDIM", {}, "DDIMScheduler with prediction_type epsilon is no schedule of a rectified flow"),
        ("flow", "FlowMatchEulerDiscrete", {"invert_sigmas": True}, "no schedule of a rectified flow"),
        ("flow", "FlowMatchEulerDiscrete", {"shift": -3.0}, "has shift -3.0; expected a positive number"),
    ],
)
def test_other_processes_are_refused(
    copy: Callable[[str], Path], kind: str, name: str, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(Unsupported, match=said):
        families.load(str(saved_with(copy(kind), name, **settings)))


def test_why_a_step_has_no_noise(copy: Callable[[str], Path]) -> None:
    """eta is named where it is 0; otherwise the schedule is."""
    family = families.load(str(saved_with(copy("epsilon"), "LCM")))
    with pytest.raises(UserError, match="step 0 of 4 without noise.*set eta or noise"):
        Sampler(4, kernel=DDIM(0.0)).with_noise(family, range(4))
    window = PolicyGradient(Sampler(4), images_per_prompt=2, window=SDEWindow(2, until=4))
    with pytest.raises(UserError, match="step 3 of 4 without noise.*whatever eta is; leave it out"):
        window.cost(family, None)


# VAEs and denoisers
def tiny_vae_of(name: str) -> AutoencoderTiny | AsymmetricAutoencoderKL:
    torch.manual_seed(0)
    if name == "tiny":
        return AutoencoderTiny(
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        )  # fmt: skip
    return AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, down_block_out_channels=(8, 8),
        up_block_types=("UpDecoderBlock2D",) * 2, up_block_out_channels=(8, 8), norm_num_groups=4,
        scaling_factor=0.7,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["tiny", "asymmetric"])
def test_other_autoencoders_work(copy: Callable[[str], Path], name: str) -> None:
    folder, vae = copy("epsilon"), tiny_vae_of(name)
    shutil.rmtree(folder / "vae")
    vae.save_pretrained(folder / "vae")
    change(folder / "model_index.json", vae=["diffusers", type(vae).__name__])
    family, stock = families.load(str(folder)), DiffusionPipeline.from_pretrained(folder)
    stock.scheduler = families.stock_scheduler(stock)
    images = torch.rand(2, 3, 16, 16)
    encoded = vae.encode(images * 2 - 1)
    plain = encoded.latents if name == "tiny" else encoded.latent_dist.mode()
    torch.testing.assert_close(family.to_latent(images), plain * vae.config.scaling_factor, atol=1e-5, rtol=1e-5)
    ours = sample_images(family.predict, family, TEXTS[:1], [3], 4, 3.0)
    theirs = stock(TEXTS[0], latents=initial_noise((4, 8, 8), [3]), num_inference_steps=4, guidance_scale=3.0,
                   output_type="pt").images  # fmt: skip
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert family.identity()["pictures"]["scaling"][1] == vae.config.scaling_factor  # type: ignore[index]


@pytest.mark.parametrize("what", ["scheduler", "scaling", "tokenizer", "text_encoder", "vae", "unet"])
def test_pictures_of_one_pipeline_are_not_taken_for_anothers(copy: Callable[[str], Path], what: str) -> None:
    """Whatever of it was changed in place, :mod:`align.evaluation.pictures` and ``align.rollout`` see it."""
    folder = copy("epsilon")
    family, words = families.load(str(folder)), folder / "tokenizer/tokenizer.json"
    before, record = draws(family), record_of(RolloutSettings("prompts"), [], family)
    RolloutFolder(folder / "rollout").start(record)
    if what == "scheduler":
        change(folder / "scheduler/scheduler_config.json", beta_end=0.03)
    elif what == "scaling":
        change(folder / "vae/config.json", scaling_factor=0.5)
    elif what == "tokenizer":
        told = json.loads(words.read_text())
        told["model"]["vocab"] |= {"a": told["model"]["vocab"]["b"], "b": told["model"]["vocab"]["a"]}
        words.write_text(json.dumps(told))
    else:
        (weights,) = (folder / what).glob("*.safetensors")
        save_file({name: tensor * 1.01 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    family = families.load(str(folder))
    assert {name for name, part in draws(family).items() if part != before[name]} == {what}
    with pytest.raises(UserError, match=f"contents of {what} '"):
        RolloutFolder(folder / "rollout").start(record_of(RolloutSettings("prompts"), [], family))
    RolloutFolder(folder / "older").start(replace(record, contents={}))  # which does not know
    RolloutFolder(folder / "older").start(record)


def test_a_rollout_knows_the_files_of_its_rewards_and_one_of_an_earlier_version_does_not(
    tiny: Build, tmp_path: Path
) -> None:
    head, settings = tmp_path / "head", RolloutSettings("prompts")
    head.write_text("one")
    settings.rewards = [RewardConfig("tests.helpers.Bright", args={"file": str(head)})]
    record = record_of(settings, [], tiny("epsilon"))
    RolloutFolder(tmp_path / "older").start(replace(record, contents={}))
    RolloutFolder(tmp_path / "rollout").start(record)
    head.write_text("another")
    record = record_of(settings, [], tiny("epsilon"))
    RolloutFolder(tmp_path / "older").start(record)
    with pytest.raises(UserError, match="contents of tests.helpers.Bright's file '"):
        RolloutFolder(tmp_path / "rollout").start(record)


def test_a_model_for_inpainting_is_refused_before_weights_are_read(copy: Callable[[str], Path]) -> None:
    folder = copy("epsilon")
    config = json.loads((folder / "unet" / "config.json").read_text())
    UNet2DConditionModel.from_config(config | {"in_channels": 9}).save_pretrained(folder / "unet")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(Unsupported, match="the unet takes 9 channels and the VAE gives 4; a model for inpainting"):
        families.load(str(folder))


# incomplete or damaged folders
UNET, TEXT, VAE = "unet/diffusion_pytorch_model", "text_encoder/model", "vae/diffusion_pytorch_model"


def drop(folder: Path, file: str, count: int = 3) -> None:
    path = folder / f"{file}.safetensors"
    state = load_file(path)
    for key in sorted(state)[-count:]:
        del state[key]
    save_file(state, path, {"format": "pt"})


def edit(folder: Path, file: str, function: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / f"{file}.safetensors"
    state = load_file(path)
    function(state)
    save_file(state, path, {"format": "pt"})


def poison(value: float) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda state: state[sorted(state)[0]].view(-1)[-1:].fill_(value)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def wider(state: dict[str, torch.Tensor]) -> None:
    name = sorted(state)[0]
    state[name] = torch.zeros(3, *state[name].shape)


def pickled(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        torch.save(load_file(path), path.with_suffix(".bin"))
        path.unlink()


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "text encoder lost tensors": (lambda f: drop(f, TEXT), r"text_encoder is not.*3 tensors are missing: encoder"),
    "VAE lost tensors": (lambda f: drop(f, VAE), r"vae is not whole.*3 tensors are missing"),
    "denoiser lost tensors": (lambda f: drop(f, UNET), r"unet is not.*3 tensors are missing.*installed t2i-align"),
    "unknown tensors": (
        lambda f: edit(f, UNET, lambda s: s.update({"foo.bar": torch.zeros(2)})), r"1 tensors are unknown: foo.bar"
    ),
    "another size": (lambda f: edit(f, TEXT, wider), r"text_encoder "),
    "NaN": (lambda f: edit(f, TEXT, poison(float("nan"))), r"text_encoder has NaN or infinite numbers in "),
    "infinite": (lambda f: edit(f, UNET, poison(float("-inf"))), r"unet has NaN or infinite numbers in "),
    "cut": (lambda f: cut(f / f"{UNET}.safetensors"), r"unet/diffusion_pytorch_model.safetensors is no whole"),
    "no weights": (lambda f: (f / f"{VAE}.safetensors").unlink(), r"vae has no weights; expected a .safetensors file"),
    "pickles": (pickled, r"a pickle, which may run code when read; convert it once.*use_safetensors=False"),
    "git-lfs": (
        lambda f: (f / f"{UNET}.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        r"git-lfs's pointer to the weights; run git lfs pull",
    ),
    "part gone": (lambda f: shutil.rmtree(f / "tokenizer"), r"has no folder tokenizer/, which model_index.json names"),
    "no vocabulary": (lambda f: (f / "tokenizer" / "tokenizer.json").unlink(), r"tokenizer"),
    "tokenizer of another model": (
        lambda f: change(f / "tokenizer" / "tokenizer_config.json", model_max_length=4000),
        r"tokenizer allows 4000 tokens, and its text encoder \d+; set model_max_length",
    ),
    "broken JSON": (lambda f: (f / "unet" / "config.json").write_text("{"), r"unet/config.json cannot be read as JSON"),
    "broken index": (lambda f: (f / "model_index.json").write_text("{"), r"model_index.json cannot be read as JSON"),
    "JSON of another kind": (lambda f: (f / "vae" / "config.json").write_text("[]"), r"vae/config.json holds a list"),
    "no config": (lambda f: (f / "vae" / "config.json").unlink(), r"vae/config.json; is the folder whole"),
    "unknown class": (lambda f: change(f / "model_index.json", unet=["diffusers", "Nothing"]), r"has no Nothing"),
    "a part of a library that is not there": (
        lambda f: change(f / "model_index.json", unet=["nowhere", "NoSuch"]), r"unet is said to be NoSuch of 'nowhere'"
    ),
    "a part that is no model": (lambda f: change(f / "model_index.json", unet=["os", "system"]), r"system of 'os'"),
    "no class": (lambda f: change(f / "model_index.json", _class_name=3), r"has no _class_name"),
    "NaN in a config": (
        lambda f: change(f / "scheduler" / "scheduler_config.json", beta_end=float("nan")), r"beta_end is nan"
    ),
    "endless": (lambda f: change(f / "text_encoder" / "config.json", num_hidden_layers=10**9), r"hidden_layers is"),
    "a negative count": (lambda f: change(f / "unet" / "config.json", layers_per_block=-1), r"layers_per_block is -1"),
    "negative width": (lambda f: change(f / "unet" / "config.json", block_out_channels=[-8, 16]), r"cannot be read"),
    "no scale": (lambda f: change(f / "vae" / "config.json", scaling_factor=0), r"scaling_factor is 0"),
    "no size": (lambda f: change(f / "unet" / "config.json", sample_size=None), r"unet/config.json is None"),
    "text encoder of another model": (
        lambda f: change(f / "unet" / "config.json", cross_attention_dim=32), r"prompts of 32 channels and the"
    ),
    "sampling.json": (lambda f: (f / "sampling.json").write_text("[1]"), r"sampling.json is no JSON object of numbers"),
    "no steps": (lambda f: (f / "sampling.json").write_text('{"num_inference_steps": 0}'), r"num_inference_steps is 0"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_folders_are_refused_in_one_line(copy: Callable[[str], Path], what: str) -> None:
    folder, (damage, said) = copy("epsilon"), DAMAGE[what]
    damage(folder)
    with pytest.raises(Unsupported, match=said) as stopped:
        families.load(str(folder))
    assert "\n" not in str(stopped.value)


def test_a_missing_shard_is_named(copy: Callable[[str], Path]) -> None:
    folder = copy("epsilon")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    (folder / f"{UNET}.safetensors").unlink()
    unet.save_pretrained(folder / "unet", max_shard_size="50KB")
    assert sorted(families.load(str(folder)).denoiser.state_dict()) == sorted(unet.state_dict())
    shard = sorted((folder / "unet").glob("*-00002-of-*"))[0]
    shard.unlink()
    with pytest.raises(Unsupported, match=f"there is no .*{shard.name}, which .*index.json names"):
        families.load(str(folder))


def test_older_spellings_of_tensors_are_known(copy: Callable[[str], Path]) -> None:
    """As SD 1.5's own folders have them: a prefix and a buffer in the text encoder, other names in the VAE."""
    folder = copy("epsilon")

    def older_text(state: dict[str, torch.Tensor]) -> None:
        for name in list(state):
            state[f"text_model.{name.removeprefix('text_model.')}"] = state.pop(name)
        state["text_model.embeddings.position_ids"] = torch.arange(12)[None]

    def older_vae(state: dict[str, torch.Tensor]) -> None:
        new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        for name in list(state):
            for part, old in new.items():
                if f".{part}." in name:
                    state[name.replace(part, old)] = state.pop(name)

    expected = families.load(str(folder))
    edit(folder, TEXT, older_text)
    edit(folder, VAE, older_vae)
    family, images = families.load(str(folder)), torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        prompts = [each.encode(TEXTS[:1])["prompt_embeds"] for each in (family, expected)]
        latents = [each.to_latent(images) for each in (family, expected)]
    assert torch.equal(*prompts) and torch.equal(*latents)


def test_a_tokenizer_without_words_is_refused(copy: Callable[[str], Path]) -> None:
    """transformers makes one that knows its special tokens alone: every caption is the same."""
    folder = copy("epsilon")
    (folder / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(Unsupported, match="tokenizer has no vocabulary, so that every prompt is the same"):
        families.load(str(folder))


def test_what_the_pipeline_can_do_without_may_be_absent(copy: Callable[[str], Path]) -> None:
    folder = copy("epsilon")
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    extractor = ["transformers", "CLIPImageProcessor"]
    change(
        folder / "model_index.json", safety_checker=checker, feature_extractor=extractor, requires_safety_checker=True
    )
    assert families.load(str(folder)).pipe.safety_checker is None


def test_the_only_variant_is_read(copy: Callable[[str], Path]) -> None:
    folder = copy("epsilon")
    expected = load_file(folder / f"{UNET}.safetensors")
    pipe = DiffusionPipeline.from_pretrained(folder)
    shutil.rmtree(folder)
    pipe.to(torch.float16).save_pretrained(folder, variant="fp16")
    with pytest.warns(UserWarning, match="has fp16 weights only; these are read"):
        family = families.load(str(folder))
    assert family.dtype == torch.float32
    assert all(torch.equal(tensor.half().float(), family.denoiser.state_dict()[k]) for k, tensor in expected.items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        families.load(str(folder), variant="fp16")
    with pytest.raises(Unsupported, match="no weights of variant 'bf16'; it has fp16"):
        families.load(str(folder), variant="bf16")


@pytest.mark.parametrize(
    ("device", "dtype", "said"),
    [("cuda", torch.float32, "no CUDA GPU here.*device: cpu"), ("cpu", torch.float16, "fp16 needs a GPU.*bf16 or no")],
)
def test_what_this_machine_lacks_is_said_before_a_weight_is_read(
    copy: Callable[[str], Path], device: str, dtype: torch.dtype, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = copy("epsilon")
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    with pytest.raises(UserError, match=said):
        families.load(str(folder), dtype, device)


def test_a_tuned_denoiser_is_read_whole(copy: Callable[[str], Path], tmp_path: Path) -> None:
    family = families.load(str(copy("epsilon")))
    for damage, said in ((lambda s: s.popitem(), "1 tensors are missing"), (poison(float("nan")), "NaN or infinite")):
        family.denoiser.save_pretrained(tmp_path / "run" / "unet")
        edit(tmp_path / "run", UNET, damage)
        with pytest.raises(Unsupported, match=said):
            families.tuned(family, str(tmp_path / "run"))
        with pytest.raises(UserError, match=f"^initial_weights: .*({said}|missing, unknown)"):
            Policy(family, None, initial=tmp_path / "run")
    (tmp_path / "run/unet/config.json").write_text("[]")
    with pytest.raises(Unsupported, match=r"config.json holds a list; expected a JSON object"):
        families.tuned(family, str(tmp_path / "run"))


# learned noise
NOISE_DAMAGE: dict[str, tuple[Callable[[dict[str, torch.Tensor], dict[str, str]], Any], str]] = {
    "NaN": (lambda t, m: t["mean"].view(-1)[:1].fill_(float("nan")), "NaN, infinite or negative"),
    "negative": (lambda t, m: t["std"].neg_(), "NaN, infinite or negative"),
    "no shape": (lambda t, m: m.pop("shape"), "metadata are not as FIND wrote them"),
    "broken": (lambda t, m: m.update(prompts="["), "metadata are not as FIND wrote them"),
    "no list": (lambda t, m: m.update(prompts='"a"'), "no list of texts"),
    "fewer prompts": (lambda t, m: m.update(prompts='["a"]'), "not of its prompts and shape"),
    "a number": (lambda t, m: m.update(shape="4"), "not of its prompts and shape"),
}


@pytest.mark.parametrize("what", NOISE_DAMAGE)
def test_damaged_noise_is_refused(tmp_path: Path, what: str) -> None:
    path = InitialNoise(TEXTS[:2], (4, 8, 8), "x", "DDIMScheduler").save(tmp_path)
    with safe_open(path, "pt") as file:
        about = dict(file.metadata())
    tensors, (damage, said) = load_file(path), NOISE_DAMAGE[what]
    damage(tensors, about)
    save_file(tensors, path, about)
    with pytest.raises(UserError, match=f"{NOISE_FILE}.*{said}"):
        InitialNoise.load(path)


def test_cut_noise_is_refused(tmp_path: Path) -> None:
    path = InitialNoise(TEXTS[:2], (4, 8, 8), "x", "DDIMScheduler").save(tmp_path)
    cut(path)
    with pytest.raises(UserError, match="no safetensors file"):
        InitialNoise.load(path)


# captions and attention
LONG = "a red circle and " + "a blue square and " * 40


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_captions_that_are_cut_are_told_once(
    copy: Callable[[str], Path], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the end token kept: captions that differ beyond the cut alone are one to the model."""
    family = families.load(str(copy(kind)))
    limit = max(token_limits(family).values())
    capsys.readouterr()
    assert families.tell_truncated(family, [TEXTS[0], LONG + "a cat", LONG + "a dog", LONG + "a cat"]) == 2
    said = capsys.readouterr().err
    assert f"2 of 3 captions are longer than the {limit} tokens" in said and said.count("\n") == 1
    sample_images(family.predict, family, [LONG + "a cat", LONG + "a bird"], [0, 1], 1)
    PromptSet(family, [{"prompt": LONG + "a dog"}])
    assert capsys.readouterr().err.count("1 of 1 captions") == 1  # the bird's
    ids = family.pipe.tokenizer([LONG], truncation=True).input_ids[0]
    assert (len(ids), ids[-1]) == (family.pipe.tokenizer.model_max_length, family.pipe.tokenizer.eos_token_id)
    with torch.no_grad():
        cat, dog = (family.encode([LONG + text])["prompt_embeds"] for text in ("a cat", "a dog"))
    assert torch.equal(cat, dog)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nonsense", "attention_backend: nonsense cannot be used: .*must be one of.*leave it out"),
        ("flash", "attention_backend: flash (cannot be used: .*install|needs a GPU).*leave it out"),
        ("xformers", "attention_backend: xformers (cannot be used: .*install|needs a GPU).*leave it out"),
    ],
)
def test_attention_that_is_not_to_be_had_is_refused(tiny: Build, name: str, said: str) -> None:
    family = tiny("epsilon")
    with pytest.raises(UserError, match=said) as stopped:
        families.set_attention_backend(family, name)
    assert "\n" not in str(stopped.value)
    families.set_attention_backend(family, "native")


def test_the_home_is_found(copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy("epsilon")
    monkeypatch.setenv("HOME", str(folder.parent))
    assert families.pipeline_class(f"~/{folder.name}/") == "StableDiffusionPipeline"


@pytest.mark.parametrize("name", ["shapes-sd/", "models/my model", "a--b/c", "a/b/c", "C:\\models\\sd", ""])
def test_what_is_no_hub_id_is_one_line(name: str) -> None:
    with pytest.raises(Unsupported, match="expected a diffusers pipeline|nor a reachable hub pipeline") as stopped:
        families.load(name)
    assert "\n" not in str(stopped.value)


def test_a_single_file_is_told_how_to_become_a_folder(copy: Callable[[str], Path]) -> None:
    with pytest.raises(Unsupported, match="no model_index.json.*from_single_file"):
        families.load(str(copy("epsilon") / f"{UNET}.safetensors"))
