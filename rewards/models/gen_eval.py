"""GenEval-style: the rules of GenEval (Ghosh et al. 2023, arXiv 2310.11513) on what an open-vocabulary detector finds.

Not GenEval: that one looks with a Mask2Former of mmdet, and its numbers do not compare with these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

from rewards import RewardError
from rewards.models.clip_score import TransformersCLIP
from rewards.models.network import Network, loading, pretrained, unit
from rewards.models.preprocess import to_pil

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
SENTENCES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
POSITIONS = ("left of", "right of", "above", "below")
SLACK = 0.1  # of the sizes of two objects, by which their centres must differ for a position to hold
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels


@dataclass(frozen=True)
class Clause:
    """``count`` objects called ``name``, of a colour, and at a position relative to an earlier clause's."""

    name: str
    count: int
    colour: str | None = None
    position: tuple[str, int] | None = None


class GenEvalStyle(Network):
    """1 where the picture holds what its row of GenEval's metadata asks for, else 0.

    The metadata are those of GenEval's ``prompts/evaluation_metadata.jsonl``: ``tag``, ``include`` and ``exclude``.
    The rules are GenEval's: every clause of ``include`` needs its count of objects, the surest are looked at; their
    colours, told by CLIP among ten, and their positions must be right; a clause of ``exclude`` must not have its count.
    Not as in GenEval: the detector (OWLv2, asked for the named classes alone) with its thresholds, suppression of
    overlapping boxes (GenEval: none), and the colour of the whole box (GenEval: the background greyed by a mask).

    Checkpoints: ``google/owlv2-base-patch16-ensemble`` (Apache-2.0), ``openai/clip-vit-large-patch14`` (MIT).
    Preprocessing: the detector's own (a square, grey below or beside the picture); CLIP's crop of each box.
    Range: 0 or 1.
    Not differentiable.
    Caveats: the thresholds were not fitted to human judgement; GenEval's 0.9 for counting belongs to Mask2Former.
    Trained on, GenEval's rules are reported to lead to collages and grids.

    Args:
        detector: folder or hub id of an OWL-ViT or OWLv2 checkpoint.
        clip: folder or hub id of a CLIP checkpoint in the layout of transformers.
        threshold: a box needs this score.
        counting_threshold: and this one where the tag is "counting".
        overlap: of two boxes of one class with at least this intersection over union, the surer one stays.
        device, dtype: default CUDA where there is any; of both networks.
    """

    differentiable: ClassVar[bool] = False
    needs_prompt: ClassVar[bool] = False

    def __init__(
        self,
        detector: str = "google/owlv2-base-patch16-ensemble",
        clip: str = "openai/clip-vit-large-patch14",
        threshold: float = 0.3,
        counting_threshold: float = 0.3,
        overlap: float = 0.5,
        device: str | None = None,
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        with loading("GenEval-style", detector):
            self.detector = pretrained(AutoModelForZeroShotObjectDetection, detector)
            self.processor = AutoProcessor.from_pretrained(detector)
        self.clip = TransformersCLIP("GenEval-style", clip)
        self.threshold, self.counting_threshold, self.overlap = threshold, counting_threshold, overlap
        self.settle(device, dtype, self.detector, self.clip)

    @torch.no_grad()
    def score(
        self, *, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        """(B, 3, H, W) in [0, 1] and a row of GenEval's metadata each -> (B,) float32; the prompts are not read."""
        if metadata is None:
            raise RewardError(
                "GenEval-style: no metadata; expected GenEval's, a row with 'tag' and 'include' per image"
            )
        rows = [clauses(data, row) for row, data in enumerate(metadata)]  # all of them before the slow part
        scores = []
        with torch.autocast(self.device.type, enabled=False):
            for image, data, (include, exclude) in zip(images, metadata, rows, strict=True):
                detections = self.find(image, data["tag"], sorted({clause.name for clause in include + exclude}))
                wrong = mistakes(detections, include, exclude, partial(self.colours, image))
                scores.append(float(not wrong))
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def find(self, image: Tensor, tag: str, names: Sequence[str]) -> dict[str, list[Box]]:
        """Boxes by class, the surest first."""
        texts = [[f"a photo of a {name}" for name in names]]
        inputs = self.processor(text=texts, images=to_pil(image[None]), return_tensors="pt")
        answer = self.detector(**inputs.to(self.device, self.detector.dtype))
        sure, which = answer.logits[0].float().sigmoid().max(-1)
        height, width = image.shape[-2:]
        middle, size = answer.pred_boxes[0].float().mul(max(height, width)).split(2, -1)  # parts of the padded square
        low, high = (middle - size / 2).clamp(min=0), (middle + size / 2).minimum(middle.new_tensor([width, height]))
        least = self.counting_threshold if tag == "counting" else self.threshold
        detections: dict[str, list[Box]] = {name: [] for name in names}
        for number in sure.argsort(descending=True, stable=True).tolist():
            left, top, right, bottom = box = (*low[number].tolist(), *high[number].tolist())
            boxes = detections[names[int(which[number])]]
            inside = left < right and top < bottom
            if inside and sure[number] > least and all(shared(box, other) < self.overlap for other in boxes):
                boxes.append(box)
        return detections

    def colours(self, image: Tensor, boxes: Sequence[Box], name: str) -> list[str]:
        """What CLIP calls the colour of each box."""
        texts = [sentence.format(colour=colour, name=name) for colour in COLOURS for sentence in SENTENCES]
        classes = unit(self.clip.text(texts).unflatten(0, (len(COLOURS), len(SENTENCES))).mean(1))
        seen = torch.cat([self.clip.image(crop(image, box)[None].to(self.device)) for box in boxes])
        return [COLOURS[number] for number in (seen @ classes.T).argmax(-1).tolist()]


def crop(image: Tensor, box: Box) -> Tensor:
    """The box of a picture (3, H, W), to the nearest whole pixel and at least one of them."""
    left, top, right, bottom = (round(edge) for edge in box)
    left, top = min(left, image.shape[-1] - 1), min(top, image.shape[-2] - 1)
    return image[:, top : max(bottom, top + 1), left : max(right, left + 1)]


def shared(one: Box, other: Box) -> float:
    """Intersection over union."""
    across = min(one[2], other[2]) - max(one[0], other[0])
    down = min(one[3], other[3]) - max(one[1], other[1])
    both = max(across, 0) * max(down, 0)
    area = sum((right - left) * (bottom - top) for left, top, right, bottom in (one, other))
    return both / (area - both)


def positions(one: Box, other: Box) -> set[str]:
    """Where ``one`` is as seen from ``other``; their sizes must not reach across most of the way between them."""
    offset = [(one[k] + one[k + 2] - other[k] - other[k + 2]) / 2 for k in (0, 1)]
    reach = [SLACK * (one[k + 2] - one[k] + other[k + 2] - other[k]) for k in (0, 1)]
    clear = [max(abs(by) - part, 0) * (1 if by > 0 else -1) for by, part in zip(offset, reach, strict=True)]
    if max(abs(clear[0]), abs(clear[1])) < 1e-3:
        return set()
    length = (offset[0] ** 2 + offset[1] ** 2) ** 0.5
    dx, dy = clear[0] / length, clear[1] / length
    return {name for name, part in zip(POSITIONS, (-dx, dx, -dy, dy), strict=True) if part > 0.5}


def mistakes(
    detections: Mapping[str, Sequence[Box]],
    include: Sequence[Clause],
    exclude: Sequence[Clause],
    colours: Callable[[Sequence[Box], str], list[str]],
) -> list[str]:
    """What is wrong with a picture, in words; nothing where it is right. ``detections`` has the surest boxes first."""
    wrong: list[str] = []
    matched: list[Sequence[Box] | None] = []
    for clause in include:
        boxes = detections.get(clause.name, ())[: clause.count]
        fault = ""
        if len(boxes) < clause.count:
            fault = f"expected {clause.count} {clause.name}, found {len(boxes)}"
        elif clause.colour and (seen := colours(boxes, clause.name)) != [clause.colour] * clause.count:
            fault = f"expected {clause.count} {clause.colour} {clause.name}, found {', '.join(seen)}"
        elif clause.position:
            where, number = clause.position
            others = matched[number]
            if others is None:
                fault = f"nothing for {clause.name} to be {where}"
            elif any(where not in positions(box, other) for box in boxes for other in others):
                fault = f"{clause.name} is not {where} it"
        matched.append(None if fault else boxes)
        wrong += [fault] if fault else []
    for clause in exclude:
        if (number := len(detections.get(clause.name, ()))) >= clause.count:
            wrong.append(f"expected fewer than {clause.count} {clause.name}, found {number}")
    return wrong


def clauses(data: Mapping[str, Any], row: int) -> tuple[list[Clause], list[Clause]]:
    """``include`` and ``exclude`` of one row of the metadata."""
    if not isinstance(data.get("tag"), str) or not data.get("include"):
        raise RewardError(f"GenEval-style: no 'tag' or nothing in 'include' of the metadata {dict(data)}", row)
    include, exclude = (
        [_clause(entry, part, number, row) for number, entry in enumerate(data.get(part) or ())]
        for part in ("include", "exclude")
    )
    return include, exclude


def _clause(entry: Any, part: str, number: int, row: int) -> Clause:
    try:
        place = entry.get("position")
        clause = Clause(entry["class"], entry["count"], entry.get("color"), (*place,) if place else None)
        where, earlier = clause.position or (POSITIONS[0], -1)
        sound = isinstance(clause.name, str) and isinstance(clause.count, int) and clause.count > 0
        sound = sound and clause.colour in (None, *COLOURS) and where in POSITIONS
        if sound and (clause.position is None or 0 <= earlier < number):
            return clause
    except (TypeError, ValueError, LookupError, AttributeError):
        pass
    raise RewardError(
        f"GenEval-style: {part} {number} of the metadata is {entry!r}; expected a class, a count, a color "
        f"of {', '.join(COLOURS)}, a position such as ['left of', 0], 0 an earlier entry's number",
        row,
    )
