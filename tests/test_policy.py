"""Current, reference and averaged weights. That saved ones draw the same images in stock diffusers, and that the
reference is exact, is checked of every family by :mod:`align.testing` (test_families.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from align import families
from align.common.errors import UserError
from align.families import LORA_FILE
from align.policy.policy import LoRA, Policy
from align.sampling.loop import initial_noise
from tests.pipelines import Build

PROMPTS = ["two red stars", "a star"]


def say(policy: Policy) -> Tensor:
    x, t = initial_noise((4, 8, 8), [1, 2]), torch.tensor([700.0, 20.0])
    return policy.predict(x, t, policy.family.encode(PROMPTS)).raw


def disturb(policy: Policy, scale: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(3)
    for parameter in policy.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("lora", [LoRA(2), None])
def test_reference_leaves_gradients_as_they_were(tiny: Build, lora: LoRA | None) -> None:
    """PEFT freezes adapters when it switches them off; a switch between forward and backward must not show."""
    policy = Policy(tiny("epsilon"), lora)
    disturb(policy)
    names = [name for name, p in policy.denoiser.named_parameters() if p.requires_grad]
    say(policy).square().mean().backward()
    plain = [p.grad.clone() for p in policy.parameters() if p.grad is not None]
    for parameter in policy.parameters():
        parameter.grad = None
    loss = say(policy).square().mean()
    with pytest.raises(ZeroDivisionError), policy.reference(), torch.no_grad():
        say(policy)
        raise ZeroDivisionError
    loss.backward()
    switched = [p.grad for p in policy.parameters() if p.grad is not None]
    assert names == [name for name, p in policy.denoiser.named_parameters() if p.requires_grad]
    assert len(plain) == len(switched) > 0
    assert all(torch.equal(a, b) for a, b in zip(plain, switched, strict=True))


def test_lora_trains_only_adapters(tiny: Build) -> None:
    policy = Policy(tiny("flow"), LoRA(2, targets=["attn.to_q"]))
    trained = [name for name, p in policy.denoiser.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name and "attn.to_q" in name for name in trained)
    for part in (policy.family.pipe.vae, policy.family.pipe.text_encoder):
        assert not any(p.requires_grad for p in part.parameters())


def test_average_of_weights(tiny: Build) -> None:
    policy = Policy(tiny("epsilon"), LoRA(2), ema_decay=0.5)
    before = [p.clone() for p in policy.parameters()]
    disturb(policy)
    policy.after_step()
    current = [p.clone() for p in policy.parameters()]
    assert policy.ema is not None
    decay = policy.ema.cur_decay_value
    with policy.ema_scope():
        for old, new, now in zip(before, current, policy.parameters(), strict=True):
            torch.testing.assert_close(now.detach(), decay * old + (1 - decay) * new)
    assert all(torch.equal(a, b) for a, b in zip(current, policy.parameters(), strict=True))


def test_state_round_trip_and_mismatch(tiny: Build) -> None:
    policy, other = Policy(tiny("epsilon"), LoRA(2)), Policy(tiny("epsilon"), LoRA(2))
    disturb(policy)
    other.load_state(policy.state())
    assert torch.equal(say(policy), say(other))
    with pytest.raises(ValueError, match="another rank, target list or model"):
        Policy(tiny("epsilon"), LoRA(2, targets=["to_q"])).load_state(policy.state())


@pytest.mark.parametrize("kind", ["epsilon", pytest.param("flow", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("anchored", "lora"),
    [
        *((True, LoRA(2, alpha=3.0)), (False, None)),
        *(pytest.param(*both, marks=pytest.mark.slow) for both in ((True, None), (False, LoRA(2, alpha=3.0)))),
    ],
)
def test_a_run_starts_from_the_weights_of_another(
    tiny: Build, tmp_path: Path, kind: str, lora: LoRA | None, anchored: bool
) -> None:
    """``anchored``: the reference is what the run starts from; else it is the pipeline without it."""
    with torch.no_grad():
        base = say(Policy(tiny(kind), None, reference=False))
        first = Policy(tiny(kind), lora)
        disturb(first)
        first.save(tmp_path)
        start = say(first)
        policy = Policy(tiny(kind), lora, initial=tmp_path, anchored=anchored)
        assert torch.equal(say(policy), start)
        disturb(policy)
        changed = say(policy)
        assert not torch.allclose(changed, start)
        for _ in range(2):
            with policy.reference():
                assert torch.equal(say(policy), start if anchored else base)
            assert torch.equal(say(policy), changed)


def test_copies_of_weights_that_autocast_made_without_a_gradient_are_made_anew(
    tiny: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch before 2.11 goes on with them, and what was asked about without a gradient has none then."""
    policy, cleared = Policy(tiny("flow"), LoRA(2)), []
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: cleared.append(True))
    for trains, times in ((False, 0), (True, 1), (True, 1), (False, 1), (True, 2)):
        with torch.set_grad_enabled(trains):
            say(policy)
        assert len(cleared) == times
    with torch.no_grad(), policy.reference():  # whose adapters are off: no copy of what trains
        say(policy)
    say(policy)
    assert len(cleared) == 2


