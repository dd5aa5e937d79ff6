"""The network that says what reward to expect of a distribution of noise: FIND's dynamic reward calibration."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn


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
    def __call__(self, seen: Tensor) -> Tensor:
        """(B,) expected rewards for inputs (B, D)."""
        return self.net(seen).squeeze(1)

    @torch.enable_grad()
    def learn(self, seen: Tensor, reward: Tensor, steps: int) -> None:
        """``steps`` steps towards ``reward`` (B,)."""
        for _ in range(steps):
            loss = (self.net(seen).squeeze(1) - reward).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, flat."""
        found = {f"value.net.{name}": tensor for name, tensor in self.net.state_dict().items()}
        for k, moments in self.optimizer.state_dict()["state"].items():
            found |= {f"value.adam.{k}.{name}": torch.as_tensor(tensor) for name, tensor in moments.items()}
        return found

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
