"""The ``t2i-align`` command: a thin dispatch to the modules' own ``main``."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import version

COMMANDS = {
    "train": ("align.train", "fine-tune a pipeline through an objective"),
    "encode": ("align.encode", "encode what a run trains on, and stop"),
    "sample": ("align.sample", "draw pictures of prompts"),
    "rollout": ("align.rollout", "draw pictures for people to compare, with their trajectories"),
    "label": ("align.label", "open the page on which people choose"),
    "evaluate": ("align.evaluate", "set a tuned model beside its base"),
    "bench": ("align.bench", "run a public bench"),
    "export": ("align.export", "write a tuned run for other programs, or put it on the hub"),
    "report": ("align.report", "make one HTML page of runs"),
    "score": ("rewards.score", "score pictures with reward models"),
    "agree": ("rewards.agree", "say how often rewards agree with people"),
    "serve": ("rewards.serve", "answer with scores over HTTP"),
    "compress": ("pruning.compress", "prune, heal and quantize a pipeline"),
}
USAGE = "\n".join(
    [
        "usage: t2i-align COMMAND [options]",
        "",
        *(f"  {name:10}{does}" for name, (_, does) in COMMANDS.items()),
        "",
        "'t2i-align COMMAND --help' tells more.",
    ]
)


def main() -> int:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in COMMANDS:
        sys.argv = sys.argv[1:]
        return int(import_module(COMMANDS[name][0]).main())
    if name in ("-h", "--help", "--version"):
        print(f"t2i-align {version('t2i-align')}" if name == "--version" else USAGE)
        return 0
    print(f"error: there is no command {name!r}; known are {', '.join(COMMANDS)}" if name else USAGE, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
