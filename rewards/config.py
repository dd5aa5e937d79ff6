"""How a user names rewards: the same on every command line and in every YAML file."""

from __future__ import annotations

import math
import os
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rewards.common.errors import RewardError, shortened
from rewards.common.files import fingerprint
from rewards.data.text import load_yaml

EXPECTED = "expected NAME, NAME:KEY=VALUE,KEY=VALUE or '{name: NAME, weight: 1, label: LABEL, args: {KEY: VALUE}}'"
TAKEN = ("file", "prompt", "total")  # names of other columns beside the rewards'


@dataclass
class RewardConfig:
    """One reward as a user names it, on a command line or in YAML.

    Args:
        name: a built-in reward's name, or an import path.
        weight: in a weighted sum; 0 only watches it, so that hacking of the others shows.
        args: the reward's own arguments.
        label: its name in logs and columns; default ``name``.
        normalize: [mean, std] of its scores, measured beforehand: (score - mean) / std is what ``weight`` is of.
        timeout: seconds after which a call that has not answered ends the run, by the reward's name; null waits.
    """

    name: str
    weight: float = 1.0
    args: dict[str, Any] = field(default_factory=dict)
    label: str | None = None
    normalize: list[float] | None = None
    timeout: float | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise RewardError(f"reward {self.title!r}: weight is {self.weight}; expected a finite number")
        if self.timeout is not None and not 0 < self.timeout <= threading.TIMEOUT_MAX:
            raise RewardError(f"reward {self.title!r}: timeout is {self.timeout}; expected seconds above 0, or null")
        if self.normalize is not None:
            check_statistics(self.title, self.normalize)

    @property
    def title(self) -> str:
        """The label, or the name where there is none."""
        return self.label or self.name

    def arguments(self) -> dict[str, Any]:
        """``args``, secrets that lie elsewhere in full. ``RewardError`` where they do not."""
        filled: dict[str, Any] = _filled(self.title, self.args)
        return filled

    def settings(self) -> dict[str, Any]:
        """What the scores depend on, with the :func:`fingerprint` of files; a token authorises, it changes none."""
        args = without_secrets({key: value for key, value in self.args.items() if not is_secret(key)})
        files = self.files()
        return {"name": self.name, "args": args} | ({"files": files} if files else {})

    def files(self) -> dict[str, str]:
        """The :func:`fingerprint` of every file or folder that an argument names."""
        named = {key: value for key, value in self.args.items() if isinstance(value, str) and value}
        paths = {key: Path(value).expanduser() for key, value in named.items() if not is_secret(key)}
        return {key: fingerprint(path) for key, path in paths.items() if _exists(path)}

    def record(self) -> dict[str, Any]:
        """What may be written down of it, with its place in a sum."""
        fields = asdict(self)
        del fields["timeout"]
        return without_secrets(fields)


Named = str | Mapping[str, Any] | RewardConfig


def parse_rewards(given: Named | Sequence[Named], weighted: bool = True) -> list[RewardConfig]:
    """The rewards of a command line or a YAML list.

    An entry is ``NAME``, ``NAME:KEY=VALUE,KEY=VALUE`` (a VALUE is a YAML scalar without commas), a mapping with the
    fields of :class:`RewardConfig`, or the YAML of such a mapping or of a list of entries. ``RewardError`` where it is
    none of these, where two have one label, and, for a command in which rewards are not summed (``weighted`` is false),
    where one has a weight.
    """
    entries = [given] if isinstance(given, str | Mapping | RewardConfig) else given
    if not isinstance(entries, Sequence):
        raise RewardError(f"rewards are {given!r}; {EXPECTED}, or a list of these")
    configs = [config for entry in entries for config in _read(entry)]
    titles = [config.title for config in configs]
    for config in configs:
        if titles.count(config.title) > 1:
            raise RewardError(
                f"two rewards are called {config.title!r}; give one a label of its own: "
                "'{name: .., label: .., args: ..}'"
            )
        if config.title in TAKEN:
            raise RewardError(f"a reward cannot be called {config.title!r}, which is another column; give a label")
        if not weighted and (config.weight != 1 or config.normalize is not None):
            raise RewardError(
                f"reward {config.title!r} has a weight or normalize, but this command tells each reward's scores by "
                "themselves and sums none; leave both out"
            )
    return configs


def plain_rewards(given: Named | Sequence[Named]) -> list[dict[str, Any]]:
    """:func:`parse_rewards`, as plain values with every field."""
    return [asdict(config) for config in parse_rewards(given)]


