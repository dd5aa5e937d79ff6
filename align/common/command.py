"""Command lines and YAML files: jsonargparse over type hints, so that the import is the registry."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import math
import sys
import tempfile
from argparse import ArgumentError
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace

from align.common.errors import UserError
from align.common.hints import nulls, plain, suggestion
from align.common.renames import tell, upgrade_arguments
from align.common.settings_file import read_settings
from rewards.common.command import DEBUG, status
from rewards.config import RewardConfig, plain_rewards, without_secrets

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


class OneLine(ArgumentParser):
    """Says what is wrong in one line, without the usage that would bury it."""

    leaves = True
    settings: type[DataclassInstance] | None = None

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # the parser of a class within, whose error the outer one tells with its key
            raise ArgumentError(None, message) from ex
        said = " ".join(message.split())
        said = plain(said) + (suggestion(said, self.settings) if self.settings else "")
        if not self.leaves:
            raise UserError(said)
        print(f"{self.prog}: error: {said} (see --help)", file=sys.stderr)
        sys.exit(2)


@functools.cache
def parser_for(settings: type[T], prog: str, description: str | None) -> OneLine:
    """A parser whose options are the fields of the dataclass ``settings``, plus ``--config FILE``."""
    traces = f"{DEBUG} shows the traceback of an error too"
    parser = OneLine(prog=prog, description=description, epilog=traces, parser_mode="yaml", allow_abbrev=False)
    parser.settings = settings
    parser.add_argument("--config", action="config", help="a YAML file; options after it on the line win")
    parser.add_class_arguments(settings, None, fail_untyped=True)
    return parser


def _not_finite(value: object) -> float | None:
    """The first nan or infinity in a setting, which may be a list or a mapping of numbers."""
    if isinstance(value, float):
        return None if math.isfinite(value) else value
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((found for one in inside if (found := _not_finite(one)) is not None), None)


def parse(
    settings: type[T], prog: str, description: str | None, argv: Sequence[str] | None, leaves: bool = True
) -> tuple[T, str]:
    """Settings from the command line, and the resolved YAML that alone gives the same settings. What is wrong with them
    leaves the process by status 2, or raises :class:`UserError`. For secrets the YAML has where they are to lie."""
    parser = parser_for(settings, prog, description)
    parser.leaves = leaves
    told: list[str] = []
    words = [word for word in (sys.argv[1:] if argv is None else argv) if word != DEBUG]
    arguments = upgrade_arguments(_bare_flags(words, settings), told)
    tell(told, "command line")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            reward_keys = _reward_keys(settings)
            arguments = _rewritten(_one_reward_list(arguments, reward_keys), Path(scratch), reward_keys)
        except OSError as error:  # no right to read it, or no room for a copy in today's names
            parser.error(f"--config: {error}")
        except UserError as error:
            parser.error(str(error))
        namespace: Namespace = parser.parse_args(arguments)
    for key, value in namespace.as_flat().__dict__.items():
        if (number := _not_finite(value)) is not None:
            parser.error(f"{key} must be a finite number, got {number}")
        if isinstance(value, int) and abs(value) >= 2**63:
            parser.error(f"{key} must be a number of at most 63 bits, got one of {value.bit_length()}")
    namespace.pop("config", None)
    for key in nulls(namespace, settings):
        parser.error(f"{key} is null; give it a value, or leave it out for its default")
    try:
        values = settings(**vars(parser.instantiate(namespace)))
    except ValueError as error:  # how settings, objectives and data refuse a value
        parser.error(str(error))
    resolved = parser.dump(namespace, skip_none=False, skip_validation=True)  # it comes from the parser itself
    plain = loaded(resolved)
    open_to_all = without_secrets(plain)
    return values, resolved if open_to_all == plain else yaml.safe_dump(open_to_all, sort_keys=False)


def loaded(text: str) -> dict[str, Any]:
    """What resolved settings say. libyaml reads them, which is faster and which thousands of brackets would crash: this
    is for no text of anybody else's."""
    return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}


def dumped(settings: object) -> str:
    """The YAML of settings that were made in Python: the file from which :func:`parse` makes them again."""
    return yaml.safe_dump(without_secrets(_plain(settings)), sort_keys=False)


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        arguments = {each.name: _plain(getattr(value, each.name)) for each in dataclasses.fields(value) if each.init}
        if any(inspect.isabstract(base) for base in type(value).__mro__):  # one of several classes: an objective, say
            return {"class_path": f"{type(value).__module__}.{type(value).__qualname__}", "init_args": arguments}
        return arguments
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _bare_flags(arguments: list[str], settings: type[DataclassInstance]) -> list[str]:
    """``--dry_run`` alone means ``--dry_run true``, as a user of argparse expects."""
    flags = {f"--{field.name}" for field in dataclasses.fields(settings) if field.type in (bool, "bool")}
    return [
        f"{argument}=true" if argument in flags and after.startswith("--") else argument
        for argument, after in zip(arguments, [*arguments[1:], "--"], strict=False)
    ]


