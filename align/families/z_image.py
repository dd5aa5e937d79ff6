"""Z-Image and Z-Image-Turbo: one stream of text and image, time from 0 to 1, the velocity the other way round."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import ZImagePipeline
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from align.families.conditioning import Conditioning
from align.families.flow import Flow

TURBO_SHIFT = 3.0  # of the schedule of Z-Image-Turbo; the base has 6
TOKENS = 512  # ZImagePipeline's own default for max_sequence_length


class ZImage(Flow):
    """The pipeline's guidance scale counts from 0: what it calls 4 others call 5."""

    pipeline = ZImagePipeline
    unguided_scale = 0.0
    patch = 2
    token_limits = {"tokenizer": TOKENS}  # noqa: RUF012  # a constant of the class
    text_mask = "bool"

    def few_steps(self) -> int | None:
        """The Turbo is told by its schedule's shift."""
        return 8 if self.scheduler.config.shift == TURBO_SHIFT else super().few_steps()

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        # a list of its own: the pipeline writes its template into what it is given
        rows, _ = self.pipe.encode_prompt(
            list(prompts), device=self.device, do_classifier_free_guidance=False, max_sequence_length=TOKENS
        )
        mask = pad_sequence([row.new_ones(len(row), dtype=torch.bool) for row in rows], batch_first=True)
        return Conditioning({"prompt_embeds": pad_sequence(rows, batch_first=True), "mask": mask})

    def guide(self, free: Tensor, bound: Tensor, guidance_scale: float) -> Tensor:
        return bound + guidance_scale * (bound - free)

    def call(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        texts = [row[own] for row, own in zip(cond["prompt_embeds"], cond["mask"], strict=True)]
        answer = denoiser(list(x_t[:, :, None].unbind()), (1000 - t) / 1000, texts, return_dict=False)[0]
        return -torch.stack(answer)[:, :, 0]