@pytest.mark.parametrize("kind", ["epsilon", pytest.param("flow", marks=pytest.mark.slow)])
def test_autocast_never_answers_with_weights_that_were_exchanged(tiny: Build, tmp_path: Path, kind: str) -> None:
    """Autocast keeps the half-precision copy of a weight for as long as it lasts, whatever the weight becomes."""
    first = Policy(tiny(kind), LoRA(2))
    disturb(first)
    first.save(tmp_path)
    policy = Policy(tiny(kind), LoRA(2), initial=tmp_path, anchored=True, ema_decay=0.5)
    for _ in range(2):  # the first average is of where the first step ended
        disturb(policy)
        policy.after_step()
    disturb(policy)

    def answers(together: bool) -> list[Tensor]:
        """Of the weights in force, the reference and the average: in one autocast, or in one each."""
        found = []
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=together):
            with torch.enable_grad():
                found.append(say(policy).detach())
            for other in (policy.reference, policy.ema_scope):
                with other(), torch.enable_grad():
                    found.append(say(policy).detach())
            with torch.enable_grad():
                found.append(say(policy).detach())
        return found

    apart, together = answers(False), answers(True)
    assert len({tuple(answer.flatten().tolist()) for answer in apart}) == 3
    assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))


def test_weights_that_do_not_fit_are_refused(tiny: Build, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected the folder of a LoRA run"):
        Policy(tiny("epsilon"), LoRA(2), initial=tmp_path)
    Policy(tiny("epsilon"), LoRA(2)).save(tmp_path)
    with pytest.raises(UserError, match=r"does not fit rank 3 .*set lora\.rank"):
        Policy(tiny("epsilon"), LoRA(3), initial=tmp_path)
    with pytest.raises(UserError, match="does not fit rank 2"):
        Policy(tiny("epsilon"), LoRA(2, targets=["to_q"]), initial=tmp_path)


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_a_saved_lora_says_its_rank_and_alpha(tiny: Build, tmp_path: Path, kind: str) -> None:
    """As diffusers' own scripts write them."""
    policy = Policy(tiny(kind), LoRA(3, alpha=6.0))
    policy.save(tmp_path)
    name = policy.family.denoiser_name
    with safe_open(tmp_path / LORA_FILE, "pt") as file:
        metadata = file.metadata()["lora_adapter_metadata"]
        assert all(key.startswith(f"{name}.") for key in file.keys())  # noqa: SIM118
    assert f'"{name}.r": 3' in metadata
    assert f'"{name}.lora_alpha": 6.0' in metadata


def test_nothing_tuned_is_said(tiny: Build, tmp_path: Path) -> None:
    with pytest.raises(families.Unsupported, match="nothing tuned in"):
        families.tuned(tiny("epsilon"), str(tmp_path))


def test_the_reference_gives_frozen_layers_no_gradient(tiny: Build) -> None:
    """Learning rates scaled to 0 freeze layers; asking the reference must leave them so."""
    policy = Policy(tiny("flow"), LoRA(2))
    policy.set_lr_scales(lambda name: float(".1." in name))
    trained = len(policy.parameters())
    cond = policy.family.encode(["a star"])
    with torch.no_grad(), policy.reference():
        policy.predict(torch.zeros(1, 4, 8, 8), torch.tensor([500.0]), cond)
    assert 0 < trained == len(policy.parameters()) < 2 * len(policy.weights.layers)


def test_an_anchored_reference_is_where_the_run_began_also_beside_frozen_layers(tiny: Build, tmp_path: Path) -> None:
    """The reference's values have the places of the parameters that train, and freezing some moves the others'."""
    first = Policy(tiny("flow"), LoRA(2))
    disturb(first)
    first.save(tmp_path)
    policy = Policy(tiny("flow"), LoRA(2), initial=tmp_path, anchored=True)
    with torch.no_grad():
        began = say(policy)
        policy.set_lr_scales(lambda name: float(".1." in name))
        disturb(policy)
        trained = say(policy)
        with policy.reference():
            assert torch.equal(say(policy), began)
        assert torch.equal(say(policy), trained) and not torch.allclose(trained, began)
        policy.move_reference()
        with policy.reference():
            assert torch.equal(say(policy), trained)


def test_initial_weights_may_lie_in_shards(tiny: Build, tmp_path: Path) -> None:
    trained = tiny("flow").denoiser
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.01)
    trained.save_pretrained(tmp_path / "transformer", max_shard_size="50KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    policy = Policy(tiny("flow"), None, initial=tmp_path)
    kept, given = policy.denoiser.state_dict(), trained.state_dict()
    assert kept.keys() == given.keys() and all(torch.equal(kept[name], given[name]) for name in given)
