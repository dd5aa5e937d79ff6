"""What an online objective keeps of the images that it sampled: the states around the steps that it trains."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from align.diffusion.process import upload
from align.families import Conditioning


@dataclass(frozen=True)
class Trajectories:
    """N trajectories of which the same K consecutive steps are kept, each state once.

    Attributes:
        latents: (N, K+1, C, h, w), the states before the kept steps and, last, the one after them; (N, 0, C, h, w)
            where no step is kept. On the sampler's ``keep_on``.
        kept_steps: (K,) the sampler's numbers of the kept steps.
        prompt_index: (N,) the row of ``cond`` that belongs to each trajectory.
        cond: the conditions of P prompts.
        log_probs: (N, K) the log-density of the state after each kept step, a mean over the latent; None where no
            objective asked for it.
        means: (N, K, C, h, w) the means of the kept steps' distributions; None where no objective asked for them.
    """

    latents: Tensor
    kept_steps: Tensor
    prompt_index: Tensor
    cond: Conditioning
    log_probs: Tensor | None = None
    means: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompt_index)

    def take(self, index: Tensor) -> Trajectories:
        """The trajectories that ``index`` selects; the conditions of the prompts stay as they are."""
        return replace(
            self,
            latents=self.latents[index.to(self.latents.device)],
            prompt_index=self.prompt_index[index],
            log_probs=None if self.log_probs is None else self.log_probs[index.to(self.log_probs.device)],
            means=None if self.means is None else self.means[index.to(self.means.device)],
        )

    def first_steps(self, count: int) -> Trajectories:
        """The same trajectories with the first ``count`` of the kept steps, or all where there are fewer."""
        return replace(
            self,
            latents=self.latents[:, : count + 1],
            kept_steps=self.kept_steps[:count],
            log_probs=None if self.log_probs is None else self.log_probs[:, :count],
            means=None if self.means is None else self.means[:, :count],
        )

    def cond_of(self, index: Tensor) -> Conditioning:
        """The conditions of the trajectories ``index`` (R,), on the device of ``cond``."""
        device = next(iter(self.cond.tensors.values())).device
        return self.cond.take(upload(self.prompt_index[index], device))

    def log_probs_at(self, index: Tensor, step: Tensor) -> Tensor:
        """(R,) the log-densities of kept steps ``step`` (R,). Raises ValueError where none were kept."""
        values = _kept(self.log_probs, "log_probs")
        return values[upload(index, values.device), upload(step, values.device)]

    def means_at(self, index: Tensor, step: Tensor) -> Tensor:
        """(R, C, h, w) the means of kept steps ``step`` (R,). Raises ValueError where none were kept."""
        values = _kept(self.means, "means")
        return values[upload(index, values.device), upload(step, values.device)]


def _kept(values: Tensor | None, name: str) -> Tensor:
    if values is None:
        raise ValueError(f"these trajectories were collected without {name}")
    return values
