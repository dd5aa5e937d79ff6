"""HPSv3 gives what upstream's forward pass gives, on a tiny Qwen2-VL with its true picture size.

The reference is the package ``hpsv3`` 1.0.0 (PyPI, MIT): its forward pass in float64, with pictures resized by PIL,
embeddings put together by hand, positions left to the language model alone and the head written out; and its answers,
which can be compared where that package is installed (``pip install --no-deps hpsv3==1.0.0``), since only it holds the
question that they answer. Elsewhere a question of ours stands in.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from rewards import RewardError, load
from rewards.models import hpsv3, preprocess
from rewards.models.hpsv3 import AREA, HPSv3, published_question, rename, size
from tests.reward_samples import PROMPTS, Sample, new_qwen, pictures, samples, tensor

REWARD = "<|Reward|>"
OURS = "How good is this picture,\n  for the prompt {prompt}  ?\n<|Reward|>\n"
WHY = "hpsv3 is not installed, which holds the published question: pip install --no-deps hpsv3==1.0.0"
PUBLISHED = importlib.util.find_spec("hpsv3") is not None
# What upstream's own code says of the same weights, files and prompts: class Qwen2VLRewardModelBT, process_vision_info
# and INSTRUCTION of the wheel hpsv3 1.0.0, run once with transformers 4.45.2, tokenizers 0.20.3, torch 2.13.0, float32.
# A batch of three prompts of different lengths there agrees with each alone to 3e-7.
GOLDEN = [
    2.901464,
    2.957833,
    1.999304,
    3.110607,
    2.590594,
    2.625632,
    3.001977,
    1.075048,
    3.219164,
    2.430908,
    2.874855,
    3.198051,
    2.684693,
    3.280882,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base``, the network it is made from, and the release's one file, with the names of transformers 4.45."""
    root = tmp_path_factory.mktemp("hpsv3")
    new_qwen(root / "base")
    words = len(Qwen2VLProcessor.from_pretrained(root / "base").tokenizer)
    weights = load_file(root / "base/model.safetensors")
    weights = {
        re.sub(r"^model\.visual", "visual", name).replace("model.language_model", "model"): value
        for name, value in weights.items()
    }
    generator = torch.Generator().manual_seed(4)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    weights["model.embed_tokens.weight"] = torch.cat([weights["model.embed_tokens.weight"][:words], drawn(1, 32)])
    weights["lm_head.weight"] = drawn(words + 1, 32)
    for number, (outputs, inputs) in {0: (1024, 32), 3: (16, 1024), 5: (2, 16)}.items():
        weights[f"rm_head.{number}.weight"] = 2 * drawn(outputs, inputs)
        weights[f"rm_head.{number}.bias"] = drawn(outputs)
    save_file(weights, root / "HPSv3.safetensors")
    (root / "question.txt").write_text(OURS)
    return root


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    every = samples(tmp_path_factory.mktemp("modes"))
    return every[:5] + every[10:]  # every kind of prompt, every mode: a thousand patches each take their time


def new(folder: Path, **extra: Any) -> HPSv3:
    arguments = {"model": str(folder), "processor": str(folder / "base"), "device": "cpu", "dtype": "float32"}
    question = {"question": str(folder / "question.txt")}
    scorer = load("HPSv3", arguments | question | extra)
    assert isinstance(scorer, HPSv3)
    return scorer


