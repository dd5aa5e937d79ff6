"""Rewards over HTTP: ``python -m rewards.serve --reward Shapes --port 8000``; :class:`rewards.remote.Remote` calls it.

    GET  /health   {"status": "ok", "waiting": {REWARD: images}}; needs no token
    GET  /rewards  {"rewards": {REWARD: {"needs_prompt": bool}}, "limits": {..}}
    POST /score    {"reward": REWARD, "items": [{"image": PNG or JPEG in base64, "prompt": text, "metadata": {..}}]}
                   -> {"scores": [..]}; "metadata" may be left out

What cannot be done is answered as {"error": text}, with "image", its place in the call, where one is to blame:
400 not understood, 401 wrong token, 408 too slow, 411 no length, 413 too large, 415 not JSON, 422 the reward refused,
500 the reward failed, 503 busy, try again, 504 the reward took too long. One call per connection.

It listens on this machine only unless ``--host`` says otherwise, and then asks for a token (``Authorization: Bearer``),
which it takes from ``--token_file`` or the environment variable ``T2I_ALIGN_TOKEN``. It speaks plain HTTP: over a
network that others read, put a proxy with TLS before it. Nothing is unpickled.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import hmac
import ipaddress
import json
import logging
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewards import Reward, RewardError, available, checked, needs_prompt
from rewards.inputs import decode, load_rewards, parse_rewards, pick_device
from rewards.remote import TOKEN

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What a server takes at most.

    Args:
        max_body: bytes of a call.
        max_pixels: of all images of a call together.
        max_batch: images of a call.
        max_waiting: images that wait for one reward; with more, calls are told to try again.
        max_connections: calls that are read or answered at one time.
        read_timeout: seconds within which a call must have arrived.
        score_timeout: seconds that a call may wait for its scores.
        batch_size: images that a reward is given at once.
        linger: seconds to wait for further calls that fill a batch.
    """

    max_body: int = 2**26
    max_pixels: int = 2**26
    max_batch: int = 64
    max_waiting: int = 1024
    max_connections: int = 128
    read_timeout: float = 30.0
    score_timeout: float = 100.0
    batch_size: int = 32
    linger: float = 0.005

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):
            value = getattr(self, one.name)
            if value < 0 or (value == 0 and one.name != "linger"):
                raise RewardError(f"{one.name} is {value}; expected more than 0")
        if self.max_waiting < self.max_batch:
            raise RewardError(f"max_waiting {self.max_waiting} is below max_batch {self.max_batch}: some never fit")


class Refused(Exception):
    """A call that is not scored: HTTP status, reason, and the image to blame."""

    def __init__(self, status: HTTPStatus, message: str, image: int | None = None) -> None:
        super().__init__(message)
        self.status, self.image = status, image


# Many calls, one reward
@dataclass(frozen=True)
class Call:
    """Images (3, H, W) uint8 of any sizes, a prompt and a metadata row for each, and the scores to come."""

    images: Sequence[Tensor]
    prompts: Sequence[str]
    metadata: Sequence[Mapping[str, Any] | None]
    scores: Future[list[float]] = field(default_factory=Future)


