"""Several processes: weights that they share (FSDP2), unequal work, every row once, resume on another number."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from align.families import LORA_FILE
from align.objectives import Context
from align.objectives.rows import Rows
from align.policy.sharding import Lockstep
from align.policy.weights import WEIGHTS_FILE
from align.train import main
from align.training.batch_plan import shares
from align.training.trainer import Trainer
from tests.benchmarks.parallel import measured
from tests.helpers import FSDP2, errors, launch_together, lines, online, untimed, write

SAMPLER = {"num_inference_steps": 2, "guidance_scale": 2.0}
DPO_PAIRS = {"class_path": "PreferencePairs", "init_args": {"path": "shapes-preferences", "split": "train", "limit": 8}}
THUMBS = {"class_path": "RatedImages", "init_args": {**DPO_PAIRS["init_args"], "pairs": True}}  # type: ignore[dict-item]
ARGUMENTS: dict[str, dict[str, Any]] = {
    "DPO": {"beta": 20.0},
    "KTO": {"beta": 20.0, "balance": True},
    "PolicyGradient": {"sampler": SAMPLER, "images_per_prompt": 2, "clip_range": 0.01, "beta": 0.5},
    "D3PO": {"sampler": SAMPLER, "images_per_prompt": 3},
    "NFT": {"sampler": SAMPLER, "images_per_prompt": 2, "kl_weight": 0.1, "old": "average"},
    "AWM": {"sampler": SAMPLER, "images_per_prompt": 2, "kl_weight": 0.1, "old_weight": 0.1, "old": "average"},
    "DGPO": {"sampler": SAMPLER, "images_per_prompt": 2, "kl_weight": 0.1, "clip_range": 1.0},
    "B2DiffuRL": {
        "update": {
            "class_path": "PolicyGradient",
            "init_args": {
                "sampler": {"num_inference_steps": 3, "guidance_scale": 1.0},
                "images_per_prompt": 3,
                "clip_range": 0.01,
            },
        },
        "first": 2,
        "stages": 4,
        "threshold_best": 0.1,
        "threshold_worst": 0.1,
        "history": 0,
    },
    "OPD": {"sampler": SAMPLER, "images_per_prompt": 2, "anchor": 0.1, "skip_last": False},
}


def config_of(pipeline: Path, folder: Path, name: str, lora: bool) -> dict[str, Any]:
    """A run of three updates, each of all rows of a rollout, since processes shuffle their own. Adam's epsilon is
    large, or a gradient of next to nothing would move a weight as far as any other, to whichever side."""
    config = online(pipeline, folder, name, **ARGUMENTS[name])
    config |= {"max_train_steps": 3, "max_grad_norm": 1e9, "rollout_batch_size": 4, "train_batch_size": 16}
    config["adam_epsilon"] = 1e-3
    if name == "DPO":
        config |= {"data": DPO_PAIRS, "train_batch_size": 4, "rewards": []}
    if name == "KTO":
        config |= {"data": THUMBS, "train_batch_size": 4, "rewards": []}
    if name in ("D3PO", "DGPO", "B2DiffuRL"):  # of some prompts no row, and fewer in one process than in the other
        config |= {"rewards": [{"name": "tests.helpers.Even"}], "train_batch_size": 24}
    if name in ("NFT", "AWM"):
        config |= {"ema_decay": 0.9}
    if name == "OPD":
        teacher = {"class_path": "PipelineTeacher", "init_args": {"path": str(pipeline), "guidance_scale": 3.0}}
        if lora:
            before = config_of(pipeline, folder, "PolicyGradient", True) | {"output_dir": str(folder / "teacher")}
            assert main(["--config", write(before, max_train_steps=1)]) == 0
            teacher = {"class_path": "LoRATeacher", "init_args": {"path": before["output_dir"]}}
        config["objective"]["init_args"]["teachers"] = [teacher]
    return config | ({} if lora else {"lora": None})


def trained(folder: Path) -> dict[str, Tensor]:
    """The weights in a run folder, whatever trained."""
    found = [folder / LORA_FILE, *(folder / name / WEIGHTS_FILE for name in ("unet", "transformer"))]
    (path,) = [path for path in found if path.is_file()]
    return load_file(path)


def require_alike(one: Path, other: Path, steps: int = 3, start: Path | None = None, compared: int = 9) -> None:
    """The weights and the metrics of the first ``compared`` updates of two runs, but for the order of sums. Of all
    weights, which begin at those in ``start``, a few are at the edge of it: they differ by less than a hundredth of
    the way that they have come."""
    alone, together = trained(one), trained(other)
    assert alone.keys() == together.keys()
    if start is not None:
        before = trained(start)
        way = sum(float((alone[name] - before[name]).square().sum()) for name in alone)
        apart = sum(float((alone[name] - together[name]).square().sum()) for name in alone)
        assert way > 0 and (apart / way) ** 0.5 < 0.01
    for name in alone:
        torch.testing.assert_close(alone[name], together[name], atol=1e-4 if start is None else 5e-4, rtol=1e-3)
    assert len(untimed(one)) == len(untimed(other)) == steps
    for a, b in list(zip(untimed(one), untimed(other), strict=True))[:compared]:
        assert a.keys() == b.keys()
        for key in a.keys() - {"ratio_max"}:
            assert a[key] == pytest.approx(b[key], abs=1e-3, rel=2e-3), key


@pytest.mark.parametrize(
    ("kind", "name", "lora"),
    [
        ("epsilon", "PolicyGradient", True),
        pytest.param("flow", "DPO", False, marks=pytest.mark.slow),
        *(
            pytest.param(kind, name, lora, marks=pytest.mark.slow)
            for kind, name, lora in [
                ("flow", "DPO", True),
                ("epsilon", "KTO", True),
                ("epsilon", "PolicyGradient", False),
                ("flow", "D3PO", True),
                ("epsilon", "D3PO", False),
                ("flow", "B2DiffuRL", True),
                ("epsilon", "B2DiffuRL", False),
                ("flow", "NFT", True),
                ("v", "NFT", False),
                ("epsilon", "AWM", True),
                ("flow", "DGPO", True),
                ("v", "DGPO", False),
                ("flow", "OPD", True),
                ("epsilon", "OPD", False),
            ]
        ),
    ],
)
def test_two_processes_that_share_the_weights_are_one(
    tiny_folders: dict[str, Path], tmp_path: Path, kind: str, name: str, lora: bool
) -> None:
    """With a sample grid, which the first process draws alone. A process without rows (D3PO, B2-DiffuRL) passes through
    the network with the other. What is saved is whole, and stock diffusers loads it."""
    config = config_of(tiny_folders[kind], tmp_path, name, lora)
    config |= {"samples": {"prompts": ["a star"], "num_inference_steps": 2, "guidance_scale": 1.0}}
    steps = 2 if (name, lora) == ("PolicyGradient", True) else 3  # two say it all but for who has which rows
    config["max_train_steps"] = steps
    assert main(["--config", write(config, output_dir=str(tmp_path / "one"))]) == 0
    half = config["train_batch_size"] // 2 if name not in ("D3PO", "DGPO", "B2DiffuRL") else config["train_batch_size"]
    changes = {"train_batch_size": half, "gradient_checkpointing": name == "DPO"}
    assert launch_together(["--config", write(config, **changes)], target=measured, **FSDP2) == [0, 0]
    start = None if lora else tiny_folders[kind]
    # B2-DiffuRL divides by how far branches of one trunk differ, which is next to nothing and the last bits of weights
    require_alike(tmp_path / "one", tmp_path / "run", steps, start, 1 if name == "B2DiffuRL" else steps)
    if lora:
        return
    whole = sum(tensor.numel() * tensor.element_size() for tensor in trained(tmp_path / "run").values())
    for rank in range(2):  # also of the reference, where one is kept; layers of odd sizes do not halve
        kept = json.loads((tmp_path / f"bytes-run-{rank}.json").read_text())
        assert kept["reference"] in (0, kept["weights"]) and kept["moments"] == 2 * kept["weights"]
        assert kept["weights"] < 0.6 * whole
    model: Any = SD3Transformer2DModel if kind == "flow" else UNet2DConditionModel
    loaded = model.from_pretrained(tmp_path / "run", subfolder="transformer" if kind == "flow" else "unet")
    assert type(loaded).__name__ == loaded.config["_class_name"] == model.__name__


@pytest.mark.slow
@pytest.mark.parametrize("name", ["D3PO", "NFT"])
def test_an_anchored_reference_is_that_of_all_processes(
    tiny_folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """It takes the place of the weights in all processes for each pass of one, who may ask it alone (D3PO); with layers
    that stay gathered, as in ZeRO-2."""
    config = config_of(tiny_folders["flow"], tmp_path, name, True)
    before = config | {"output_dir": str(tmp_path / "before"), "rewards": [{"name": "tests.helpers.Bright"}]}
    assert main(["--config", write(before, learning_rate=0.1)]) == 0
    config["objective"]["init_args"] = ARGUMENTS[name] | {"reference": "start"}
    if name == "D3PO":
        config["objective"]["init_args"]["reference_batch"] = 3
    config["initial_weights"] = before["output_dir"]
    assert main(["--config", write(config, output_dir=str(tmp_path / "one"))]) == 0
    half = config["train_batch_size"] // (2 if name == "NFT" else 1)
    stay = FSDP2 | {"FSDP_RESHARD_AFTER_FORWARD": "false"}
    assert launch_together(["--config", write(config, train_batch_size=half)], **stay) == [0, 0]
    require_alike(tmp_path / "one", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("lora", [True, False])
def test_a_run_goes_on_with_another_number_of_processes(
    tiny_folders: dict[str, Path], tmp_path: Path, lora: bool
) -> None:
    """Two that share the weights, then one, then two that do not: the run that one process makes. So it does with an
    average of the weights and, of a LoRA, with an anchor; the evaluations count on."""
    config = config_of(tiny_folders["flow"], tmp_path, "PolicyGradient", lora)
    config |= {"ema_decay": 0.9, "checkpointing_steps": 1, "max_train_steps": 4}
    if lora:
        assert main(["--config", write(config, output_dir=str(tmp_path / "before"), max_train_steps=1)]) == 0
        config["objective"]["init_args"]["reference"] = "start"
        config["initial_weights"] = str(tmp_path / "before")
    assert main(["--config", write(config, output_dir=str(tmp_path / "one"))]) == 0
    together, resume = {"train_batch_size": 8}, ["--resume_from_checkpoint", "latest"]
    assert launch_together(["--config", write(config, max_train_steps=2, **together)], **FSDP2) == [0, 0]
    assert main(["--config", write(config, max_train_steps=3), *resume]) == 0
    assert launch_together(["--config", write(config, **together), *resume]) == [0, 0]
    require_alike(tmp_path / "one", tmp_path / "run", 4)
    for name in ("ema-trained", "trained", "optimizer", *(["reference-trained"] if lora else [])):
        file = f"checkpoint-4/{name}.safetensors"
        alone, other = load_file(tmp_path / "one" / file), load_file(tmp_path / "run" / file)
        assert alone.keys() == other.keys()
        for key in alone:
            torch.testing.assert_close(alone[key], other[key], atol=1e-4, rtol=1e-2)
    counts = [[line["evaluations/trained"] for line in lines(tmp_path / name)] for name in ("one", "run")]
    assert counts[0] == counts[1] == [0, 32, 64, 96]


@pytest.mark.slow
def test_a_run_that_shares_the_weights_goes_on_so(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    """One process, then two that share all weights and take their parts of the moments."""
    config = config_of(tiny_folders["epsilon"], tmp_path, "DPO", False)
    config |= {"ema_decay": 0.9, "checkpointing_steps": 1}
    assert main(["--config", write(config, output_dir=str(tmp_path / "one"))]) == 0
    assert main(["--config", write(config, max_train_steps=1)]) == 0
    resume = ["--resume_from_checkpoint", "latest"]
    assert launch_together(["--config", write(config, train_batch_size=2), *resume], **FSDP2) == [0, 0]
    require_alike(tmp_path / "one", tmp_path / "run")


def test_other_rows_of_an_update_are_refused(tiny_folders: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    """As another number of processes makes them, where train_batch_size stays what it was."""
    config = config_of(tiny_folders["epsilon"], tmp_path, "DPO", True) | {"rollout_batch_size": None}
    assert main(["--config", write(config, checkpointing_steps=1, max_train_steps=1)]) == 0
    assert main(["--config", write(config, train_batch_size=2), "--resume_from_checkpoint", "latest"]) == 2
    (error,) = errors(capsys.readouterr().err)
    assert "rows of an update: 2, was 4 (train_batch_size x gradient_accumulation_steps x processes)" in error


@pytest.mark.slow
def test_processes_without_shared_weights_may_draw_unequally(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    """A sample grid is drawn by one of two; SD3's network has a buffer, which DDP would exchange at every pass."""
    config = config_of(tiny_folders["flow"], tmp_path, "PolicyGradient", True)
    config |= {"samples": {"prompts": ["a star", "a circle"], "num_inference_steps": 3}, "train_batch_size": 8}
    assert launch_together(["--config", write(config)]) == [0, 0]


