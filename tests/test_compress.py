"""Healing and the whole command, on tiny pipelines: what may change, what must not, and what is left on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file

import pruning
from align import families
from align.common.command import parse
from align.common.errors import UserError
from align.data.prompts import PromptSet
from align.families import LORA_FILE
from align.objectives import Context
from align.objectives.teachers import PipelineTeacher
from align.policy.policy import LoRA, Policy
from align.sampling.sampler import Sampler
from pruning import compress
from pruning.distill import Heal, sensitivity
from pruning.graph import BlockGraph
from pruning.linear4bit import Linear4bit
from pruning.plan import from_ranges, make_plan
from pruning.report import Reporting, report
from tests import tiny_families
from tests.helpers import HOSTILE, errors, gradients, lines, texts_of

PROMPTS = ["two red stars", "a star", "a red circle", "a blue circle left of a green square"]


def batch(policy: Policy) -> Any:
    return PromptSet(policy.family, [{"prompt": text} for text in PROMPTS]).batch(range(4))


def healing(folder: Path, tmp_path: Path, blocks: str, **arguments: Any) -> tuple[Policy, Heal]:
    """A student without ``blocks`` and the objective that heals it."""
    whole = families.load(str(folder))
    graph = BlockGraph.of(whole.denoiser)
    plan = from_ranges(graph, blocks, str(folder)) if blocks else make_plan(graph, [], str(folder))
    plan.save(tmp_path / "plan.json")
    student = families.load(str(folder))
    BlockGraph.of(student.denoiser).remove(plan.dropped)
    defaults: dict[str, Any] = {"sampler": Sampler(3, guidance_scale=1.0), "sensitivity": "none"}
    objective = Heal(PipelineTeacher(path=str(folder)), tmp_path / "plan.json", **(defaults | arguments))
    policy = Policy(student, None, reference=False)
    objective.prepare(policy, None)
    policy.set_lr_scales(objective.lr_scale)
    return policy, objective


def loss_of(policy: Policy, objective: Heal) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ctx = Context(policy, 0, 0, range(4))
    with torch.no_grad():
        table = objective.rollout(ctx, batch(policy))
    return objective.loss(ctx, table)


def test_nothing_removed_is_nothing_to_learn(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    policy, objective = healing(tiny_folders["flow"], tmp_path, "", feature_weight=1.0)
    loss, metrics = loss_of(policy, objective)
    assert loss.item() == 0.0
    assert metrics["output"].item() == metrics["feature"].item() == 0.0


@pytest.mark.parametrize("kind", ["flow", pytest.param("epsilon", marks=pytest.mark.slow)])
def test_healing_teaches_the_student_and_leaves_the_teacher(
    tiny_folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    policy, objective = healing(
        tiny_folders[kind], tmp_path, "1" if kind == "flow" else "mid_block", feature_weight=0.1
    )
    theirs = {n: p.clone() for n, p in objective.teacher.family.denoiser.named_parameters()}
    adam = torch.optim.Adam(policy.parameters(), 5e-3)
    before = loss_of(policy, objective)[0].item()
    for _ in range(12):
        adam.zero_grad()
        loss_of(policy, objective)[0].backward()
        adam.step()
    assert loss_of(policy, objective)[0].item() < 0.8 * before
    for name, parameter in objective.teacher.family.denoiser.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, theirs[name])


@pytest.mark.parametrize("preservation", [True, False])
def test_what_runs_before_the_first_removed_block_is_frozen(
    tiny_folders: dict[str, Path], tmp_path: Path, preservation: bool
) -> None:
    policy, objective = healing(tiny_folders["flow"], tmp_path, "1", preservation=preservation)
    loss_of(policy, objective)[0].backward()
    early = ("transformer_blocks.0.", "pos_embed", "time_text_embed", "context_embedder")
    for name, parameter in policy.denoiser.named_parameters():
        frozen = preservation and name.startswith(early)
        assert (parameter.grad is None) == frozen, name
        assert parameter.requires_grad == (not frozen)


def test_the_feature_term_pairs_blocks_by_their_old_places(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    """Behind the removed block, student block 1 answers to teacher block 2."""
    policy, objective = healing(tiny_folders["flow"], tmp_path, "1", feature_weight=1.0)
    assert objective._pairs == {"transformer_blocks.1": "transformer_blocks.2"}
    _, metrics = loss_of(policy, objective)
    ctx = Context(policy, 0, 0, range(4))
    with torch.no_grad():
        table = objective.rollout(ctx, batch(policy))
        rows = table.x_t, table.t
        cond = table.cond.take(table.image)
        empty = table.empty
        null = policy.family.uncond
        cond = type(cond)(
            {k: torch.where(empty.view(-1, *[1] * (v.ndim - 1)), null[k], v) for k, v in cond.tensors.items()}
        )
        found = []
        for family, name in (
            (policy.family, "transformer_blocks.1"),
            (objective.teacher.family, "transformer_blocks.2"),
        ):
            with BlockGraph.of(family.denoiser).tap([name]) as features:
                family.predict(*rows, cond)
            found.append(features[name]["hidden"])
    assert metrics["feature"].item() == pytest.approx((found[0] - found[1]).square().mean().item(), rel=1e-4)


def test_what_takes_guidance_as_an_input_heals_at_the_scale_that_it_draws_at(tmp_path: Path) -> None:
    folder, heard = tiny_families.save("flux-dev", tmp_path / "flux"), set[float]()
    policy, objective = healing(folder, tmp_path, "", sampler=Sampler(2, guidance_scale=1.5))
    for network in (policy.denoiser, objective.teacher.family.denoiser):
        network.register_forward_pre_hook(lambda _m, _a, k: heard.update(k["guidance"].tolist()), with_kwargs=True)
    loss_of(policy, objective)
    assert heard == {1.5}


def test_rows_heal_alike_however_they_are_cut_into_batches(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    """By the teacher's size over a batch, a U-Net's gradients were 63 % apart for batches of 12 and of 1."""
    policy, objective = healing(
        tiny_folders["epsilon"], tmp_path, "mid_block", feature_weight=1.0, relative_features=True
    )
    ctx = Context(policy, 0, 0, range(4))
    with torch.no_grad():
        rows = objective.rollout(ctx, batch(policy))
    whole = objective.loss(ctx, rows)[0]
    parts = [len(part) / len(rows) * objective.loss(ctx, part)[0] for part in rows.chunks(5)]
    torch.testing.assert_close(sum(parts), whole, atol=0, rtol=1e-5)
    torch.testing.assert_close(gradients(policy, sum(parts, torch.zeros(()))), gradients(policy, whole))


def test_real_pictures_have_a_task_term(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    from align.data.captioned import ImageBatch

    policy, objective = healing(
        tiny_folders["flow"], tmp_path, "1", task_weight=1.0, output_weight=0.0, feature_weight=0.0
    )
    prompts = batch(policy)
    latents = torch.randn(4, *policy.family.latent_shape(), generator=torch.Generator().manual_seed(1))
    ctx = Context(policy, 0, 0, range(4))
    table = objective.rollout(ctx, ImageBatch(latents, prompts.cond, PROMPTS, [0, 1, 2, 3]))
    assert torch.equal(table.x0, latents)
    loss, metrics = objective.loss(ctx, table)
    assert loss.item() == pytest.approx(metrics["task"].item())
    with pytest.raises(UserError, match="needs data with images"):
        objective.rollout(ctx, prompts)


def test_sensitive_blocks_move_less() -> None:
    cost, blocks = {"a": 4.0, "b": 1.0, "c+d": 2.0, "e": -1.0}, ("a", "b", "c", "e", "new")
    soft = sensitivity(cost, blocks, "graded")
    assert soft["a"] < soft["c"] < soft["b"] < soft["e"] == soft["new"] == 1.0
    assert soft["a"] == pytest.approx(1.5 / 5.5)  # the median of 4, 1, 2, 0
    assert sensitivity(cost, blocks, "binary") == {"a": 0.0, "b": 1.0, "c": 0.0, "e": 1.0, "new": 1.0}
    assert set(sensitivity({}, blocks, "graded").values()) == {1.0}


def test_the_learning_rate_follows_the_sensitivity(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    """Without block 0 the others heal. Of these block 1, block 0 of the student, costs 3, which is the median; what
    block 2 costs was not measured."""
    units = {f"transformer_blocks.{k}": {"mse": v, "reward": None, "drop": None} for k, v in enumerate((1.0, 3.0))}
    profile = {"settings": {}, "full": {"seconds": 1.0}, "blocks": {}, "units": units}
    (tmp_path / "profile.json").write_text(json.dumps(profile))
    policy, _ = healing(
        tiny_folders["flow"], tmp_path, "0", sensitivity="graded", profile=tmp_path / "profile.json", preservation=False
    )
    names = {id(p): n for n, p in policy.denoiser.named_parameters()}
    found = {names[id(p)]: factor for factor, some in policy.groups().items() for p in some}
    assert found.keys() == set(names.values())
    for name, factor in found.items():
        assert factor == (0.5 if name.startswith("transformer_blocks.0.") else 1.0), name


# the command
@pytest.fixture
def config(tiny_folders: dict[str, Path], tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    heal = {
        "objective": {
            "class_path": "pruning.distill.Heal",
            "init_args": {
                "teacher": {"path": "filled in"},
                "plan_path": "filled in",
                "sampler": {"num_inference_steps": 2, "guidance_scale": 1},
            },
        },
        "data": {"class_path": "Prompts", "init_args": {"path": str(tmp_path / "prompts.txt")}},
        "lora": None,
        "rollout_batch_size": 2,
        "train_batch_size": 4,
        "max_train_steps": 2,
        "learning_rate": 1e-3,
        "report_to": "none",
    }
    heal["objective"]["init_args"]["profile"] = "filled in"  # type: ignore[index]
    (tmp_path / "heal.yaml").write_text(yaml.safe_dump(heal))
    return {
        "pretrained_model_name_or_path": str(tiny_folders["flow"]),
        "output_dir": str(tmp_path / "out"),
        "prompts": str(tmp_path / "prompts.txt"),
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
        "budget": {"parameters": 0.2},
        "heal": str(tmp_path / "heal.yaml"),
        "dtype": "float32",
        "report": {
            "prompts": str(tmp_path / "prompts.txt"), "reward": ["tests.helpers.Bright"], "num_inference_steps": 2,
            "repeats": 2, "memory": False,
        },
    }  # fmt: skip


def run(config: dict[str, Any], tmp_path: Path, *words: str) -> int:
    (tmp_path / "compress.yaml").write_text(yaml.safe_dump(config))
    return compress.main(["--config", str(tmp_path / "compress.yaml"), *words])


def test_the_whole_command(config: dict[str, Any], tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    assert run(config, tmp_path) == 0
    out = tmp_path / "out"
    report = json.loads((out / "report.json").read_text())["pipelines"]
    assert list(report) == ["original", "pruned", "healed", "int4-alone", "int4"]
    plan = json.loads((out / "plan.json").read_text())
    assert len(plan["dropped"]) == 1
    assert report["original"]["parameters"] == plan["before"] > plan["after"] == report["int4"]["parameters"]
    assert report["int4"]["denoiser_bytes"] < report["healed"]["denoiser_bytes"] < report["original"]["denoiser_bytes"]
    for name in ("profile.png", "plan.png", "gallery.png", "gallery.html", "report.md"):
        assert (out / name).stat().st_size > 100
    # stock diffusers, without a word about us
    for name in ("pruned", "healed"):
        pipe = StableDiffusion3Pipeline.from_pretrained(out / name)
        stock, loading = type(pipe.transformer).from_pretrained(out / name / "transformer", output_loading_info=True)
        assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert stock.config.num_layers == 2
    assert "Removed from the denoiser" in (out / "int4/README.md").read_text()
    packed = pruning.load(out / "int4")
    assert isinstance(packed, StableDiffusion3Pipeline)
    # called again it does nothing anew
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert run(config, tmp_path, "--stages", "[analyze,plan,remove,heal,quantize]") == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == times


def test_hostile_names_and_prompts_are_text_on_the_page(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(HOSTILE) + "\n")
    prompts, reward = str(tmp_path / "prompts.txt"), ["tests.helpers.Bright"]
    settings = Reporting(prompts, reward, num_inference_steps=1, guidance_scale=1.0, memory=False, repeats=1)
    folders = {name: str(tiny_folders["flow"]) for name in HOSTILE}
    report(folders, settings, tmp_path)
    shown = texts_of((tmp_path / "gallery.html").read_text())
    assert all(shown.count(text) >= 1 + 2 * len(HOSTILE) for text in HOSTILE)  # as a prompt, and below its images
    assert shown.count("tests.helpers.Bright") == 2  # a column of one table, a row of the other


def test_the_pruned_folder_is_the_skipped_model_bit_by_bit(config: dict[str, Any], tmp_path: Path) -> None:
    assert run(config | {"heal": None, "blocks": "1", "budget": None}, tmp_path, "--stages", "[plan,remove]") == 0
    whole = families.load(config["pretrained_model_name_or_path"])
    small = families.of(DiffusionPipeline.from_pretrained(tmp_path / "out/pruned"), "small")
    x = torch.randn(2, *whole.latent_shape(), generator=torch.Generator().manual_seed(3))
    t, cond = whole.sample_timesteps(torch.tensor([0.2, 0.7])), whole.encode(PROMPTS[:2])
    with torch.no_grad(), BlockGraph.of(whole.denoiser).skip(["transformer_blocks.1"]):
        skipped = whole.forward(x, t, cond)
    with torch.no_grad():
        assert torch.equal(small.forward(x, t, cond), skipped)


@pytest.mark.slow
def test_parts_of_blocks_go_through_every_stage(config: dict[str, Any], tmp_path: Path) -> None:
    more = {"blocks": "1-2.ff, 0.norm1_context", "budget": None, "quantize": {"skip": ["proj_out"]}}
    assert run(config | more, tmp_path) == 0
    out, parts = tmp_path / "out", [f"transformer_blocks.{part}" for part in ("0.norm1_context", "1.ff", "2.ff")]
    report = json.loads((out / "report.json").read_text())["pipelines"]
    assert report["original"]["parameters"] > report["int4"]["parameters"] == report["healed"]["parameters"]
    assert report["int4"]["denoiser_bytes"] < report["healed"]["denoiser_bytes"] < report["original"]["denoiser_bytes"]
    # the pruned pipeline is the whole one without those parts, healed and quantised ones are others; align reads all
    whole = families.load(config["pretrained_model_name_or_path"])
    x = torch.randn(2, *whole.latent_shape(), generator=torch.Generator().manual_seed(3))
    t, cond = whole.sample_timesteps(torch.tensor([0.2, 0.7])), whole.encode(PROMPTS[:2])
    with torch.no_grad():
        said = [families.load(str(out / name)).forward(x, t, cond) for name in ("pruned", "healed", "int4")]
        with BlockGraph.of(whole.denoiser).skip(parts):
            assert torch.equal(said[0], whole.forward(x, t, cond))
    assert not torch.equal(said[0], said[1])
    assert 0 < (said[1] - said[2]).norm() / said[1].norm() < 0.5
    # what the denoiser skips is no matter of the text encoders, which keep their own list
    packed = pruning.load(out / "int4")
    kept = [m.config.quantization_config.llm_int8_skip_modules for m in (packed.transformer, packed.text_encoder)]
    assert kept == [["proj_out"], ["text_projection"]]
    assert type(packed.transformer.proj_out) is type(packed.text_encoder.text_projection) is torch.nn.Linear
    assert isinstance(packed.transformer.norm_out.linear, Linear4bit)


def test_a_lora_is_merged_first(config: dict[str, Any], tmp_path: Path) -> None:
    policy = Policy(families.load(config["pretrained_model_name_or_path"]), LoRA(2))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
    (tmp_path / "run").mkdir()
    policy.save(tmp_path / "run")
    assert (tmp_path / "run" / LORA_FILE).is_file()
    changed = config | {"weights": str(tmp_path / "run"), "heal": None, "blocks": "1", "budget": None}
    assert run(changed, tmp_path, "--stages", "[plan,remove]") == 0
    merged = families.of(DiffusionPipeline.from_pretrained(tmp_path / "out/merged"), "merged")
    x = torch.randn(2, *merged.latent_shape(), generator=torch.Generator().manual_seed(3))
    t, cond = merged.sample_timesteps(torch.tensor([0.2, 0.7])), merged.encode(PROMPTS[:2])
    with torch.no_grad():
        torch.testing.assert_close(merged.forward(x, t, cond), policy.predict(x, t, cond).raw, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"budget": None}, "either a budget or blocks"),
        ({"blocks": "1"}, "either a budget or blocks"),
        ({"budget": {"parameters": 0.2, "bytes": 10.0}}, "not parameters and bytes"),
        ({"budget": {"parameters": 0.99}}, "out of reach"),
        ({"measure": "drop"}, "needs a reward"),
        ({"heal": "nowhere.yaml"}, "no config nowhere.yaml"),
        ({"heal": {"learning_rat": 1.0}}, "learning_rat"),
        ({"heal": {"max_train_steps": 0}}, "max_train_steps must be at least 1"),
        ({"heal": ["no mapping"]}, "heal: "),
        ({"tune": {"lora": {"rank": 2}}}, "set lora: null"),
        ({"weights": "nowhere"}, "nowhere"),
        ({"quantize": {"skip": ["proj_out", "proj_in"]}}, "'proj_in' names no Linear of SD3Transformer2DModel"),
        ({"budget": None, "blocks": "0-2"}, "cannot prune"),
        ({"budget": None, "blocks": "7, nonsense"}, "nonsense"),
    ],
)
def test_bad_settings_in_words(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], said: str
) -> None:
    for name in {"heal", "tune"} & change.keys():
        if isinstance(change[name], dict | list):  # what its file says
            heal = yaml.safe_load((tmp_path / "heal.yaml").read_text())
            said_there = heal | change[name] if isinstance(change[name], dict) else change[name]
            (tmp_path / "changed.yaml").write_text(yaml.safe_dump(said_there))
            change = change | {name: str(tmp_path / "changed.yaml")}
    assert run(config | change, tmp_path) == 2
    told = errors(capsys.readouterr().err)
    assert len(told) == 1
    assert said in told[0]
    assert not (tmp_path / "out/pruned").exists()
    if {"heal", "tune", "quantize"} & change.keys():
        assert not (tmp_path / "out").exists()  # refused before anything is written


def test_another_plan_in_the_same_folder_is_refused(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    by_hand = config | {"budget": None, "heal": None, "blocks": "1"}
    assert run(by_hand, tmp_path, "--stages", "[plan,remove]") == 0
    assert run(by_hand | {"blocks": "0"}, tmp_path, "--stages", "[plan,remove]") == 2
    assert 'plan (blocks was "1", is "0"); pruned, which follows' in capsys.readouterr().err


@pytest.mark.slow
def test_a_healed_run_is_a_run_of_the_loop(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(config, tmp_path, "--stages", "[analyze,plan,remove,heal]") == 0
    found = [line for line in lines(tmp_path / "out/heal") if "loss" in line]
    assert [line["step"] for line in found] == [1, 2]
    assert {"output", "feature"} <= found[0].keys()
    assert "4 trained + 8 frozen" in capsys.readouterr().out  # two prompts drawn in two steps, and the teacher's
    heal = yaml.safe_load((tmp_path / "heal.yaml").read_text())
    heal["data"] = {"class_path": "align.shapes.scenes.Scenes", "init_args": {"limit": 2, "cache_dir": str(tmp_path)}}
    (tmp_path / "scenes.yaml").write_text(yaml.safe_dump(heal))
    changed = config | {"heal": str(tmp_path / "scenes.yaml"), "output_dir": str(tmp_path / "scenes")}
    assert run(changed, tmp_path, "--stages", "[analyze,plan,remove,heal]") == 0
    assert "4 trained + 4 frozen" in capsys.readouterr().out


def test_a_teacher_in_4_bit(config: dict[str, Any], tmp_path: Path) -> None:
    assert run(config | {"heal": None}, tmp_path, "--stages", "[analyze,plan,remove,quantize]") == 0
    student = Policy(families.load(config["pretrained_model_name_or_path"]), LoRA(2))
    teacher = PipelineTeacher(path=str(tmp_path / "out/int4-alone"))
    teacher.open(student)
    x = torch.randn(2, *student.family.latent_shape(), generator=torch.Generator().manual_seed(3))
    t, cond = student.family.sample_timesteps(torch.tensor([0.2, 0.7])), student.family.encode(PROMPTS[:2])
    with torch.no_grad():
        said, own = teacher.predict(student, x, t, cond, 1.0).raw.float(), student.predict(x, t, cond).raw
    assert 0 < (said - own).norm() / own.norm() < 0.5


def test_in_4_bit_a_lora_trains_and_nothing_else(config: dict[str, Any], tmp_path: Path) -> None:
    assert run(config | {"heal": None}, tmp_path, "--stages", "[analyze,plan,remove,quantize]") == 0
    source = str(tmp_path / "out/int4")
    policy = Policy(families.load(source), LoRA(2))
    x = torch.randn(2, *policy.family.latent_shape(), generator=torch.Generator().manual_seed(3))
    t, cond = policy.family.sample_timesteps(torch.tensor([0.2, 0.7])), policy.family.encode(PROMPTS[:2])
    policy.predict(x, t, cond).raw.square().sum().backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in policy.parameters())
    with pytest.raises(UserError, match="4 bit, which cannot be trained"):
        Policy(families.load(source), None)


@pytest.mark.slow
def test_what_is_not_packed_makes_up_for_the_rounding(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tune = yaml.safe_load((tmp_path / "heal.yaml").read_text()) | {"max_train_steps": 40, "learning_rate": 1e-2}
    tune["objective"]["init_args"] |= {"preservation": False, "sensitivity": "none", "feature_weight": 0.0}
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump(tune))
    config |= {"heal": None, "tune": str(tmp_path / "tune.yaml"), "blocks": "1.norm1_context", "budget": None}
    assert run(config, tmp_path) == 0
    out = tmp_path / "out"
    report = json.loads((out / "report.json").read_text())["pipelines"]
    assert list(report) == ["original", "pruned", "int4-alone", "int4", "int4-tuned"]
    for what in ("parameters", "denoiser_bytes"):
        assert report["int4-tuned"][what] == report["int4"][what]
    before, after = (
        load_file(out / name / "transformer/diffusion_pytorch_model.safetensors") for name in ("int4", "int4-tuned")
    )
    assert before.keys() == after.keys()
    packed = {key for key in before if ".weight." in key or before[key].dtype == torch.uint8}
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert packed and not packed & moved and any(key.endswith("attn.to_q.bias") for key in moved)
    whole = families.load(config["pretrained_model_name_or_path"])
    x = torch.randn(8, *whole.latent_shape(), generator=torch.Generator().manual_seed(3))
    t, cond = whole.sample_timesteps(torch.linspace(0.1, 0.9, 8)), whole.encode(PROMPTS * 2)
    with torch.no_grad():
        right = whole.forward(x, t, cond)
        errors_of = [(families.load(str(out / n)).forward(x, t, cond) - right).norm() for n in ("int4", "int4-tuned")]
    assert errors_of[1] < 0.9 * errors_of[0]
    # a LoRA could not be merged into it
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump({key: value for key, value in tune.items() if key != "lora"}))
    assert run(config, tmp_path) == 2
    assert "set lora: null" in errors(capsys.readouterr().err)[0]


def test_damaged_weights_are_refused(config: dict[str, Any], tmp_path: Path) -> None:
    assert (
        run(config | {"heal": None, "blocks": "1", "budget": None}, tmp_path, "--stages", "[plan,remove,quantize]") == 0
    )
    path = tmp_path / "out/int4/transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["proj_out.bias"]
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"proj_out\.bias is missing"):
        pruning.load(tmp_path / "out/int4")


def test_the_config_parses_as_it_is_shipped() -> None:
    root = Path(__file__).parents[1]
    config, _ = parse(compress.Compress, "x", None, ["--config", str(root / "configs/compress_shapes_sd3.yaml")])
    config.check()
    assert config.heal is not None