def _read(entry: Named) -> list[RewardConfig]:
    if isinstance(entry, RewardConfig):
        return [entry]
    content: Any = entry
    try:
        if isinstance(entry, str):
            content = load_yaml(entry) if entry.lstrip().startswith(("{", "[")) else _short(entry)
    except RewardError:
        raise
    except ValueError as error:
        raise RewardError(f"--reward {shortened(str(entry))} is not YAML ({error}); {EXPECTED}") from error
    if isinstance(content, list):
        return [config for one in content for config in _read(one)]
    known = {one.name for one in fields(RewardConfig)}
    if not isinstance(content, Mapping) or set(content) - known:
        keys = f"the keys {', '.join(map(str, content))}" if isinstance(content, Mapping) else "no keys"
        raise RewardError(f"--reward {entry} has {keys}; {EXPECTED}")
    values = {key: value for key, value in content.items() if value is not None}
    number = int | float
    types: dict[str, Any] = {
        "name": str,
        "label": str,
        "args": dict,
        "weight": number,
        "normalize": list,
        "timeout": number,
    }
    sound = all(isinstance(value, types[key]) and not isinstance(value, bool) for key, value in values.items())
    if not sound or not values.get("name") or values.get("label") == "":
        raise RewardError(f"--reward {entry}: {EXPECTED}")
    return [RewardConfig(**values)]


def _short(text: str) -> dict[str, Any]:
    """``NAME:KEY=VALUE,KEY=VALUE``."""
    name, _, rest = text.partition(":")
    args: dict[str, Any] = {}
    for item in rest.split(",") if rest else []:
        key, equals, value = item.partition("=")
        if not equals or not key.isidentifier() or key in args:
            raise RewardError(f"--reward {text}: {item!r} is no KEY=VALUE of its own; {EXPECTED}")
        args[key] = load_yaml(value)
    return {"name": name, "args": args}


# Secrets: a config may name where one lies, and none is written into a run folder.
SECRETS = (
    *("token", "api_key", "apikey", "access_key", "secret_key", "private_key", "password", "passwd", "passphrase"),
    *("secret", "authorization", "bearer", "credentials", "cookie"),
)
ELSEWHERE = ("env:", "file:")


def is_secret(key: object) -> bool:
    """Whether a setting of this name, or one that ends in it (``hf_token``), authorises."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", str(key)).lower().replace("-", "_")  # accessToken
    return any(name == secret or name.endswith(f"_{secret}") for secret in SECRETS)


def without_secrets(content: Any) -> Any:
    """``content``, plain values, with the secrets in it replaced by the environment variable that is to hold them."""
    if isinstance(content, Mapping):
        return {
            key: f"env:T2I_ALIGN_{str(key).upper().replace('-', '_')}"
            if is_secret(key) and value and not str(value).startswith(ELSEWHERE)
            else without_secrets(value)
            for key, value in content.items()
        }
    if isinstance(content, str):  # of an address, whoever is to be let in
        return re.sub(r"(?<=://)[^/@\s:]*:[^/@\s]+(?=@)", "***", content)
    return [without_secrets(item) for item in content] if isinstance(content, list) else content


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a long text, a NUL
        return False


def _filled(title: str, content: Any) -> Any:
    """``content`` with the secrets in it, at any depth, that lie elsewhere."""
    if isinstance(content, Mapping):
        return {k: _secret(title, k, v) if is_secret(k) else _filled(title, v) for k, v in content.items()}
    return [_filled(title, item) for item in content] if isinstance(content, list) else content


def _secret(title: str, key: str, value: Any) -> Any:
    """A secret that is given as ``env:VARIABLE`` or ``file:PATH``; any other is what it is."""
    if not isinstance(value, str) or not value.startswith(ELSEWHERE):
        return value
    kind, _, place = value.partition(":")
    if kind == "env":
        if not (secret := os.environ.get(place)):
            raise RewardError(f"reward {title!r}: {key} is in the environment variable {place}, which is not set")
        return secret
    try:
        return Path(place).expanduser().read_text("utf-8").strip()
    except (OSError, ValueError) as error:
        raise RewardError(f"reward {title!r}: {key} is in the file {place}, which cannot be read: {error}") from error


def check_statistics(name: str, statistics: Sequence[float]) -> None:
    """``RewardError`` unless these are the mean and the standard deviation of the scores of the reward ``name``."""
    numbers = [value for value in statistics if isinstance(value, int | float) and math.isfinite(value)]
    if len(statistics) != 2 or len(numbers) != 2 or numbers[1] <= 0:
        raise RewardError(
            f"reward {name!r} is to be normalized by {statistics}; expected (mean, std), finite, std above 0"
        )
