"""One HTML page of one or several runs, for a browser that is offline: curves, samples through time, what differs.

    python -m align.report outputs/mine
    python -m align.report outputs/a outputs/b "wide=outputs/c" --output page.html

A run that is still going is shown as far as it has come, a killed one as far as it came. Runs are named by their
folders, or by NAME=FOLDER. The page asks nothing of any host and does not grow with the length of a run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from align.common.errors import UserError
from align.evaluation.run_page import RUNS, prompts_shown, run_page
from align.evaluation.run_record import read_run, require_run
from rewards.common.command import DEBUG, OneLine, exit_status, status
from rewards.common.files import write_text


def named(given: Sequence[str]) -> dict[str, Path]:
    """Run folders by the names that a page gives them: the word before ``=``, else as much of the end of the path as
    tells it from the others. Raises :class:`UserError` where two are one folder or have one name."""
    if len(given) > RUNS:
        raise UserError(f"{len(given)} runs are more than a page can tell apart; give at most {RUNS}")
    labels: list[str | None] = []
    paths: list[Path] = []
    for word in given:
        label, equals, rest = word.partition("=")
        own = bool(equals and label and rest) and not Path(word).exists()
        labels.append(label if own else None)
        paths.append(Path(rest if own else word))
        require_run(paths[-1])
    places = [path.resolve() for path in paths]
    if twice := [path for k, path in enumerate(paths) if places[k] in places[:k]]:
        raise UserError(f"{twice[0]} is given twice; give each run once")
    depth = next(
        d for d in range(1, 1 + max(len(p.parts) for p in places)) if len({p.parts[-d:] for p in places}) == len(places)
    )
    names = [label or "/".join(place.parts[-depth:]) for label, place in zip(labels, places, strict=True)]
    if len(set(names)) < len(names):
        raise UserError(
            f"two runs are named {next(n for n in names if names.count(n) > 1)}; give other names: NAME=RUN"
        )
    return dict(zip(names, paths, strict=True))


def report(runs: Sequence[str], output: Path | None = None, now: float | None = None) -> Path:
    """Write the page of ``runs``, by default ``report.html`` in the first one's folder; ``now`` is the time that it
    tells of runs that still go. Returns where. Raises :class:`UserError`."""
    now = time.time() if now is None else now
    found = named(runs)
    output = output or next(iter(found.values())) / "report.html"
    if output.is_dir():
        raise UserError(f"--output is the folder {output}; expected the name of an HTML file")
    records = [read_run(name, path, now, prompts_shown(len(found))) for name, path in found.items()]
    page = run_page(records, now).html()
    write_text(output, page.encode(errors="replace").decode())  # JSON may hold halves of characters
    return output


@exit_status
def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLine(
        prog="python -m align.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder of align.train, or NAME=FOLDER")
    parser.add_argument("--output", type=Path, help="the HTML file (default: report.html in the first run's folder)")
    parser.add_argument(DEBUG, action="store_true", help="show the traceback of an error too")
    arguments = parser.parse_args(argv)
    return status(lambda: print(report(arguments.runs, arguments.output)), argv)


if __name__ == "__main__":
    sys.exit(main())