def _reward_keys(settings: type, above: str = "") -> list[str]:
    """The dotted names of the settings that list rewards."""
    keys = []
    for name, hint in get_type_hints(settings).items():
        if hint == list[RewardConfig]:
            keys.append(above + name)
        elif dataclasses.is_dataclass(hint) and isinstance(hint, type) and not inspect.isabstract(hint):
            keys += _reward_keys(hint, f"{above}{name}.")
    return keys


def _spellings(key: str) -> tuple[str, str]:
    """``--reward`` comes once for each on a command line, ``rewards`` is a list in YAML; both are taken in both."""
    return key.removesuffix("s"), key.removesuffix("s") + "s"


def _one_reward_list(arguments: list[str], reward_keys: Sequence[str]) -> list[str]:
    """``--reward A --reward B:K=V`` as the one list that jsonargparse takes."""
    for key in reward_keys:
        options = [f"--{name}" for name in _spellings(key)]
        entries, others = [], []
        words = iter(arguments)
        for word in words:
            option, equals, value = word.partition("=")
            if option in options:
                entries.append(value if equals else next(words, ""))
            else:
                others.append(word)
        arguments = [*others, f"--{key}={json.dumps(plain_rewards(entries))}"] if entries else others
    return arguments


def _plain_reward_lists(config: dict[str, Any], reward_keys: Sequence[str]) -> None:
    """Rewards that a YAML file names in short, as the mappings that jsonargparse takes."""
    for key in reward_keys:
        *parents, name = key.split(".")
        section: Any = config
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        for spelling in _spellings(name):
            if isinstance(section, dict) and section.get(spelling) is not None:
                section[name] = plain_rewards(section.pop(spelling))


def _at_home(value: Any) -> Any:
    """``~/`` at the start of a text is the user's home, in YAML and after ``=`` as where the shell sees to it."""
    if isinstance(value, dict):
        return {key: _at_home(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_at_home(item) for item in value]
    if isinstance(value, str) and value.startswith("--") and "=~/" in value:
        return value.replace("=~/", f"={Path.home()}/", 1)
    return str(Path.home() / value[2:]) if isinstance(value, str) and value.startswith("~/") else value


def _rewritten(arguments: list[str], scratch: Path, reward_keys: Sequence[str]) -> list[str]:
    """Config files in today's names, with rewards in full, and without what the line replaces.

    Where the line names another class than the file (``--objective D3PO``), the file's arguments of that class are
    forgotten: jsonargparse would keep those whose names fit, and a beta of 2000 would slip from DPO into D3PO."""
    chosen: dict[str, str] = {}
    for at, argument in enumerate(arguments):
        name, equals, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and not name.endswith(".help"):
            chosen[name.removesuffix(".class_path")] = value if equals else "".join(arguments[at + 1 : at + 2])
    cleaned = [_at_home(argument) for argument in arguments]
    for at, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name != "--config" or not (equals or at + 1 < len(arguments)):
            continue
        path = Path(value if equals else arguments[at + 1])
        if not path.is_file():
            continue  # jsonargparse says so
        told: list[str] = []
        try:
            new = _at_home(read_settings(path, told))
        except UserError as error:
            raise UserError(f"--config {error}") from error
        tell(told, str(path))
        _plain_reward_lists(new, reward_keys)
        for key, entry in list(new.items()):
            class_path = entry.get("class_path") if isinstance(entry, dict) else None
            if class_path and key in chosen and chosen[key].rpartition(".")[2] != str(class_path).rpartition(".")[2]:
                del new[key]
        copy = scratch / f"{at}-{path.name}"
        copy.write_text(yaml.safe_dump(new))
        cleaned[at : at + (1 if equals else 2)] = [f"--config={copy}"] if equals else ["--config", str(copy)]
    return cleaned


def command(run: Callable[[], Any], argv: Sequence[str] | None = None) -> int:
    """Run a command quietly; its exit status is that of :func:`rewards.common.command.status`."""
    from align.common import bitsandbytes_shim
    from align.common.imports import own_process, uncollected

    if argv is None:
        own_process()
    with uncollected():
        bitsandbytes_shim.ensure()
        from diffusers.utils import logging as diffusers_logging  # here: --help and a wrong key need neither library
        from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):  # their loading bars and hints would bury ours
        library.disable_progress_bar()
        library.set_verbosity_error()
    return status(run, argv)
