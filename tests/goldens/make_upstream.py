"""Makes ``upstream_*.json``: what the published packages themselves say of tiny weights of ours; no test runs this.

1. Ours writes weights, pictures and prompts: ``.venv/bin/python -m tests.goldens.make_upstream FOLDER``
2. The packages score them, in an environment of their own, one call each:
   ``upstream/bin/python -m tests.goldens.make_upstream FOLDER hpsv2`` (image_reward, aesthetic, clip_score, mps,
   vqa_score).

The environment is Python 3.11 and, all with ``pip install --no-deps``: hpsv2==1.2.0 image-reward==1.5 t2v-metrics==3.0
torchmetrics==1.9.0 lightning-utilities clip-anytorch==2.6.0 qwen-vl-utils==0.0.14 decord==0.6.0 fairscale==0.4.13 (its
folder out of the sdist) timm==0.6.13 transformers==4.49.0 tokenizers==0.21.4 huggingface-hub==0.36.2 pillow==12.3.0
einops clint args accelerate "setuptools<80", with our torch, torchvision and numpy behind them; hpsv2's wheel lacks
``src/open_clip/bpe_simple_vocab_16e6.txt.gz``, which is copied from open_clip_torch; MPS is no package: the folder
``trainer`` of Kwai-Kolors/MPS at be9027f. Where a package asks the hub it is handed our files, and where a size is
fixed in its code a tiny one: ``REPLACED`` says what, for each. Nothing else of theirs is touched.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib
import importlib.metadata
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import rewards  # first of all: it makes torchvision importable beside a CPU torch

assert rewards
HERE = Path(__file__).parent
Scores = dict[str, list[float]]

PYPI = {  # wheels, and what they hash to
    "hpsv2": "hpsv2-1.2.0-py3-none-any.whl 3ee638b06847bef24e1de43d0b5e3890a4a850034b4bf618e4bb3e78e2d806a1",
    "ImageReward": "image_reward-1.5-py3-none-any.whl b4917a680c3caa68a1ce3847cebab3ae6d5b4c409d7f8804f537b9d42662cf12",
    "clip": "clip_anytorch-2.6.0-py3-none-any.whl ebc0afed243851b9dc7e16ab8afb665237e8a5838986e97cd99f123ae4ce94ce",
    "torchmetrics": "torchmetrics-1.9.0-py3-none-any.whl "
    "bfdcbff3dd1d96b3374bb2496eb39f23c4b28b8a845b6a18c313688e0d2d9ca1",
    "t2v": "t2v_metrics-3.0-py3-none-any.whl 448398dc130d6ab99cc1e5638e51e7eff57bdf7a771d996be969e6022e461c1b",
    "qwen": "qwen_vl_utils-0.0.14-py3-none-any.whl 5e28657bfd031e56bd447c5901b58ddfc3835285ed100f4c56580e0ade054e96",
}
SOURCES = {
    "hpsv2": [PYPI["hpsv2"], "score()"],
    "image_reward": [PYPI["ImageReward"], "load() and score()"],
    "aesthetic": [
        PYPI["ImageReward"],
        "models/AestheticScore.py, LAION's predictor",
        f"on OpenAI's CLIP: {PYPI['clip']}",
    ],
    "clip_score": [PYPI["torchmetrics"], "functional.multimodal.clip_score"],
    "mps": ["github.com/Kwai-Kolors/MPS be9027f3e9097a4a8b1e0be5991d0096aa8abc4b", "trainer/models"],
    "vqa_score": [PYPI["t2v"], "models/vqascore_models/qwen2vl_model.py", f"on {PYPI['qwen']}"],
}
REPLACED = {
    "hpsv2": [
        "the configuration named ViT-H-14 is tiny",
        "download_pretrained and hf_hub_download give our files",
        "the module turtle, of which it imports a name that it does not use, is empty",
    ],
    "image_reward": [
        "create_vit makes a ViT of 2 layers and width 128, still for 224 pixels in patches of 16",
        "BertTokenizer reads our vocab.txt",
        "ReFL, the training code, is not imported",
    ],
    "aesthetic": ["clip.load gets our file for the name ViT-L/14", "ReFL, the training code, is not imported"],
    "clip_score": [],
    "mps": [
        "Cross_model is of width 16, 3 layers and 2 heads",
        "half() leaves float32 as it is; the published code rounds pixels and mask to float16",
        "the README's lines that tokenise, normalise and multiply are below",
    ],
    "vqa_score": [
        "qwen2-vl-2b is our folder, in float32 and with eager attention",
        "the packages' __init__ files, which import every other model, are not run",
    ],
}
PACKAGES = ("torch", "torchvision", "numpy", "pillow", "transformers", "tokenizers", "timm")

# -- what both sides share ---------------------------------------------------------------------------------------


def new_checkpoints(root: Path) -> None:
    """Tiny weights from fixed seeds, laid out as ours reads them."""
    from tests.reward_samples import new_clip
    from tests.test_reward_models import BlipSize, new_aesthetic_head, new_image_reward, new_open_clip

    root.mkdir(exist_ok=True)
    new_open_clip(root / "hpsv2")
    new_image_reward(root / "image_reward", BlipSize(layers=(2, 1), widths=(128, 768), side=224, patch=16))
    new_aesthetic_head(root / "aesthetic", width=768)
    new_large_clip(root / "aesthetic/clip")
    new_clip(root / "clip_score")
    new_clip(root / "mps")
    new_mps(root / "mps")
    new_published_qwen(root / "vqa_score")


def new_large_clip(folder: Path) -> None:
    """A CLIP as large as its parts can be told from: OpenAI's code takes heads of 64 and stores float16."""
    from transformers import CLIPConfig, CLIPModel

    from tests.reward_samples import randomise

    towers = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 1}
    vision, text = {**towers, "image_size": 224, "patch_size": 32}, {**towers, "vocab_size": 100, "eos_token_id": 99}
    text["bos_token_id"] = 98
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=768))
    randomise(model, 11)
    model.half().float().save_pretrained(folder)


