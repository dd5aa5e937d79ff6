"""What rewards that ask questions about a picture share: a vision-language model, here or behind an endpoint.

A bench asks ten and more questions about every picture, and several of its figures come from the same answers: rewards
of one setting share one :class:`Questioner`, which keeps what it answered last, so that nothing is asked twice.
"""

from __future__ import annotations

import hashlib
import math
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from rewards import RewardError
from rewards.models.endpoint import Endpoint
from rewards.models.network import DTYPES
from rewards.models.preprocess import to_pil
from rewards.models.vqa_score import Chat

MODEL = "Qwen/Qwen2.5-VL-7B-Instruct"
KEPT = 8192  # answers
ALTERNATIVES = 20  # most probable first tokens that an endpoint is asked for, the most that OpenAI's interface allows
Answer = TypeVar("Answer", str, float)


@dataclass(frozen=True)
class Asked:
    """A question about picture ``row`` of a batch."""

    row: int
    picture: Image.Image
    question: str


class Questioner(nn.Module):
    """A vision-language model that answers questions about pictures: ``model`` of transformers, or the one that an
    OpenAI-compatible ``url`` knows by that name. Answers are those of greedy decoding.

    Args:
        reward: whose it is, for messages.
        model, url: folder or hub id; or the name that the server at ``url`` knows it by.
        key_variable, timeout, attempts, workers: as :class:`rewards.models.endpoint.Endpoint` takes them.
        device, dtype: of the network, default CUDA where there is any.
    """

    def __init__(
        self,
        reward: str,
        model: str,
        url: str | None,
        key_variable: str | None,
        timeout: float,
        attempts: int,
        workers: int,
        device: str | None,
        dtype: str,
    ) -> None:
        super().__init__()
        self.chat: Chat | None = None
        self.endpoint: Endpoint | None = None
        self.kept: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        if url is not None:
            self.endpoint = Endpoint(url, model, reward, key_variable, timeout, attempts, workers=workers)
            return
        if dtype not in DTYPES:
            raise RewardError(f"{reward}: dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
        self.chat = Chat(reward, model)
        self.chat.to(getattr(torch, dtype)).eval().requires_grad_(False)
        self.chat.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def replies(self, asked: Sequence[Asked], tokens: int) -> list[str]:
        """What is answered to each, of at most ``tokens``; a longer reply ends there."""

        def one(ask: Asked) -> str:
            if self.endpoint is not None:
                reply = self.endpoint.choice(ask.row, ask.picture, ask.question, tokens)["message"]["content"]
                return reply if isinstance(reply, str) else ""
            assert self.chat is not None
            return self.chat.reply(ask.picture, ask.question, tokens)[0]

        return self._answers(asked, ("reply", tokens), one)

    def probabilities(self, asked: Sequence[Asked], forms: Sequence[Sequence[str]]) -> list[float]:
        """How probable a reply of each is to begin as one of its ``forms`` does: the sum, over the forms, of the
        probability of each one's first token among the whole vocabulary. Forms that begin with one token count it
        once each, as GenEval2's code has it.

        An endpoint tells the most probable tokens alone, and their texts: there it is the sum over the forms that are
        one of them in full.
        """
        wanted = {(ask.row, ask.question): tuple(words) for ask, words in zip(asked, forms, strict=True)}

        def one(ask: Asked) -> float:
            words = wanted[ask.row, ask.question]
            return self._told(ask, words) if self.endpoint is not None else self._computed(ask, words)

        return self._answers(asked, ("probability",), one, wanted)

    def _computed(self, ask: Asked, words: Sequence[str]) -> float:
        assert self.chat is not None
        encode = self.chat.processor.tokenizer.encode
        logits = self.chat.network(**self.chat.inputs(ask.picture, ask.question), logits_to_keep=1).logits[0, -1]
        first = torch.tensor([encode(word, add_special_tokens=False)[0] for word in words], device=logits.device)
        return float(logits.float().softmax(-1)[first].sum())

    def _told(self, ask: Asked, words: Sequence[str]) -> float:
        assert self.endpoint is not None
        more = {"logprobs": True, "top_logprobs": ALTERNATIVES}
        choice = self.endpoint.choice(ask.row, ask.picture, ask.question, 1, **more)
        try:
            tokens = {one["token"]: float(one["logprob"]) for one in choice["logprobs"]["content"][0]["top_logprobs"]}
        except (LookupError, TypeError, ValueError) as error:
            told = "answered without the probabilities of tokens (logprobs, top_logprobs)"
            raise RewardError(f"{self.endpoint.name}: {self.endpoint.address} {told}", ask.row) from error
        return sum(math.exp(tokens[word]) for word in dict.fromkeys(words) if word in tokens)

    @torch.no_grad()
    def _answers(
        self,
        asked: Sequence[Asked],
        kind: tuple[Any, ...],
        answer: Callable[[Asked], Answer],
        more: Mapping[tuple[int, str], Any] | None = None,
    ) -> list[Answer]:
        """``answer`` of each that is not kept from before; an endpoint is asked several at once."""
        digests = {ask.row: _digest(ask.picture) for ask in asked}
        keys = [(*kind, digests[a.row], a.question, more and more[a.row, a.question]) for a in asked]
        new = {key: ask for key, ask in zip(keys, asked, strict=True) if key not in self.kept}
        if self.endpoint is None:
            with torch.autocast(next(self.parameters()).device.type, enabled=False):
                self.kept |= {key: answer(ask) for key, ask in new.items()}
        else:
            found = self.endpoint.at_once(answer, [(ask,) for ask in new.values()])
            self.kept |= dict(zip(new, found, strict=True))
        answers = [self.kept[key] for key in keys]
        while len(self.kept) > KEPT:
            self.kept.popitem(last=False)
        return answers


_THERE: weakref.WeakValueDictionary[tuple[Any, ...], Questioner] = weakref.WeakValueDictionary()


def questioner(reward: str, *settings: Any) -> Questioner:
    """The :class:`Questioner` of ``settings`` (``model`` and what follows): one for all rewards that hold it."""
    found = _THERE.get(settings)
    if found is None:
        found = _THERE[settings] = Questioner(reward, *settings)
    return found


def _digest(picture: Image.Image) -> str:
    return hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()


class Asking(nn.Module):
    """The base of rewards that put questions to a vision-language model.

    Args:
        model: folder or hub id of any model that :class:`rewards.models.vqa_score.VQAScore` loads; with ``url`` the
            name that the server knows it by.
        url: an OpenAI-compatible endpoint, up to and including the version; null runs ``model`` here.
        key_variable: environment variable that holds the endpoint's key, where it wants one.
        timeout, attempts, workers: of the endpoint: seconds without an answer, attempts at each question, questions
            under way at once.
        device, dtype: of the network here; default CUDA where there is any.
    """

    differentiable: ClassVar[bool] = False
    needs_prompt: ClassVar[bool] = False

    def __init__(
        self,
        model: str = MODEL,
        url: str | None = None,
        key_variable: str | None = None,
        timeout: float = 60.0,
        attempts: int = 4,
        workers: int = 8,
        device: str | None = None,
        dtype: str = "bfloat16",
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.questioner = questioner(name, model, url, key_variable, timeout, attempts, workers, device, dtype)

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        """(B, 3, H, W) in [0, 1] and a row of the bench's metadata each -> (B,) float32."""
        if metadata is None:
            raise RewardError(f"{type(self).__name__}: no metadata; expected {self.expected} with every image")
        rows = [self.read(prompt, data, row) for row, (prompt, data) in enumerate(zip(prompts, metadata, strict=True))]
        return torch.tensor(self.answer(to_pil(images), rows), dtype=torch.float32, device=images.device)

    expected: ClassVar[str]

    def read(self, prompt: str, data: Mapping[str, Any], row: int) -> Any:
        """What is asked of a picture. Raises :class:`RewardError`, with the row, where ``data`` do not say it."""
        raise NotImplementedError

    def answer(self, pictures: Sequence[Image.Image], rows: Sequence[Any]) -> list[float]:
        """The scores of ``pictures``, of which ``rows`` say what is asked."""
        raise NotImplementedError
