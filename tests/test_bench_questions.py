"""Benches that ask questions of a picture: their aggregations by hand, their files, and each from the command down to
its figure, with a server that stands in for the model."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForQuestionAnswering,
    BlipProcessor,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from align.bench import main
from align.common.errors import DataError
from align.evaluation.bench_prompts import read_rows
from align.evaluation.bench_spec import load_spec
from rewards import RewardError, RewardSum, parse_rewards
from rewards.models import blip_vqa
from rewards.models.blip_vqa import BLIPVQA, phrases_of
from rewards.models.question_graph import Question, QuestionGraph, is_yes, share
from rewards.models.questions import questioner
from rewards.models.soft_tifa import SoftTIFA, forms, mean_of
from rewards.models.wi_score import RUBRICS, WiScore
from tests import bench_files
from tests.bench_files import opinion, stand_in
from tests.reward_samples import new_qwen, pictures, randomise, tensor

Asked = Sequence[tuple[bytes, str]]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Asked]]:
    monkeypatch.setenv("no_proxy", "*")
    with stand_in() as found:
        yield found


def picture(seed: int) -> torch.Tensor:
    return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


# -- GenEval2 ----------------------------------------------------------------------------------------------------


def test_soft_tifa_by_hand() -> None:
    values = [0.5, 0.8, 0.2]
    assert mean_of(values, "am") == pytest.approx(0.5, abs=1e-12)
    assert mean_of(values, "gm") == pytest.approx(0.430886938006377, abs=1e-12)  # 0.08^(1/3)
    assert mean_of([0.5, 0.0], "gm") == 0
    assert forms("How many stars are in the image?", "three") == ("three", "Three", " three", " Three", "3", " 3")
    assert forms("Are there any stars?", "Yes") == ("Yes", "yes", " yes", " Yes")


def test_soft_tifa_is_the_official_loop(tmp_path: Path) -> None:
    """GenEval2's ``soft_tifa`` in float64, on a tiny model: the sum of the probabilities of the forms' first tokens."""
    new_qwen(tmp_path)
    scorer = SoftTIFA("gm", str(tmp_path), device="cpu", dtype="float32")
    arithmetic = SoftTIFA("am", str(tmp_path), device="cpu", dtype="float32")
    assert arithmetic.questioner is scorer.questioner  # one network for both
    chat = scorer.questioner.chat
    assert chat is not None
    model = Qwen2VLForConditionalGeneration.from_pretrained(str(tmp_path)).double()
    shown, row = pictures([(50, 41)])[0], bench_files.GENEVAL2[0]
    expected = []
    for question, answer in row["vqa_list"]:
        inputs = {
            k: v.double() if v.is_floating_point() else v
            for k, v in chat.inputs(shown, f"{question} Answer in one word.").items()
        }
        with torch.no_grad():
            made = model.generate(
                **inputs, max_new_tokens=1, do_sample=False, output_scores=True, return_dict_in_generate=True
            )
        probabilities, total = made.scores[0][0].softmax(-1), 0.0
        numbers = {"one": "1", "two": "2"}
        words = ["Yes", "yes", " yes", " Yes"]
        if question.startswith("How many"):
            words = [answer, answer.capitalize(), " " + answer, " " + answer.capitalize()]
            words += [numbers[answer], " " + numbers[answer]]
        for word in words:
            total += float(probabilities[chat.processor.tokenizer.encode(word)[0]])
        expected.append(total)
    given: dict[str, Any] = {"images": tensor(shown), "prompts": [row["prompt"]], "metadata": [row]}
    assert float(arithmetic.score(**given)) == pytest.approx(sum(expected) / 3, rel=1e-4)
    assert float(scorer.score(**given)) == pytest.approx(math.prod(expected) ** (1 / 3), rel=1e-4)
    assert max(expected) > 1.01 * min(expected)


def test_am_and_gm_ask_every_question_once(server: tuple[str, Asked]) -> None:
    url, asked = server
    spec = load_spec("geneval2")
    configs = parse_rewards(list(spec.reward))
    for config in configs:
        config.args |= {"url": url, "model": "m"}
    rewards = RewardSum.of(configs)
    images = torch.cat([picture(0), picture(1), picture(0)])
    rows = [bench_files.GENEVAL2[k] for k in (0, 1, 0)]
    scores = rewards.scores(images=images, prompts=["a"] * 3, metadata=rows)
    assert len(asked) == 3 + 2  # the third picture is the first
    first = [(opinion(*one) + 1) / 512 for one in asked if "stars" in one[1]]
    parts = {"How": 0.5 + 0.125 + 0.125, "Are": 1.0 + 0.25}  # two, ` two`, 2; Yes, yes
    values = [p * parts[one[1][:3]] for p, one in zip(first, [o for o in asked if "stars" in o[1]], strict=True)]
    assert float(scores["Soft-TIFA AM"][0]) == pytest.approx(sum(values) / 3, rel=1e-6)
    assert float(scores["Soft-TIFA GM"][2]) == pytest.approx(math.prod(values) ** (1 / 3), rel=1e-6)
    with pytest.raises(RewardError, match="vqa_list is None") as caught:
        rewards.scores(images=images[:2], prompts=["a", "b"], metadata=[rows[0], {}])
    assert caught.value.row == 1


# -- DPG-Bench, OneIG --------------------------------------------------------------------------------------------


def test_a_no_counts_for_what_depends_on_it() -> None:
    chain = [Question(1, "a?", (0,)), Question(2, "b?", (1,)), Question(3, "c?", (2,)), Question(4, "d?", (0,))]
    yes = [False, True, True, True]
    assert share(yes, chain, chained=True) == 1 / 4  # DPG-Bench: b falls with a, and c with b
    assert share(yes, chain, chained=False) == 2 / 4  # OneIG: b was answered yes, so c stands
    assert share([True] * 4, chain, chained=True) == 1
    later = [Question(1, "a?", (2,)), Question(2, "b?", (3,)), Question(3, "c?", (0,))]
    assert share([True, True, False], later, chained=True) == 1 / 3  # in the order of the file: a saw b's own answer
    both = [Question(1, "a?", (0,)), Question(2, "b?", (0,)), Question(3, "c?", (1, 2))]
    assert share([True, False, True], both, chained=False) == 1 / 3
    assert [is_yes(reply) for reply in ("Yes", " yes.\n", "YES", "yes, it is", "No", "")] == [True] * 3 + [False] * 3


def test_questions_that_do_not_fit_are_refused(server: tuple[str, Asked]) -> None:
    scorer = QuestionGraph(url=server[0], model="m")
    sound = {"number": 1, "question": "a?", "parents": [0]}
    for rows in (None, [], [sound, sound], [sound | {"parents": [2]}], [sound | {"question": ""}], [{"number": 1}]):
        data = {} if rows is None else {"questions": rows}
        with pytest.raises(RewardError, match="QuestionGraph: the metadata are"):
            scorer.score(images=picture(0), prompts=["a"], metadata=[data])
    with pytest.raises(RewardError, match="no metadata; expected questions"):
        scorer.score(images=picture(0), prompts=["a"])
    assert not server[1]


# -- WISE --------------------------------------------------------------------------------------------------------


def test_wiscore_by_hand() -> None:
    reply = "Consistency: 2\n**Realism:** 1\nAesthetic Quality: 0"
    assert RUBRICS["legacy"].read(reply) == pytest.approx(0.8, abs=1e-12)  # (0.7 * 2 + 0.2 * 1 + 0.1 * 0) / 2
    assert RUBRICS["legacy"].read(reply.replace("0", "2")) == pytest.approx(0.9, abs=1e-12)
    assert [RUBRICS["verified"].read(f"Score: {n}") for n in (0, 1)] == [0, 1]
    for text in (reply[:20], reply.replace("2", "3"), "Score: 1"):
        with pytest.raises(ValueError, match="expected"):
            RUBRICS["legacy"].read(text)


def test_the_judge_is_told_prompt_and_explanation(server: tuple[str, Asked], tmp_path: Path) -> None:
    url, asked = server
    (tmp_path / "question.txt").write_text("P {prompt} E {explanation} Score: 0 or Score: 1")
    scorer = WiScore("verified", str(tmp_path / "question.txt"), url=url, model="m")
    images = torch.cat([picture(0), picture(1)])
    rows = [{"Explanation": "it is {prompt}"}, {"Explanation": "yellow"}]
    scores = scorer.score(images=images, prompts=["a {explanation}", "a leaf"], metadata=rows)
    texts = ["P a {explanation} E it is {prompt} Score: 0 or Score: 1", "P a leaf E yellow Score: 0 or Score: 1"]
    assert sorted(text for _, text in asked) == sorted(texts)
    thoughts = {text: opinion(shown, text) for shown, text in asked}
    assert scores.tolist() == [thoughts[text] % 2 for text in texts]
    with pytest.raises(RewardError, match="Explanation is None"):
        scorer.score(images=images[:1], prompts=["a"], metadata=[{}])
    for wrong in ("no place", str(tmp_path / "nowhere.txt"), "{prompt} alone"):
        with pytest.raises(RewardError, match="WiScore: "):
            WiScore(question=wrong, url=url, model="m")


# -- T2I-CompBench -----------------------------------------------------------------------------------------------

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "yes",
    "no",
    "a",
    "red",
    "green",
    "round",
    "star",
    "blue",
    "circle",
]
WORDS += ["?", "the", "side", "and"]


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny BLIP with random weights; [DEC] and [ENC] are the last words, as in the published one."""
    folder = tmp_path_factory.mktemp("blip")
    (folder / "vocab.txt").write_text("\n".join([*WORDS, "[DEC]", "[ENC]"]))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = small | {"vocab_size": len(WORDS) + 2, "bos_token_id": len(WORDS), "encoder_hidden_size": 16}
    vision = small | {"image_size": 32, "patch_size": 8}
    model = BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=vision))
    randomise(model, 3)
    model.save_pretrained(folder)
    processor = BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer)
    processor.save_pretrained(folder)
    return str(folder)


