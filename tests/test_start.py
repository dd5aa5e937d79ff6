"""What the first step of a training run costs before it, and what it must not import; and compiled blocks."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from align.common import bitsandbytes_shim, imports
from align.common.errors import UserError
from align.data.preferences import PairBatch
from align.objectives import DPO, Context
from align.policy.compiled import compile_blocks
from align.policy.policy import LoRA, Policy

if TYPE_CHECKING:
    from tests.pipelines import Build

ROOT = Path(__file__).parents[1]
TO_THE_FIRST_STEP = """
import gc, json, resource, sys
from torch.optim.optimizer import register_optimizer_step_post_hook

class Enough(BaseException):
    pass

def first(*_):
    raise Enough

register_optimizer_step_post_hook(first)
from align.train import main
try:
    main()
except Enough:
    used = resource.getrusage(resource.RUSAGE_SELF)
    found = {"seconds": used.ru_utime + used.ru_stime, "modules": sorted(sys.modules)}
    print(json.dumps(found | {"frozen": gc.get_freeze_count(), "collects": gc.isenabled()}))
"""
# pandas comes with pyarrow where a data set's index is made, the first time alone
NEEDLESS = ("torch._inductor.compile_fx", "datasets", "pruning.loading", "matplotlib", "pyarrow.dataset")


@pytest.mark.slow
def test_training_reaches_its_first_step_soon_and_imports_nothing_needless(tmp_path: Path) -> None:
    """6 to 7 s of CPU where we measured, with the caption and image encoders' work of eight pairs in it."""
    words = [
        *("--data", "PreferencePairs", "--data.path", "shapes-preferences", "--data.split", "heldout"),
        *("--data.limit", "8", "--data.cache_dir", str(tmp_path / "cache"), "--objective", "DPO"),
        *("--output_dir", str(tmp_path / "run"), "--checkpointing_steps", "0"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", TO_THE_FIRST_STEP, *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert sorted(set(NEEDLESS) & set(found["modules"])) == []
    assert found["seconds"] < 25
    assert found["frozen"] > 100_000 and found["collects"]


def test_imports_are_not_collected_in_a_commands_own_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook's garbage, models among it, is never kept; nor is a command's once it may have models."""
    monkeypatch.setattr(imports, "_young", False)
    before = gc.get_freeze_count()
    with imports.uncollected():
        assert gc.isenabled()
    assert gc.get_freeze_count() == before
    imports.own_process()
    kept: list[list[object]] = []
    try:
        for last in (False, True):
            frozen = gc.get_freeze_count()
            with pytest.raises(ImportError), imports.uncollected(last):
                assert not gc.isenabled()
                kept += [[] for _ in range(1000)]
                raise ImportError
            assert gc.isenabled() and gc.get_freeze_count() >= frozen + 1000
        with imports.uncollected():
            assert gc.isenabled()
    finally:
        gc.unfreeze()


def test_bitsandbytes_is_compiled_when_it_is_called() -> None:
    calls: list[str] = []

    def compiler(function: object, **options: object) -> object:
        calls.append("compiled")
        return function

    later = bitsandbytes_shim._when_called(compiler, lambda x: x + 1, dynamic=True)
    assert not calls
    assert [later(1), later(2)] == [2, 3] and calls == ["compiled"]
    before = torch.compile
    bitsandbytes_shim.ensure()
    assert torch.compile is before


def test_the_repeated_blocks_are_those_that_compile(tiny: Build) -> None:
    policy = Policy(tiny("flow"), LoRA(rank=2), compiled=True)
    compiled = [type(m).__name__ for m in policy.denoiser.modules() if m._compiled_call_impl is not None]
    assert compiled == ["JointTransformerBlock"] * len(policy.denoiser.transformer_blocks)
    with pytest.raises(UserError, match="no blocks that a Linear repeats"):
        compile_blocks(nn.Linear(2, 2))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_compiled_blocks_say_what_they_say_otherwise(tiny: Build, kind: str) -> None:
    losses, gradients = [], []
    for compiled in (False, True):
        policy = Policy(tiny(kind), LoRA(rank=2), compiled=compiled)
        torch.manual_seed(0)
        for parameter in policy.parameters():
            nn.init.normal_(parameter, std=0.1)
        ctx, objective = Context(policy, 0, 0, range(2)), DPO(beta=100.0)
        latents = torch.randn(2, 2, *policy.family.latent_shape(), generator=torch.Generator().manual_seed(1))
        batch = PairBatch(latents, policy.family.encode(["a", "b"]), ["a", "b"], [0, 1])
        loss, _ = objective.loss(ctx, objective.rollout(ctx, batch))
        loss.backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)
