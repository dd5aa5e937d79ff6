"""What the commands of this package share: their ``--reward`` option, and one line for a mistake."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from rewards import RewardError, available

MISTAKE = 2  # exit status where the user has something to put right


def new_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of ``python -m name``, with ``--reward``, which :func:`rewards.data.inputs.parse_rewards` reads."""
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


def status(command: Callable[[], int]) -> int:
    """Its exit status; a ``RewardError`` becomes one line on stderr and :data:`MISTAKE`."""
    try:
        return command()
    except RewardError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return MISTAKE