def test_blip_vqa_is_the_official_product(blip: str) -> None:
    """T2I-CompBench's ``vqa_prob`` in float64, a question at a time: P(yes) / (P(yes) + P(no)), then the product."""
    scorer = BLIPVQA(blip, device="cpu")
    model = BlipForQuestionAnswering.from_pretrained(blip).double().eval()
    tokenizer, shown = scorer.tokenizer, pictures([(50, 41), (30, 60)])
    phrases = [["a red star", "a blue circle and the side"], ["a Green Star.", "top", "a"]]
    expected = []
    for one, asked in zip(shown, phrases, strict=True):
        resized = np.asarray(one.convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)) / 255.0
        mean, std = np.array(scorer.resize.image_mean), np.array(scorer.resize.image_std)
        pixels = torch.from_numpy(((resized - mean) / std).transpose(2, 0, 1)[None])
        product = 1.0
        for text in (t for t in asked if t != "top"):
            ids = tokenizer(f"{text.lower().rstrip('.')}?", return_tensors="pt").input_ids
            ids[:, 0] = len(WORDS) + 1
            with torch.no_grad():
                seen = model.vision_model(pixels).last_hidden_state
                states = model.text_encoder(
                    input_ids=ids, attention_mask=torch.ones_like(ids), encoder_hidden_states=seen
                ).last_hidden_state
                begin = torch.full((1, 1), len(WORDS))
                chances = model.text_decoder(input_ids=begin, encoder_hidden_states=states).logits[0, 0].softmax(-1)
            yes, no = (float(chances[WORDS.index(word)]) for word in ("yes", "no"))
            product *= yes / (yes + no)
        expected.append(product)
    rows = [{"noun_phrases": asked} for asked in phrases]
    images = [tensor(one) for one in shown]
    scores = [
        float(scorer.score(images=image, prompts=["x"], metadata=[row]))
        for image, row in zip(images, rows, strict=True)
    ]
    assert scores == pytest.approx(expected, rel=1e-4)
    assert abs(expected[0] - expected[1]) > 1e-3


