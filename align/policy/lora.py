"""The settings of LoRA, in a file of their own: reading them imports nothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters on the denoiser. ``alpha`` defaults to ``rank``, ``targets`` to the family's attention."""

    rank: int = 8
    alpha: float | None = None
    targets: list[str] | None = None

    def __post_init__(self) -> None:
        if self.targets == []:
            raise ValueError(
                "lora: targets is empty, which trains nothing; leave it out for the family's attention layers"
            )
        if self.rank < 1 or (self.alpha is not None and self.alpha <= 0):
            raise ValueError(f"lora: rank must be at least 1 and alpha positive, got {self.rank} and {self.alpha}")
