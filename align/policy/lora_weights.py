"""LoRA as what trains: adapters on the frozen denoiser."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import layer as lora_layers
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from align.common.errors import UserError
from align.families import LORA_FILE, Family, LoRAFile, read_lora
from align.policy.lora import LoRA
from align.policy.sharding import Sharding, exchange, part, whole
from align.policy.weights import Weights
from rewards.common.files import atomic


class PlainLinear(lora_layers.Linear):
    """peft's linear layer with LoRA, less what its general case costs one plain adapter: a product by a scale of 1, and
    its gradient. The same bits."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = self.active_adapters
        if args or kwargs or self.merged or self.lora_variant or len(active) > 1:
            return super().forward(x, *args, **kwargs)
        result: Tensor = self.base_layer(x)
        if self.disable_adapters or not active or active[0] not in self.lora_A:
            return result
        name, dtype = active[0], result.dtype
        down, up, scale = self.lora_A[name], self.lora_B[name], self.scaling[name]
        added = up(down(self.lora_dropout[name](self._cast_input_dtype(x, down.weight.dtype))))
        return (result + (added if scale == 1 else added * scale)).to(dtype)


class LoRAWeights(Weights):
    """Adapters on the frozen denoiser: the reference is the same network with the adapters off, or with those that it
    began with (``anchored``, :attr:`ref_params`); no second model either way."""

    kind = "LoRA"

    def __init__(self, family: Family, lora: LoRA, initial: Path | None, anchored: bool, reference: bool) -> None:
        super().__init__(family, family.denoiser)
        self.denoiser, self.lora = family.denoiser, lora
        if not family.lora_targets:
            kind = type(self.denoiser).__name__
            raise UserError(f"diffusers has no LoRA for a {kind}; set lora: null, which trains every weight")
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha if lora.alpha is not None else lora.rank,
            target_modules=lora.targets or list(family.lora_targets),
            init_lora_weights="gaussian",
        )
        widest = max(getattr(module, "in_features", 0) for module in self.denoiser.modules())
        if lora.rank > widest:
            raise UserError(f"lora.rank: {lora.rank} is more than the width of any layer of this model, {widest}")
        try:
            self.denoiser.add_adapter(config)
        except ValueError as error:  # peft's for targets that fit nothing
            known = ", ".join(family.lora_targets)
            said = " ".join(str(error).split())[:300]  # peft prints the whole layer
            raise UserError(f"lora.targets: {said} The family's own are {known}") from error
        names = [name for name, module in self.denoiser.named_modules() if isinstance(module, BaseTunerLayer)]
        fitting = {target for target in lora.targets or () for name in names if f".{name}".endswith(f".{target}")}
        if missed := [target for target in lora.targets or () if target not in fitting]:
            known = ", ".join(family.lora_targets)
            raise UserError(
                f"lora.targets: no layer is called {', '.join(map(repr, missed))}; the family's own are {known}"
            )
        self.layers = self._layers()
        for layer in self.layers:
            if type(layer) is lora_layers.Linear:
                layer.__class__ = PlainLinear
        self.upcast()
        if initial is not None:
            self._take(initial)
            if anchored and reference:
                self.ref_params = [p.detach().clone() for p in self.parameters()]

    def _layers(self) -> list[BaseTunerLayer]:
        return [module for module in self.denoiser.modules() if isinstance(module, BaseTunerLayer)]

    @torch.no_grad()
    def _take(self, source: Path) -> None:
        """Put in the LoRA at ``source``, whose strength stays what it was: where its alpha / r is another, B makes up
        for it. Raises :class:`UserError`."""
        file = self._denoisers(source, "initial_weights")
        layers = file.of(self.family.denoiser_name)
        names = {name: m for name, m in self.denoiser.named_modules() if isinstance(m, BaseTunerLayer)}
        ranks = sorted({len(layer.A) for layer in layers.values()})
        if layers.keys() != names.keys() or ranks != [self.lora.rank]:
            common = len(layers.keys() & names.keys())
            raise UserError(
                f"initial_weights: the LoRA in {file.path} does not fit rank {self.lora.rank} on {len(names)} layers: "
                f"it has rank {', '.join(map(str, ranks))} on {len(layers)}, {common} of them the same; set lora.rank "
                "and lora.targets as they were in that run"
            )
        for name, module in names.items():
            layer = layers[name]
            module.lora_A["default"].weight.copy_(layer.A)
            module.lora_B["default"].weight.copy_(layer.B * (layer.scale / module.scaling["default"]))

    def _denoisers(self, source: Path, setting: str) -> LoRAFile:
        """The LoRA at ``source``, all of whose layers are the denoiser's. Raises :class:`UserError`."""
        file = read_lora(source, self.family.pipe, self.family.denoiser_name)
        others = len(file.layers) - len(file.of(self.family.denoiser_name))
        if others:
            raise UserError(
                f"{setting}: {others} of the {len(file.layers)} layers in {file.path} are of text encoders, which stay "
                "as they are here; merge that LoRA into the pipeline first (as a teacher: give a PipelineTeacher)"
            )
        return file

    @contextmanager
    def reference(self) -> Iterator[nn.Module]:
        anchored = self.ref_params is not None
        try:
            self.swap() if anchored else self._switch(False)
            yield self.denoiser
        finally:
            self.swap() if anchored else self._switch(True)

    def shard(self, sharding: Sharding) -> None:
        super().shard(sharding)
        if self.ref_params is not None:
            self.ref_params = [part(r, p) for r, p in zip(self.ref_params, self.parameters(), strict=True)]

    def swap(self) -> None:
        """Without a copy where each process has them whole."""
        assert self.ref_params is not None
        self.let_go()
        for k, parameter in enumerate(self.parameters()):
            if self.sharded:  # what is gathered is the memory of a part, whatever tensor names it
                exchange(parameter, self.ref_params[k])
                continue
            parameter.data, self.ref_params[k] = self.ref_params[k], parameter.data
        torch.clear_autocast_cache()  # it would answer with the half-precision copies of the weights that were there

    def _switch(self, on: bool) -> None:
        # not enable_adapters(), which freezes adapters when it turns them off and unfreezes all when it turns them on,
        # also what lr_scale froze, and takes a hundredth of a small model's step for it
        for layer in self.layers:
            layer._disable_adapters = not on

    def add_adapter(self, name: str, folder: Path) -> None:
        """Load the LoRA in ``folder`` beside the one that trains: frozen, silent but within :meth:`adapter`."""
        trained = {id(p) for p in self.parameters()}
        layers = self._denoisers(folder, name).state_dict()
        self.denoiser.load_lora_adapter(layers, prefix=self.family.denoiser_name, adapter_name=name)
        self.layers = self._layers()
        for layer in self.layers:
            layer.set_adapter("default")
        for parameter in self.denoiser.parameters():
            parameter.requires_grad_(id(parameter) in trained)

    @contextmanager
    def adapter(self, name: str) -> Iterator[nn.Module]:
        """Within, the network that is given says what the adapter ``name`` alone says."""
        flags = [(p, p.requires_grad) for p in self.denoiser.parameters()]
        try:
            for layer in self.layers:
                layer.set_adapter(name)
            for parameter, flag in flags:  # peft unfreezes what it turns on
                parameter.requires_grad_(flag)
            yield self.denoiser
        finally:
            for layer in self.layers:
                layer.set_adapter("default")
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    @torch.no_grad()
    def average_adapters(self, names: Sequence[str]) -> None:
        """Start the LoRA that trains at the mean of the adapters ``names``: of their products scale · B · A, not of
        their factors, cut to its rank by the largest singular values. Flow-OPD's cold start (arXiv 2605.08063), whose
        code averages the factors, which is the mean of the products only where the teachers share one factor.

        Exact where the rank is at least the sum of theirs.
        """
        for layer in self.layers:
            present = [name for name in names if name in layer.lora_A]
            if not present:
                continue
            if "default" not in layer.lora_A:
                raise UserError(
                    "cold_start: a teacher has LoRA on layers that the student lacks; give both one lora.targets"
                )
            if any(layer.lora_A[n].weight.ndim != 2 for n in present):
                raise UserError("cold_start knows linear layers only; leave convolutions out of lora.targets")
            factors = [
                (layer.scaling[n], layer.lora_A[n].weight.float(), layer.lora_B[n].weight.float()) for n in present
            ]
            mean = torch.stack([scale * b @ a for scale, a, b in factors]).sum(0) / len(names)
            u, s, vh = torch.linalg.svd(mean, full_matrices=False)
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            rank = min(len(a), len(s))
            root = (s[:rank] / layer.scaling["default"]).sqrt()
            a.zero_()
            b.zero_()
            a[:rank], b[:, :rank] = root[:, None] * vh[:rank], u[:, :rank] * root

    def save(self, folder: Path) -> Path:
        """``pytorch_lora_weights.safetensors`` with rank and alpha in its metadata, for ``load_lora_weights``."""
        name, target = self.family.denoiser_name, folder / LORA_FILE
        with self.ema_scope():
            layers = whole(get_peft_model_state_dict(self.denoiser))
            if self.writes:
                arguments = {
                    f"{name}_lora_layers": layers,
                    f"{name}_lora_adapter_metadata": self.denoiser.peft_config["default"].to_dict(),
                }
                with atomic(target) as draft:
                    type(self.family.pipe).save_lora_weights(draft.parent, weight_name=draft.name, **arguments)
        return target