def test_noun_phrases_come_from_the_file_or_from_spacy(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"noun_phrases": ["a star", "the left", *map(str, range(9))]}
    assert phrases_of("x", told, 0) == ["a star", *map(str, range(7))]  # eight, without what is no object
    with pytest.raises(RewardError, match="noun_phrases is 'a star'"):
        phrases_of("x", {"noun_phrases": "a star"}, 0)
    with pytest.raises(RewardError, match="has no noun phrase"):
        phrases_of("x", {"noun_phrases": ["top"]}, 0)
    blip_vqa.spacy_phrases.cache_clear()
    with pytest.raises(RewardError, match="pip install spacy"):  # it is no dependency
        phrases_of("a star", {}, 0)
    monkeypatch.setattr(blip_vqa, "spacy_phrases", lambda: lambda prompt: [prompt, "top"])
    assert phrases_of("a star", {}, 0) == ["a star"]


# -- from the command to the figure ------------------------------------------------------------------------------


def run(name: str, prompts: Path, output: Path, *more: str) -> int:
    small = ["--num_inference_steps", "1", "--output_dir", str(output), "--batch_size", "4"]
    return main([name, "--models", "shapes-sd", "--prompts", str(prompts), *small, *more])


def decoded(file: bytes) -> bytes:
    with Image.open(io.BytesIO(file)) as one:
        return one.convert("RGB").tobytes()


