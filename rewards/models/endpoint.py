"""The one client of OpenAI-compatible endpoints: a question about a picture goes out, a whole answer comes back."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from PIL import Image

from rewards import RewardError
from rewards.common.errors import shortened

Answer = TypeVar("Answer")
AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}  # answers of a server worth asking again
LARGEST = 1 << 20  # bytes of an answer


@dataclass
class Endpoint:
    """A model behind an OpenAI-compatible endpoint.

    A server that is unreachable, silent for ``timeout`` seconds or answers 429 or 5xx is asked again, ``attempts``
    times in all, with pauses that double; anything else is an error at once. Redirects are refused: they would carry
    the key elsewhere.

    Args:
        url: up to and including the version: ``http://localhost:8000/v1``.
        model: the name that the server knows it by.
        name: of the reward that asks, which errors begin with.
        key_variable: environment variable that holds the key, where the server wants one.
        timeout: seconds without an answer after which an attempt is given up.
        attempts: at each question.
        pause: seconds before the second attempt.
        workers: questions under way at once.
    """

    url: str
    model: str
    name: str = "judge"
    key_variable: str | None = None
    timeout: float = 60.0
    attempts: int = 4
    pause: float = 1.0
    workers: int = 8

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RewardError(f"{self.name}: url is {self.url!r}; expected one like http://localhost:8000/v1")
        if parts.query or parts.username:  # it is written down with the scores
            raise RewardError(
                f"{self.name}: url holds a query or a name and password; expected none: give key_variable"
            )
        if min(self.timeout, self.attempts, self.workers) <= 0 or self.pause < 0:
            raise RewardError(f"{self.name}: timeout, attempts and workers must be above 0, and pause not below")
        self.address = f"{self.url.rstrip('/')}/chat/completions"
        self.headers = {"Content-Type": "application/json"}
        if self.key_variable is not None:
            if not (key := os.environ.get(self.key_variable)):
                raise RewardError(f"{self.name}: the environment variable {self.key_variable} holds no key")
            self.headers["Authorization"] = f"Bearer {key}"

    def choice(self, row: int, picture: Image.Image, question: str, tokens: int, **more: Any) -> dict[str, Any]:
        """The first choice of the answer, at temperature 0; ``more`` goes into the request. The picture is sent as a
        PNG file, so without loss."""
        file = io.BytesIO()
        picture.save(file, format="PNG")
        shown = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": shown}}, {"type": "text", "text": question}]
        message = {"role": "user", "content": content}
        body = {"model": self.model, "messages": [message], "max_tokens": tokens, "temperature": 0, **more}
        answer = self.post(json.dumps(body).encode(), row)
        try:
            choice: dict[str, Any] = json.loads(answer)["choices"][0]
            choice["message"]["content"]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            told = shortened(answer.decode(errors="replace"))
            raise RewardError(f"{self.name}: {self.address} answered no chat completion: {told!r}", row) from error
        return choice

    def at_once(self, ask: Callable[..., Answer], asked: Iterable[Sequence[Any]]) -> list[Answer]:
        """``ask(*each)`` of what is ``asked``, ``workers`` under way at once; the first that fails stops the rest."""
        pool = ThreadPoolExecutor(self.workers)
        try:
            return [one.result() for one in [pool.submit(ask, *each) for each in asked]]
        finally:
            pool.shutdown(cancel_futures=True)

    def reply(self, row: int, picture: Image.Image, question: str, tokens: int) -> str:
        """The whole reply; one that is cut off after ``tokens`` is an error."""
        choice = self.choice(row, picture, question, tokens)
        reply = choice["message"]["content"]
        if choice.get("finish_reason") == "length" or not isinstance(reply, str):
            raise RewardError(f"{self.name}: no whole reply in {tokens} tokens: {shortened(str(reply))!r}", row)
        return reply

    def post(self, body: bytes, row: int) -> bytes:
        """The answer's bytes, after as many attempts as are allowed."""
        request = urllib.request.Request(self.address, body, self.headers)
        reason = ""
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            try:
                return fetch(request, self.timeout)
            except urllib.error.HTTPError as error:
                with error:
                    reason = f"status {error.code}: {shortened(error.read(LARGEST).decode(errors='replace'))}"
                if error.code not in AGAIN:
                    raise RewardError(f"{self.name}: {self.address} refused with {reason}", row) from error
            except (OSError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
                reason = str(error) or type(error).__name__
        raise RewardError(f"{self.name}: {self.address} gave no answer in {self.attempts} attempts ({reason})", row)


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Makes every redirect an ``HTTPError``."""

    def redirect_request(self, *args: Any) -> None:
        return None


OPENER = urllib.request.build_opener(NoRedirect)


def fetch(request: urllib.request.Request, timeout: float) -> bytes:
    """The body of the answer; ``OSError`` where it is too long or takes too long."""
    end = time.monotonic() + timeout
    with OPENER.open(request, timeout=timeout) as response:
        body = b""
        while part := response.read1(1 << 16):
            body += part
            if len(body) > LARGEST:
                raise OSError(f"an answer of more than {LARGEST} bytes")
            if time.monotonic() > end:
                raise TimeoutError(f"no whole answer in {timeout:g} s")
        return body