class Batcher:
    """One thread that gives a reward the images of all waiting calls, ``batch_size`` at a time."""

    def __init__(self, name: str, reward: Reward, limits: Limits, device: str) -> None:
        self.name, self.reward, self.limits, self.device = name, reward, limits, device
        self.waiting = 0
        self._calls: deque[Call] = deque()
        self._changed = threading.Condition()
        self._open = True
        threading.Thread(target=self._work, name=f"reward {name}", daemon=True).start()

    def submit(self, call: Call) -> Future[list[float]]:
        """Begin to score. ``Refused`` (503) where too much is waiting."""
        with self._changed:
            if not self._open or self.waiting + len(call.images) > self.limits.max_waiting:
                state = f"{self.waiting} images are waiting for it" if self._open else "the server is stopping"
                raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, f"reward {self.name!r} is busy: {state}; try again")
            self.waiting += len(call.images)
            self._calls.append(call)
            self._changed.notify()
        return call.scores

    def close(self) -> None:
        """Take no further call; those that wait are still scored."""
        with self._changed:
            self._open = False
            self._changed.notify()

    def _work(self) -> None:
        while calls := self._take():
            self._answer([call for call in calls if call.scores.set_running_or_notify_cancel()])

    def _take(self) -> list[Call]:
        """The next calls that fit one batch, at least one; none when closed."""
        taken: list[Call] = []
        with self._changed:
            self._changed.wait_for(lambda: self._calls or not self._open)
            room = self.limits.batch_size
            self._changed.wait_for(lambda: self.waiting >= room or not self._open, self.limits.linger)
            while self._calls and (not taken or len(self._calls[0].images) <= room):
                taken.append(self._calls.popleft())
                room -= len(taken[-1].images)
                self.waiting -= len(taken[-1].images)
        return taken

    def _answer(self, calls: Sequence[Call]) -> None:
        if not calls:
            return
        try:
            scores = self._score(calls)
        except Exception as error:  # anyone's reward may raise anything; only the call to blame may suffer from it
            if len(calls) > 1:
                for call in calls:
                    self._answer([call])
            else:
                calls[0].scores.set_exception(error)
            return
        for call in calls:
            call.scores.set_result(scores[: len(call.images)])
            del scores[: len(call.images)]

    def _score(self, calls: Sequence[Call]) -> list[float]:
        """Scores of all images of the calls, one after the other; pictures of one size go together."""
        items = [item for call in calls for item in zip(call.images, call.prompts, call.metadata, strict=True)]
        alike: dict[tuple[Any, ...], list[int]] = {}
        for number, (image, _, record) in enumerate(items):
            alike.setdefault((*image.shape, record is None), []).append(number)
        scores = [0.0] * len(items)
        for numbers in alike.values():
            for start in range(0, len(numbers), self.limits.batch_size):
                chunk = numbers[start : start + self.limits.batch_size]
                images = torch.stack([items[n][0] for n in chunk]).to(self.device).float() / 255
                records = [record for n in chunk if (record := items[n][2]) is not None]
                try:
                    with torch.no_grad():
                        values = checked(self.reward, self.name, images, [items[n][1] for n in chunk], records or None)
                except RewardError as error:
                    raise RewardError(str(error), None if error.row is None else chunk[error.row]) from error
                for number, value in zip(chunk, values.tolist(), strict=True):
                    scores[number] = value
        return scores


