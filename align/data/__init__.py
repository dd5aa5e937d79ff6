"""Prompts, preferences, images, trajectories, annotations; imported here, ``data:`` needs no import path."""

from align.data.annotations import LabelledRollout
from align.data.captioned import Images
from align.data.dataset import Data, Dataset, Setup
from align.data.preferences import PreferencePairs
from align.data.prompts import Prompts, TaskPrompts
from align.data.rated import RatedImages

__all__ = [
    "Data",
    "Dataset",
    "Images",
    "LabelledRollout",
    "PreferencePairs",
    "Prompts",
    "RatedImages",
    "Setup",
    "TaskPrompts",
]
