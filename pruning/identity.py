"""What stands where a part of an SD3 or FLUX block was: modules without parameters.

HierarchicalPrune's identity semantics: an attention or feed-forward gives back the input of its branch, an AdaLN
becomes a plain LayerNorm with gate 1, shift and scale 0. A branch that is gone thus still adds gate * norm(x).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# what diffusers' AdaLNs return: the normed input (x), gates (1), shifts and scales (0)
_RETURNS = {
    "AdaLayerNormContinuous": "x",
    "AdaLayerNormZero": "x1001",
    "AdaLayerNormZeroSingle": "x1",
    "SD35AdaLayerNormZeroX": "x1001x1",
}


class Identity(nn.Module):
    """The place of a part that was removed. ``part`` is false for the second module of a part that had two."""

    part = True


class IdentityFeedForward(Identity):
    """Gives back its input."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


class IdentityOut(IdentityFeedForward):
    """A FLUX single block's output projection, gone with its MLP: what is left to project is attention's output."""

    part = False


class IdentityMLP(Identity):
    """A FLUX single block's MLP: of width 0 beside the attention's output."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states[..., :0]


class IdentityAttention(Identity):
    """Gives back its inputs. Takes a processor as attentions do, because callers set one on every block."""

    def __init__(self) -> None:
        super().__init__()
        self.processor: Any = None

    def set_processor(self, processor: Any) -> None:
        self.processor = processor

    def get_processor(self) -> Any:
        return self.processor

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        return hidden_states if encoder_hidden_states is None else (hidden_states, encoder_hidden_states)


class IdentityNorm(Identity):
    """A LayerNorm without parameters, with the gates, shifts and scales that leave it alone."""

    def __init__(self, norm: nn.Module, returns: str) -> None:
        super().__init__()
        self.norm = norm
        self.returns = returns

    def forward(self, hidden_states: Tensor, emb: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        normed, one = self.norm(hidden_states), hidden_states.new_ones(len(hidden_states), 1)
        what = {"x": normed, "1": one, "0": torch.zeros_like(one)}
        returned = tuple(what[letter] for letter in self.returns)
        return returned if len(returned) > 1 else returned[0]


def stand_in(path: str, module: nn.Module) -> Identity:
    """What takes the place of ``module``, the part of a block that stands at ``path``."""
    attribute = path.rpartition(".")[2]
    if attribute.startswith("norm"):
        return IdentityNorm(module.norm, _RETURNS[type(module).__name__])  # type: ignore[arg-type]
    if attribute.startswith("attn"):
        return IdentityAttention()
    return {"proj_mlp": IdentityMLP, "proj_out": IdentityOut}.get(attribute, IdentityFeedForward)()
