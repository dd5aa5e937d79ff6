"""BLIP-VQA, by which T2I-CompBench scores colour, shape and texture (Huang et al. 2023, arXiv 2307.06350)."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, BlipForQuestionAnswering

from rewards import RewardError
from rewards.models.network import Network, loading, pretrained
from rewards.models.preprocess import to_pil

MOST = 8  # noun phrases of a prompt that count
LEFT_OUT = ("top", "the side", "the left", "the right")  # are no objects


class BLIPVQA(Network):
    """The product over a prompt's noun phrases of how surely BLIP says yes to "PHRASE?".

    The metadata may say the ``noun_phrases``, a list of texts; where they do not, the prompt is taken apart by spaCy's
    ``en_core_web_sm``, as the official code does, which has to be installed then.
    Formula: of each phrase p = P(yes) / (P(yes) + P(no)) for the first word of the answer; the score is the product of
    the first 8. The phrases top, the side, the left and the right, which are no objects, do not count.
    Checkpoints: ``Salesforce/blip-vqa-capfilt-large`` (BSD-3-Clause by its card), the official weights in the layout of
    transformers.
    Preprocessing: the checkpoint's own (a square by bicubic resize, PIL). Not as there: its picture is 384 pixels
    where the official code takes 480, and p is not rounded to four digits.
    Range: 0 to 1.
    Not differentiable.

    Args:
        model: folder or hub id.
        device, dtype: default CUDA where there is any; of the network; probabilities are float32.
    """

    differentiable: ClassVar[bool] = False

    def __init__(
        self,
        model: str = "Salesforce/blip-vqa-capfilt-large",
        device: str | None = None,
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        with loading("BLIPVQA", model):
            self.network = pretrained(BlipForQuestionAnswering, model)
            self.tokenizer = AutoTokenizer.from_pretrained(model)
            self.resize = AutoImageProcessor.from_pretrained(model, backend="pil")
            self.yes, self.no = self.tokenizer.convert_tokens_to_ids(["yes", "no"])
            self.begin = self.network.config.text_config.bos_token_id  # [DEC]; [ENC] is the one after it
            if None in (self.yes, self.no) or self.begin + 1 >= self.network.config.text_config.vocab_size:
                raise ValueError("its vocabulary lacks yes, no or [ENC]")
        self.settle(device, dtype, self.network)

    @torch.no_grad()
    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B,) float32."""
        rows = metadata or [{}] * len(prompts)
        phrases = [phrases_of(*pair, row) for row, pair in enumerate(zip(prompts, rows, strict=True))]
        pairs = zip(to_pil(images), phrases, strict=True)
        with torch.autocast(self.device.type, enabled=False):
            scores = [float(self.sure(picture, asked).prod()) for picture, asked in pairs]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def sure(self, picture: Image.Image, phrases: Sequence[str]) -> Tensor:
        """P(yes) / (P(yes) + P(no)) of each phrase: (n,)."""
        pixels = self.resize(picture, return_tensors="pt")["pixel_values"].to(self.device, self.network.dtype)
        seen = self.network.vision_model(pixels).last_hidden_state.expand(len(phrases), -1, -1)
        texts = [question(phrase) for phrase in phrases]
        words = self.tokenizer(texts, padding=True, truncation=True, max_length=35, return_tensors="pt").to(self.device)
        words.input_ids[:, 0] = self.begin + 1
        asked = self.network.text_encoder(
            input_ids=words.input_ids,
            attention_mask=words.attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=seen.new_ones(seen.shape[:2], dtype=torch.long),
        ).last_hidden_state
        logits = self.network.text_decoder(
            input_ids=words.input_ids.new_full((len(phrases), 1), self.begin),
            encoder_hidden_states=asked,
            encoder_attention_mask=words.attention_mask,
        ).logits[:, 0]
        return (logits[:, self.yes] - logits[:, self.no]).float().sigmoid()


def question(phrase: str) -> str:
    """What BLIP is asked about ``phrase``: its own preparation of questions, lower case and without punctuation."""
    text = re.sub(r"[.!\"()*#:;~]", "", f"{phrase}?".lower()).rstrip(" ")
    return " ".join(text.split(" ")[:50])


def phrases_of(prompt: str, data: Mapping[str, Any], row: int) -> list[str]:
    """The noun phrases that count. Raises :class:`RewardError`, with the row, where there is none."""
    found = data["noun_phrases"] if "noun_phrases" in data else spacy_phrases()(prompt)
    if not isinstance(found, list) or not all(isinstance(one, str) and one.strip() for one in found):
        raise RewardError(f"BLIPVQA: noun_phrases is {found!r}; expected a list of texts", row)
    phrases = [phrase for phrase in found if phrase not in LEFT_OUT][:MOST]
    if not phrases:
        raise RewardError(f"BLIPVQA: the prompt {prompt!r} has no noun phrase; expected noun_phrases", row)
    return phrases


@functools.cache
def spacy_phrases() -> Callable[[str], list[str]]:
    """The noun chunks that spaCy finds in a text."""
    try:
        import spacy

        read = spacy.load("en_core_web_sm")
    except (ImportError, OSError) as error:
        raise RewardError(
            "BLIPVQA: the metadata say no noun_phrases, and spaCy's en_core_web_sm, by which T2I-CompBench finds them, "
            "is not there: pip install spacy; python -m spacy download en_core_web_sm; or give a .jsonl of prompt and "
            "noun_phrases"
        ) from error
    return lambda prompt: [chunk.text for chunk in read(prompt).noun_chunks]
