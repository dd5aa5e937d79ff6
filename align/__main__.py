"""The ``t2i-align`` command: a thin dispatch to the modules' own ``main``."""

from __future__ import annotations

import sys
from importlib import import_module

COMMANDS = {
    "train": "align.train",
    "encode": "align.encode",
    "sample": "align.sample",
    "rollout": "align.rollout",
    "label": "align.label",
    "evaluate": "align.evaluate",
    "bench": "align.bench",
    "export": "align.export",
    "report": "align.report",
    "score": "rewards.score",
    "agree": "rewards.agree",
    "serve": "rewards.serve",
    "compress": "pruning.compress",
}


def main() -> int:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        print(f"usage: t2i-align {{{','.join(COMMANDS)}}} [options]; 't2i-align COMMAND --help' tells more")
        return 0 if name in ("-h", "--help") else 2
    sys.argv = sys.argv[1:]
    return int(import_module(COMMANDS[name]).main())


if __name__ == "__main__":
    sys.exit(main())
