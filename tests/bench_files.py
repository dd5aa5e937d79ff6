"""Benches' prompt files, a few prompts in each one's own layout, and a vision-language model that stands in for one."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

GENEVAL2 = [
    {
        "prompt": "two red stars", "atom_count": 3, "skills": ["count", "attribute", "object"],
        "vqa_list": [["How many stars are in the image?", "two"], ["Are the stars red?", "Yes"],
                     ["Are there any stars in the image?", "Yes"]],
    },
    {
        "prompt": "a blue circle", "atom_count": 4, "skills": ["count", "object"],
        "vqa_list": [["How many circles are in the image?", "one"], ["Are there any circles in the image?", "Yes"]],
    },
    {
        "prompt": "a star", "atom_count": 3, "skills": ["object"],
        "vqa_list": [["Are there any stars in the image?", "Yes"]],
    },
]  # fmt: skip
DPG = [
    ("stars", "two red stars, side by side", [(1, "0", "Are there stars?"), (2, "1", "Are there two stars?"),
                                              (3, "2", "Are both red?")]),
    ("circle", "a blue circle", [(1, "0", "Is there a circle?"), (2, "0, 1", "Is it blue?")]),
]  # fmt: skip
WISE = [
    {"Prompt": text, "Explanation": told, "Category": category, "Subcategory": "x", "prompt_id": number}
    for number, (text, told, category) in enumerate(
        [("food of a feast", "mooncakes", "Cultural knowledge"), ("noon in the north", "a long shadow", "time"),
         ("a leaf in autumn", "it is yellow", "Biology")], 1,
    )
]  # fmt: skip
ONEIG = [
    ("Anime_Stylization", "000", "two red stars"),
    ("General_Object", "000", "a circle"),
    ("Text_Rendering", "000", "a"),
]
COMPBENCH = {"color_val": ["a red star and a blue circle", "a green star"], "shape_val": ["a round star"]}


def write_geneval2(folder: Path) -> Path:
    file = folder / "geneval2_data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in GENEVAL2))
    return file


def write_dpg(folder: Path) -> Path:
    names = ["item_id", "text", "keywords", "proposition_id", "dependency", "category_broad", "category_detailed",
             "tuple", "question_natural_language"]  # fmt: skip
    with (folder / "dpg_bench.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        for item, text, questions in DPG:
            for number, parents, question in questions:
                writer.writerow([item, text, "", number, parents, "entity", "whole", "entity - whole (x)", question])
    return folder / "dpg_bench.csv"


def write_wise(folder: Path, ending: str = "") -> Path:
    folder.mkdir()
    for name, rows in {
        "cultural_common_sense": WISE[:1],
        "spatio-temporal_reasoning": WISE[1:2],
        "natural_science": WISE[2:],
    }.items():
        (folder / f"{name}{ending}.json").write_text(json.dumps(rows))
    (folder / "merge.json").write_text(json.dumps(WISE))  # which is not read besides
    return folder


def write_oneig(folder: Path) -> Path:
    questions = folder / "scripts/alignment/Q_D"
    questions.mkdir(parents=True)
    (folder / "OneIG-Bench.csv").write_text(
        "category,id,prompt_en,type,prompt_length,class\n"
        + "".join(f"{category},{number},{text},T,short,\n" for category, number, text in ONEIG)
    )
    stars = {"question": json.dumps({"1": "Are there stars?", "2": "Are there two?", "3": "Are they red?"}),
             "dependency": json.dumps({"1": [0], "2": [1], "3": [2]})}  # fmt: skip
    circle = {"question": {"1": "Is there a circle?"}, "dependency": {"1": [0]}}
    for name, rows in {"anime": {"000": stars}, "human": {}, "object": {"000": circle}}.items():
        (questions / f"{name}.json").write_text(json.dumps(rows))
    return folder


def write_compbench(folder: Path) -> Path:
    folder.mkdir()
    for name, lines in COMPBENCH.items():
        (folder / f"{name}.txt").write_text("\n".join(lines))
    return folder


def write_all(folder: Path) -> dict[str, Path]:
    """The files of the benches that ask questions, by bench."""
    (folder / "captions.jsonl").write_text('{"caption": "a star"}\n{"caption": "two red circles", "user_id": 3}\n')
    return {
        "geneval2": write_geneval2(folder),
        "dpg": write_dpg(folder),
        "wise": write_wise(folder / "WISE"),
        "wise-verified": write_wise(folder / "verified", "_verified"),
        "oneig-alignment": write_oneig(folder / "OneIG"),
        "t2i-compbench": write_compbench(folder / "dataset"),
        "pickapic": folder / "captions.jsonl",
    }


def opinion(picture: bytes, question: str) -> int:
    """What the stand-in thinks of a picture and a question: 0 to 255."""
    return hashlib.sha256(picture + question.encode()).digest()[0]


class StandIn(BaseHTTPRequestHandler):
    """Answers by :func:`opinion`: yes and no, marks, or the probabilities of first tokens."""

    seen: list[tuple[bytes, str]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        image, text = body["messages"][0]["content"]
        picture = base64.b64decode(image["image_url"]["url"].partition(",")[2])
        self.seen.append((picture, text["text"]))
        choice: dict[str, Any] = {"finish_reason": "stop"}
        choice["message"] = {"content": self.reply(opinion(picture, text["text"]), text["text"])}
        if body.get("logprobs"):
            choice |= {"logprobs": {"content": [{"top_logprobs": tokens(opinion(picture, text["text"]))}]}}
        raw = json.dumps({"choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def reply(self, thought: int, question: str) -> str:
        if "Consistency" in question:
            return f"Consistency: {thought % 3}\nRealism: {thought // 3 % 3}\n**Aesthetic Quality**: {thought // 9 % 3}"
        if "Score: 0 or Score: 1" in question:
            return f"Score: {thought % 2}"
        return ("Yes", "No.", "no", " yes.")[thought % 4]

    def log_message(self, *args: Any) -> None:
        pass


def tokens(thought: int) -> list[dict[str, Any]]:
    """First tokens and their log-probabilities: a half of Yes, two eighths of two and ` two`, by the thought."""
    share = (thought + 1) / 512
    parts = {"Yes": 1.0, "yes": 0.25, "two": 0.5, " two": 0.125, "2": 0.125, "one": 0.5, "No": 0.5}
    return [{"token": name, "logprob": math.log(share * part)} for name, part in parts.items()]


@contextmanager
def stand_in() -> Iterator[tuple[str, Sequence[tuple[bytes, str]]]]:
    """The address of a :class:`StandIn`, and what it was asked so far: (picture, question)."""
    handler = type("Scene", (StandIn,), {"seen": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1", handler.seen
        server.shutdown()
        thread.join()
