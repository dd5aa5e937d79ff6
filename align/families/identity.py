"""What cached latents and embeddings depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from align.families.parts import tokenizers

if TYPE_CHECKING:
    from align.families.family import Family


def identity(family: Family) -> Mapping[str, Mapping[str, object]]:
    """:meth:`Family.identity`: of ``pictures`` the VAE, of ``captions`` all but it and the denoiser."""
    parts = {name: part for name, part in family.pipe.components.items() if name != family.denoiser_name}
    weights = {name: _fingerprint(part) for name, part in parts.items() if isinstance(part, nn.Module)}
    kind, vae = {"family": type(family).__name__}, weights.pop("vae")
    return {
        "pictures": kind | {"vae": vae, "scaling": _scaling(family)},
        "captions": kind | {"weights": weights, "tokenizers": _words(family)},
    }


def _scaling(family: Family) -> list[object]:
    return [part.tolist() if isinstance(part, Tensor) else part for part in family.statistics()]


def _words(family: Family) -> dict[str, object]:
    parts = family.pipe.components
    return {
        name: [part.model_max_length, _digest(sorted(part.get_vocab().items())), parts[name].chat_template]
        for name, part in tokenizers(family.pipe).items()
    }


def meaning(family: Family) -> dict[str, object]:
    """What makes the states and predictions of two models the same things: equal entries. The VAE's weights are none of
    them, of which fine-tuned ones share a latent space."""
    statistics = [torch.as_tensor(part).flatten() for part in family.statistics()]
    alpha, sigma = family.path(torch.tensor([100.0, 500.0, 900.0]))
    return {
        "prediction": family.prediction_type,
        "latents": family.latent_shape(),
        "autoencoder": type(family.pipe.vae).__name__,
        "latent statistics": [[round(x, 4) for x in part.tolist()] for part in statistics],
        "noise levels": [round(x, 3) for x in torch.cat([alpha, sigma]).tolist()],
    }


def draws(family: Family) -> dict[str, object]:
    """What tells the pictures that a pipeline draws from another's, by its parts: the weights of its networks, LoRA
    among them, the settings of its scheduler, its tokenizers, and how latents are scaled."""
    return {name: _fingerprint(network) for name, network in _networks(family).items()} | _beside(family)


def contents_of_model(family: Family) -> dict[str, str]:
    """:func:`draws`, in a word for each part: what a run's checkpoints belong to. What is in 4 bit is left out: another
    device packs it otherwise, in the last bits."""
    networks = {name: network for name, network in _networks(family).items() if not _is_packed(network)}
    parts = {name: _fingerprint(network) for name, network in networks.items()} | _beside(family)
    return {name: _digest(part)[:16] for name, part in parts.items()}


def _beside(family: Family) -> dict[str, object]:
    """What a picture depends on beside the networks."""
    scheduler = family.pipe.scheduler
    default = scheduler.config.get("_use_default_values", ())  # of which other versions of diffusers have others
    said = {k: v for k, v in scheduler.config.items() if not k.startswith("_") and k not in default}
    settings = {"scheduler": [type(scheduler).__name__, sorted(said.items())], "scaling": _scaling(family)}
    return {**settings, **_words(family)}


def _networks(family: Family) -> dict[str, nn.Module]:
    return {name: part for name, part in family.pipe.components.items() if isinstance(part, nn.Module)}


def _is_packed(module: nn.Module) -> bool:
    return any(tensor.dtype == torch.uint8 for tensor in module.state_dict().values())


def _digest(value: object) -> str:
    return hashlib.sha256(str(value).encode()).hexdigest()


def _fingerprint(module: nn.Module) -> list[object]:
    """Class, size, and a digest of about 1,024 numbers of each parameter and buffer, evenly spaced: training changes
    them, while in a sum it cancels out."""
    tensors = list(module.state_dict().values())
    sampled = [tensor.detach().flatten()[:: max(1, tensor.numel() // 1024)].float().cpu() for tensor in tensors]
    digest = hashlib.sha256(torch.cat(sampled).numpy().tobytes()).hexdigest()
    return [type(module).__name__, sum(tensor.numel() for tensor in tensors), digest]
