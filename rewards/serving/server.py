"""What :mod:`rewards.serve` starts: rewards behind FastAPI and uvicorn. That module describes the protocol."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hmac
import ipaddress
import json
import logging
import socket
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import safetensors
import torch
import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, FailFast, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from torch import Tensor
from uvicorn.protocols.http.h11_impl import H11Protocol

from rewards import Reward, RewardError, needs_prompt
from rewards.common.command import run_until_stopped
from rewards.common.errors import RewardFailure
from rewards.data.images import decode_tensor
from rewards.models.remote import TENSORS, TOKEN
from rewards.serving.batching import Batcher, Busy, Call, Limits

logger = logging.getLogger(__name__)
BEARER = HTTPBearer(auto_error=False)


class Refused(HTTPException):
    """A call that is not scored: HTTP status, reason, and the image to blame."""

    def __init__(self, status: int, reason: str, image: int | None = None) -> None:
        super().__init__(status, reason, {"Retry-After": "1"} if status == 503 else None)
        self.image = image


# What a call says
class Item(BaseModel, extra="forbid", strict=True):
    """``image`` is a PNG or JPEG file in base64, or the name of a tensor."""

    image: str
    prompt: str
    metadata: dict[str, Any] | None = None


class Asked(BaseModel, extra="forbid", strict=True):
    """The JSON of a call."""

    reward: str
    items: Annotated[list[Item], FailFast()]  # one error is enough; a body has room for millions


async def receive(request: Request, limits: Limits) -> bytes:
    """The body. ``Refused`` before it is read, while it is read, or where it does not come."""

    def check(length: int) -> None:
        if length > limits.max_body:
            raise Refused(413, f"the body has {length} bytes or more; at most {limits.max_body} are taken")

    async def read() -> bytes:
        body = bytearray()
        async for part in request.stream():
            body += part
            check(len(body))
        return bytes(body)

    check(int(request.headers.get("Content-Length", 0)))  # uvicorn lets nothing but digits through
    try:
        return await asyncio.wait_for(read(), limits.read_timeout)
    except asyncio.TimeoutError as error:
        raise Refused(408, f"the body did not arrive within {limits.read_timeout:g} s") from error
    except ClientDisconnect as error:
        raise Refused(400, "the client left") from error


def understand(text: str | bytes, find: Callable[[str, int], Tensor], limits: Limits) -> tuple[str, Call]:
    """JSON -> the reward's name, and what it shall score. ``find`` makes a picture (3, H, W) of an item's ``image``
    where that has at most so many pixels, and raises ``OSError`` or ``ValueError`` where it cannot."""
    try:
        asked = Asked.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = first["loc"]
        expected = '{"reward": name, "items": [{"image": .., "prompt": text, "metadata": object or null}]}'
        message = f"{'.'.join(map(str, place)) or 'body'}: {first['msg']}; expected {expected}"
        raise Refused(400, message, int(place[1]) if len(place) > 1 else None) from error
    if not 1 <= len(asked.items) <= limits.max_batch:
        raise Refused(413 if asked.items else 400, f"{len(asked.items)} items; expected 1 to {limits.max_batch}")
    images: list[Tensor] = []
    room = limits.max_pixels
    for number, item in enumerate(asked.items):
        try:
            images.append(find(item.image, room))
        except (OSError, ValueError) as error:
            raise Refused(400, f"image {number} cannot be read: {error}", number) from error
        room -= images[-1][0].numel()
    return asked.reward, Call(images, [i.prompt for i in asked.items], [i.metadata for i in asked.items])


def from_json(body: bytes, limits: Limits) -> tuple[str, Call]:
    """:func:`understand` a body whose images are files in base64."""
    return understand(
        body, lambda text, most: decode_tensor(base64.b64decode(text, validate=True), FILES, most), limits
    )


def from_tensors(body: bytes, limits: Limits) -> tuple[str, Call]:
    """:func:`understand` a body that is a safetensors file."""
    try:
        views = dict(safetensors.deserialize(body))
        text = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])["__metadata__"]["call"]
    except (safetensors.SafetensorError, LookupError) as error:
        raise Refused(400, f'the body is no safetensors file with the metadata "call": {error}') from error

    def find(name: str, most: int) -> Tensor:
        if name not in views:
            raise ValueError(f"there is no tensor {name[:100]!r}")
        kind, shape = views[name]["dtype"], views[name]["shape"]
        if kind not in DTYPES or len(shape) != 3 or shape[0] != 3 or 0 in shape or shape[1] * shape[2] > most:
            raise ValueError(f"{kind} of shape {shape}; expected {' or '.join(DTYPES)}, (3, H, W), H x W <= {most}")
        return torch.frombuffer(views[name]["data"], dtype=DTYPES[kind]).view(shape)

    return understand(text, find, limits)


FILES = ("PNG", "JPEG")
DTYPES = {"U8": torch.uint8, "F32": torch.float32}
KINDS = {"application/json": from_json, TENSORS: from_tensors}  # a page in a browser can send neither unasked


# The application
async def scored(batcher: Batcher, call: Call, seconds: float) -> list[float]:
    """The call's scores. ``Refused`` where the reward is busy, too slow, refuses, or fails."""
    try:
        batcher.submit(call)
        scores = asyncio.wrap_future(call.scores)
        if (await asyncio.wait([scores], timeout=seconds))[0]:
            return scores.result()
        call.scores.cancel()  # where it waits; the line below would do that too, but only after the answer is sent
        scores.cancel()
    except Busy as error:
        raise Refused(503, str(error)) from error
    except RewardError as error:
        if isinstance(error, RewardFailure):
            logger.error("%s", error, exc_info=error)
            raise Refused(500, str(error), error.row) from error
        raise Refused(422, str(error), error.row) from error
    raise Refused(504, f"reward {batcher.name!r} took over {seconds:g} s")


