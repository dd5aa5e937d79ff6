"""The page on which people choose, in a real browser: Chromium, driven by Playwright."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from tests import label_page
from tests.helpers import HOSTILE
from tests.label_page import item_of, latencies, opened, press, served, settled, standing, until

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        label_page.CHROMIUM is None or importlib.util.find_spec("playwright") is None,
        reason="needs Chromium and playwright: `make test-browser` installs them",
    ),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with label_page.chromium() as found:
        yield found


def chosen(line: dict[str, Any]) -> str:
    """The key that gave a line of pairs."""
    if line["label"] in ("tie", "both bad", "skip"):
        return {"tie": "ArrowDown", "both bad": "ArrowUp", "skip": "s"}[line["label"]]
    return "ArrowLeft" if "ab"[line["shown"][0]] == line["label"] else "ArrowRight"


@pytest.mark.parametrize("count", [24, pytest.param(200, marks=pytest.mark.slow)])
def test_pairs_by_keyboard_with_undo_and_a_kill_in_between(browser: Browser, tmp_path: Path, count: int) -> None:
    """0 answers lost, 0 twice, each the one that was given; the next picture within 100 ms, by the median."""
    answers, keys = tmp_path / "answers.jsonl", ["ArrowLeft", "ArrowRight", "2", "1", "ArrowDown", "x", "s"]
    given: dict[str, str] = {}
    same = {"1": "ArrowLeft", "2": "ArrowRight", "x": "ArrowUp"}

    def choose(page: Page, number: int) -> None:
        key = keys[number % len(keys)]
        until(page, "document.body.dataset.item")
        given[item_of(page)] = same.get(key, key)
        press(page, key)

    with served(str(label_page.pairs(tmp_path / "in", count)), "--output", str(answers)) as server:
        page = opened(browser, server.url("/annotate/ann"))
        for number in range(12):
            choose(page, number)
        page.keyboard.press("q")
        page.keyboard.press("e")
        choose(page, 0)
        settled(page)
        assert standing(answers)[-1]["why"] == ["prompt", "style"]
        last = item_of(page)
        press(page, "u")  # the answer before comes back, to be given again
        undone = item_of(page)
        assert undone in given and given.pop(undone) == "ArrowLeft"
        choose(page, 1)
        assert item_of(page) == last and standing(answers) != []
        settled(page)
        server.kill()  # SIGKILL
        for number in range(5):
            choose(page, number)  # what is ahead is in the browser already
        until(page, "document.getElementById('state').textContent.includes('5 answers wait in this browser')")
        server.start()
        while (number := len(given)) < count:
            choose(page, number)
        page.wait_for_selector("[data-state=done]")
        settled(page)
        times = latencies(page)
        assert page.locator("#count").text_content() == f"{count} of {count}"
        page.context.close()
    found = standing(answers)
    assert Counter(line["item"] for line in found) == dict.fromkeys(range(count), 1)
    assert {str(line["item"]): chosen(line) for line in found} == given
    assert len(times) >= count and median(times) < 100, times


def test_answers_outlive_the_page_that_could_not_send_them(browser: Browser, tmp_path: Path) -> None:
    """The server dies, the laptop is closed; both come back."""
    answers = tmp_path / "answers.jsonl"
    with served(str(label_page.pairs(tmp_path / "in", 6)), "--output", str(answers)) as server:
        page = opened(browser, server.url("/annotate/ann"))
        server.kill()
        for _ in range(3):
            press(page, "ArrowLeft")
        context = page.context
        page.close()
        assert answers.read_text() == ""
        server.start()
        page = context.new_page()
        page.goto(server.url("/annotate/ann"))
        page.wait_for_selector("body[data-item]")
        settled(page)
        assert len(standing(answers)) == 3
        press(page, "Backspace")  # also what an earlier page said can be taken back
        settled(page)
        assert len(standing(answers)) == 2
        while item_of(page):
            press(page, "ArrowRight")
        settled(page)
        context.close()
    assert Counter(line["item"] for line in standing(answers)) == dict.fromkeys(range(6), 1)


def test_two_people_at_once_share_the_work(browser: Browser, tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    with served(str(label_page.pairs(tmp_path / "in", 16)), "--output", str(answers)) as server:
        pages = [opened(browser, server.url(f"/annotate/{name}")) for name in ("ann", "bob")]
        second = pages[0].context.new_page()  # another tab of the same person shows the same to nobody twice
        second.goto(server.url("/annotate/ann"))
        open_pages = [*pages, second]
        while open_pages:
            for page in list(open_pages):
                page.wait_for_selector("body[data-item], [data-state=waiting], [data-state=done]")
                if item_of(page):
                    press(page, "ArrowLeft")
                else:
                    open_pages.remove(page)
        for page in pages:
            settled(page)
            page.context.close()
    found = standing(answers)
    assert Counter(line["item"] for line in found) == dict.fromkeys(range(16), 1)
    assert {line["annotator"] for line in found} == {"ann", "bob"}


def grids(folder: Path) -> Path:
    """Three prompts with four pictures each."""
    folder.mkdir()
    rows = []
    for number in range(12):
        Image.new("RGB", (32, 32), (20 * number, 90, 200)).save(folder / f"{number:02d}.png")
        rows.append(f'{{"file_name": "{number:02d}.png", "text": "prompt {number // 4}"}}')
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def test_best_of_four_by_key_by_click_and_in_order(browser: Browser, tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    with served(str(grids(tmp_path / "in")), "--task", "best", "--output", str(answers)) as server:
        page = opened(browser, server.url("/annotate/ann"))
        press(page, "3")
        with page.expect_response("**/answers"):
            page.get_by_role("button", name="Picture 2 of 4 is the best").click()
        page.keyboard.press("o")
        page.get_by_role("button", name="Picture 4 of 4, not ranked").click()
        page.keyboard.press("2")
        page.keyboard.press("1")  # one is left, which is the last
        assert page.locator(".ranked").all_text_contents() == ["3rd", "2nd", "4th", "1st"]
        page.keyboard.press("Enter")
        page.wait_for_selector("[data-state=done]")
        settled(page)
        page.context.close()
    ranked = [[line["ranking"][place] for place in line["shown"]] for line in standing(answers)]
    assert ranked == [[2, 2, 1, 2], [2, 1, 2, 2], [3, 2, 4, 1]]


def test_hostile_texts_and_pictures_are_shown_or_refused_in_words(browser: Browser, tmp_path: Path) -> None:
    """And nothing goes to another host; a large picture comes small, and whole when asked for."""
    source = label_page.pairs(tmp_path / "in", 6, prompts=HOSTILE)
    Image.new("L", (10_000, 5_000), 90).save(tmp_path / "in/0004-a.png", compress_level=1)
    bad = tmp_path / "in/0005-a.png"
    bad.write_bytes(bad.read_bytes()[:80])
    answers, hosts, seen = tmp_path / "answers.jsonl", set(), {}
    with served(str(source), "--output", str(answers)) as server:
        page = browser.new_context().new_page()
        page.on("request", lambda request: hosts.add(re.sub(r"^(blob:)?https?://([^/]*).*", r"\2", request.url)))
        page.on("dialog", lambda dialog: pytest.fail(f"a caption became a script: {dialog.message}"))
        page.goto(server.url("/annotate/ann"))
        for _ in range(6):
            page.wait_for_selector("body[data-item]")
            item = item_of(page)
            seen[item] = page.locator("#prompt").text_content()
            if item == "4":
                widths = page.locator("#pictures img").evaluate_all("all => all.map(image => image.naturalWidth)")
                assert sorted(widths) == [64, 1280]
                page.keyboard.press("z")
                page.keyboard.press(f"{widths.index(1280) + 1}")
                until(page, "document.getElementById('which').textContent.includes('10000 × 5000')")
                page.keyboard.press("Escape")
            if item == "5":
                assert "This picture cannot be shown: not a readable image" in str(
                    page.locator("#pictures").text_content()
                )
                page.keyboard.press("ArrowLeft")  # nobody can say that it is better
                assert item_of(page) == "5" and page.locator("#note").text_content() == "It can only be skipped."
                press(page, "s")
            else:
                press(page, "ArrowLeft")
        settled(page)
        page.goto(server.url("/summary"))
        page.context.close()
    assert [seen[str(number)] for number in range(4)] == list(HOSTILE)
    assert hosts == {f"127.0.0.1:{server.port}"}
    assert [line["label"] for line in standing(answers) if line["item"] == 5] == ["skip"]


@pytest.mark.parametrize("task", ["pair", pytest.param("best", marks=pytest.mark.slow)])
def test_it_fits_a_narrow_screen_and_has_a_name_for_everything(browser: Browser, tmp_path: Path, task: str) -> None:
    with served(str(grids(tmp_path / "in")), "--task", task, "--output", str(tmp_path / "a.jsonl")) as server:
        page = opened(browser, server.url("/annotate/ann"), viewport={"width": 360, "height": 740})
        whole = "[document.scrollingElement.scrollWidth, document.scrollingElement.scrollHeight]"
        assert page.evaluate(whole) == [360, 740]
        unnamed = "e => !(e.ariaLabel || e.alt || (e.labels?.[0] || e).textContent.trim())"
        unnamed = f"[...document.querySelectorAll('button, input, img')].filter({unnamed})"
        assert page.evaluate(f"{unnamed}.length") == 0
        boxes = [box.bounding_box() for box in page.locator("#choices button:visible, .choose").all()]
        assert all(box and box["x"] >= 0 and box["x"] + box["width"] <= 360 and box["height"] >= 40 for box in boxes)
        pictures = [box for box in boxes if box and box["height"] > 100]
        assert len(pictures) == (2 if task == "pair" else 4)
        page.goto(server.url("/summary"))
        assert page.evaluate(whole)[0] == 360
        page.context.close()
