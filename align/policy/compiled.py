"""Regional compilation: the blocks that a denoiser repeats, compiled once for all that are alike."""

from __future__ import annotations

import torch
from torch import nn

from align.common.errors import UserError

# of one class of block: shapes, with adapters and without, with gradient and without, what the first and the last have
# of their own; torch would go on without compiling beyond 8
RECOMPILATIONS = 64


def compile_blocks(denoiser: nn.Module) -> None:
    """Have the blocks that diffusers says ``denoiser`` repeats compiled when they are called first.

    Raises :class:`UserError` where it says none, and where torch finds no compiler on a CPU.
    """
    # SD3's, for one, says only what may not be split among devices, which is the same
    names = getattr(denoiser, "_repeated_blocks", None) or getattr(denoiser, "_no_split_modules", None) or ()
    blocks = [module for module in denoiser.modules() if type(module).__name__ in names]
    if not blocks:
        kind = type(denoiser).__name__
        raise UserError(f"compile: diffusers names no blocks that a {kind} repeats; set compile: false")
    if next(denoiser.parameters()).device.type == "cpu":
        from torch._inductor import cpp_builder, exc

        try:
            cpp_builder.get_cpp_compiler()
        except (exc.InvalidCxxCompiler, OSError) as error:
            text = " ".join(str(error).split())[:100]
            raise UserError(
                f"compile: torch finds no C++ compiler ({text}); install g++, or set compile: false"
            ) from error
    torch._dynamo.config.recompile_limit = max(RECOMPILATIONS, torch._dynamo.config.recompile_limit)
    for block in blocks:
        block.compile()
