"""What one child of :mod:`tests.benchmarks.peers` does: train by somebody's script, ours or a peer's, and say what each
optimizer step cost.

    python tests/benchmarks/peer_runs.py WORK.json      # for peers.py, which writes it

It is run by its path and imports nothing of ours on a peer's behalf, so that a process of theirs holds what it needs
and no more. What their scripts ask for and is not installed, or that diffusers has since taken away, is put in their
place here (:func:`stub`); their files stay as they are.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import resource
import runpy
import sys
from importlib.machinery import ModuleSpec
from itertools import cycle
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[2]


class Enough(BaseException):
    """All steps are done; their loop would go on for ever."""


class Meter:
    """User CPU seconds of this process at the end of every optimizer step, whoever steps."""

    def __init__(self, steps: int) -> None:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self.steps, self.seconds = steps, list[float]()
        self.remove = register_optimizer_step_post_hook(self).remove

    def __call__(self, *_: object) -> None:
        self.seconds.append(resource.getrusage(resource.RUSAGE_SELF).ru_utime)
        if len(self.seconds) == self.steps:
            raise Enough

    def report(self) -> dict[str, Any]:
        used = resource.getrusage(resource.RUSAGE_SELF)
        # of this program alone: ru_maxrss begins at what its parent held
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        peak = int(lines["VmHWM"].split()[0]) * 1024
        return {"steps": self.seconds, "peak_bytes": peak, "whole": used.ru_utime + used.ru_stime}


def stub(name: str, **content: Any) -> ModuleType:
    """A module called ``name`` that holds ``content``, with a spec, which others look for."""
    module = ModuleType(name)
    module.__dict__.update(content, __spec__=ModuleSpec(name, None))
    sys.modules[name] = module
    return module


class Settings(dict[str, Any]):
    """ml_collections' ConfigDict, as far as their configs go."""

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__  # type: ignore[assignment]

    def to_dict(self) -> dict[str, Any]:
        return self

    def put(self, changes: dict[str, Any]) -> None:
        for name, value in changes.items():
            if isinstance(value, dict) and isinstance(self.get(name), Settings):
                self[name].put(value)
            else:
                self[name] = value


def borrowed(file: str) -> ModuleType:
    """A file of ours by its path, without the packages that it is in."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, ROOT / file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def theirs(work: dict[str, Any]) -> None:
    """Their script, unmodified, on stubs."""
    borrowed("rewards/common/torchvision_shim.py").ensure()
    stub("wandb", init=lambda **_: None, log=lambda *_, **__: None, Image=lambda *_, **__: None)
    script = Path(work["checkout"]) / work["script"]
    sys.argv = [str(script), *work["argv"]]
    if "settings" in work:
        sys.path.insert(0, work["checkout"])
        flags = SimpleNamespace(FLAGS=SimpleNamespace(config=None))
        stub("absl", app=SimpleNamespace(run=lambda main: main([])), flags=flags)
        stub("ml_collections", ConfigDict=Settings, config_flags=SimpleNamespace(DEFINE_config_file=lambda *_: None))
        stub("inflect", engine=lambda: None)
        config = runpy.run_path(str(Path(work["checkout"]) / "config/base.py"))["get_config"]()
        config.put(work["settings"])
        flags.FLAGS.config = config
    if work.get("old_lora"):
        old_lora()
        from ddpo_pytorch import prompts  # whose own from_file() fails on a file that is there

        lines = cycle(Path("train.txt").read_text().splitlines())
        prompts.ours = lambda: (next(lines), {})
    for tokenizer, most in work["tokens"].items():
        cut(tokenizer, most)
    runpy.run_path(str(script), run_name="__main__")


def cut(tokenizer: str, most: int) -> None:
    """Have a tokenizer class of transformers fill captions up to ``most`` tokens only, whatever it is asked for."""
    import transformers

    kind = getattr(transformers, tokenizer)
    call = kind.__call__
    kind.__call__ = lambda self, *words, max_length=None, **more: call(
        self, *words, max_length=min(max_length or most, most), **more
    )


def old_lora() -> None:
    """What ddpo-pytorch takes from diffusers 0.17 and 0.42 no longer has: ``randn_tensor`` in its old place, and the
    attention processor that adds LoRA of rank 4 to queries, keys, values and output. The sums are those of 0.17's
    ``LoRAAttnProcessor``; the attention is ``scaled_dot_product_attention``, which is faster than its softmax."""
    import diffusers.utils
    import torch
    from diffusers.models import attention_processor
    from diffusers.utils.torch_utils import randn_tensor
    from torch import Tensor, nn

    class LoRALinearLayer(nn.Module):
        def __init__(self, width: int, out: int, rank: int) -> None:
            super().__init__()
            self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, out, bias=False)
            nn.init.normal_(self.down.weight, std=1 / rank)
            nn.init.zeros_(self.up.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.down(x))

    class LoRAAttnProcessor(nn.Module):
        def __init__(self, hidden_size: int, cross_attention_dim: int | None = None, rank: int = 4) -> None:
            super().__init__()
            context = cross_attention_dim or hidden_size
            self.to_q_lora = LoRALinearLayer(hidden_size, hidden_size, rank)
            self.to_k_lora = LoRALinearLayer(context, hidden_size, rank)
            self.to_v_lora = LoRALinearLayer(context, hidden_size, rank)
            self.to_out_lora = LoRALinearLayer(hidden_size, hidden_size, rank)

        def __call__(
            self, attn: Any, x: Tensor, encoder_hidden_states: Tensor | None = None, *_: Any, **__: Any
        ) -> Any:
            context = x if encoder_hidden_states is None else encoder_hidden_states
            query = attn.to_q(x) + self.to_q_lora(x)
            key, value = attn.to_k(context) + self.to_k_lora(context), attn.to_v(context) + self.to_v_lora(context)
            query, key, value = (t.unflatten(2, (attn.heads, -1)).transpose(1, 2) for t in (query, key, value))
            mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
            return attn.to_out[1](attn.to_out[0](mixed) + self.to_out_lora(mixed))

    diffusers.utils.randn_tensor = randn_tensor
    attention_processor.LoRAAttnProcessor = LoRAAttnProcessor


def ours(work: dict[str, Any]) -> None:
    """``python -m align.train``."""
    sys.path.insert(0, str(ROOT))
    from align.train import main

    main(work["argv"])


def run(work: dict[str, Any]) -> dict[str, Any]:
    meter = Meter(work["steps"])
    with contextlib.suppress(Enough):
        (ours if work["side"] == "ours" else theirs)(work)
    return meter.report()


if __name__ == "__main__":
    asked = Path(sys.argv[1])
    figures = run(json.loads(asked.read_text()))
    asked.with_suffix(".out").write_text(json.dumps(figures))
