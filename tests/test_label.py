"""The page on which people choose, without a browser: sources, sessions, the answers file, the server, the summary,
exports."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from align import families, label, rollout
from align.common.errors import DataError, UserError
from align.data.annotations import LabelledRollout
from align.data.preferences import PreferencePairs
from align.evaluation.pictures import Drawing, PictureFolder, Wanted
from align.labelling import answer_file
from align.labelling.access import Access
from align.labelling.answer_file import AnswerFile
from align.labelling.answers import Answer, Refused
from align.labelling.decisions import decisions
from align.labelling.drawing import Background
from align.labelling.items import Item, Picture, uncertainty
from align.labelling.server import Page
from align.labelling.session import GAP, LEASE, Rules, Session
from align.labelling.sources import open_source, read_scores, with_scores
from align.labelling.summary import alpha, summarize
from align.labelling.writers import export
from rewards.common.errors import WriteError
from rewards.data.formats import open_input
from rewards.data.preferences import recognise
from rewards.data.tables import LazyImage
from tests.helpers import HOSTILE, contents
from tests.test_labels import settings

TOKEN = "long-enough"


def picture(folder: Path, name: str, color: str | int = "red", side: int = 6) -> Picture:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), color).save(path)
    return Picture(name, LazyImage(path))


def pairs(folder: Path, count: int, models: tuple[str, str] = ("", "")) -> list[Item]:
    """Items of two pictures, of the models where these are named."""
    both = [[picture(folder, f"{k}-{side}.png", k) for side in "ab"] for k in range(count)]
    named = [[Picture(one.name, one.image, model) for one, model in zip(two, models, strict=True)] for two in both]
    return [Item(f"prompt {k}", tuple(two)) for k, two in enumerate(named)]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def session(folder: Path, items: Sequence[Item], clock: Clock | None = None, **rules: Any) -> Session:
    how = Rules(**rules)
    file = AnswerFile(folder / "answers.jsonl", Session.record(items, how, "test") | {"root": "."})
    names = lambda item: [one.keep(folder / "answers-pictures") for one in item.pictures]  # noqa: E731
    return Session(items, how, file, names, clock=clock or time.monotonic)


def entry(of: Session, item: int, choice: Any, identity: str | None = None, **more: Any) -> dict[str, Any]:
    return {
        "id": identity or f"test-{os.urandom(8).hex()}",
        "session": of.digest,
        "item": item,
        "choice": choice,
    } | more


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


# the answers file
def test_an_answer_is_on_the_disk_once_however_often_it_is_sent(tmp_path: Path) -> None:
    one = session(tmp_path, pairs(tmp_path, 3))
    sent = entry(one, 0, 1, "answer-0001")
    assert [one.submit("ann", sent) for _ in range(3)] == ["stored", "known", "known"]
    assert one.submit("ann", entry(one, 0, 2)) == "already"  # another tab
    assert one.submit("bob", entry(one, 0, 2)) == "stored"
    written = lines(tmp_path)
    assert [line["annotator"] for line in written] == ["ann", "bob"]
    first = one.shown("ann", 0)[0]
    assert written[0]["label"] == "ab"[first] and written[0]["shown"][0] == first
    one.file.close()
    again = session(tmp_path, one.items)
    assert [again.submit("ann", sent), again.submit("bob", sent | {"item": 1})] == ["known", "known"]
    assert len(lines(tmp_path)) == 2 and again.answers() == one.answers()


def test_undo_is_a_line_and_frees_the_item(tmp_path: Path) -> None:
    one = session(tmp_path, pairs(tmp_path, 2))
    one.submit("ann", entry(one, 1, 1, "answer-0001"))
    with pytest.raises(Refused, match="somebody else's"):
        one.submit("bob", {"id": "undo-0000", "undo": "answer-0001"})
    with pytest.raises(Refused, match="no answer 'nothing'"):
        one.submit("ann", {"id": "undo-0000", "undo": "nothing"})
    assert one.submit("ann", {"id": "undo-0001", "undo": "answer-0001"}) == "stored"
    assert one.submit("ann", {"id": "undo-0001", "undo": "answer-0001"}) == "known"
    assert one.submit("ann", {"id": "undo-0002", "undo": "answer-0001"}) == "already"
    assert one.answers() == [] and one.progress("ann")["own"] == 0
    assert one.submit("ann", entry(one, 1, "tie")) == "stored"
    one.file.close()
    again = session(tmp_path, one.items)
    assert [answer.worth for answer in again.answers()] == [(0.0, 0.0)] and len(lines(tmp_path)) == 3


def test_a_line_cut_short_by_a_kill_goes_and_the_next_is_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = session(tmp_path, pairs(tmp_path, 3))
    sent = [entry(one, number, 1) for number in range(3)]
    for each in sent[:2]:
        one.submit("ann", each)
    one.file.close()
    path = tmp_path / "answers.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])  # no page was told that the second is there, so it sends it again
    readable = PreferencePairs(str(path)).read()
    assert len(readable) == 1 and "cut short" in caplog.text  # also who trains before the page is started again
    again = session(tmp_path, one.items)
    assert [again.submit("ann", each) for each in sent] == ["known", "stored", "stored"]
    assert [line["id"] for line in lines(tmp_path)] == [each["id"] for each in sent]


def test_what_the_disk_does_not_take_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = session(tmp_path, pairs(tmp_path, 2))
    one.submit("ann", entry(one, 0, 1))
    before, write = (tmp_path / "answers.jsonl").read_bytes(), os.write

    def full(descriptor: int, data: bytes) -> int:
        if len(data) < 30:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[: len(data) // 2])

    monkeypatch.setattr(answer_file.os, "write", full)
    sent = entry(one, 1, 1)
    with pytest.raises(WriteError, match=r"answers.jsonl: No space left on device"):
        one.submit("ann", sent)
    monkeypatch.undo()
    assert (tmp_path / "answers.jsonl").read_bytes() == before
    assert one.submit("ann", sent) == "stored" and len(lines(tmp_path)) == 2


@pytest.mark.parametrize("how", ["replaced", "deleted", "written into", "cut"])
def test_a_file_that_other_hands_have_changed_takes_no_answer(tmp_path: Path, how: str) -> None:
    """It would be lost with a file that is no more, or glued to half a line."""
    one, path = session(tmp_path, pairs(tmp_path, 2)), tmp_path / "answers.jsonl"
    one.submit("ann", entry(one, 0, 1))
    text = path.read_text()
    if how in ("replaced", "deleted"):
        path.rename(tmp_path / "away")
    if how != "deleted":
        path.write_text({"written into": text + '{"half', "cut": text[:-1]}.get(how, text))
    sent = entry(one, 1, 1)
    with pytest.raises(WriteError, match="changed, moved or deleted by other hands; start align.label again"):
        one.submit("ann", sent)
    assert (path.read_text() if path.exists() else "").count("\n") <= 1
    one.file.close()
    again = session(tmp_path, one.items)
    assert again.submit("ann", sent) == "stored" and lines(tmp_path)[-1]["id"] == sent["id"]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"item": 7}, "item 7, of which it says other than there is to say"),
        ({"item": 1, "ranking": [1, 2, 3]}, "item 1, of which"),
        ({"item": 0}, "item 0, which ann has answered before"),
        ({"item": 1, "id": "answer-0001"}, "the id 'answer-0001', which is another line's"),
        ({"item": 1, "label": "left"}, "the label is 'left'; expected a, b, tie, both bad or skip"),
        ({"item": 1, "shown": [0, 0]}, "item 1, shown as"),
        ({"undo": "answer-0001", "id": None}, "the id None"),
    ],
)
def test_an_edited_line_is_refused_when_the_page_starts(tmp_path: Path, edit: dict[str, Any], said: str) -> None:
    one, path = session(tmp_path, pairs(tmp_path, 2)), tmp_path / "answers.jsonl"
    one.submit("ann", entry(one, 0, 1) | {"id": "answer-0001"})
    one.file.close()
    line = json.loads(path.read_text()) | {"id": "answer-0002"} | edit
    path.write_text(path.read_text() + json.dumps(line) + "\n")
    with pytest.raises(DataError, match=re.escape(said)):
        session(tmp_path, one.items)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda text: text.replace('"prompt"', '"promt"'), "of the prompt None"),
        (lambda text: text.replace('"0-a.png"', "3"), "is no answer of align.label: it is about [3, "),
        (lambda text: text.replace('"image_a"', '"image_x"'), "is no answer of align.label: it is about ['0-b.png']"),
        (lambda text: "[" * 100_000 + "\n", "nested deeper"),
    ],
)
def test_an_edited_line_is_not_exported(tmp_path: Path, edit: Any, said: str) -> None:
    one, path = session(tmp_path, pairs(tmp_path, 1)), tmp_path / "answers.jsonl"
    one.submit("ann", entry(one, 0, 1))
    one.file.close()
    path.write_text(edit(path.read_text()))
    with pytest.raises(DataError, match=re.escape(said)):
        export(path, "jsonl", tmp_path / "out.jsonl")
    path.with_suffix(".session.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="answers.session.json cannot be read"):
        export(path, "jsonl", tmp_path / "out.jsonl")
    with pytest.raises(UserError, match="answers.session.json beside it cannot be read"):
        session(tmp_path, one.items)


def test_one_process_writes_one_session(tmp_path: Path) -> None:
    items = pairs(tmp_path, 2)
    one = session(tmp_path, items)
    with pytest.raises(UserError, match="being written by another process"):
        session(tmp_path, items)
    one.submit("ann", entry(one, 0, 1))
    one.file.close()
    with pytest.raises(UserError, match=r"another session \(seed 0, now 1\)"):
        session(tmp_path, items, seed=1)
    with pytest.raises(UserError, match="another session.*digest"):
        session(tmp_path, items[:1] * 2)
    (tmp_path / "answers.session.json").unlink()
    with pytest.raises(UserError, match=r"answers.session.json beside it cannot be read"):
        session(tmp_path, items)
    (tmp_path / "answers.jsonl").write_text("[1, 2]\n")
    (tmp_path / "answers.session.json").write_text(json.dumps(Session.record(items, Rules(), "") | {"root": "."}))
    with pytest.raises(DataError, match="answers.jsonl:1 is no answer of this page"):
        session(tmp_path, items)


# who is shown what
def test_sides_and_order_are_the_seeds(tmp_path: Path) -> None:
    items = pairs(tmp_path, 200)
    one = session(tmp_path, items)
    sides = [one.shown("ann", number) for number in range(200)]
    assert 70 < sum(shown == (0, 1) for shown in sides) < 130
    assert sides != [one.shown("bob", number) for number in range(200)]
    assert one.order != list(range(200)) and sorted(one.order) == list(range(200))
    one.file.close()
    again = session(tmp_path, items)
    assert (again.order, [again.shown("ann", number) for number in range(200)]) == (one.order, sides)
    again.file.close()
    (tmp_path / "answers.jsonl").unlink()
    assert session(tmp_path, items, seed=1).order != one.order


def answered(of: Session, annotator: str, choose: Any = lambda showing: 1, most: int = 10_000) -> list[str]:
    """Everything that somebody is given, answered one by one; the keys of it."""
    keys: list[str] = []
    while len(keys) < most and (found := of.next(annotator, 1)):
        keys.append(found[0].key)
        more = {"check": found[0].check} if found[0].check else {}
        assert of.submit(annotator, entry(of, found[0].item, choose(found[0]), **more)) == "stored"
    return keys


def test_each_item_goes_to_as_many_people_as_asked(tmp_path: Path) -> None:
    clock = Clock()
    one = session(tmp_path, pairs(tmp_path, 10), clock, per_item=2)
    held = [showing.key for showing in one.next("ann", 4)]
    assert len(held) == 4 and not set(held) & {showing.key for showing in one.next("ann", 8, held)}
    assert len(answered(one, "bob")) == 10
    assert sorted(answered(one, "cy")) == []  # ann has all ten in her browser, bob has answered them
    clock.now += LEASE + 1  # she has closed it
    first = answered(one, "cy", most=4)
    assert len(first) == 4
    assert len(answered(one, "ann")) == 6 and answered(one, "dan") == []
    assert Counter(answer.item for answer in one.answers()) == dict.fromkeys(range(10), 2)
    progress = one.progress("cy")
    assert (progress["done"], progress["wanted"], progress["own"]) == (20, 20, 4)


def test_some_items_come_again_swapped_or_not(tmp_path: Path) -> None:
    """A person who always takes picture 1 is steady where items come again as they were, and never where swapped."""
    one = session(tmp_path, pairs(tmp_path, 60), repeat=0.2, swap=0.2)
    keys = answered(one, "ann")
    again = [key for key in keys if "." in key]
    assert len(keys) == 60 + len(again) and len(set(keys)) == len(keys) and 12 < len(again) < 36
    for key in again:
        assert keys.index(key) - keys.index(key.split(".")[0]) >= min(GAP, 60)
    found = summarize(one.items, one.answers(), "pair").people[0]
    repeats = sum(key.endswith("repeat") for key in again)
    assert found.repeat == (repeats, repeats) and found.swap == (0, len(again) - repeats)
    assert found.first is not None and found.first.mean == 1
    assert summarize(one.items, one.answers(), "pair").votes == 60  # the second time is no vote
    with pytest.raises(Refused, match="does not come again so"):
        one.submit("bob", entry(one, 0, 1, check="swop"))
    one.file.close()
    assert len(PreferencePairs(str(tmp_path / "answers.jsonl")).read()) == 60


@pytest.mark.parametrize(
    ("task", "choice", "words"),
    [
        ("pair", 3, "expected 1, 2, tie"),
        ("pair", True, "expected 1, 2, tie"),
        ("pair", [1], "expected 1, 2, tie"),
        ("best", [1, 1], "expected places of 2 pictures"),
        ("best", [1.0], "expected places of 2 pictures"),
        ("best", [True, 1], "expected places of 2 pictures"),
        ("best", [{}], "expected places of 2 pictures"),
        ("best", [3], "expected places of 2 pictures"),
        ("best", "1", "expected places of 2 pictures"),
        ("thumbs", 1, "expected good, bad or skip"),
        ("score", 0, "expected 1, 2, 3, 4, 5 or skip"),
        ("score", 4.5, "expected 1, 2, 3, 4, 5 or skip"),
    ],
)
def test_a_choice_that_is_none_is_refused(tmp_path: Path, task: Any, choice: Any, words: str) -> None:
    items = pairs(tmp_path, 1)
    if task in ("thumbs", "score"):
        items = [Item(items[0].prompt, items[0].pictures[:1])]
    one = session(tmp_path, items, task=task)
    with pytest.raises(Refused, match=words):
        one.submit("ann", entry(one, 0, choice))
    for wrong in ({"item": 1}, {"item": True}, {"id": "x"}, {"session": "other"}, {"why": ["no"]}, {"seconds": -1}):
        with pytest.raises(Refused):
            one.submit("ann", entry(one, 0, "skip") | wrong)
    assert one.submit("ann", entry(one, 0, "skip", why=["anatomy"], seconds=1.234)) == "stored"
    assert lines(tmp_path)[0]["label"] == "skip" and one.answers()[0].worth is None


# sources
@pytest.fixture(scope="module")
def round1(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rollout of five prompts with three pictures each."""
    folder = tmp_path_factory.mktemp("label") / "rollout"
    assert rollout.main(settings(tiny_folders["epsilon"], folder)) == 0
    return folder


