"""A reward that another process computes: the other end of ``python -m rewards.serve``."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any, ClassVar
from urllib.parse import urlsplit

import torch
from safetensors.torch import save
from torch import Tensor

from rewards import RewardError
from rewards.models.preprocess import to_levels

TOKEN = "T2I_ALIGN_TOKEN"  # the environment variable that both ends read
TENSORS = "application/x-safetensors"  # the Content-Type of a call whose images are tensors
_ANSWER = 2**24  # bytes of an answer that are read at most


class Remote:
    """Scores through a server, whose rewards are asked for when this is made.

    Pictures travel in a safetensors file, without loss: in 8 bits where each value is a level of 255, else in float32.
    They arrive contiguous: a reward that sums over pixels may differ in the last bit where those given are not.

    A refused connection, one that breaks, and "503 busy" are tried again, ``retries`` times, after 0.25, 0.5, 1, ... at
    most 8 seconds. Anything else, a time-out too, is a :class:`rewards.RewardError` at once.

    Args:
        url: ``http://host:port`` or ``https://..``; a token over plain http can be read on the way.
        token: that the server asks for; ``env:VARIABLE`` and ``file:PATH`` say where it lies; default
            the environment variable ``T2I_ALIGN_TOKEN``.
        reward: its label at the server; may be left out where that has only one.
        timeout: seconds to wait for the connection, and for the next byte of the answer.
        retries: how often to try again.
    """

    concurrent: ClassVar[bool] = True
    differentiable: ClassVar[bool] = False

    def __init__(
        self,
        url: str,
        token: str | None = None,
        reward: str | None = None,
        timeout: float = 120.0,
        retries: int = 6,
    ) -> None:
        parts = urlsplit(url)
        if parts.query or parts.username:  # it is written down with the scores
            raise RewardError("Remote: url holds a query or a password; expected http://host:port alone: give token")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RewardError(f"Remote: url is {url!r}; expected http://host:port or https://host:port")
        if timeout <= 0 or retries < 0:
            raise RewardError(f"Remote: timeout is {timeout} and retries {retries}; expected above 0, and 0 or more")
        self.url, self.timeout, self.retries = url.rstrip("/"), timeout, retries
        self._token = os.environ.get(TOKEN) if token is None else token
        self._whose = self.url  # whom errors name
        answer = self._ask("GET", "/rewards", None)
        try:
            served = {str(name): bool(about["needs_prompt"]) for name, about in answer["rewards"].items()}
            limits = {name: int(answer["limits"][name]) for name in ("max_batch", "max_pixels", "max_body")}
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise RewardError(f"{self.url} answered, but not as rewards.serve does; is it that?") from error
        if reward is None and len(served) == 1:
            reward = next(iter(served))
        if reward not in served:
            raise RewardError(f"Remote: reward is {reward!r}; {self.url} has {', '.join(sorted(served))}")
        self.reward, self.needs_prompt, self._limits = reward, served[reward], limits
        self._whose = f"reward {reward!r} at {self.url}"

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B,) float32 on the device of ``images``; metadata must be JSON. ``RewardError``
        repeats what the server said, with the row where it named one."""
        sent = images.detach().float().cpu().contiguous()
        levels = to_levels(sent)
        if torch.equal(levels / 255, sent):  # as the server divides
            sent = levels.to(torch.uint8)
        records = [None] * len(prompts) if metadata is None else [dict(record) for record in metadata]
        pixels = images.shape[-2] * images.shape[-1]
        if pixels > self._limits["max_pixels"]:
            raise RewardError(f"{self._whose} takes {self._limits['max_pixels']} pixels; one image has {pixels}")
        room = min(self._limits["max_pixels"] // pixels, self._limits["max_body"] // sent[0].nbytes)
        size = max(1, min(self._limits["max_batch"], room))
        scores: list[float] = []
        for start in range(0, len(sent), size):
            stop = start + size
            scores += self._score(sent[start:stop], prompts[start:stop], records[start:stop], start)
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def _score(
        self, images: Tensor, prompts: Sequence[str], records: Sequence[dict[str, Any] | None], first: int
    ) -> list[float]:
        """The scores by one call, or where its texts make that too large, by two halves."""
        items = [
            {"image": str(number), "prompt": prompt, "metadata": record}
            for number, (prompt, record) in enumerate(zip(prompts, records, strict=True))
        ]
        try:
            call = json.dumps({"reward": self.reward, "items": items})
        except (TypeError, ValueError) as error:
            raise RewardError(f"Remote: metadata must be JSON: {error}") from error
        body = save({str(number): image for number, image in enumerate(images)}, {"call": call})
        if len(body) > self._limits["max_body"]:
            if len(items) == 1:
                most = self._limits["max_body"]
                raise RewardError(f"{self._whose} takes {most} bytes; one image and its texts have {len(body)}", first)
            half = len(items) // 2
            ends = (slice(half), first), (slice(half, None), first + half)
            return [s for part, row in ends for s in self._score(images[part], prompts[part], records[part], row)]
        answer = self._ask("POST", "/score", body, first)
        scores = answer.get("scores")
        if (
            not isinstance(scores, list)
            or len(scores) != len(items)
            or not all(isinstance(score, (int, float)) for score in scores)
        ):
            raise RewardError(f"{self._whose} answered {str(answer)[:200]}; expected {len(items)} scores")
        return scores

    def _ask(self, method: str, path: str, body: bytes | None, first: int = 0) -> dict[str, Any]:
        """The server's JSON object, after as many attempts as it may take."""
        for attempt in range(self.retries + 1):
            try:
                status, text = self._once(method, path, body)
            except ConnectionError as error:  # refused, reset, or closed without an answer
                trouble = f"{type(error).__name__}: {error}"
            except TimeoutError as error:
                raise RewardError(f"{self._whose} did not answer within {self.timeout:g} s") from error
            except (OSError, HTTPException) as error:
                raise RewardError(f"{self._whose} cannot be asked: {type(error).__name__}: {error}") from error
            else:
                answer = _parse(text)
                if status == 200 and answer is not None:
                    return answer
                trouble = f"{status} {text[:500].decode(errors='replace')}"
                if answer is not None and isinstance(answer.get("error"), str):
                    trouble = f"{status} {answer['error']}"
                if status != 503:
                    row = answer.get("image") if answer else None
                    raise RewardError(
                        f"{self._whose} answered {trouble}", row=first + row if isinstance(row, int) else None
                    )
            if attempt < self.retries:
                time.sleep(min(0.25 * 2**attempt, 8.0))
        raise RewardError(f"{self._whose} failed {self.retries + 1} times, last with {trouble}")

    def _once(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
        parts = urlsplit(self.url)
        connect = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        headers = {"Content-Type": TENSORS}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        connection = connect(parts.hostname or "", parts.port, timeout=self.timeout)
        try:
            connection.request(method, parts.path + path, body, headers)
            response = connection.getresponse()  # no redirect is followed: it could carry the token elsewhere
            return response.status, response.read(_ANSWER)
        finally:
            connection.close()


def _parse(text: bytes) -> dict[str, Any] | None:
    try:
        answer = json.loads(text)
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None
