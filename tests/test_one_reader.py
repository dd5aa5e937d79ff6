"""One reader and one decoder: a row with several captions and an image of any mode are the same to every command."""

from __future__ import annotations

import functools
import io
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from align.data.captioned import Images
from align.data.preferences import PreferencePairs
from align.data.prompts import read_prompts
from align.data.views import cut
from rewards import agree
from rewards.common import files
from rewards.common.files import atomic
from rewards.data import images
from rewards.data.formats import open_input
from rewards.data.images import UnreadableError, decode, decode_tensor
from rewards.score import main


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


def deep(seed: int) -> bytes:
    """16-bit grey, 8 x 8."""
    return encoded(np.random.default_rng(seed).integers(0, 65536, (8, 8), dtype=np.uint16))


def test_training_drawing_scoring_and_agreement_see_one_text_and_one_image(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        (tmp_path / f"{name}.png").write_bytes(deep(seed))
    row = {"text": "third", "prompt": "second", "caption": "first"}
    rows, pairs = tmp_path / "rows.jsonl", tmp_path / "pairs.jsonl"
    rows.write_text(json.dumps({"file_name": "a.png", **row}))
    pairs.write_text(json.dumps({"chosen": "a.png", "rejected": "b.png", **row}))
    caplog.set_level(logging.WARNING)
    (scored,) = [one for one in open_input(str(rows)).rows(lambda number: True) if one]
    (trained,) = Images(str(rows), cache_dir=str(tmp_path)).read().items
    (pair,) = PreferencePairs(str(pairs)).read().items
    choices = agree.read(str(pairs), None, None, None, None)
    texts = [scored.prompt, trained.caption, pair.caption, choices.choices[0].prompt, *read_prompts(rows)]
    assert texts == ["first"] * 5
    said = [record.message for record in caplog.records if str(rows) in record.message]
    assert len(said) == 2 and "caption and prompt with different texts; caption is taken" in said[0]
    images = [decode(image.data()) for image in (trained.images[0], pair.images[0])]
    pixels = [scored.read(), *(cut(image, 8, 0.5, 0.5, False) for image in images)]
    pixels.append(decode_tensor(choices.pictures[0][0].source()))
    levels = np.round(np.asarray(Image.open(tmp_path / "a.png")).astype(np.int64) / 257)
    assert all(torch.equal(one, torch.from_numpy(levels).byte().expand(3, 8, 8)) for one in pixels)


def test_another_column_is_taken_where_it_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_bytes(deep(1))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"file_name": "a.png", "caption": "first", "prompt": "a red star"}))
    command = [str(rows), "--reward", "Shapes", "--output", str(tmp_path / "out.parquet")]
    assert main(command) == 2  # "first" is no caption of the embedded world
    capsys.readouterr()
    assert main([*command, "--prompt_column", "prompt"]) == 0
    assert "--prompt_column is called --caption_column now" in capsys.readouterr().err


def test_every_mode_has_one_rule() -> None:
    grey = np.array([[0.0, 0.5], [1.0, 0.25]], dtype=np.float32)
    for scale in (1, 255):
        found = np.asarray(decode(encoded(grey * scale, "TIFF")))[..., 0]
        assert found.tolist() == [[0, 128], [255, 64]]
    for wrong in (grey - 1, grey * 300, grey * np.float32("nan")):
        with pytest.raises(UnreadableError, match=r"expected \[0, 1\] or \[0, 255\]"):
            decode(encoded(wrong, "TIFF"))
    assert np.asarray(decode(encoded(np.array([[0, 65535]], dtype=np.int32), "TIFF")))[0, :, 0].tolist() == [0, 255]
    with pytest.raises(UnreadableError, match="integer pixels from -1 to 5"):
        decode(encoded(np.array([[-1, 5]], dtype=np.int32), "TIFF"))
    rgb = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    for mode in ("1", "L", "P", "CMYK"):
        image, out = Image.fromarray(rgb).convert(mode), io.BytesIO()
        image.save(out, "TIFF")
        assert decode(out.getvalue()).tobytes() == image.convert("RGB").tobytes(), mode


def test_an_animation_is_its_first_frame_which_is_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "_mention_once", functools.cache(images._mention_once.__wrapped__))  # a new process
    frames = [Image.new("RGB", (3, 3), colour) for colour in ("red", "blue")]
    out = io.BytesIO()
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    still = io.BytesIO()
    frames[0].save(still, "GIF")
    assert decode(still.getvalue()).getpixel((0, 0)) == (255, 0, 0) and not caplog.messages
    for _ in range(3):
        assert decode(out.getvalue()).getpixel((0, 0)) == (255, 0, 0)
    assert caplog.messages == ["an animated image is among the data; of these the first frame is taken"]


def test_a_draft_goes_where_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "below" / "file"
    with atomic(path) as draft:
        draft.write_text("whole")
    with pytest.raises(RuntimeError), atomic(path) as draft:
        draft.write_text("half")
        raise RuntimeError
    with atomic(tmp_path / "folder") as draft:
        draft.mkdir()
        (draft / "a").write_text("a")
    assert path.read_text() == "whole" and (tmp_path / "folder/a").read_text() == "a"
    with atomic(tmp_path / "folder") as draft:
        draft.mkdir()
        assert (tmp_path / "folder/a").read_text() == "a"  # until the new one is whole
        (draft / "b").write_text("b")
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["b"]
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_folder_half_taken_away_has_no_name_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "notes.tmp").write_text("a user's")
    monkeypatch.setattr(files.shutil, "rmtree", lambda path: None)  # killed before a file of it is gone
    files.discard(tmp_path / "checkpoint-1")
    monkeypatch.undo()
    assert not (tmp_path / "checkpoint-1").exists()
    assert len(list(tmp_path.iterdir())) == 2
    files.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.tmp"]
