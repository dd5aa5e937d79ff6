"""What the commands of this package share: their ``--reward`` option, and one line for a mistake."""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NoReturn

from rewards.base import available
from rewards.common.device import is_out_of_memory
from rewards.common.errors import DataError, RewardError, UserError, shortened

MISTAKE = 2  # exit status where the user has something to put right
STOPPED = 75  # where the command was told to end and can be given again (sysexits' EX_TEMPFAIL)
DEBUG = "--debug"
# how gloo and NCCL say that the other end of an exchange is gone
LOST = re.compile(r"Connection (closed|reset) by peer|remote process exited|Broken pipe")
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


class Ended(KeyboardInterrupt):
    """SIGTERM or SIGHUP, which clusters send, is raised wherever the command is, as Ctrl-C is."""


class OneLine(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage that would bury it."""

    def error(self, message: str) -> NoReturn:
        self.exit(MISTAKE, f"{self.prog}: error: {' '.join(message.split())} (see --help)\n")


def new_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of ``python -m name``, with ``--reward``, which :func:`rewards.config.parse_rewards` reads, and
    :data:`DEBUG`, which :func:`status` does."""
    parser = OneLine(
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
    parser.add_argument(DEBUG, action="store_true", help="show the traceback of an error too")
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
        if (value := getattr(arguments, name)) is not None and not value >= bound:  # nor NaN
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


def exit_status(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """A command's ``main``, which returns its exit status also where the parser would end the process (or a notebook's
    cell) by ``SystemExit``."""

    @functools.wraps(main)
    def returning(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv)
        except SystemExit as leaving:
            if not isinstance(leaving.code, int):
                raise
            return leaving.code

    return returning


def status(command: Callable[[], object], argv: Sequence[str] | None = None) -> int:
    """The exit status of a command: the number that it returns, or 0; 130 where it is interrupted; :data:`STOPPED`
    where a signal told it to end, unless it heard that itself; :data:`MISTAKE` where it raises a ``UserError`` or the
    machine gives out, which is told on stderr in a line, with :data:`DEBUG` among the arguments after the traceback. A
    bug keeps its traceback."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started this process; progress bars write to it all the same
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    try:
        return _status(command, argv)
    except Ended:  # just when it had ended by itself
        return STOPPED


def _status(command: Callable[[], object], argv: Sequence[str] | None) -> int:
    forget = hear(_end)
    try:
        answer = command()
        sys.stdout.flush()  # now, while a closed pipe can still be told
    except Ended as error:
        with contextlib.suppress(OSError):  # of a terminal that is gone
            print(f"stopped by {error}; the files that were written are whole (status {STOPPED})", file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if (told := _told(error)) is None:
            raise
        _let_go_of_output()
        with contextlib.suppress(OSError):  # stderr may be the pipe that is closed
            if DEBUG in (sys.argv[1:] if argv is None else argv):
                traceback.print_exc()
            print(f"error: {told}", file=sys.stderr)
        return MISTAKE
    finally:
        forget()
    return answer if isinstance(answer, int) else 0


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    hear(signal.SIG_DFL)  # a second one ends the process at once
    raise Ended(signal.Signals(number).name)


def hear(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> Callable[[], None]:
    """Let ``handler`` have SIGTERM and SIGHUP, but for one that whoever started this process has it ignore, as `nohup`
    does; returns what takes that back. Only the main thread of a process can hear signals."""
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    heard = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heard}

    def forget() -> None:
        for number in list(before):
            signal.signal(number, before.pop(number))

    return forget


def run_until_stopped(serve: Callable[[], object], stop: Callable[[], object]) -> None:
    """``serve``, which uvicorn does, until Ctrl-C or a signal ends that; uvicorn alone does not know SIGHUP."""
    forget = hear(lambda _number, _frame: stop())
    try:
        with contextlib.suppress(KeyboardInterrupt):  # which uvicorn raises anew when it has ended
            serve()
    finally:
        forget()


def _told(error: Exception) -> str | None:
    """What a user is told of an error that is none of ours; None of a bug."""
    if isinstance(error, UserError):
        text = str(error)
        rows = isinstance(error, DataError) or text.count("\n") < 3
        return text if rows else shortened(text, 1000)
    if isinstance(error, BrokenPipeError) and error.filename is None:
        return "nobody reads the output any more; the files that were written are whole"
    if isinstance(error, OSError):
        named = error.filename and error.strerror
        what = f"{error.filename}: {error.strerror}" if named else shortened(str(error), 600)
        kept = "the files that were written are whole; " if error.errno in UNWRITABLE else ""
        return f"{what} ({kept}{DEBUG} shows where)"
    if is_out_of_memory(error):
        return f"out of memory: {shortened(str(error)) or 'no more is given'}; lower the batch size or the resolution"
    if isinstance(error, RuntimeError) and LOST.search(str(error)):
        rank = os.environ.get("RANK", "?")
        return (
            f"process {rank} has lost another one of this run, whose own error says why it ended ({DEBUG} shows where)"
        )
    return None


def _let_go_of_output() -> None:
    """What cannot be written to stdout is dropped: Python would complain of it once more when it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