# One call
class Handler(BaseHTTPRequestHandler):
    """Reads a call, waits for its scores and answers, in a thread of its own."""

    server: Server
    server_version, sys_version = "t2i-align", ""

    def setup(self) -> None:
        super().setup()
        seconds = self.server.limits.read_timeout
        self.connection.settimeout(seconds)  # between two bytes; the timer is for all of them
        self._timer = threading.Timer(seconds, self._hang_up)
        self._timer.daemon = True
        self._timer.start()

    def finish(self) -> None:
        self._timer.cancel()
        super().finish()

    def _hang_up(self) -> None:
        try:
            self.connection.shutdown(socket.SHUT_RD)  # whoever is reading meets the end, and can still answer
        except OSError:
            logger.debug("a slow client had left")

    def do_GET(self) -> None:
        self._respond(self._get)

    def do_POST(self) -> None:
        self._respond(self._post)

    def _respond(self, answer: Any) -> None:
        try:
            self._send(HTTPStatus.OK, answer())
        except Refused as refused:
            blame = {} if refused.image is None else {"image": refused.image}
            self._send(refused.status, {"error": str(refused), **blame})
            self._drain()

    def _get(self) -> dict[str, Any]:
        batchers = self.server.batchers
        if self.path == "/health":
            return {"status": "ok", "waiting": {name: batcher.waiting for name, batcher in batchers.items()}}
        if self.path != "/rewards":
            raise Refused(HTTPStatus.NOT_FOUND, f"no such address: {self.path}; there are /health, /rewards, /score")
        self._authorise()
        about = {name: {"needs_prompt": needs_prompt(batcher.reward)} for name, batcher in batchers.items()}
        return {"rewards": about, "limits": dataclasses.asdict(self.server.limits)}

    def _post(self) -> dict[str, Any]:
        if self.path != "/score":
            raise Refused(HTTPStatus.NOT_FOUND, f"no such address: {self.path}; expected POST /score")
        self._authorise()
        batcher, call = self._call(self._body())
        scores = batcher.submit(call)
        if not wait([scores], self.server.limits.score_timeout).done:
            scores.cancel()
            waited = f"{self.server.limits.score_timeout:g} s"
            raise Refused(HTTPStatus.GATEWAY_TIMEOUT, f"reward {batcher.name!r} took over {waited}")
        try:
            return {"scores": scores.result()}
        except RewardError as error:
            raise Refused(HTTPStatus.UNPROCESSABLE_ENTITY, str(error), error.row) from error
        except Exception as error:  # anyone's reward may raise anything
            logger.exception("reward %r failed", batcher.name)
            text = f"reward {batcher.name!r} failed: {type(error).__name__}: {error}"
            raise Refused(HTTPStatus.INTERNAL_SERVER_ERROR, text) from error

    def _authorise(self) -> None:
        if self.server.token is None:
            return
        given = self.headers.get("Authorization", "").encode("latin-1", "replace")
        if not hmac.compare_digest(given, f"Bearer {self.server.token}".encode()):
            raise Refused(HTTPStatus.UNAUTHORIZED, "wrong or no token; expected 'Authorization: Bearer TOKEN'")

    def _body(self) -> bytes:
        kind = self.headers.get_content_type()
        if kind != "application/json":  # a page in a browser cannot send it to another origin unasked
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"Content-Type is {kind}; expected application/json")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()) or "Transfer-Encoding" in self.headers:
            raise Refused(HTTPStatus.LENGTH_REQUIRED, f"Content-Length is {length!r}; expected the number of bytes")
        if len(length) > 15 or int(length) > self.server.limits.max_body:
            most = self.server.limits.max_body
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body has {length} bytes; at most {most} are taken")
        try:
            body = self.rfile.read(int(length))
        except TimeoutError:
            body = b""
        if len(body) < int(length):
            within = f"{self.server.limits.read_timeout:g} s"
            raise Refused(HTTPStatus.REQUEST_TIMEOUT, f"the body of {length} bytes did not arrive within {within}")
        self._timer.cancel()
        return body

    def _call(self, body: bytes) -> tuple[Batcher, Call]:
        try:
            given = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise Refused(HTTPStatus.BAD_REQUEST, f"the body is not JSON: {error}") from error
        if not isinstance(given, dict) or set(given) != {"reward", "items"} or not isinstance(given["items"], list):
            raise Refused(HTTPStatus.BAD_REQUEST, 'expected {"reward": name, "items": [..]}')
        name, items = given["reward"], given["items"]
        if not isinstance(name, str) or name not in self.server.batchers:
            there = ", ".join(self.server.batchers)
            raise Refused(HTTPStatus.BAD_REQUEST, f"no reward {str(name)[:100]!r} here; there are {there}")
        if not 1 <= len(items) <= self.server.limits.max_batch:
            status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE if items else HTTPStatus.BAD_REQUEST
            most = self.server.limits.max_batch
            raise Refused(status, f"the call has {len(items)} items; expected 1 to {most}")
        images: list[Tensor] = []
        for number, item in enumerate(items):
            images.append(self._image(number, item, sum(image[0].numel() for image in images)))
        return self.server.batchers[name], Call(
            images, [i["prompt"] for i in items], [i.get("metadata") for i in items]
        )

    def _image(self, number: int, item: Any, before: int) -> Tensor:
        """The picture of one item, in a call that has ``before`` pixels already."""
        if (
            not isinstance(item, dict)
            or not {"image", "prompt"} <= set(item) <= {"image", "prompt", "metadata"}
            or not isinstance(item["image"], str)
            or not isinstance(item["prompt"], str)
            or not isinstance(item.get("metadata"), (dict, type(None)))
        ):
            expected = '{"image": base64, "prompt": text, "metadata": object or null}'
            raise Refused(HTTPStatus.BAD_REQUEST, f"item {number} is not {expected}", number)
        most = self.server.limits.max_pixels - before
        try:
            return decode(base64.b64decode(item["image"], validate=True), ("PNG", "JPEG"), most)
        except OSError as error:
            raise Refused(HTTPStatus.BAD_REQUEST, f"image {number} cannot be read: {error}", number) from error
        except ValueError as error:
            raise Refused(HTTPStatus.BAD_REQUEST, f"image {number} is not base64: {error}", number) from error

    def _send(self, status: HTTPStatus, answer: Mapping[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(body)

    def _drain(self) -> None:
        """Read on a little: closing with unread bytes would reset the connection before the answer is read."""
        until = time.monotonic() + 1
        try:
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(1)
            while self.rfile.read1(2**16) and time.monotonic() < until:
                pass
        except OSError:
            logger.debug("a refused client left early")

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses, as JSON too."""
        self._send(HTTPStatus(code), {"error": message or HTTPStatus(code).phrase})

    def log_message(self, format: str, *args: Any) -> None:
        logger.info("%s %s", self.address_string(), format % args)


# The server
class Server(ThreadingHTTPServer):
    """``serve_forever`` runs it, ``shutdown`` and ``server_close`` end it; ``server_port`` tells a port that was given
    as 0. ``RewardError`` where it would listen beyond this machine without a token, or where the port is taken."""

    daemon_threads = True
    request_queue_size = 128

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
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.token, self.limits = token, limits or Limits()
        self._slots = threading.BoundedSemaphore(self.limits.max_connections)
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            raise RewardError(f"cannot listen on {host} port {port}: {error}; give another --host or --port") from error
        self.batchers = {name: Batcher(name, reward, self.limits, device) for name, reward in rewards.items()}

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._slots.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        try:
            request.sendall(b'HTTP/1.0 503 Busy\r\n\r\n{"error": "busy: too many connections"}\n')
        except OSError:
            logger.debug("a client left before it was refused")
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if isinstance(sys.exc_info()[1], OSError):
            logger.info("%s left early", client_address)
        else:
            logger.exception("a call from %s failed", client_address)

    def server_close(self) -> None:
        super().server_close()
        for batcher in self.batchers.values():
            batcher.close()


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


def _token(file: str | None) -> str | None:
    if file is None:
        return os.environ.get(TOKEN) or None
    try:
        return Path(file).read_text("ascii").strip()
    except (OSError, ValueError) as error:
        raise RewardError(f"--token_file {file} cannot be read: {error}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 where the user has something to put right."""
    parser = argparse.ArgumentParser(
        prog="python -m rewards.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--reward",
        action="append",
        required=True,
        metavar="NAME[:KEY=VALUE,...]",
        help=f"may come several times; {', '.join(available())}, or package.module.Class",
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--token_file", help=f"a file that holds the token; default: the variable {TOKEN}")
    parser.add_argument("--device", help="default: a GPU, or the CPU")
    for one in dataclasses.fields(Limits):
        parser.add_argument(f"--{one.name}", type=type(one.default), default=one.default, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        limits = Limits(**{one.name: getattr(arguments, one.name) for one in dataclasses.fields(Limits)})
        named, token = parse_rewards(arguments.reward), _token(arguments.token_file)
        check_token(arguments.host, token)  # before anything heavy is loaded
        device = pick_device(arguments.device)
        server = Server(load_rewards(named, device), arguments.host, arguments.port, token, limits, device)
    except RewardError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    with server:
        logger.info("%s on http://%s:%d", ", ".join(server.batchers), arguments.host, server.server_port)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            logger.info("stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
