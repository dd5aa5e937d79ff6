"""VQAScore (Lin et al. 2024, arXiv 2404.01291): how probable "Yes" is as a vision-language model's next word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

from rewards import RewardError
from rewards.models.network import Network, loading, pretrained
from rewards.models.preprocess import to_pil


class VQAScore(Network):
    """``P(answer | image, question)``, the question put as the model's chat template puts a user's.

    Checkpoints: any model that transformers loads as image-text-to-text and whose processor has a chat template, such
    as ``Qwen/Qwen2.5-VL-7B-Instruct`` or ``Qwen/Qwen2-VL-7B-Instruct`` (both Apache-2.0 by their cards). The paper's
    CLIP-FlanT5-XXL (11 B) is not in that layout: it needs t2v_metrics 3.0. Scores of different models, and of different
    questions, are not comparable.
    Preprocessing: the checkpoint's own, by PIL, on the picture as an 8-bit file holds it; each picture alone. Where an
    edge is under 14 pixels t2v_metrics chooses another size, and scores are others.
    Formula: the softmax over the whole vocabulary at the first token of the reply, read at the answer's first token;
    the question is t2v_metrics' for Qwen. It generates the token and so applies the checkpoint's repetition penalty,
    where there is one; here the logits are as the network gives them.
    Range: 0 to 1.
    Not differentiable.
    Caveats: a question with "Please answer yes or no." is a different score; the case of the answer matters.

    Args:
        model: folder or hub id.
        question: with ``{}`` where the prompt goes.
        answer: the reply whose first token is looked at.
        device, dtype: default CUDA where there is any; of the network; the softmax is float32.
    """

    differentiable: ClassVar[bool] = False

    def __init__(
        self,
        model: str = "Qwen/Qwen2.5-VL-7B-Instruct",
        question: str = 'Does this image show "{}"?',
        answer: str = "Yes",
        device: str | None = None,
        dtype: str = "bfloat16",
    ) -> None:
        super().__init__()
        if question.count("{}") != 1 or not answer:
            raise RewardError(f"VQAScore: question {question!r}, answer {answer!r}; expected one {{}}, and an answer")
        self.chat = Chat("VQAScore", model)
        self.question = question
        self.answer = self.chat.processor.tokenizer.encode(answer, add_special_tokens=False)[0]
        self.settle(device, dtype, self.chat)

    @torch.no_grad()
    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pairs = zip(to_pil(images), prompts, strict=True)
        return torch.stack([self.one(picture, self.question.replace("{}", prompt)) for picture, prompt in pairs])

    def one(self, picture: Image.Image, question: str) -> Tensor:
        """One picture's score: ()."""
        logits = self.chat.network(**self.chat.inputs(picture, question), logits_to_keep=1).logits[0, -1]
        return logits.float().softmax(-1)[self.answer]


class Chat(nn.Module):
    """A vision-language model of transformers and the processor that puts questions to it, one picture at a time."""

    def __init__(self, reward: str, model: str) -> None:
        super().__init__()
        with loading(reward, model):
            self.network = pretrained(AutoModelForImageTextToText, model)
            self.processor = AutoProcessor.from_pretrained(model)
            # upstream and the published scores resize with PIL; transformers 5 unless told with torchvision
            self.processor.image_processor = AutoImageProcessor.from_pretrained(model, backend="pil")
            if self.processor.chat_template is None:
                raise ValueError("its processor has no chat template")

    def inputs(self, picture: Image.Image, question: str) -> dict[str, Any]:
        """What the network is called with for one question about one picture."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        batch = self.processor(text=[text], images=[picture], return_tensors="pt")
        return dict(batch.to(self.network.device, self.network.dtype))  # only floats change their dtype

    def reply(self, picture: Image.Image, question: str, tokens: int) -> tuple[str, bool]:
        """The most probable reply, token by token, of at most ``tokens``, and whether it came to its end."""
        inputs = self.inputs(picture, question)
        made = self.network.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0]
        ends = self.network.generation_config.eos_token_id
        last = int(made[-1])
        whole = last in ends if isinstance(ends, list) else last == ends
        new = made[inputs["input_ids"].shape[1] :]
        return self.processor.tokenizer.decode(new, skip_special_tokens=True), whole
