"""Rewards over HTTP: ``python -m rewards.serve --reward Shapes --port 8000``; :class:`Remote` calls it.

    GET  /health   {"status": "ok", "waiting": {REWARD: images}}; needs no token
    GET  /rewards  {"rewards": {REWARD: {"needs_prompt": bool}}, "limits": {..}}
    POST /score    {"reward": REWARD, "items": [{"image": PNG or JPEG in base64, "prompt": text, "metadata": {..}}]}
                   -> {"scores": [..]}; "metadata" may be left out

/score also takes a safetensors file (Content-Type: application/x-safetensors) of images (3, H, W), uint8 or float32 in
[0, 1], which has this JSON as "call" in its metadata, where "image" is the name of a tensor.

What cannot be done is answered as {"error": text}, with "image", its place in the call, where one is to blame:
400 not understood, 401 wrong token, 404 and 405 no such address, 408 too slow, 413 too large, 415 neither JSON nor
safetensors, 422 the reward refused, 500 the reward failed, 503 busy, try again, 504 the reward took too long.
What is no HTTP is a plain 400, and who does not send the head of a call in time is cut off without a word.

It listens on this machine only unless ``--host`` says otherwise, and then asks for a token (``Authorization: Bearer``),
which it takes from ``--token_file`` or the environment variable ``T2I_ALIGN_TOKEN``. It speaks plain HTTP: over a
network that others read, put a proxy with TLS before it. Nothing is unpickled.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rewards import RewardError
from rewards.base import RewardSum
from rewards.common.command import exit_status, new_parser, status
from rewards.common.device import pick_device
from rewards.config import parse_rewards
from rewards.models.remote import TOKEN
from rewards.serving.batching import Limits

logger = logging.getLogger(__name__)


def token_from(file: str | None) -> str | None:
    """The token in ``file``, or in the environment variable; None where there is neither. ``RewardError``."""
    if file is None:
        return os.environ.get(TOKEN) or None
    try:
        return Path(file).read_text("ascii").strip()
    except (OSError, ValueError) as error:
        raise RewardError(f"--token_file {file} cannot be read: {error}") from error


def run(arguments: argparse.Namespace) -> int:
    """The command; ``RewardError`` where the user has something to put right."""
    try:
        from rewards.serving.server import Server, check_token
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn"):
            raise
        raise RewardError(f"the server needs {error.name}; pip install 't2i-align[serve]'") from error
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    limits = Limits(**{one.name: getattr(arguments, one.name) for one in dataclasses.fields(Limits)})
    named, token = parse_rewards(arguments.reward, weighted=False), token_from(arguments.token_file)
    check_token(arguments.host, token)  # before anything heavy is loaded
    device = pick_device(arguments.device)
    server = Server(RewardSum.of(named, device).rewards, arguments.host, arguments.port, token, limits, device)
    logger.info("%s on http://%s:%d", ", ".join(server.batchers), arguments.host, server.port)
    server.run()
    logger.info("stopped")
    return 0


@exit_status
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 where the user has something to put right."""
    parser = new_parser("rewards.serve", __doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--token_file", help=f"a file that holds the token; default: the variable {TOKEN}")
    parser.add_argument("--device", help="default: a GPU, or the CPU")
    for one in dataclasses.fields(Limits):
        parser.add_argument(f"--{one.name}", type=type(one.default), default=one.default, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    return status(lambda: run(arguments), argv)


if __name__ == "__main__":
    sys.exit(main())