def test_every_layout_of_preferences_is_a_source(tmp_path: Path) -> None:
    source = open_source("shapes-preferences", tmp_path, split="heldout")
    items = source.items("pair")
    assert len(items) == 300 and {len(item.pictures) for item in items} == {2}
    assert {item.known for item in items} == {(1.0, 0.0)}
    name = items[0].pictures[0].keep(tmp_path / "a-pictures")
    assert (tmp_path / name).read_bytes() == items[0].pictures[0].data()
    assert len(source.items("thumbs", limit=5)) == 5
    for side in ("chosen", "rejected"):
        picture(tmp_path, f"w/{side}/one.png")
        (tmp_path / f"w/{side}/one.txt").write_text("a star")
    siblings = open_source(str(tmp_path / "w"), tmp_path).items("pair")
    assert [one.name for one in siblings[0].pictures] == ["w/chosen/one.png", "w/rejected/one.png"]


def test_a_rollout_is_a_source_with_its_scores(round1: Path, tmp_path: Path) -> None:
    source = open_source(str(round1), tmp_path)
    assert len(source.items("pair")) == 15 and len(source.items("best")) == 5 and len(source.items("score")) == 15
    assert [len(item.pictures) for item in source.items("best", k=2)] == [2] * 5  # a picture that is left over alone
    assert source.groups[0].pictures[1].name == "images/00001.png"
    assert set(source.groups[0].pictures[1].scores) == {"JPEGCompressibility"}