def new_mps(folder: Path) -> None:
    """``MPS.safetensors`` beside a CLIP of width 16."""
    from safetensors.torch import save_file

    from tests.reward_samples import mps_weights

    save_file(mps_weights(folder), folder / "MPS.safetensors")


def new_published_qwen(folder: Path) -> None:
    """A Qwen2-VL that takes pictures of the sizes that the published ones take."""
    from tests.reward_samples import new_qwen

    new_qwen(folder)
    path = folder / "processor_config.json"
    settings = json.loads(path.read_text())
    settings["image_processor"]["size"] = {"shortest_edge": 4 * 28 * 28, "longest_edge": 16384 * 28 * 28}
    path.write_text(json.dumps(settings))


def drawn(folder: Path) -> list[Any]:
    """The pictures and prompts of ``reward_samples``, and three larger than what any network reads."""
    from tests.reward_samples import PROMPTS, Sample, pictures, samples, tensor

    large = pictures([(640, 301), (333, 500), (225, 226)], seed=5)
    return samples(folder) + [Sample(tensor(one), one, prompt) for one, prompt in zip(large, PROMPTS, strict=False)]


def digest(picture: Image.Image) -> str:
    """Of a picture's size and levels."""
    return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()[:16]


def weighed(folder: Path) -> dict[str, float]:
    """The sum of the absolute weights in each file, which tells whether they are the same but for a last bit."""
    from safetensors.torch import load_file

    found = {}
    for path in sorted([*folder.rglob("*.safetensors"), *folder.glob("*.pt")]):
        loaded = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        weights = loaded.get("state_dict", loaded)
        found[str(path.relative_to(folder))] = sum(float(value.double().abs().sum()) for value in weights.values())
    return found


# -- 1. ours: the same weights as the packages read them ------------------------------------------------------------


