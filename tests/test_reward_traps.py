"""What goes wrong with reward models without a word, one test each.

Elsewhere, beside the scorers they belong to: PickScore's logit scale, HPSv2's letterbox and versions, ImageReward's 35
tokens, alone or in a batch (test_reward_models); the same for the others, judges that cannot be parsed, OCR's formula,
pickles (test_more_rewards); HPSv3's positions, marks and first number (test_hpsv3).
"""

from __future__ import annotations

import inspect
import json
import shutil
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

import rewards
from rewards import RewardError, RewardSum, base, checked, load
from rewards.models.aesthetic import Aesthetic
from rewards.models.clip_score import TransformersCLIP
from rewards.models.jpeg import kilobytes
from rewards.models.network import unit
from rewards.models.preprocess import normalise, square, to_levels, to_pil
from tests.reward_samples import PROMPTS, SIDE, new_clip, pictures, tensor
from tests.test_reward_models import new_aesthetic_head


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("traps") / "clip"
    new_clip(folder)
    return str(folder)


def test_transformers_5_pooled_outputs_are_projected_once(clip: str) -> None:
    """``get_image_features`` answers with an object now; its ``pooler_output`` has been through the projection."""
    towers, images = TransformersCLIP("test", clip), tensor(pictures([(40, 40)])[0])
    pixels = normalise(square(images, SIDE, "transformers"), towers.mean, towers.std)
    network = towers.network
    assert isinstance(network.get_image_features(pixel_values=pixels), BaseModelOutputWithPooling)
    once = network.visual_projection(network.vision_model(pixel_values=pixels).pooler_output)
    torch.testing.assert_close(towers.image(images), unit(once))
    tokens = towers.tokenizer(["a fox"], return_tensors="pt")
    once = network.text_projection(network.text_model(**tokens).pooler_output)
    torch.testing.assert_close(towers.text(["a fox"]), unit(once))
    assert towers.image(images).shape == towers.text(["a fox"]).shape == (1, network.config.projection_dim)


def test_old_end_of_text_token_in_the_configuration_is_the_same(clip: str, tmp_path: Path) -> None:
    """Checkpoints from before transformers 4.31 say that it is 2; whichever is said, the last token is read."""
    old = shutil.copytree(clip, tmp_path / "old")
    config = json.loads((old / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 2
    (old / "config.json").write_text(json.dumps(config))
    assert CLIPModel.from_pretrained(old).text_model.eos_token_id == 2
    with torch.no_grad():
        new_texts, old_texts = (TransformersCLIP("test", str(folder)).text(PROMPTS) for folder in (clip, old))
    assert torch.equal(new_texts, old_texts)


def test_aesthetic_brings_embeddings_to_length_one(clip: str, tmp_path: Path) -> None:
    new_aesthetic_head(tmp_path / "head")
    scorer = load("Aesthetic", {"model": clip, "head": str(tmp_path / "head"), "device": "cpu"})
    assert isinstance(scorer, Aesthetic)
    images = tensor(pictures([(40, 40)])[0])
    before = scorer.score(images=images, prompts=[""])
    with torch.no_grad():
        scorer.projection.weight.mul_(25)  # about the length of CLIP L/14's
    torch.testing.assert_close(scorer.score(images=images, prompts=[""]), before)


@pytest.mark.parametrize("name", rewards.available())
def test_pictures_and_prompts_have_names(name: str) -> None:
    """HPSv3's package swapped the two between versions; here neither can be given by its place."""
    module, _, cls = base.BUILT_IN[name].rpartition(".")
    scorer = getattr(import_module(module), cls)
    parameters = dict(inspect.signature(scorer.score).parameters)
    assert list(parameters) == ["self", "images", "prompts", "metadata"]
    del parameters["self"]
    assert {parameter.kind for parameter in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}


def test_levels_are_multiplied_by_255_once() -> None:
    levels = torch.arange(256, dtype=torch.uint8).expand(3, 8, 256)
    images = (levels / 255)[None]
    assert torch.equal(to_levels(images), levels[None].float())
    (picture,) = to_pil(images)
    assert np.array_equal(np.asarray(picture), levels.permute(1, 2, 0).numpy())
    assert np.array_equal(np.asarray(picture), np.asarray(Image.fromarray(levels.permute(1, 2, 0).numpy())))
    for wrong in (levels[None], levels[None].float()):
        with pytest.raises(RewardError, match=r"expected float in \[0, 1\]|values from 0 to 255"):
            checked(load("JPEGIncompressibility"), "jpeg", wrong, [""])
        with pytest.raises(RewardError, match=r"expected float in \[0, 1\]|values from 0 to 255"):
            RewardSum({"jpeg": load("JPEGCompressibility")}).score(images=wrong, prompts=[""])
    assert kilobytes(images, 95) != kilobytes((images * 255).clamp(max=1), 95)  # what multiplying twice would give
