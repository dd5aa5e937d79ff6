"""A page on which people choose, for tests and benchmarks: Chromium, the command in a process that can be killed,
pictures."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from tests.helpers import launch

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
ARGUMENTS += ["--disable-component-update", "--disable-sync", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
FAULTS: list[str] = []  # of scripts


@contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's Chromium, without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


def command(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    from align.label import main

    os._exit(main(list(arguments)))


class Command:
    """``align.label`` on a port of its own, which a restart takes again."""

    def __init__(self, *words: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.words = [*words, "--port", str(self.port)]
        self.process: ForkServerProcess | None = None

    def url(self, path: str = "/") -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def start(self) -> None:
        self.process = launch(self.words, target=command)
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(self.url("/static/label.css"), timeout=5).close()
                return
            except OSError:
                assert self.process.is_alive() and time.monotonic() < deadline, "the server did not come"
                time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


@contextmanager
def served(*words: str) -> Iterator[Command]:
    one = Command(*words)
    one.start()
    try:
        yield one
    finally:
        one.kill()


def pairs(folder: Path, count: int, side: int = 64, prompts: Sequence[str] = ()) -> Path:
    """A preference set of ``count`` pairs of pictures that differ, a file each."""
    rng, rows = np.random.default_rng(0), []
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        names = [f"{number:04d}-{one}.png" for one in "ab"]
        for name in names:
            ground = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(ground).resize((side, side), Image.Resampling.BICUBIC).save(folder / name, compress_level=1)
        prompt = prompts[number] if number < len(prompts) else f"prompt {number}"
        rows.append({"prompt": prompt, "chosen": names[0], "rejected": names[1]})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "pairs.jsonl"


ENDED = "['done', 'waiting'].includes(document.body.dataset.state)"


def opened(browser: Browser, url: str, **how: Any) -> Page:
    """A page of a person, with what comes next on the screen; :func:`settled` fails where its script has failed."""
    page = browser.new_context(**how).new_page()
    page.set_default_timeout(20_000)
    page.on("pageerror", lambda error: FAULTS.append(str(error)))
    page.goto(url)
    page.wait_for_selector("body[data-item]")
    return page


def item_of(page: Page) -> str:
    """The key of the item that is on the screen."""
    return str(page.evaluate("document.body.dataset.item || ''"))


def press(page: Page, key: str) -> None:
    """Press, and wait for the next item or the end; between them, while pictures load, there is none."""
    before = item_of(page)
    page.keyboard.press(key)
    until(page, f"document.body.dataset.item ? document.body.dataset.item !== '{before}' : {ENDED}")


def until(page: Page, condition: str, seconds: float = 20) -> None:
    """Wait for a condition in JavaScript, which the page's own policy does not let Playwright ask from within."""
    deadline = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, f"never came: {condition}; {page.evaluate('document.body.innerText')}"
        page.wait_for_timeout(5)


def settled(page: Page) -> None:
    """Wait until the server has all answers."""
    assert not FAULTS
    until(page, "outbox.length === 0 && !sending")


def latencies(page: Page) -> list[float]:
    """Milliseconds from each key to the next picture on the screen, by the page's own clock."""
    return [
        float(x) for x in page.evaluate("performance.getEntriesByName('next-picture').map(entry => entry.duration)")
    ]


def standing(answers: Path) -> list[dict[str, Any]]:
    """The answers in the file that nobody took back."""
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    undone = {line["undo"] for line in lines if "undo" in line}
    return [line for line in lines if "undo" not in line and line["id"] not in undone]
