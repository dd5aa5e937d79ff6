"""Files of settings: what ``--config`` names, and what a run keeps of its own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from align.common.errors import UserError
from align.common.renames import upgrade
from rewards.data.text import load_yaml, read_text


class OnceLoader(yaml.SafeLoader):
    """YAML of which no key comes twice: the later would win without a word. ``None`` is null and ``1e-5`` a number, as
    they are to whoever writes Python."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set[tuple[str, str]]()
        for key, _ in node.value:  # as they are written: merged ones (<<) are there to be overridden
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    line = node.start_mark.line + 1
                    raise yaml.YAMLError(f"the key {key.value!r} comes twice in the mapping from line {line} on")
                seen.add((key.tag, key.value))
        return node


OnceLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("None"), ["N"])
OnceLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


def read_settings(path: Path, told: list[str] | None = None) -> dict[str, Any]:
    """The settings in a YAML file, in today's names; what was renamed is ``told``. Raises :class:`UserError`."""
    try:
        content = load_yaml(read_text(path), OnceLoader)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        given = "nothing" if content is None else f"a {type(content).__name__}"
        raise UserError(f"{path} holds {given}; expected settings, a line for each, such as seed: 0")
    return dict(upgrade(content, told=told))