def write(root: Path) -> None:
    """Everything that the packages need, under ``root``."""
    new_checkpoints(root)
    samples = drawn(root / "modes")
    (root / "pictures").mkdir()
    for number, sample in enumerate(samples):
        sample.picture.save(root / f"pictures/{number:02}.png")
    weights = {name: weighed(root / name) for name in SOURCES}
    shared = {"prompts": [sample.prompt for sample in samples], "weights": weights}
    (root / "shared.json").write_text(json.dumps(shared))
    bert = json.loads((root / "image_reward/tokenizer.json").read_text())["model"]["vocab"]
    (root / "image_reward/vocab.txt").write_text("\n".join(sorted(bert, key=bert.get)) + "\n")
    write_clip_tokenizer(root)
    write_openai(root / "aesthetic")
    write_old_qwen(root / "vqa_score")


def write_clip_tokenizer(root: Path) -> None:
    """CLIP's tokenizer as its checkpoints have it, instead of the ``tokenizer.json`` that we load."""
    for folder in (root / "clip_score", root / "mps"):
        old = folder / "upstream"
        old.mkdir()
        model = json.loads((folder / "tokenizer.json").read_text())["model"]
        (old / "vocab.json").write_text(json.dumps(model["vocab"]))
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        (old / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
        end = "<|endoftext|>"
        special = {"bos_token": "<|startoftext|>", "eos_token": end, "unk_token": end, "pad_token": end}
        settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}
        (old / "tokenizer_config.json").write_text(json.dumps(settings))
        side = json.loads((folder / "config.json").read_text())["vision_config"]["image_size"]
        pixels = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": side}, "crop_size": side}
        (old / "preprocessor_config.json").write_text(json.dumps(pixels))
        for name in ("config.json", "model.safetensors"):
            shutil.copy(folder / name, old)


