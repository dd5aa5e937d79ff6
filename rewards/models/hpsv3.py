"""HPSv3, Human Preference Score v3 (Ma et al. 2025, arXiv 2508.03789): Qwen2-VL with a head that ranks pictures."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoProcessor, Qwen2VLModel

from rewards import RewardError
from rewards.models.network import Network, loading, read_weights
from rewards.models.preprocess import normalise, resize, to_levels

AREA = 256 * 28 * 28  # pixels that every picture is brought to, as nearly as multiples of its patches allow
LONGEST = 200  # times the shorter edge
TOKEN = "<|Reward|>"
# where upstream's package keeps the question that the network was trained on, and in which names
PACKAGE, FILE, PARTS = "hpsv3", "dataset/data_collator_qwen.py", ("INSTRUCTION", "prompt_with_special_token")
DIGEST = "e61d58f3c7d3be656ccd024f5c0cd8c001cf9a2122305d52b59e60d94147e0f2"  # of that question, SHA-256


class HPSv3(Network):
    """The first of the two numbers, mean and deviation, that the head reads off the question's last word.

    Checkpoint: ``MizzenAI/HPSv3``, file ``HPSv3.safetensors`` (8 B, 16.5 GB; MIT by the licence in upstream's package),
    which holds all weights; configuration, tokenizer and chat template are those of ``Qwen/Qwen2-VL-7B-Instruct``
    (Apache-2.0). The question that the network was trained on has to be asked word for word; it is read, and nothing
    run, out of upstream's package: ``pip install --no-deps hpsv3==1.0.0``.
    Preprocessing: bicubic to multiples of 28 pixels whose product is about 256 * 28 * 28, whatever the size of the
    picture, CLIP's mean and deviation; the prompt, uncut, inside upstream's instruction.
    Formula: h the state of the token ``<|Reward|>``, float32; ``w5 relu(w3 relu(w0 h + b0) + b3) + b5``, its first
    number. The second, the deviation that training fitted, is not read.
    Range: unbounded either way; by its authors there is no limit, reports go from about -10 to 15.
    Differentiable; upstream's own way of that resizes bilinearly, this one as the scores have it.
    Caveats: a sum with other rewards needs its scale divided out first. More than 15 has been reported for a messy
    picture, and faces that all look alike after training on it. Upstream's ``reward`` takes pictures first in version
    1.0.0 and prompts first later; here both have names. Upstream feeds the network embeddings alone, and so numbers the
    tokens of a picture one after another like those of a text; ports that let transformers number them by row and
    column score a little differently.

    Args:
        model: folder or hub id that holds ``file``, or the file itself.
        file: its name there.
        processor: folder or hub id of the Qwen2-VL that it was made from; its weights are not read.
        question: a text file with another question, for a network that was trained on one: ``{prompt}`` once, and the
            token ``<|Reward|>`` once after it. Default the published one.
        device, dtype: default CUDA where there is any; of the network; the head is float32.
    """

    def __init__(
        self,
        model: str = "MizzenAI/HPSv3",
        file: str = "HPSv3.safetensors",
        processor: str = "Qwen/Qwen2-VL-7B-Instruct",
        question: str | None = None,
        device: str | None = None,
        dtype: str = "bfloat16",
    ) -> None:
        super().__init__()
        asked = published_question() if question is None else written_question(Path(question))
        with loading("HPSv3", processor):
            config = AutoConfig.from_pretrained(processor)
            self.processor = AutoProcessor.from_pretrained(processor)
            self.processor.tokenizer.add_tokens([TOKEN], special_tokens=True)
            content = [{"type": "image"}, {"type": "text", "text": asked}]
            self.text = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
        with loading("HPSv3", model):
            self.network, self.head = build(read_weights(model, file), config, len(self.processor.tokenizer))
        self.settle(device, dtype, self.network)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels, grid = self.patches(images)
        tokens = self.read(prompts, int(grid.prod()) // self.processor.image_processor.merge_size**2)
        ids = tokens.input_ids
        state = self.network(
            input_ids=ids,
            attention_mask=tokens.attention_mask,
            position_ids=torch.arange(ids.shape[1], device=ids.device).expand(3, *ids.shape),  # as in a text
            pixel_values=pixels,
            image_grid_thw=grid.expand(len(images), 3),
            use_cache=False,
        ).last_hidden_state
        asked = state[ids == self.processor.tokenizer.convert_tokens_to_ids(TOKEN)]
        return self.head(asked.to(self.head[0].weight.dtype))[:, 0]

    def patches(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [0, 1] -> every patch, in the network's order, twice as two frames; and their grid (3,)."""
        settings = self.processor.image_processor
        patch, merge, frames = settings.patch_size, settings.merge_size, settings.temporal_patch_size
        height, width = size(images.shape[-2], images.shape[-1], patch * merge)
        pixels = normalise(resize(to_levels(images), height, width) / 255, settings.image_mean, settings.image_std)
        blocks = pixels.unflatten(3, (-1, merge, patch)).unflatten(2, (-1, merge, patch))
        blocks = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7)
        flat = blocks.unsqueeze(6).expand(*blocks.shape[:6], frames, patch, patch).flatten(5).flatten(0, 4)
        return flat.to(self.network.dtype), torch.tensor([1, height // patch, width // patch], device=images.device)

    def read(self, prompts: Sequence[str], count: int) -> Any:
        """Tokens of the question about each prompt, ``count`` of them for the picture; padded at the end."""
        tokenizer, image = self.processor.tokenizer, self.processor.image_token
        before, after = self.text.replace(image, image * count).split("{prompt}")
        texts = [before + prompt + after for prompt in prompts]
        tokens = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").to(self.device)
        for token, expected in ((TOKEN, 1), (image, count)):
            counts = (tokens.input_ids == tokenizer.convert_tokens_to_ids(token)).sum(1)
            if (wrong := (counts != expected).nonzero()).numel():
                row = int(wrong[0])
                raise RewardError(f"HPSv3: the prompt {prompts[row]!r} holds {token}, a mark of the network's own", row)
        return tokens


def published_question() -> str:
    """The question in upstream's package, with ``{prompt}`` where the prompt goes. ``RewardError`` where the package is
    not there, or is another version with other words."""
    spec = importlib.util.find_spec(PACKAGE)  # finds it without importing it, which would want its training stack
    path = Path(spec.submodule_search_locations[0], FILE) if spec and spec.submodule_search_locations else None
    if path is None or not path.is_file():
        raise RewardError(
            f"HPSv3 has to be asked in the words it was trained on, which are in {FILE} of PyPI's package: "
            f"pip install --no-deps {PACKAGE}==1.0.0 (its requirements are not needed)"
        )
    words: dict[str, str] = {}
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            words |= {name.id: node.value.value for name in node.targets if isinstance(name, ast.Name)}
    question = "".join(words.get(part, "") for part in PARTS).replace("{text_prompt}", "{prompt}")
    if hashlib.sha256(question.encode()).hexdigest() != DIGEST:
        raise RewardError(f"{path} does not hold the question of {PACKAGE} 1.0.0; install that version")
    return question


def written_question(path: Path) -> str:
    """The text of ``path``. ``RewardError`` where the prompt or the token has no place in it."""
    if not path.is_file():
        raise RewardError(f"HPSv3: there is no file {path} with a question")
    text = path.read_text("utf-8")
    if text.count("{prompt}") != 1 or text.count(TOKEN) != 1:
        raise RewardError(f"HPSv3: {path} has to hold {{prompt}} once and {TOKEN} once")
    return text


def size(height: int, width: int, factor: int) -> tuple[int, int]:
    """Height and width, multiples of ``factor``, that a picture is brought to: Qwen's rule for a fixed ``AREA``."""
    if max(height, width) > LONGEST * min(height, width):
        raise RewardError(f"HPSv3: a picture of {width} x {height}; expected edges at most {LONGEST} to 1")
    rounded = [max(factor, round(edge / factor) * factor) for edge in (height, width)]
    if rounded[0] * rounded[1] > AREA:
        shrink = math.sqrt(height * width / AREA)  # divided by, not multiplied with: 1344 / 3 is 448, not just below
        rounded = [math.floor(edge / shrink / factor) * factor for edge in (height, width)]
    elif rounded[0] * rounded[1] < AREA:
        grow = math.sqrt(AREA / (height * width))
        rounded = [math.ceil(edge * grow / factor) * factor for edge in (height, width)]
    return rounded[0], rounded[1]


def build(weights: dict[str, Tensor], config: Any, words: int) -> tuple[Any, nn.Sequential]:
    """The network, without the layer that would predict words, and the head; ``ValueError`` where they do not fit."""
    head = nn.Sequential(
        nn.Linear(config.text_config.hidden_size, 1024),
        nn.ReLU(),
        nn.Identity(),  # where training had dropout, so that the layers keep their numbers
        nn.Linear(1024, 16),
        nn.ReLU(),
        nn.Linear(16, 2),
    )
    prefix = "rm_head."
    head.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    body = {rename(k): v for k, v in weights.items() if not k.startswith((prefix, "lm_head."))}
    rows = body["language_model.embed_tokens.weight"]
    if len(rows) != words:  # upstream cut the table to its tokenizer's size
        raise ValueError(f"it has {len(rows)} words, the tokenizer {words}")
    config.text_config.vocab_size = words
    # given the weights, transformers makes no second copy of them, in float32 of all things
    network, report = Qwen2VLModel.from_pretrained(
        None, config=config, state_dict=body, dtype=rows.dtype, output_loading_info=True
    )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"it lacks {len(missing)} weights of a Qwen2-VL, such as {missing[0]}")
    return network, head


def rename(name: str) -> str:
    """A weight of the network, by the names of transformers before or since 4.52, as it is called inside the model."""
    name = name.removeprefix("model.")
    return name if name.startswith(("visual.", "language_model.")) else f"language_model.{name}"
