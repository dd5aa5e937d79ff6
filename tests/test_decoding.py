"""Latents that do not fit through the autoencoder at once are decoded in parts, to the same pixels."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from align import families
from align.families import Family
from align.sampling.generate import sample_images
from tests.pipelines import Build


class Small:
    """A memory that holds ``room`` latents of ``family`` through its autoencoder; ``asked`` are the sizes of calls."""

    def __init__(self, family: Family, room: int, error: Exception) -> None:
        self.decode, self.room, self.error = family.decode_pixels, room, error
        self.asked: list[int] = []
        family.decode_pixels = self  # type: ignore[method-assign]

    def __call__(self, z: Tensor) -> Tensor:
        self.asked.append(len(z))
        if len(z) > self.room:
            raise self.error
        return self.decode(z)


NO_ROOM = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize("error", [NO_ROOM, RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")])
@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_parts_that_fit_give_the_same_bits(
    tiny: Build, kind: str, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    family = tiny(kind)
    x0 = torch.randn(11, *family.latent_shape(), generator=torch.Generator().manual_seed(0))
    whole = family.to_image(x0)
    assert family.decode_batch_size is None
    memory = Small(family, 3, error)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(family.to_image(x0), whole)
    assert memory.asked == [11, 6, 3, 3, 3, 2] and family.decode_batch_size == 3
    assert [record.getMessage().split()[0] for record in caplog.records] == ["11", "6"]
    memory.asked.clear()
    assert torch.equal(family.to_image(x0[:4]), whole[:4]) and memory.asked == [2, 2], "what is known is kept to"
    memory.room = 1
    assert torch.allclose(family.to_image(x0[:4]), whole[:4], atol=1e-5, rtol=0)
    assert memory.asked[2:] == [2, 1, 1, 1, 1]


def test_what_was_decoded_is_not_decoded_again(tiny: Build) -> None:
    family = tiny("flow")
    x0 = torch.randn(8, *family.latent_shape(), generator=torch.Generator().manual_seed(0))
    whole = family.to_image(x0)
    family.decode_batch_size = 4  # a user's own
    memory = Small(family, 4, NO_ROOM)
    decode = memory.decode

    def fuller(z: Tensor) -> Tensor:
        memory.room = 2  # from the second part on
        return decode(z)

    memory.decode = fuller
    assert torch.equal(family.to_image(x0), whole)
    assert memory.asked == [4, 4, 2, 2]


def test_one_that_does_not_fit_other_errors_and_gradients_are_left_alone(tiny: Build) -> None:
    family = tiny("flow")
    x0 = torch.randn(4, *family.latent_shape(), generator=torch.Generator().manual_seed(0))
    memory = Small(family, 0, NO_ROOM)
    with pytest.raises(torch.OutOfMemoryError):
        family.to_image(x0)
    assert memory.asked == [4, 2, 1]
    memory.error = RuntimeError("shapes do not match")
    family.decode_batch_size = None
    with pytest.raises(RuntimeError, match="do not match"):
        family.to_image(x0)
    memory.error, family.decode_batch_size = NO_ROOM, None
    memory.asked.clear()
    with pytest.raises(torch.OutOfMemoryError):
        family.to_image(x0.requires_grad_())
    assert memory.asked == [4]


def test_the_shipped_pipeline_draws_the_same_pictures_in_parts() -> None:
    family = families.load("shapes-sd")
    prompts = ["two red stars", "a blue square", "a star", "a circle", "three green squares", "a ring"]
    whole = sample_images(family.predict, family, prompts, range(6), 2)
    memory = Small(family, 2, NO_ROOM)
    assert torch.equal(sample_images(family.predict, family, prompts, range(6), 2), whole)
    assert memory.asked == [6, 3, 2, 2, 2]