def by_hand(name: str, asked: Asked, images: Path) -> dict[str, float]:
    """The bench's figures from what the stand-in was asked, by the papers' formulas."""
    rows = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()]
    thoughts = {(decoded(sent), text): opinion(sent, text) for sent, text in asked}
    scores: dict[str, list[float]] = {}
    for number, row in enumerate(rows):
        pixels = decoded((images / f"{number:05d}.png").read_bytes())

        def of(question: str, pixels: bytes = pixels) -> int:
            return thoughts[pixels, question]

        if name == "geneval2":
            each = []
            for question, answer in row["vqa_list"]:
                p = (of(f"{question} Answer in one word.") + 1) / 512
                parts = {"two": 0.75, "one": 0.5, "Yes": 1.25}  # the stand-in's first tokens
                each.append(p * parts[answer])
            scores.setdefault("Soft-TIFA AM", []).append(100 * sum(each) / len(each))
            scores.setdefault("Soft-TIFA GM", []).append(100 * math.prod(each) ** (1 / len(each)))
        elif name.startswith("wise"):
            spec, data = load_spec(name), {"Explanation": row["Explanation"]}
            rubric = parse_rewards(list(spec.reward))[0].args["rubric"]
            text = WiScore(rubric, url="http://localhost/v1", model="m").read(row["prompt"], data, 0)
            t = of(text)
            c, r, a = t % 3, t // 3 % 3, t // 9 % 3
            scores.setdefault("WiScore", []).append(t % 2 if "verified" in name else (0.7 * c + 0.2 * r + 0.1 * a) / 2)
        else:
            suffix = " Please answer 'Yes' or 'No' only." if name == "dpg" else ". Please answer 'Yes' or 'No' only."
            right = {q["number"]: of(q["question"] + suffix) % 4 in (0, 3) for q in row["questions"]}
            kept = dict(right)
            for q in row["questions"]:
                known = kept if name == "dpg" else right
                kept[q["number"]] = right[q["number"]] and all(known[p] for p in q["parents"] if p)
            scale = 100 if name == "dpg" else 1
            scores.setdefault("QuestionGraph", []).append(scale * sum(kept.values()) / len(kept))
    return {reward: float(np.mean(values)) for reward, values in scores.items()}


def drawn_in(images: Path) -> set[bytes]:
    return {decoded(file.read_bytes()) for file in images.glob("*.png")}


@pytest.mark.parametrize(
    "name",
    [
        "dpg",
        "wise",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("geneval2", "wise-verified", "oneig-alignment")),
    ],
)
def test_a_bench_that_asks_questions(name: str, server: tuple[str, Asked], tmp_path: Path) -> None:
    url, asked = server
    prompts = bench_files.write_all(tmp_path)[name]
    more = ("--reward_args", f"{{url: '{url}', model: m}}", "--samples_per_prompt", "2")
    assert run(name, prompts, tmp_path / "out", *more) == 0
    report = json.loads((tmp_path / "out/bench.json").read_text())
    images, spec = tmp_path / "out/images/shapes-sd", load_spec(name)
    expected = by_hand(name, asked, images)
    assert set(expected) == set(report["rewards"])
    for reward, figure in expected.items():
        entry = report["rewards"][reward]
        assert spec.scale.get(reward, 1.0) * entry["shapes-sd_mean"] == pytest.approx(figure, rel=1e-6)
        assert "shapes-sd_overall" not in entry  # over prompts, whatever their tasks
        if spec.task_column:
            assert entry["task_ci"].keys() == entry["tasks"].keys()
    page = (tmp_path / "out/bench.md").read_text()
    assert f"scorers given url {url}, model m" in report["differences"]
    assert all(line in " ".join(page.split()) for line in spec.unlike if "'" not in line)
    with Image.open(tmp_path / "out/chart.png") as chart:
        assert chart.width > 300
    assert 'class="chart"' in (tmp_path / "out/gallery.html").read_text()
    if name == "dpg":  # the same command goes on: nothing but the canaries is asked again
        noise = [text for sent, text in asked if decoded(sent) not in drawn_in(images)]
        before = len(asked)
        assert run(name, prompts, tmp_path / "out", *more) == 0
        again = [text for sent, text in asked[before:] if decoded(sent) not in drawn_in(images)]
        assert sorted(again) == sorted(noise) and len(asked) < 2 * before


