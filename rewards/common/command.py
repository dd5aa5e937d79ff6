"""What the commands of this package share: their ``--reward`` option, and one line for a mistake."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

from rewards.base import available
from rewards.common.errors import RewardError, UserError

MISTAKE = 2  # exit status where the user has something to put right


def new_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of ``python -m name``, with ``--reward``, which :func:`rewards.config.parse_rewards` reads."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--reward",
        action="append",
        required=True,
        metavar="NAME[:KEY=VALUE,...]",
        help=f"may come several times; {', '.join(available())}, or package.module.Class; with a label: "
        "'{name: NAME, label: LABEL, args: {KEY: VALUE}}'",
    )
    return parser


def add_reading_options(parser: argparse.ArgumentParser, max_bad: int) -> None:
    """The options of a command that reads images and scores them in batches."""
    parser.add_argument("--caption_column", help="default: the first of caption, prompt, text that is there")
    parser.add_argument("--split", help="of a save_to_disk folder, a hub id (default train), or a folder of several")
    parser.add_argument("--limit", type=int, help="the first LIMIT rows only")
    parser.add_argument(
        "--max_bad", type=int, default=max_bad, help="stop at more unusable ones (default: %(default)s)"
    )
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=min(8, os.cpu_count() or 1), help="that decode, per process")
    parser.add_argument("--device", help="default: this process's GPU, or the CPU")


def check_at_least(arguments: argparse.Namespace, **least: int) -> None:
    """``RewardError`` where one of these options is given and below its least value."""
    for name, bound in least.items():
        if (value := getattr(arguments, name)) is not None and value < bound:
            raise RewardError(f"--{name} is {value}; expected at least {bound}")


class OldName(argparse.Action):
    """An option under its name of version 0.1: it still works and says what it is called now."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        print(
            f"warning: {option} is called --{self.dest} now; the old name goes with the next release", file=sys.stderr
        )
        setattr(namespace, self.dest, values)


def status(command: Callable[[], object]) -> int:
    """The exit status of a command: the number that it returns, or 0; :data:`MISTAKE` where it raises a ``UserError``,
    which is told on stderr; 130 where it is interrupted. A bug keeps its traceback."""
    try:
        answer = command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return answer if isinstance(answer, int) else 0