@pytest.mark.parametrize(
    ("environment", "changes", "message"),
    [
        ({"FSDP_VERSION": "1"}, {}, "configured for FSDP 1; this loop shards by FSDP 2: set fsdp_version: 2"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, {}, "fsdp_cpu_ram_efficient_loading leaves text encoders empty"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, {}, "fsdp_offload_params is not supported"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "gradient_checkpointing: true here"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_FSDP": "false"}, {}, "configured for DeepSpeed"),
    ],
)
def test_what_accelerate_is_configured_with_is_heard_or_refused(
    tiny_folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    environment: dict[str, str],
    changes: dict[str, Any],
    message: str,
) -> None:
    for name, value in {**FSDP2, **environment}.items():
        monkeypatch.setenv(name, value)
    config = config_of(tiny_folders["epsilon"], tmp_path, "DPO", True)
    assert main(["--config", write(config, **changes)]) == 2
    (error,) = errors(capsys.readouterr().err)
    assert message in error


# processes that are simulated
@pytest.mark.parametrize("seed", range(5))
def test_eight_processes_with_unequal_work_pass_through_together(seed: int) -> None:
    """Whatever each has to do between two meetings, all see the same passes in the same order, and each its own."""
    world, rounds = 8, 4
    generator = torch.Generator().manual_seed(seed)
    # (rounds, world) lists of passes, 2 x network + gradient; of some processes none
    work = [
        [
            torch.randint(0, 4, (int(torch.randint(0, 5, (), generator=generator)),), generator=generator).tolist()
            for _ in range(world)
        ]
        for _ in range(rounds)
    ]
    places, barrier = [0] * world, threading.Barrier(world)
    seen: list[list[int]] = [[] for _ in range(world)]
    gradients: list[list[float]] = [[] for _ in range(world)]
    parameter = [torch.ones((), requires_grad=True) for _ in range(world)]
    helped = [0] * world

    def process(rank: int) -> None:
        def exchange(mine: int) -> list[int]:
            places[rank] = mine
            barrier.wait()
            told = list(places)
            barrier.wait()
            return told

        def passed(network: int) -> Tensor:
            seen[rank].append(2 * network + torch.is_grad_enabled())
            return parameter[rank] * 1.0

        lockstep = Lockstep([lambda: 0.0 * passed(0), lambda: 0.0 * passed(1)], exchange)
        for each in work:
            loss = torch.zeros(())
            for place in each[rank]:
                with torch.set_grad_enabled(bool(place % 2)):
                    lockstep.forward(place // 2)
                    output = passed(place // 2)
                loss = loss + output
            if any(place % 2 for own in each for place in own):
                lockstep.backward(loss).backward()
            else:
                lockstep.settle()
            gradients[rank].append(float(parameter[rank].grad or 0))
        helped[rank] = lockstep.helped

    threads = [threading.Thread(target=process, args=(rank,), daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert all(passes == seen[0] for passes in seen)
    for rank in range(world):
        own = [place for each in work for place in each[rank]]
        assert len(seen[rank]) == len(own) + helped[rank]
        assert gradients[rank][-1] == sum(place % 2 for place in own)


@pytest.mark.parametrize("world", [1, 2, 8])
@pytest.mark.parametrize("ties", [False, True])
def test_an_update_is_the_mean_over_the_rows_of_all_processes(
    monkeypatch: pytest.MonkeyPatch, world: int, ties: bool
) -> None:
    """Of uneven groups, and with none in some processes, as ties leave them: every row has the same weight in the
    gradient that processes average, and trains once."""
    monkeypatch.setattr("align.training.trainer.merged", lambda *_: {"loss": 0.0})  # of a process without rows
    generator = torch.Generator().manual_seed(world)
    counts = [int(n) for n in torch.randint(0, 40, (world,), generator=generator)]
    counts = [0 if ties and k % 2 else n for k, n in enumerate(counts)]
    counts[0] = max(counts[0], 3)
    firsts = [sum(counts[:k]) for k in range(world)]
    plan, trained = shares(counts, 4, 2, None), torch.zeros(sum(counts))
    for parts in plan:
        sizes = [part.stop - part.start for part in parts]
        gradient = torch.zeros(sum(counts))
        for rank in range(world):
            rows = Rows(image=firsts[rank] + torch.arange(counts[rank])[parts[rank]])
            gradient += _updated(list(rows.chunks(4)), sizes, sum(counts)) / world
        mine = torch.cat([first + torch.arange(n)[part] for first, n, part in zip(firsts, counts, parts, strict=True)])
        expected = torch.zeros(sum(counts))
        expected[mine] = 1 / sum(sizes)
        torch.testing.assert_close(gradient, expected)
        trained += (gradient > 0).float()
    assert (trained == 1).all()


def _updated(chunks: Sequence[Rows], sizes: Sequence[int], count: int) -> Tensor:
    """The gradient of one process in :meth:`Trainer.update`; that of weight k is what row k counts."""
    weights = torch.zeros(count, requires_grad=True)

    def loss(_ctx: Context, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        return weights[rows.image].mean(), {}

    def clip_grad_norm_(parameters: Any, _norm: float) -> Tensor:
        return weights.grad.norm() if weights.grad is not None else torch.zeros(())

    accelerator = SimpleNamespace(
        num_processes=1,
        scaler=None,
        autocast=contextlib.nullcontext,
        no_sync=lambda _model: contextlib.nullcontext(),
        backward=lambda scaled: scaled.backward(),
        clip_grad_norm_=clip_grad_norm_,
    )
    policy = SimpleNamespace(
        sharded=False,
        model=None,
        absent=lambda: 0.0 * weights.sum(),
        joined=lambda scaled: scaled,
        settle=lambda: None,
        after_step=lambda: None,
        parameters=lambda: [weights],
    )
    done = SimpleNamespace(step=lambda: None, zero_grad=lambda **_: None, get_last_lr=lambda: [0.0])
    loop = SimpleNamespace(
        config=SimpleNamespace(train_batch_size=4, max_grad_norm=1.0, objective=SimpleNamespace(loss=loss)),
        accelerator=accelerator,
        policy=policy,
        optimizer=done,
        scheduler=done,
        sizes=SimpleNamespace(group=1),
        folder=SimpleNamespace(latest=lambda: None),
        step=0,
    )
    Trainer.update(loop, SimpleNamespace(checks=[]), chunks, [], sizes)  # type: ignore[arg-type]
    assert weights.grad is not None
    return weights.grad


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(file, id=file.stem, marks=pytest.mark.slow if file.stem in ("multi_node", "zero2") else [])
        for file in sorted((Path(__file__).parents[1] / "configs/accelerate").glob("*.yaml"))
    ],
)
def test_the_configs_of_accelerate_are_read_by_it_and_heard_by_us(
    tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: Path
) -> None:
    """What accelerate's launcher makes of the file is an environment that a run takes."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    assert load_config_from_file(str(file)).num_processes > 1
    arguments, *_ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(file), "--num_processes", "2", "train.py"])
    )
    environment = prepare_multi_gpu_env(arguments)
    shares_weights = environment.get("ACCELERATE_USE_FSDP") == "true"
    assert shares_weights == (file.stem in ("fsdp2", "zero2", "zero3"))
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    if shares_weights:
        assert environment["FSDP_VERSION"] == "2"
        assert environment["FSDP_RESHARD_AFTER_FORWARD"].lower() == str(file.stem != "zero2").lower()
    for name, value in environment.items():
        if name.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.setenv(name, value)
    config = config_of(tiny_folders["epsilon"], tmp_path, "DPO", True) | {"dry_run": True}
    assert main(["--config", write(config)]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("lora", [True, False])
def test_shared_weights_in_half_precision(tiny_folders: dict[str, Path], tmp_path: Path, lora: bool) -> None:
    """float32 adapters beside a bf16 backbone, or float32 weights under autocast; a replay gives what was drawn."""
    config = config_of(tiny_folders["flow"], tmp_path, "PolicyGradient", lora) | {"mixed_precision": "bf16"}
    assert launch_together(["--config", write(config, train_batch_size=8)], **FSDP2) == [0, 0]
    saved = trained(tmp_path / "run")
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in saved.values())
    assert abs(lines(tmp_path / "run")[0]["ratio_max"] - 1) < 0.1