def test_blip_vqa_from_the_command(blip: str, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = [("a red star and a blue circle", "color", ["a red star", "a blue circle"]), ("a star", "shape", ["a star"])]
    lines = [json.dumps({"prompt": text, "task": task, "noun_phrases": found}) for text, task, found in rows]
    prompts.write_text("\n".join(lines))
    more = ("--reward_args", f"{{model: '{blip}', device: cpu}}", "--samples_per_prompt", "2")
    assert run("t2i-compbench", prompts, tmp_path / "out", *more) == 0
    entry = json.loads((tmp_path / "out/bench.json").read_text())["rewards"]["BLIPVQA"]
    scorer, shown = BLIPVQA(blip, device="cpu"), tmp_path / "out/images/shapes-sd"
    each = []
    for number in range(4):
        with Image.open(shown / f"{number:05d}.png") as one:
            row = [{"noun_phrases": rows[number // 2][2]}]
            each.append(float(scorer.score(images=tensor(one), prompts=["x"], metadata=row)))
    assert entry["tasks"]["color"]["shapes-sd"] == pytest.approx((each[0] + each[1]) / 2, rel=1e-5)
    assert entry["shapes-sd_overall"] == pytest.approx(sum(each) / 4, rel=1e-5)


def test_a_scorer_that_does_not_heed_the_questions_is_caught(
    server: tuple[str, Asked], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = bench_files.write_all(tmp_path)
    assert run("geneval2", places["geneval2"], tmp_path / "out", "--reward", "JPEGCompressibility") == 2
    assert "whatever metadata they come with" in capsys.readouterr().err
    words = ("--reward", "QuestionGraph", "--reward_args", "{model: m}")
    assert run("dpg", places["dpg"], tmp_path / "out", *words) == 2
    assert "reward_args are of the bench's own scorers" in capsys.readouterr().err


# -- files -------------------------------------------------------------------------------------------------------


def test_files_become_prompts_with_their_questions(tmp_path: Path) -> None:
    places = bench_files.write_all(tmp_path)
    rows, told = read_rows(load_spec("dpg"), str(places["dpg"]))
    assert [row["item_id"] for row in rows] == ["stars", "circle"] and told == ["2 prompts, 1065 in the bench"]
    assert rows[1]["questions"][1] == {"number": 2, "question": "Is it blue?", "parents": [0, 1]}
    rows, told = read_rows(load_spec("oneig-alignment"), str(places["oneig-alignment"]))
    assert [row["category"] for row in rows] == ["Anime_Stylization", "General_Object"]
    assert [one["parents"] for one in rows[0]["questions"]] == [[0], [1], [2]]
    assert len(told) == 2 and told[1].endswith("has another SHA-256 than the official one")
    rows, told = read_rows(load_spec("wise"), str(places["wise"]))
    assert [row["prompt_id"] for row in rows] == [1, 2, 3] and rows[2]["Category"] == "Biology"
    rows, told = read_rows(load_spec("wise-verified"), str(places["wise"] / "merge.json"))
    assert len(rows) == 3 and "is none of the official cultural_common_sense_verified.json" in told[1]
    (places["wise"] / "natural_science.json").unlink()
    assert "natural_science.json is not there" in read_rows(load_spec("wise"), str(places["wise"]))[1]


def test_files_that_are_not_the_benchs_are_told_in_words(tmp_path: Path) -> None:
    places = bench_files.write_all(tmp_path)
    (places["oneig-alignment"] / "scripts/alignment/Q_D/human.json").unlink()
    for name, text in (("dpg", "item_id,text\na,b\n"), ("dpg", "item_id,text,proposition_id,dependency\na,b,one,0\n")):
        places["dpg"].write_text(text)
        with pytest.raises(DataError, match=r"dpg_bench\.csv:2: expected item_id, text"):
            read_rows(load_spec(name), str(places["dpg"]))
    with pytest.raises(DataError, match=r"there is no .*human\.json"):
        read_rows(load_spec("oneig-alignment"), str(places["oneig-alignment"]))
    with pytest.raises(DataError, match=r"has no OneIG-Bench\.csv"):
        read_rows(load_spec("oneig-alignment"), str(tmp_path))


def test_one_model_is_there_once(server: tuple[str, Asked]) -> None:
    settings = ("m", server[0], None, 60.0, 4, 8, None, "bfloat16")
    one = questioner("A", *settings)
    assert questioner("B", *settings) is one and questioner("A", "n", *settings[1:]) is not one
