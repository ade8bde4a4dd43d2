"""What every dataset of this room is handed over as."""

from __future__ import annotations

from dataclasses import dataclass

from torch.utils.data import Dataset


@dataclass(frozen=True)
class Splits:
    """The two parts of a dataset, and what a model must know of it.

    Attributes:
        name: the dataset's name, one of `DATASETS`.
        train: augmented training part.
        val: held-out part, without augmentation.
        num_classes: number of classes; labels are 0 … num_classes − 1.
        in_channels: C of an item.
        image_size: H = W of an item, in pixels.
        events: whether an item is (frames float32 [T,C,H,W], int label) instead of (image float32 [C,H,W], int label).
        classes: the name of each label.
    """

    name: str
    train: Dataset
    val: Dataset
    num_classes: int
    in_channels: int
    image_size: int
    events: bool
    classes: tuple[str, ...]