def upstream(folder: Path, question: str) -> Callable[[Image.Image, str], list[float]]:
    """Mean and deviation of one picture and prompt."""
    processor = Qwen2VLProcessor.from_pretrained(folder / "base")
    processor.image_processor = Qwen2VLImageProcessorPil()
    processor.tokenizer.add_special_tokens({"additional_special_tokens": [REWARD]})
    weights = {name: value.double() for name, value in load_file(folder / "HPSv3.safetensors").items()}
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder / "base").double()
    model.resize_token_embeddings(len(processor.tokenizer))
    body = {name: value for name, value in weights.items() if not name.startswith(("rm_head.", "lm_head."))}
    model.model.load_state_dict({rename(name): value for name, value in body.items()})

    def score(picture: Image.Image, prompt: str) -> list[float]:
        height, width = smart_resize(picture.height, picture.width, 28, AREA, AREA)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        content = [{"type": "image"}, {"type": "text", "text": question.replace("{prompt}", prompt)}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        batch = processor(text=[text], images=[picture], return_tensors="pt")
        ids = batch["input_ids"]
        embedded = model.get_input_embeddings()(ids)
        seen = model.model.visual(batch["pixel_values"].double(), grid_thw=batch["image_grid_thw"]).pooler_output
        embedded[ids == model.config.image_token_id] = seen
        state = model.model.language_model(inputs_embeds=embedded, attention_mask=batch["attention_mask"])[0]
        (h,) = state[ids == processor.tokenizer.convert_tokens_to_ids(REWARD)]
        for number in (0, 3, 5):
            h = weights[f"rm_head.{number}.weight"] @ h + weights[f"rm_head.{number}.bias"]
            h = h.relu() if number < 5 else h
        return h.tolist()

    return score


@pytest.mark.slow
@pytest.mark.parametrize("published", [False, pytest.param(True, marks=pytest.mark.skipif(not PUBLISHED, reason=WHY))])
def test_scores_are_upstreams(folder: Path, drawn: list[Sample], published: bool) -> None:
    ours = new(folder, **({"question": None} if published else {}))
    theirs = upstream(folder, published_question() if published else OURS)
    with torch.no_grad():
        expected = [theirs(sample.picture, sample.prompt) for sample in drawn]
    scores = [float(ours.score(images=sample.images, prompts=[sample.prompt])) for sample in drawn]
    assert scores == pytest.approx([mean for mean, _ in expected], rel=1e-4)
    if published:
        assert scores == pytest.approx(GOLDEN, rel=1e-4)
    assert np.std(scores) > 0.03
    assert all(abs(mean - deviation) > 0.01 for mean, deviation in expected)  # so it is the first of the two


def test_the_question_is_read_out_of_the_package_and_checked(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hpsv3, "PACKAGE", "no_such_hpsv3")
    with pytest.raises(RewardError, match=r"pip install --no-deps no_such_hpsv3==1\.0\.0"):
        new(folder, question=None)
    stand_in = tmp_path / "some_hpsv3" / hpsv3.FILE
    stand_in.parent.mkdir(parents=True)
    (tmp_path / "some_hpsv3/__init__.py").write_text("raise AssertionError('it is read, not run')")
    words = {"INSTRUCTION": "Rate {text_prompt}. ", "other": "no", "prompt_with_special_token": "<|Reward|>"}
    stand_in.write_text("import nothing_there\n" + "".join(f"{k} = {v!r}\n" for k, v in words.items()))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(hpsv3, "PACKAGE", "some_hpsv3")
    with pytest.raises(RewardError, match="does not hold the question of some_hpsv3"):
        published_question()
    digest = hashlib.sha256(b"Rate {prompt}. <|Reward|>").hexdigest()
    monkeypatch.setattr(hpsv3, "DIGEST", digest)
    assert published_question() == "Rate {prompt}. <|Reward|>"
    (tmp_path / "bad.txt").write_text("Rate {prompt}")
    for question, message in (("bad.txt", "has to hold"), ("gone.txt", "no file")):
        with pytest.raises(RewardError, match=message):
            new(folder, question=str(tmp_path / question))


def test_sizes_are_qwens() -> None:
    for height, width in [(448, 448), (896, 896), (1344, 1344), (1, 1), (3000, 15), (40, 1), (224, 895), (500, 400)]:
        assert size(height, width, 28) == smart_resize(height, width, 28, AREA, AREA)
    rng = np.random.default_rng(0)
    for height, width in (10 ** rng.uniform(0, 3.5, (2000, 2))).astype(int).tolist():
        if max(height, width) <= 200 * min(height, width):
            assert size(height, width, 28) == smart_resize(height, width, 28, AREA, AREA)
    with pytest.raises(RewardError, match="HPSv3: a picture of 1 x 201; expected edges at most 200 to 1"):
        size(201, 1, 28)


def test_pixels_are_upstreams(folder: Path) -> None:
    scorer = new(folder)
    for picture in pictures([(64, 64), (500, 333), (3, 90)]):
        height, width = size(picture.height, picture.width, 28)
        small = picture.resize((width, height), Image.Resampling.BICUBIC)
        theirs = Qwen2VLImageProcessorPil()(small, return_tensors="pt")
        pixels, grid = scorer.patches(tensor(picture))
        torch.testing.assert_close(pixels, theirs.pixel_values, rtol=0, atol=1e-5)
        assert grid.tolist() == theirs.image_grid_thw[0].tolist()


def test_alone_or_in_a_batch_is_the_same(folder: Path) -> None:
    scorer = new(folder)
    images = torch.cat([tensor(picture) for picture in pictures([(50, 41)] * 3)])
    prompts = [PROMPTS[0], PROMPTS[2], PROMPTS[1]]  # of different lengths
    together = scorer.score(images=images, prompts=prompts)
    alone = torch.cat([scorer.score(images=images[k : k + 1], prompts=prompts[k : k + 1]) for k in range(3)])
    assert together.dtype == torch.float32 and not together.requires_grad
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert (together[0] - together[1:]).abs().min() > 0.01


def test_picture_tokens_are_numbered_as_words_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream never gives Qwen2-VL what it needs to number them by row and column; doing so is another score."""
    scorer, images = new(folder), tensor(pictures([(90, 50)])[0])
    right = float(scorer.score(images=images, prompts=["a fox"]))
    forward = scorer.network.forward

    def by_row_and_column(input_ids: Tensor, position_ids: Tensor, **rest: Any) -> Any:
        kinds = (input_ids == scorer.network.config.image_token_id).int()
        return forward(input_ids=input_ids, mm_token_type_ids=kinds, **rest)

    monkeypatch.setattr(scorer.network, "forward", by_row_and_column)
    assert abs(float(scorer.score(images=images, prompts=["a fox"])) - right) > 1e-3


def test_the_gradient_is_the_slope(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As near as the language model's norms allow, which are float32 whatever it runs in."""
    scorer = new(folder).double()
    images = 0.2 + 0.6 * tensor(pictures([(45, 38)], seed=3)[0]).double()
    images.requires_grad_()
    monkeypatch.setattr(preprocess, "eight_bit", lambda levels: levels.clamp(0, 255))
    (gradient,) = torch.autograd.grad(scorer(images, ["a fox"]).sum(), images)
    step = 3e-4 * gradient / gradient.abs().max()
    with torch.no_grad():
        slope = (scorer(images + step, ["a fox"]) - scorer(images - step, ["a fox"])).sum() / 2
    assert scorer.differentiable and float(slope) == pytest.approx(float((gradient * step).sum()), rel=1e-2)
    assert not any(weight.requires_grad for weight in scorer.parameters())


def test_lower_precision_keeps_the_head(folder: Path) -> None:
    images = tensor(pictures([(40, 40)])[0])
    exact = float(new(folder).score(images=images, prompts=["a fox"]))
    scorer = new(folder, dtype="bfloat16")
    assert scorer.head[0].weight.dtype == torch.float32 and scorer.network.dtype == torch.bfloat16
    coarse = float(scorer.score(images=images, prompts=["a fox"]))
    assert coarse != exact and coarse == pytest.approx(exact, abs=0.1)


def test_prompts_cannot_hold_the_networks_marks(folder: Path) -> None:
    scorer = new(folder)
    for mark in (REWARD, "<|image_pad|>"):
        with pytest.raises(RewardError, match=re.escape(f"HPSv3: the prompt 'a {mark}' holds {mark}")) as caught:
            scorer.score(images=torch.zeros(2, 3, 30, 30), prompts=["{prompt} and {}", f"a {mark}"])
        assert caught.value.row == 1


def test_a_wrong_checkpoint_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "HPSv3.safetensors")
    for name, lost, message in [
        (
            "layer",
            "model.layers.1.input_layernorm.weight",
            "lacks 1 weights of a Qwen2-VL, such as language_model.layers.1",
        ),
        ("head", "rm_head.3.weight", "loading state_dict"),
    ]:
        (tmp_path / name).mkdir()
        save_file({k: v for k, v in weights.items() if k != lost}, tmp_path / name / "HPSv3.safetensors")
        with pytest.raises(RewardError, match=f"HPSv3: .*{message}"):
            new(folder, model=str(tmp_path / name))
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:-1]
    save_file(weights, tmp_path / "HPSv3.safetensors")
    with pytest.raises(RewardError, match=r"it has \d+ words, the tokenizer \d+"):
        new(folder, model=str(tmp_path))
    with pytest.raises(RewardError, match="there is no HPSv3.safetensors in it"):
        new(folder, model=str(folder / "base"))
