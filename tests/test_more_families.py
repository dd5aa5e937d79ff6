"""Every family beside Stable Diffusion 1 and 3 holds what :mod:`align.testing` asks, on tiny pipelines."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from diffusers import Flux2KleinPipeline
from torch import Tensor

from align.families import Family
from align.testing import CHECKS, FamilyCase
from tests import tiny_families

# of every kind of guidance, text and autoencoder; the others, and what takes long, are slow
FAST = ("sdxl", "flux-dev", "qwen-image", "z-image", "sana")
QUICK = ("check_sampling", "check_rows", "check_cache_keys", "check_replay")


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
        pytest.param(name, check, marks=[] if name in FAST and check.__name__ in QUICK else pytest.mark.slow)
        for name in tiny_families.BUILD
        for check in CHECKS
    ]


@pytest.mark.parametrize(("name", "check"), cases())
def test_a_family_holds(name: str, check: Callable[[FamilyCase], None], case: Callable[[str], FamilyCase]) -> None:
    check(case(name))