def application(batchers: Mapping[str, Batcher], token: str | None, limits: Limits) -> FastAPI:
    """The addresses that :mod:`rewards.serve` describes."""

    def authorise(given: Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)]) -> None:
        sent = given.credentials.encode("latin-1") if given else b""
        if token is not None and not hmac.compare_digest(sent, token.encode()):
            raise Refused(401, "wrong or no token; expected 'Authorization: Bearer TOKEN'")

    app = FastAPI(openapi_url=None)  # no pages that describe it: they would need no token
    authorised = [Depends(authorise)]

    @app.exception_handler(HTTPException)
    async def refuse(request: Request, error: HTTPException) -> JSONResponse:
        blame = {"image": error.image} if isinstance(error, Refused) and error.image is not None else {}
        return JSONResponse({"error": error.detail} | blame, error.status_code, error.headers)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "waiting": {name: batcher.waiting for name, batcher in batchers.items()}}

    @app.get("/rewards", dependencies=authorised)
    async def rewards() -> dict[str, Any]:
        about = {name: {"needs_prompt": needs_prompt(batcher.reward)} for name, batcher in batchers.items()}
        return {"rewards": about, "limits": dataclasses.asdict(limits)}

    @app.post("/score", dependencies=authorised)
    async def score(request: Request) -> dict[str, list[float]]:
        kind = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind not in KINDS:
            raise Refused(415, f"Content-Type is {kind!r}; expected {' or '.join(KINDS)}")
        name, call = await run_in_threadpool(KINDS[kind], await receive(request, limits), limits)
        if name not in batchers:
            raise Refused(400, f"no reward {name[:100]!r} here; there are {', '.join(batchers)}")
        return {"scores": await scored(batchers[name], call, limits.score_timeout)}

    return app


# The server
BUSY = JSONResponse({"error": "busy: too many connections"}, 503, {"Retry-After": "1", "Connection": "close"})


def protocol(limits: Limits) -> type[H11Protocol]:
    """uvicorn's, which alone would wait as long as it takes for the head of a call, and for the rest of one that is
    answered; its own limit of connections would refuse calls for connections that came later and say nothing."""

    class Protocol(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._patience = self.loop.call_later(limits.read_timeout, self._hang_up)
            if len(self.connections) > limits.max_connections:
                self.app = BUSY

        def on_response_complete(self) -> None:
            self._patience.cancel()
            self._patience = self.loop.call_later(limits.read_timeout, self._hang_up)
            super().on_response_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._patience.cancel()
            super().connection_lost(exc)

        def _hang_up(self) -> None:
            if self.cycle is None or self.cycle.response_complete:  # else a call is at work, which has its own limits
                self.transport.close()

    return Protocol


class Server:
    """``run`` serves until ``stop`` is called in another thread, or Ctrl-C; ``port`` tells one that was given as 0.
    ``RewardError`` where it would listen beyond this machine without a token, or where the port is taken."""

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        host: str = "127.0.0.1",
        port: int = 8000,
        token: str | None = None,
        limits: Limits | None = None,
        device: str = "cpu",
    ) -> None:
        check_token(host, token)
        limits = limits or Limits()
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._socket = socket.create_server((host, port), family=family, backlog=128)
        except (OSError, OverflowError) as error:
            raise RewardError(f"cannot listen on {host} port {port}: {error}; give another --host or --port") from error
        self.port = int(self._socket.getsockname()[1])
        self.batchers = {name: Batcher(name, reward, limits, device) for name, reward in rewards.items()}
        config = uvicorn.Config(
            application(self.batchers, token, limits),
            http=protocol(limits),
            ws="none",
            lifespan="off",
            log_config=None,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=5,
        )
        self._server = uvicorn.Server(config)

    def run(self) -> None:
        """Serve. When it is to end, calls that are waiting have 5 seconds."""
        try:
            run_until_stopped(lambda: self._server.run([self._socket]), self.stop)
        finally:
            for batcher in self.batchers.values():
                batcher.close()

    def stop(self) -> None:
        """Make ``run`` end."""
        self._server.should_exit = True


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_token(host: str, token: str | None) -> None:
    """``RewardError`` where there must be a token and is none, or where it is too simple."""
    if token is None and not is_loopback(host):
        raise RewardError(f"host {host} can be reached by others; give --token_file, or set {TOKEN}")
    if token is not None and (len(token) < 8 or not token.isascii() or not token.isprintable() or " " in token):
        raise RewardError("the token is too simple; expected at least 8 printable ASCII characters and no space")
