"""The network that says what reward to expect of a distribution of noise: FIND's dynamic reward calibration."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from align.families import Conditioning
from align.objectives.noise_memory import NoiseSamples
from align.policy.initial_noise import InitialNoise


class ValueNet:
    """g(mean, std, text) -> expected reward: ReLU layers of 256, 256, 256, trained by squared error with AdamW (Chen et
    al. 2024; their code's learning rate is 1e-4)."""

    def __init__(self, inputs: int, learning_rate: float, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            sizes = [inputs, 256, 256, 256]
            hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
            self.net = nn.Sequential(*hidden, nn.Linear(256, 1))
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=learning_rate)

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Tensor:
        """(B,) expected rewards for inputs (B, D)."""
        return self.net(inputs).squeeze(1)

    @torch.enable_grad()
    def learn(self, inputs: Tensor, reward: Tensor, steps: int) -> None:
        """``steps`` steps towards ``reward`` (B,)."""
        for _ in range(steps):
            loss = (self.net(inputs).squeeze(1) - reward).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, flat."""
        flat = {f"value.net.{name}": tensor for name, tensor in self.net.state_dict().items()}
        for k, moments in self.optimizer.state_dict()["state"].items():
            flat |= {f"value.adam.{k}.{name}": torch.as_tensor(tensor) for name, tensor in moments.items()}
        return flat

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`state` gave."""
        net = {k.removeprefix("value.net."): v for k, v in state.items() if k.startswith("value.net.")}
        self.net.load_state_dict(net)
        moments: dict[int, dict[str, Tensor]] = {}
        for key, tensor in state.items():
            if key.startswith("value.adam."):
                k, name = key.removeprefix("value.adam.").split(".")
                moments.setdefault(int(k), {})[name] = tensor
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})


class RewardForecast:
    """What reward a prompt's distribution of noise is expected to give: a :class:`ValueNet` that is built when first
    asked, since the size of its input is that of the model's latents and conditions."""

    def __init__(self, learning_rate: float, steps: int) -> None:
        if learning_rate <= 0 or steps < 1:
            raise ValueError("value_learning_rate must be positive, and value_steps at least 1")
        self.learning_rate, self.steps = learning_rate, steps
        self.network: ValueNet | None = None
        self._restored: Mapping[str, Tensor] | None = None

    def __call__(self, noise: InitialNoise, samples: NoiseSamples, rollout: int, seed: int) -> Tensor:
        """(R,) the expected reward of the prompts of ``samples``, before the network learns from those that were drawn
        in ``rollout``."""
        prompts, row = samples.index.unique(return_inverse=True)
        mean, log_std = noise.detached(prompts)
        inputs = torch.cat([mean.flatten(1), log_std.exp().flatten(1), samples.texts(row, len(prompts))], 1)
        fresh = samples.rollout == rollout
        if self.network is None:
            self.network = ValueNet(inputs.shape[1], self.learning_rate, seed)
            if self._restored is not None:
                self.network.load_state(self._restored)
        expected = self.network(inputs)[row]
        self.network.learn(inputs[row[fresh]], samples.reward[fresh], self.steps)
        return expected

    def state(self) -> dict[str, Tensor]:
        return self.network.state() if self.network is not None else {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._restored = {k: v for k, v in state.items() if k.startswith("value.")} or None


def pooled(cond: Conditioning) -> Tensor:
    """(B, D) one vector a prompt, whatever the family's conditions are: means over its tokens, joined."""
    parts = {name: tensor.float().cpu() for name, tensor in cond.tensors.items()}
    mask = parts.pop("mask", None)
    return torch.cat([v if v.ndim < 3 else _mean(v, mask) for v in parts.values()], 1)


def _mean(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """(B, D) the mean of tokens (B, L, D), or (B, .., D), where ``mask`` (B, L) lets them count."""
    if mask is None:
        return tokens.flatten(1, -2).mean(1)
    return (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
