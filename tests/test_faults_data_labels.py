"""People's answers in the spelling of their tools: what is unambiguous is accepted, the rest is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align.common.errors import DataError
from align.data.annotations import Reader
from align.data.trajectories import ManifestLine, Rollout, RolloutFolder, RolloutRecord
from tests.test_labels import lines_of, table


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    """Of a rollout of two prompts with two images each, in the folder round1."""
    folder = RolloutFolder(tmp_path / "round1")
    (folder.path / "images").mkdir(parents=True)
    lines = [ManifestLine(f"images/{k:05d}.png", f"{k:05d}", f"prompt {k // 2}", k // 2, 0, k, {}) for k in range(4)]
    record = RolloutRecord(
        "m", None, "", "no", 0, {}, True, None, [4, 8, 8], 2, "", images_per_prompt=2, prompts_per_shard=2, images=4,
        shards=1, half=False, rewards=[],
    )  # fmt: skip
    return Reader(Rollout(folder, record, lines))


def choice(label: object, a: str = "images/00000.png", b: str = "00001") -> dict[str, object]:
    return {"image_a": a, "image_b": b, "label": label}


@pytest.mark.parametrize(
    ("label", "value"),
    [
        *(
            (word, 1.0)
            for word in ("a", "A", "a ", "left", "Left", "image_a", "Image A", "first", {"selected": "left"})
        ),
        *((word, 1.0) for word in ("A.", "(a)", "A is better", "images/00000.png")),
        *((word, -1.0) for word in ("00001", "b", "B", "right", "image_b", "second", {"choices": ["right"]}, ["b"])),
        *((word, 0.0) for word in ("tie", "Tie", "draw", "equal", "both good", "neither", "no preference")),
    ],
)
def test_a_label_in_other_words(reader: Reader, tmp_path: Path, label: object, value: float) -> None:
    (vote,) = reader.read(Path(lines_of(tmp_path, [choice(label)])))
    assert (vote.a, vote.b, vote.value) == (0, 1, value)
    if isinstance(label, str):
        (vote,) = reader.read(Path(table(tmp_path, [choice(label)], "labels.CSV")))
        assert vote.value == value


def test_label_studios_export_is_an_answer_of_each_person(reader: Reader, tmp_path: Path) -> None:
    def said(value: dict[str, object], **more: object) -> dict[str, object]:
        return {"id": 7, "result": [{"value": value, "from_name": "which", "type": "pairwise"}], **more}

    answers = [said({"selected": "right"}, completed_by=1), said({"choices": ["a"]}, completed_by=2)]
    answers += [said({"selected": "left"}, was_cancelled=True), {"id": 9, "result": []}]
    data = {"image_a": "/data/upload/3/6b0c6f5a-00000.png", "image_b": "/data/upload/3/6b0c6f5b-00001.png"}
    (tmp_path / "export.json").write_text(json.dumps([{"id": 3, "annotations": answers, "data": data}]))
    votes = reader.read(tmp_path / "export.json")
    assert [(vote.annotator, vote.a, vote.b, vote.value) for vote in votes] == [("1", 0, 1, -1.0), ("2", 0, 1, 1.0)]
    two = {"id": 3, "annotations": [{"result": answers[0]["result"] * 2}], "data": data}
    (tmp_path / "export.json").write_text(json.dumps([two]))
    with pytest.raises(DataError, match="label is .*; expected a, b or tie"):
        reader.read(tmp_path / "export.json")


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_numbers_count_where_both_are_there(reader: Reader, tmp_path: Path, suffix: str) -> None:
    def votes(*labels: object) -> list[float]:
        rows = [choice(label) for label in labels]
        write = lines_of if suffix == "jsonl" else table
        return [vote.value for vote in reader.read(Path(write(tmp_path, rows, f"l.{suffix}")))]

    assert votes(1, 2, "tie", 1) == [1, -1, 0, 1]
    for labels in ((1, 1), (0, 1), (1, 2, 0), (1.5, 1)):
        with pytest.raises(DataError, match="expected a, b or tie; 1 and 2 are understood where both are there"):
            votes(*labels)


@pytest.mark.parametrize("label", ["", "c", "skip", None, True, "a or b", {"rating": 3}, [], "x" * 10**5])
def test_a_label_that_says_nothing_is_refused(reader: Reader, tmp_path: Path, label: object) -> None:
    with pytest.raises(DataError, match="label is .*; expected a, b or tie") as stopped:
        reader.read(Path(lines_of(tmp_path, [choice(label)])))
    assert len(str(stopped.value)) < 400 and "\n" not in str(stopped.value)


@pytest.mark.parametrize(
    "name",
    [
        "images\\00000.png",
        "00000.jpg",
        "images/00000.JPEG",
        ".\\images\\00000.jfif",
        "00000.bmp",
        "00000.webp",
        " 00000.png ",
        "C:\\Users\\ann\\round1\\images\\00000.png",
        "/home/ann/round1/images/00000.png",
        "/data/upload/3/6b0c6f5a-00000.png",
        "http://localhost:8080/data/upload/3/6b0c6f5a-00000.jpg",
        "/data/local-files/?d=round1/images/00000.png",
        "/data/local-files/?d=round1%2Fimages%2F00000.png",
    ],
)
def test_an_image_by_another_machines_name(reader: Reader, tmp_path: Path, name: str) -> None:
    (vote,) = reader.read(Path(lines_of(tmp_path, [choice("a", name)])))
    assert (vote.a, vote.b) == (0, 1)


@pytest.mark.parametrize(
    "name",
    [
        "C:\\Users\\ann\\round2\\images\\00000.png",
        "/pictures/00000.png",
        "other/00000.png",
        "00007.png",
        "00000.txt",
        "",
        "x" * 10**5,
    ],
)
def test_an_image_of_another_rollout_is_refused(reader: Reader, tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="is unknown to") as stopped:
        reader.read(Path(lines_of(tmp_path, [choice("a", name)])))
    assert len(str(stopped.value)) < 600


def test_an_image_that_lies_in_another_rollout_here_is_refused(reader: Reader, tmp_path: Path) -> None:
    other = tmp_path / "copy/round1/images/00000.png"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"")
    with pytest.raises(DataError, match="is unknown to"):
        reader.read(Path(lines_of(tmp_path, [choice("a", str(other))])))


@pytest.mark.parametrize("score", ["9" * 400, 10**290, "nan", True, None, "1e999", "x" * 10**5])
def test_a_score_that_is_no_number_is_refused(reader: Reader, tmp_path: Path, score: object) -> None:
    file = Path(lines_of(tmp_path, [{"image": "00000", "score": score}]))
    if score == 10**290:
        assert reader.read(file)[0].value == 1e290
        return
    with pytest.raises(DataError, match="which is not a number") as stopped:
        reader.read(file)
    assert len(str(stopped.value)) < 400
