"""The page on which people choose, by a real browser: 200 pairs of 512 x 512 pictures by keyboard, with a SIGKILL of
the server in between; how long from key to next picture, and what of the answers is in the file.

    python tests/benchmarks/label.py
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests import label_page
from tests.benchmarks import record


def run(folder: Path, count: int, side: int) -> dict[str, Any]:
    """``count`` pairs answered; the server is killed after half of them, and comes back five answers later."""
    answers, given = folder / "answers.jsonl", {}
    source = label_page.pairs(folder / "in", count, side)
    with label_page.chromium() as browser, label_page.served(str(source), "--output", str(answers)) as server:
        page = label_page.opened(browser, server.url("/annotate/ann"))
        for number in range(count):
            key = ["ArrowLeft", "ArrowRight", "ArrowDown"][number % 3]
            label_page.until(page, "document.body.dataset.item")
            given[label_page.item_of(page)] = key
            label_page.press(page, key)
            page.wait_for_timeout(300)  # nobody is faster
            if number == count // 2:
                server.kill()
            if number == count // 2 + 5:
                server.start()
        label_page.settled(page)
        times = np.array(label_page.latencies(page))
    lines = label_page.standing(answers)
    said = {"tie": "ArrowDown"}
    found = {
        str(line["item"]): said.get(line["label"])
        or ["ArrowRight", "ArrowLeft"]["ab"[line["shown"][0]] == line["label"]]
        for line in lines
    }
    return {
        "pairs": count,
        "side": side,
        "milliseconds": {
            name: float(np.quantile(times, q)) for name, q in (("median", 0.5), ("p95", 0.95), ("most", 1))
        },
        "lost": len(given.keys() - found.keys()),
        "twice": sum(n - 1 for n in Counter(line["item"] for line in lines).values()),
        "other": sum(found.get(item) != key for item, key in given.items()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--side", type=int, default=512)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = run(Path(folder), args.pairs, args.side)
    record("label", figures, quick=args.pairs < 200)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
