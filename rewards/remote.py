"""A reward that another process computes: the other end of ``python -m rewards.serve``."""

from __future__ import annotations

import base64
import io
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any, ClassVar
from urllib.parse import urlsplit

import torch
from PIL import Image
from torch import Tensor

from rewards import RewardError
from rewards.preprocess import to_levels

TOKEN = "T2I_ALIGN_TOKEN"  # the environment variable that both ends read
_ANSWER = 2**24  # bytes of an answer that are read at most
_SPARE = 1024  # bytes of a body that are not its items


class Remote:
    """Scores through a server, whose rewards are asked for when this is made.

    Pictures are sent as PNG of 8 bits a channel, so a value differs from the one given by at most 1/510; for pictures
    that come from 8-bit files, and for every reward that rounds to 8 bits itself, nothing changes.

    A refused connection, one that breaks, and "503 busy" are tried again, ``retries`` times, after 0.25, 0.5, 1, ... at
    most 8 seconds. Anything else, a time-out too, is a :class:`rewards.RewardError` at once.

    Args:
        url: ``http://host:port`` or ``https://..``; a token over plain http can be read on the way.
        token: that the server asks for; default the environment variable ``T2I_ALIGN_TOKEN``.
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
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
            raise RewardError(f"Remote: url is {url!r}; expected http://host:port or https://host:port")
        if timeout <= 0 or retries < 0:
            raise RewardError(f"Remote: timeout is {timeout} and retries {retries}; expected above 0, and 0 or more")
        self.url, self.timeout, self.retries = url.rstrip("/"), timeout, retries
        self._token = os.environ.get(TOKEN) if token is None else token
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

    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B,) float32 on the device of ``images``; metadata must be JSON. ``RewardError``
        repeats what the server said, with the row where it named one."""
        pixels = images.shape[-2] * images.shape[-1]
        if pixels > self._limits["max_pixels"]:
            raise RewardError(f"{self.url} takes {self._limits['max_pixels']} pixels a call; one image has {pixels}")
        levels = to_levels(images.detach()).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        records = [None] * len(prompts) if metadata is None else metadata
        try:
            items = [
                json.dumps({"image": _png(picture), "prompt": prompt, "metadata": record and dict(record)})
                for picture, prompt, record in zip(levels, prompts, records, strict=True)
            ]
        except TypeError as error:
            raise RewardError(f"Remote: metadata must be JSON: {error}") from error
        scores: list[float] = []
        for call in self._calls(items, min(self._limits["max_batch"], self._limits["max_pixels"] // pixels)):
            scores += self._score(call, len(scores))
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def _calls(self, items: Sequence[str], most: int) -> Iterator[list[str]]:
        """As many items a call as the server takes."""
        room = self._limits["max_body"] - _SPARE - len(json.dumps(self.reward))
        call: list[str] = []
        for item in items:
            if len(item) + 1 > room:
                raise RewardError(
                    f"{self.url} takes {self._limits['max_body']} bytes a call; one image has {len(item)}"
                )
            if len(call) == most or sum(map(len, call)) + len(call) + len(item) + 1 > room:
                yield call
                call = []
            call.append(item)
        yield call

    def _score(self, items: Sequence[str], first: int) -> list[float]:
        body = f'{{"reward": {json.dumps(self.reward)}, "items": [{",".join(items)}]}}'
        answer = self._ask("POST", "/score", body.encode(), first)
        scores = answer.get("scores")
        if (
            not isinstance(scores, list)
            or len(scores) != len(items)
            or not all(isinstance(score, (int, float)) for score in scores)
        ):
            raise RewardError(f"{self.url} answered {str(answer)[:200]}; expected {len(items)} scores")
        return scores

    def _ask(self, method: str, path: str, body: bytes | None, first: int = 0) -> dict[str, Any]:
        """The server's JSON object, after as many attempts as it may take."""
        for attempt in range(self.retries + 1):
            try:
                status, text = self._once(method, path, body)
            except ConnectionError as error:  # refused, reset, or closed without an answer
                trouble = f"{type(error).__name__}: {error}"
            except TimeoutError as error:
                raise RewardError(f"{self.url} did not answer within {self.timeout:g} s") from error
            except (OSError, HTTPException) as error:
                raise RewardError(f"{self.url} cannot be asked: {type(error).__name__}: {error}") from error
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
                        f"{self.url} answered {trouble}", row=first + row if isinstance(row, int) else None
                    )
            if attempt < self.retries:
                time.sleep(min(0.25 * 2**attempt, 8.0))
        raise RewardError(f"{self.url} failed {self.retries + 1} times, last with {trouble}")

    def _once(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
        parts = urlsplit(self.url)
        connect = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        headers = {"Content-Type": "application/json"}
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


def _png(picture: Any) -> str:
    """(H, W, 3) uint8 -> a PNG file in base64."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()