def write_openai(folder: Path) -> None:
    """The CLIP with the names of OpenAI's own code, and the head with the name that its package looks for."""
    from safetensors.torch import load_file

    old = load_file(folder / "clip/model.safetensors")
    new: dict[str, Tensor] = {"logit_scale": old["logit_scale"], "text_projection": old["text_projection.weight"].mT}
    new["visual.proj"] = old["visual_projection.weight"].mT
    new["visual.class_embedding"] = old["vision_model.embeddings.class_embedding"]
    new["visual.positional_embedding"] = old["vision_model.embeddings.position_embedding.weight"]
    new["visual.conv1.weight"] = old["vision_model.embeddings.patch_embedding.weight"]
    new["token_embedding.weight"] = old["text_model.embeddings.token_embedding.weight"]
    new["positional_embedding"] = old["text_model.embeddings.position_embedding.weight"]
    norms = {"visual.ln_pre": "vision_model.pre_layrnorm", "visual.ln_post": "vision_model.post_layernorm"}
    norms["ln_final"] = "text_model.final_layer_norm"
    parts = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    parts["attn.out_proj"] = "self_attn.out_proj"
    for layer in range(2):
        for tower, name in (("visual.", "vision_model"), ("", "text_model")):
            block, was = f"{tower}transformer.resblocks.{layer}", f"{name}.encoder.layers.{layer}"
            norms |= {f"{block}.{one}": f"{was}.{other}" for one, other in parts.items()}
            for kind in ("weight", "bias"):
                three = [old[f"{was}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
                new[f"{block}.attn.in_proj_{kind}"] = torch.cat(three)
    for name, was in norms.items():
        new |= {f"{name}.{kind}": old[f"{was}.{kind}"] for kind in ("weight", "bias")}
    torch.save({name: value.clone() for name, value in new.items()}, folder / "ViT-L-14.pt")
    torch.save(load_file(folder / "model.safetensors"), folder / "sac%2Blogos%2Bava1-l14-linearMSE.pth")


def write_old_qwen(folder: Path) -> None:
    """The checkpoint as transformers 4 reads it, and the published checkpoints are."""
    old = folder / "upstream"
    old.mkdir()
    for name in ("model.safetensors", "generation_config.json", "tokenizer.json"):
        shutil.copy(folder / name, old)
    config = json.loads((folder / "config.json").read_text())
    text, vision = config.pop("text_config"), config["vision_config"]
    rope = text.pop("rope_parameters")
    del text["model_type"], text["layer_types"], vision["rope_parameters"], config["dtype"]
    text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    text |= {"rope_theta": rope["rope_theta"], "tie_word_embeddings": False, "bos_token_id": None}
    (old / "config.json").write_text(json.dumps(config | text))
    words = json.loads((folder / "tokenizer_config.json").read_text())
    words["additional_special_tokens"] = words.pop("extra_special_tokens")
    (old / "tokenizer_config.json").write_text(json.dumps(words))
    pixels = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    size = pixels.pop("size")
    pixels |= {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    pixels["processor_class"] = "Qwen2VLProcessor"
    (old / "preprocessor_config.json").write_text(json.dumps(pixels))
    template = (folder / "chat_template.jinja").read_text()
    (old / "chat_template.json").write_text(json.dumps({"chat_template": template}))


# -- 2. theirs ---------------------------------------------------------------------------------------------------


def module(name: str) -> Any:
    return importlib.import_module(name)


def each(score: Callable[[str, str], Any], pictures: list[Path], prompts: list[str]) -> list[float]:
    return [float(score(str(picture), prompt)) for picture, prompt in zip(pictures, prompts, strict=True)]


def hpsv2(folder: Path, pictures: list[Path], prompts: list[str]) -> Scores:
    os.environ["HPS_ROOT"] = str(folder)
    sys.modules["turtle"] = ModuleType("turtle")
    sys.modules["turtle"].forward = None  # type: ignore[attr-defined]
    package, factory, scorer = module("hpsv2"), module("hpsv2.src.open_clip.factory"), module("hpsv2.img_score")
    factory._MODEL_CONFIGS["ViT-H-14"] = json.loads((folder / "tiny-open-clip.json").read_text())
    factory.download_pretrained = lambda *_, **__: str(folder / "HPS_v2_compressed.pt")
    scorer.huggingface_hub.hf_hub_download = lambda _, name: str(folder / name)

    def one(picture: str, prompt: str, version: str) -> Any:
        return package.score(picture, prompt, hps_version=f"v{version}")[0]

    return {name: each(functools.partial(one, version=name), pictures, prompts) for name in ("2.0", "2.1")}


def imported_image_reward() -> Any:
    sys.modules["ImageReward.ReFL"] = ModuleType("ImageReward.ReFL")
    return module("ImageReward")


def image_reward(folder: Path, pictures: list[Path], prompts: list[str]) -> Scores:
    package, blip = imported_image_reward(), module("ImageReward.models.BLIP.blip")
    tokenizer, vit = blip.BertTokenizer, blip.VisionTransformer
    blip.BertTokenizer = SimpleNamespace(from_pretrained=lambda _: tokenizer(str(folder / "vocab.txt")))
    module("ImageReward.models.BLIP.blip_pretrain").create_vit = lambda _, side, *__: (
        vit(img_size=side, patch_size=16, embed_dim=128, depth=2, num_heads=2),
        128,
    )
    file = str(folder / "ImageReward.pt")
    model = package.load(file, device="cpu", med_config=str(folder / "med_config.json"))
    assert model.state_dict().keys() == torch.load(file, weights_only=True).keys()  # load() does not ask for all
    return {"": each(lambda picture, prompt: model.score(prompt, picture), pictures, prompts)}


def aesthetic(folder: Path, pictures: list[Path], prompts: list[str]) -> Scores:
    package, clip = imported_image_reward(), module("clip")
    load = clip.load
    clip.load = lambda _, device, jit, download_root: load(str(folder / "ViT-L-14.pt"), device, jit)
    model = package.load_score("Aesthetic", device="cpu", download_root=str(folder))
    return {"": each(lambda picture, prompt: model.score(prompt, picture), pictures, prompts)}


def clip_score(folder: Path, pictures: list[Path], prompts: list[str]) -> Scores:
    to_tensor, transformers = module("torchvision.transforms.functional").pil_to_tensor, module("transformers")
    score = module("torchmetrics.functional.multimodal").clip_score
    both = tuple(
        getattr(transformers, name).from_pretrained(folder / "upstream") for name in ("CLIPModel", "CLIPProcessor")
    )

    def one(picture: str, prompt: str) -> Any:
        return score(to_tensor(Image.open(picture)), prompt, lambda: both)

    return {"": each(one, pictures, prompts)}


def mps(folder: Path, pictures: list[Path], prompts: list[str]) -> Scores:
    published, layers, transformers = (
        module(name) for name in ("trainer.models.clip_model", "trainer.models.cross_modeling", "transformers")
    )
    published.Cross_model = lambda **_: layers.Cross_model(dim=16, layer_num=3, heads=2)
    Tensor.half = Tensor.float  # type: ignore[method-assign]
    model = published.CLIPModel(str(folder / "upstream")).eval()
    weights = module("safetensors.torch").load_file(folder / "MPS.safetensors")
    lacking, unknown = model.load_state_dict(weights, strict=False)
    assert not unknown and all(re.search(r"position_ids|norm\.bias|inv_freq", name) for name in lacking), lacking
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "upstream")
    processor = transformers.CLIPImageProcessor.from_pretrained(folder / "upstream")

    def tokens(text: str) -> Tensor:
        length = tokenizer.model_max_length
        kind = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        return tokenizer(text, max_length=length, **kind).input_ids

    def one(path: str, prompt: str, condition: str) -> Tensor:
        pixels = processor(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"]
        text, image, _ = model(tokens(prompt), pixels.repeat(2, 1, 1, 1), tokens(condition))
        image, text = image / image.norm(dim=-1, keepdim=True), text / text.norm(dim=-1, keepdim=True)
        return model.logit_scale.exp() * torch.diag(torch.einsum("bd,cd->bc", text, image))

    from rewards.models.mps import OVERALL

    conditions = {"overall": OVERALL, "none": ""}
    return {
        name: each(functools.partial(one, condition=condition), pictures, prompts)
        for name, condition in conditions.items()
    }


def vqa_score(folder: Path, pictures: list[Path], prompts: list[str]) -> Scores:
    root = Path(str(importlib.metadata.distribution("t2v_metrics").locate_file("")))
    for name in ("t2v_metrics", "t2v_metrics.models", "t2v_metrics.models.vqascore_models"):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(root / name.replace(".", "/"))]
    published = module("t2v_metrics.models.vqascore_models.qwen2vl_model")
    settings = {"path": str(folder / "upstream")}
    model = {**settings, "torch_dtype": torch.float32, "attn_implementation": "eager"}
    published.QWEN2_VL_MODELS["qwen2-vl-2b"] = {"tokenizer": settings, "model": model}
    scorer = published.Qwen2VLModel("qwen2-vl-2b", device="cpu")
    return {"": each(lambda picture, prompt: scorer.forward([picture], [prompt]), pictures, prompts)}


UPSTREAM: dict[str, Callable[[Path, list[Path], list[str]], Scores]] = {
    "hpsv2": hpsv2,
    "image_reward": image_reward,
    "aesthetic": aesthetic,
    "clip_score": clip_score,
    "mps": mps,
    "vqa_score": vqa_score,
}


def score(root: Path, name: str) -> None:
    """One scorer's golden numbers, from its published code."""
    torch.set_num_threads(1)
    pictures, shared = sorted((root / "pictures").iterdir()), json.loads((root / "shared.json").read_text())
    with torch.no_grad():
        scores = UPSTREAM[name](root / name, pictures, shared["prompts"])
    golden = {
        "source": SOURCES[name],
        "replaced": REPLACED[name],
        "made": f"{datetime.date.today()} by make_upstream.py, in float32 on a CPU, weights from fixed seeds",
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "weights": shared["weights"][name],
        "pictures": [digest(Image.open(path)) for path in pictures],
        "scores": scores,
    }
    (HERE / f"upstream_{name}.json").write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    if len(sys.argv) == 2:
        write(Path(sys.argv[1]))
    else:
        score(Path(sys.argv[1]), sys.argv[2])