def test_folders_with_pictures_of_the_same_prompts_are_models(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for model in ("base", "tuned"):
        rows = [{"file_name": f"{k}.png", "prompt": f"prompt {k % 2}"} for k in range(4)]
        for k in range(4):
            picture(tmp_path, f"in/{model}/{k}.png", k)
        (tmp_path / f"in/{model}/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    items = open_source(str(tmp_path / "in"), tmp_path).items("pair")
    assert [[one.name for one in item.pictures] for item in items][:2] == [
        ["in/base/0.png", "in/tuned/0.png"],
        ["in/base/1.png", "in/tuned/1.png"],
    ]
    assert {tuple(one.model for one in item.pictures) for item in items} == {("base", "tuned")} and len(items) == 4
    assert "in one folder alone" not in caplog.text
    picture(tmp_path, "in/base/4.png")
    (tmp_path / "in/base/metadata.jsonl").write_text(
        "\n".join(map(json.dumps, [*rows, {"file_name": "4.png", "prompt": "another"}]))
    )
    open_source(str(tmp_path / "in"), tmp_path)
    assert "1 of 3 prompts have pictures in one folder alone" in caplog.text


def test_what_is_no_source_is_said_in_words(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture(tmp_path, "outside.png")
    inside = [picture(tmp_path, f"in/{k}.png") for k in range(2)]
    with pytest.raises(DataError, match="no image with a prompt.*--prompts FILE"):
        open_source(str(tmp_path / "in"), tmp_path)
    (tmp_path / "texts.txt").write_text("a star\na circle\n")
    one = open_source(str(tmp_path / "in"), tmp_path, prompts=str(tmp_path / "texts.txt"))
    assert [group.pictures[0].name for group in one.groups] == [each.name for each in inside]
    with pytest.raises(UserError, match="no prompt has two pictures.*--task thumbs"):
        one.items("pair")
    rows = [{"file_name": name, "text": "a star"} for name in ("0.png", "../outside.png", "/etc/hostname")]
    (tmp_path / "in/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = open_source(str(tmp_path / "in"), tmp_path)
    assert [group.pictures[0].name for group in found.groups] == ["in/0.png"]
    assert "3 images are left out, the first: 1.png" in caplog.text
    with pytest.raises(DataError, match="no such folder|there is no file"):
        open_source(str(tmp_path / "nothing"), tmp_path)


def test_what_rewards_contradict_each_other_on_comes_first(tmp_path: Path) -> None:
    items = pairs(tmp_path, 3)
    table = {
        "0-a.png": (3, 3),
        "0-b.png": (0, 0),
        "1-a.png": (3, 0),
        "1-b.png": (0, 3),
        "2-a.png": (2, 1),
        "2-b.png": (0, 0),
    }
    (tmp_path / "scores.csv").write_text(
        "file,prompt,one,other\n" + "".join(f"{name},x,{a},{b}\n" for name, (a, b) in table.items())
    )
    scored = with_scores(items, read_scores(tmp_path / "scores.csv"), tmp_path)
    assert scored[1].pictures[0].scores == {"one": 3.0, "other": 0.0}
    assert list((-uncertainty(scored)).argsort()) == [1, 2, 0]
    with pytest.raises(UserError, match="needs scores"):
        uncertainty(items)
    with pytest.raises(UserError, match="none of a picture that is shown"):
        with_scores(items, {"other.png": {"one": 1.0}}, tmp_path)


# the server
def client(of: Session, token: str | None = None, names: Sequence[str] = ()) -> TestClient:
    page = Page(of, Access(token, names), "<b>title</b>", local=token is None)
    return TestClient(page.app, base_url="http://127.0.0.1", follow_redirects=False)


def tags_of(page: str) -> list[tuple[str, dict[str, str]]]:
    found: list[tuple[str, dict[str, str]]] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.append((tag, {name: value or "" for name, value in attrs}))

    Reader().feed(page)
    return found


def test_pages_ask_nobody_else_and_escape_what_they_show(tmp_path: Path) -> None:
    items = [Item(text, each.pictures) for text, each in zip(HOSTILE, pairs(tmp_path, 4), strict=True)]
    one = session(tmp_path, items)
    for name, choice in (("ann", 1), ("bob", 2), ("cy", "tie")):
        for number in range(4):
            one.submit(name, entry(one, number, choice, why=["anatomy"]))
    web = client(one)
    for path in ("/", "/annotate/ann", "/summary"):
        response = web.get(path)
        assert response.status_code == 200
        policy = response.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        for tag, attributes in tags_of(response.text):
            assert tag not in ("b", "style") or (path == "/summary" and not attributes)
            assert tag != "script" or attributes["src"].startswith("/static/")
            assert not any(name.startswith("on") or name == "style" for name in attributes)
            assert not any(
                attributes.get(name, "").startswith(("http", "//", "data")) for name in ("src", "href", "action")
            )
    page = web.get("/summary").text
    assert not [text for text in HOSTILE if "<" in text and text in page]
    assert "alert(1)&lt;/script&gt;" in page and "{{ 7 * 7 }}" in page
    told = web.get("/annotate/dan/next").json()
    assert told["items"] == [] or {item["prompt"] for item in told["items"]} <= set(HOSTILE)
    for script in ("label.js", "label.css"):
        assert "http" not in re.sub(r"https?://www.w3.org/\S*", "", web.get(f"/static/{script}").text)
    assert web.get("/static/../server.py").status_code == 404


def test_only_pictures_of_the_source_can_be_asked_for(tmp_path: Path) -> None:
    items = pairs(tmp_path, 2)
    picture(tmp_path, "secret.png", "blue")
    web = client(session(tmp_path, items))
    response = web.get("/annotate/ann/picture/0/1")
    assert response.status_code == 200 and Image.open(io.BytesIO(response.content)).size == (6, 6)
    for path in (
        "0/2",
        "0/-1",
        "2/0",
        "-1/0",
        "0/..",
        "..%2f..%2fsecret.png/0",
        "0/0/../../secret.png",
        "secret.png/0",
    ):
        assert web.get(f"/annotate/ann/picture/{path}").status_code in (404, 422), path
    assert web.get("/summary/picture/7/0").status_code == 404
    assert client(session(tmp_path / "b", items)).get("/", headers={"Host": "evil.example"}).status_code == 403


def test_a_link_without_its_token_is_refused_in_words(tmp_path: Path) -> None:
    one = session(tmp_path, pairs(tmp_path, 2))
    web, access = client(one, TOKEN, ["ann", "bob"]), Access(TOKEN, ["ann", "bob"])
    for path in (
        "/",
        "/summary",
        "/annotate/ann",
        "/annotate/ann?token=wrong",
        f"/annotate/ann?token={access.token_of('bob')}",
    ):
        refused = web.get(path, headers={"Accept": "text/html"})
        assert refused.status_code == 401 and "ask for the whole link" in refused.text
    for path in ("/annotate/ann/next", "/annotate/ann/picture/0/0", "/summary/summary.json", "/summary/picture/0/0"):
        assert web.get(path).json()["error"].startswith("the link has no token")
    assert web.post("/annotate/ann/answers", json={"entries": [entry(one, 0, 1)]}).status_code == 401
    moved = web.get(access.link("/annotate/ann", "ann"))
    assert moved.status_code == 303 and moved.headers["Location"] == "/annotate/ann"  # the token leaves the address bar
    assert "HttpOnly" in moved.headers["Set-Cookie"] and "Path=/annotate/ann" in moved.headers["Set-Cookie"]
    assert web.get("/annotate/ann/next").status_code == 200 and web.get("/annotate/bob/next").status_code == 401
    assert web.get("/summary").status_code == 401
    web.get(access.link("/summary"))
    assert web.get("/summary").status_code == 200 and access.token_of("ann") in web.get("/").text
    assert web.get("/annotate/eve").status_code == 404 and "expected one of ann, bob" in web.get("/annotate/eve").text
    assert not lines(tmp_path)


def test_wrong_calls_are_refused_in_words_and_others_go_on(tmp_path: Path) -> None:
    one = session(tmp_path, pairs(tmp_path, 3))
    web, path = client(one), "/annotate/ann/answers"
    for body, status in (
        (b"{", 400),
        (b"[]", 400),
        (b'{"entries": [1]}', 400),
        (b"[" * 5000, 400),
        (b" " * 300_000, 413),
    ):
        response = web.post(path, content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == status and response.json()["error"]
    assert web.post(path, content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415
    assert web.post(path, json={"entries": [{}] * 201}).status_code == 413
    sent = [entry(one, 0, 1), entry(one, 1, "nonsense"), entry(one, 2, 2)]
    results = web.post(path, json={"entries": sent}).json()["results"]
    assert [results[each["id"]].partition(":")[0] for each in sent] == ["stored", "refused", "stored"]
    no_text = web.post(path, content=b'{"entries": [{"id": "\\ud800"}]}', headers={"Content-Type": "application/json"})
    assert no_text.status_code == 200 and "refused" in no_text.text
    assert web.get("/annotate/a%20b").status_code == 404 and web.get("/annotate/<b>").status_code == 404
    assert web.get("/?name=ann").headers["Location"] == "/annotate/ann"


def test_large_and_damaged_pictures(tmp_path: Path) -> None:
    big, bad = tmp_path / "big.jpg", tmp_path / "bad.png"
    Image.new("L", (10_000, 5_000), 90).save(big)
    picture(tmp_path, "bad.png", side=40)
    items = [Item("large", (Picture("big.jpg", LazyImage(big)), Picture("bad.png", LazyImage(bad))))]
    one = session(tmp_path, items)
    web, shown = client(one), one.shown("ann", 0)
    path = f"/annotate/ann/picture/0/{shown.index(0)}"
    page = Image.open(io.BytesIO(web.get(path).content))
    assert page.size == (1280, 640)
    for damaged in (bad.read_bytes()[:60], b"no picture"):
        bad.write_bytes(damaged)
        refused = web.get(f"/annotate/ann/picture/0/{shown.index(1)}")
        assert refused.status_code == 422
        told = refused.json()["error"]
        assert "This picture cannot be shown: not a readable image" in told and "BytesIO" not in told


def test_a_picture_that_is_gone_is_shown_as_that(tmp_path: Path) -> None:
    one = session(tmp_path, pairs(tmp_path, 2))
    one.items[1].pictures[0].image.file.unlink()
    assert len(one.next("ann", 8)) == 2 and one.progress("ann")["undrawn"] == 0
    place = one.shown("ann", 1).index(0)
    assert client(one).get(f"/annotate/ann/picture/1/{place}").status_code == 422


def test_ten_thousand_items_are_quick(tmp_path: Path) -> None:
    both = pairs(tmp_path, 1)[0].pictures
    one = session(tmp_path, [Item(f"prompt {k}", both) for k in range(10_000)])
    web = client(one)
    started = time.process_time()
    for _ in range(10):
        told = web.get("/annotate/ann/next").json()
        web.post("/annotate/ann/answers", json={"entries": [entry(one, item["item"], 1) for item in told["items"]]})
    assert time.process_time() - started < 2 and told["progress"]["wanted"] == 10_000
    assert one.progress("ann")["own"] == 80


def test_two_people_and_two_tabs_at_once_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    one = session(tmp_path, pairs(tmp_path, 60))
    web = client(one)

    def work(name: str) -> None:
        while items := web.get(f"/annotate/{name}/next").json()["items"]:
            sent = {"entries": [entry(one, item["item"], 1) for item in items]}
            for _ in range(2):  # a slow network, so it is sent once more
                web.post(f"/annotate/{name}/answers", json=sent)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("ann", "ann", "bob")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(line["item"] for line in lines(tmp_path)) == dict.fromkeys(range(60), 1)


# the summary
def said(*votes: tuple[str, int, tuple[float, ...]]) -> list[Answer]:
    return [Answer(f"id-{k}", name, item, worth, shown=(0, 1)) for k, (name, item, worth) in enumerate(votes)]


def test_alpha_is_krippendorffs() -> None:
    """His own example of four observers and twelve units (2011, section C and D): nominal 0.743, ordinal 0.815."""
    table = """1 2 3 3 2 1 4 1 2 . . .
               1 2 3 3 2 2 4 1 2 5 . 3
               . 3 3 3 2 3 4 2 2 5 1 .
               1 2 3 3 2 4 4 1 2 5 1 ."""
    rows = [line.split() for line in table.splitlines()]
    votes = [
        (f"{k}", unit, float(value)) for k, row in enumerate(rows) for unit, value in enumerate(row) if value != "."
    ]
    assert alpha(votes, "nominal") == pytest.approx(0.743, abs=5e-4)
    assert alpha(votes, "ordinal") == pytest.approx(0.815, abs=5e-4)
    assert alpha([("a", 0, 1.0), ("a", 1, 0.0)], "nominal") is None  # one person
    assert alpha([("a", 0, 1.0), ("b", 0, 1.0)], "nominal") is None  # one opinion


def test_the_summary_says_who_wins_what_is_disputed_and_who_agrees(tmp_path: Path) -> None:
    items = pairs(tmp_path, 4, ("base", "tuned"))
    scored = [
        Item(
            item.prompt,
            tuple(Picture(one.name, one.image, one.model, {"R": float(k)}) for k, one in enumerate(item.pictures)),
            (0.0, 1.0),
        )
        for item in items
    ]  # R likes the second, and so does the source
    a, b, tie = (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)
    votes = said(("x", 0, b), ("y", 0, b), ("x", 1, b), ("y", 1, a), ("z", 1, b), ("x", 2, tie), ("x", 3, a))
    found = summarize(scored, votes, "pair")
    assert found.models["tuned"].mean == pytest.approx((1 + 2 / 3 + 0.5 + 0) / 4)
    assert found.models["base"].mean == pytest.approx(1 - found.models["tuned"].mean)
    assert [one.item for one in found.disputed] == [1] and found.disputed[0].said == [
        ("picture B", 2),
        ("picture A", 1),
    ]
    assert found.rewards["R"].mean == pytest.approx(2 / 3) and found.rewards["R"].count == 3
    assert found.known is not None and found.known.mean == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert (found.answered, found.votes, len(found.people)) == (4, 7, 3)


def test_decisions_are_the_majority(tmp_path: Path) -> None:
    folder = [picture(tmp_path, f"{k}.png") for k in range(4)]
    grid = [Item("a", tuple(folder))]
    best = decisions(grid, said(("x", 0, (-2.0, -1.0, -2.0, -2.0)), ("y", 0, (-1.0, -2.0, -3.0, -4.0))))
    votes = {(one.pictures[0].name[0], one.pictures[1].name[0]): one.votes for one in best}
    assert votes["0", "1"] == (1, 1) and votes["1", "2"] == (2, 0) and votes["2", "3"] == (1, 0) and len(votes) == 6
    rated = [Item("a", (one,)) for one in folder[:3]]
    order = decisions(rated, said(("x", 0, (5.0,)), ("x", 1, (2.0,)), ("y", 1, (4.0,)), ("x", 2, (3.0,))))
    assert [(one.ordered.pictures[0].name, one.tie) for one in order] == [
        ("0.png", False),
        ("0.png", False),
        ("1.png", True),
    ]


# what training reads, and exports
def choose_first(of: Session, annotator: str = "ann", choice: Any = None) -> None:
    """Somebody who prefers the first picture of the source to every other, or says ``choice`` of each."""
    task = of.rules.task
    for number in range(len(of.items)):
        place = of.shown(annotator, number).index(0) + 1
        said = choice(number) if choice else [place] if task == "best" else place
        of.submit(annotator, entry(of, number, said))


def labelled(folder: Path, source: str, task: Any, choice: Any = None, **how: Any) -> Path:
    """The answers file of one person on a source."""
    folder.mkdir(exist_ok=True)
    found = open_source(source, folder, **how)
    one_session_items = found.items(task)
    rules, file = Rules(task), folder / "answers.jsonl"
    root = os.path.relpath(found.root, folder) if found.root else "."
    record = Session.record(one_session_items, rules, source) | {"root": root}
    kept = folder / "answers-pictures"
    one = Session(one_session_items, rules, AnswerFile(file, record), lambda i: [p.keep(kept) for p in i.pictures])
    choose_first(one, choice=choice)
    one.submit("ann", {"id": "undo-last", "undo": one.last("ann", 1)[0].id})
    one.submit("ann", entry(one, len(one_session_items) - 1, "skip"))
    one.file.close()
    return file


def test_answers_on_a_preference_set_train_as_they_are(tmp_path: Path) -> None:
    heldout = pq.read_table("align/shapes/shapes-preferences/heldout.parquet").slice(0, 6)
    pq.write_table(heldout, tmp_path / "six.parquet")
    answers = labelled(tmp_path / "a", str(tmp_path / "six.parquet"), "pair")
    before = PreferencePairs(str(tmp_path / "six.parquet")).read()
    after = PreferencePairs(str(answers)).read()
    assert len(before) == 6 and len(after) == 5  # one was skipped
    layout, _, rows, _ = recognise(str(answers), None, None, None)
    known = [row.sides for row in recognise(str(tmp_path / "six.parquet"), None, None, None).rows]
    for row, sides in zip(rows, known, strict=False):
        assert row.sides is not None and sides is not None
        assert [side.data() for side in row.sides] == [side.data() for side in sides]  # the same winner
    assert layout.startswith("pairs (prompt, image_a, image_b, label)")


@pytest.mark.parametrize(("task", "count"), [("pair", 14), ("best", 8), ("thumbs", 8), ("score", 8)])
def test_answers_on_a_rollout_train_as_they_are_and_as_d3pos_json(
    round1: Path, tmp_path: Path, task: str, count: int
) -> None:
    """The first picture of each prompt is liked best; of the last item nobody said anything that stands."""
    choice = {
        "thumbs": lambda number: "good" if number % 3 == 0 else "bad",
        "score": lambda number: 5 if number % 3 == 0 else 2,
    }.get(task)
    answers = labelled(tmp_path / "a", str(round1), task, choice)
    _, found = LabelledRollout(str(round1), [str(answers)]).read()
    winners = [pair for pair in found.pairs if pair[0] % 3 == 0]
    assert len(found.pairs) == {"pair": 14, "best": 8, "thumbs": 9, "score": 9}[task]
    assert len(winners) == {"pair": 10, "best": 8, "thumbs": 9, "score": 9}[task]
    rows = export(answers, "d3po", tmp_path / "human.json")
    _, theirs = LabelledRollout(str(round1), [str(tmp_path / "human.json")]).read()
    first = [pair for pair in theirs.pairs if pair[0] % 3 == 0]
    assert rows == 5 and len(first) == (10 if task == "pair" else 8), count


def test_exports_of_pairs_are_read_again(tmp_path: Path) -> None:
    for name in "abcd":  # links, as in the hub's cache
        picture(tmp_path, f"blobs/{name}.png", name.encode()[0]).image.file.rename(tmp_path / "blobs" / name)
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / f"in/{name}.png").symlink_to(f"../blobs/{name}")
    rows = [{"prompt": p, "chosen": f"{a}.png", "rejected": f"{b}.png"} for p, a, b in ("xab", "ycd", "zad")]
    (tmp_path / "in/pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    answers = labelled(tmp_path / "a", str(tmp_path / "in/pairs.jsonl"), "pair")
    for to, name in (("pickapic", "p.parquet"), ("jsonl", "out/p.jsonl"), ("imagefolder", "p")):
        assert export(answers, to, tmp_path / name) == 2
        found = list(recognise(str(tmp_path / name), None, None, None).rows)
        assert [(row.caption, row.votes) for row in found] == [("x", (1, 0)), ("y", (1, 0))]
        sides = [[side.data() for side in row.sides or ()] for row in found]
        assert sides[0] == [(tmp_path / f"in/{name}.png").read_bytes() for name in "ab"]
    columns = pq.read_schema(tmp_path / "p.parquet").names
    assert {"caption", "jpg_0", "jpg_1", "label_0", "label_1", "has_label"} <= set(columns)
    with pytest.raises(UserError, match="is there already"):
        export(answers, "imagefolder", tmp_path / "p")
    before = answers.read_bytes()
    for same in (
        answers,
        answers.with_suffix(".session.json"),
        answers.parent / ".." / answers.parent.name / answers.name,
    ):
        with pytest.raises(UserError, match="is what is read"):
            export(answers, "jsonl", same)
    assert answers.read_bytes() == before
    (tmp_path / "in/a.png").unlink()
    with pytest.raises(DataError, match=r"a.png is gone"):
        export(answers, "pickapic", tmp_path / "q.parquet")
    (tmp_path / "in/a.png").symlink_to("secret.key")
    (tmp_path / "in/secret.key").write_text("what a link leads to and is no picture")
    for to in ("pickapic", "jsonl", "imagefolder"):
        with pytest.raises(DataError, match=r"a.png, which answers are about, is no picture"):
            export(answers, to, tmp_path / "q")
        assert not (tmp_path / "q").exists()


def test_thumbs_and_scores_are_unpaired_rows(tmp_path: Path) -> None:
    for k in range(3):
        picture(tmp_path, f"in/{k}.png", k)
    (tmp_path / "texts.txt").write_text("a\nb\nc\n")
    how = {"prompts": str(tmp_path / "texts.txt")}
    thumbs = labelled(tmp_path / "t", str(tmp_path / "in"), "thumbs", lambda number: ["good", "bad"][number % 2], **how)
    assert export(thumbs, "jsonl", tmp_path / "kto.jsonl") == 2
    written = [json.loads(line) for line in (tmp_path / "kto.jsonl").read_text().splitlines()]
    assert written == [
        {"image": "in/0.png", "prompt": "a", "label": True},
        {"image": "in/1.png", "prompt": "b", "label": False},
    ]
    as_it_is = open_input(str(thumbs)).listed  # what Images reads, and whatever trains on ratings
    assert [(row.prompt, row.metadata["label"]) for row in as_it_is] == [("a", True), ("b", False)]
    scores = labelled(tmp_path / "s", str(tmp_path / "in"), "score", lambda number: 3 + number, **how)
    with pytest.raises(UserError, match="--threshold 4"):
        export(scores, "jsonl", tmp_path / "s.jsonl")
    assert export(scores, "imagefolder", tmp_path / "rated", 4) == 2
    rows = [json.loads(line) for line in (tmp_path / "rated/metadata.jsonl").read_text().splitlines()]
    assert [row["label"] for row in rows] == [False, True] and (tmp_path / "rated" / rows[0]["file_name"]).is_file()


# the command
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "say what is to be judged"),
        (["shapes-preferences", "--models", "a", "b"], "say what is to be judged"),
        (["--models", "a", "b"], "--prompts FILE"),
        (["nowhere"], "nowhere"),
        (["shapes-preferences"], "say which with split"),
        (["shapes-preferences", "--split", "heldout", "--swap", "0.6", "--repeat", "0.5"], "at most 1 together"),
        (["shapes-preferences", "--split", "heldout", "--task", "thumbs", "--swap", "0.5"], "cannot be swapped"),
        (["shapes-preferences", "--split", "heldout", "--k", "3"], "with --task best"),
        (["shapes-preferences", "--split", "heldout", "--host", "0.0.0.0"], "can be reached by others"),
        (["shapes-preferences", "--split", "heldout", "--annotators", "a/b"], "annotators has 'a/b'"),
        (["shapes-preferences", "--split", "heldout", "--annotators", ".."], "annotators has '..'"),
        (["--models", __file__, "--prompts", "shapes-prompts"], "does not say which model it is of"),
        (["--models", "shapes-sd", "--prompts", "shapes-prompts", "--resolution", "3"], "is no multiple of"),
        (["shapes-preferences", "--split", "heldout", "--first", "uncertain"], "needs scores of every picture"),
        (["export", "nothing.jsonl", "--to", "jsonl", "--output", "x"], "nothing.session.json cannot be read"),
    ],
)
def test_what_cannot_be_is_a_line(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("T2I_ALIGN_TOKEN", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    output = [] if "export" in words else ["--output", str(tmp_path / "answers.jsonl")]
    assert label.main([*words, *output]) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("error:") == 1


def test_rewards_score_the_pictures_first_and_links_carry_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("T2I_ALIGN_TOKEN", TOKEN)
    words = ["shapes-preferences", "--split", "heldout", "--limit", "6", "--first", "uncertain", "--port", "0"]
    words += ["--reward", "Shapes", "--reward", "JPEGCompressibility", "--annotators", "ann", "bob"]
    config, _ = label.parse(label.Label, "x", "", label.words_of([*words, "--output", str(tmp_path / "answers.jsonl")]))
    server = label.serve(config)
    one = server.page.session
    assert set(one.items[0].pictures[0].scores) == {"Shapes", "JPEGCompressibility"}
    gaps = uncertainty(one.items)[one.order]
    assert sorted(one.order) == list(range(6)) and np.all(np.diff(gaps) <= 0)
    told = label.links(server, config)
    access = Access(TOKEN)
    assert told[0] == f"ann: http://127.0.0.1:{server.port}/annotate/ann?token={access.token_of('ann')}"
    assert access.token_of("ann") != access.token_of("bob") and TOKEN not in "".join(told)


def test_models_draw_while_people_choose(tmp_path: Path, tiny_folders: dict[str, Path]) -> None:
    (tmp_path / "texts.txt").write_text("a star\na circle\n")
    words = ["--models", str(tiny_folders["epsilon"]), str(tiny_folders["v"]), "--prompts", str(tmp_path / "texts.txt")]
    words += ["--num_inference_steps", "2", "--batch_size", "1", "--port", "0", "--output", str(tmp_path / "a.jsonl")]
    config, _ = label.parse(label.Label, "x", "", label.words_of(words))
    server = label.serve(config)
    one = server.page.session
    deadline = time.monotonic() + 60
    while len(keys := [showing.key for showing in one.next("ann", 8)]) < 2 and not one.next("ann", 8, keys):
        assert time.monotonic() < deadline and not server.page.fault(), server.page.fault()
        time.sleep(0.02)
    assert one.progress("ann")["undrawn"] == 0
    one.submit("ann", entry(one, 0, 1))
    line = json.loads((tmp_path / "a.jsonl").read_text())
    assert line["models"] == [folder.name for folder in (tiny_folders["epsilon"], tiny_folders["v"])]
    assert (tmp_path / line["image_a"]).is_file() and "a-drawn" in line["image_a"]
    found = summarize(one.items, one.answers(), "pair").models
    assert sum(share.mean for share in found.values()) == 1
    one.file.close()
    before = contents(tmp_path / "a-drawn")
    again = label.serve(replace(config, mixed_precision="bf16"))  # other pictures than those that were judged
    while "people have judged them" not in again.page.fault():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert contents(tmp_path / "a-drawn") == before
    for thread in threading.enumerate():  # it loads the other model yet, in which time no test could make one
        if thread.name == "drawing":
            thread.join()


def test_drawing_ends_with_the_page(tmp_path: Path, tiny_folders: dict[str, Path]) -> None:
    """Left alone, it would abort the process that ends."""
    drawn = PictureFolder(tmp_path / "drawn", [Wanted("a star", seed, {}) for seed in range(2000)], 1)
    background = Background({"one": lambda: families.load(str(tiny_folders["epsilon"]))}, {"one": drawn})
    thread = background.start(Drawing(4))
    while not drawn.file(0).is_file():
        assert thread.is_alive(), background.fault
        time.sleep(0.005)
    background.stop()
    assert not thread.is_alive() and not background.fault and not drawn.file(1999).is_file()
    Background({}, {}).stop()  # of one that was never begun


def test_answers_stay_with_the_pictures_that_they_are_about(tmp_path: Path) -> None:
    one = session(tmp_path, items := pairs(tmp_path, 1))
    one.submit("ann", entry(one, 0, 1))
    one.file.close()
    session(tmp_path, items).file.close()
    Image.effect_noise((8, 8), 90).save(tmp_path / "0-b.png")
    with pytest.raises(UserError, match="answers of another session .sizes of pictures"):
        session(tmp_path, items)


def test_rankings_of_other_tools_are_votes_or_refused_in_words(round1: Path, tmp_path: Path) -> None:
    file = tmp_path / "ranks.jsonl"

    def read(images: Sequence[str], ranking: Any) -> list[tuple[int, int]]:
        file.write_text(json.dumps({"images": images, "ranking": ranking}) + "\n")
        return LabelledRollout(str(round1), [str(file)]).read()[1].pairs

    assert read(["00000.png", "00001.png", "00002.png"], [3, 1, 3]) == [(1, 0), (1, 2)]
    with pytest.raises(DataError, match="two lists of one length"):
        read(["00000.png", "00001.png"], [1])
    with pytest.raises(DataError, match="expected distinct images of one prompt"):
        read(["00000.png", "00003.png"], [1, 2])
    with pytest.raises(DataError, match="a rank is 'first', which is not a number"):
        read(["00000.png", "00001.png"], ["first", 2])
