"""What every dataset of this room is handed over as."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
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
        events: whether an item is (frames [T,C,H,W], int label) instead of (image [C,H,W], int label).
        classes: the name of each label.
        finish_train: what is left to do to a batch of `train` on the device, [B,...] of the items' type → float32; None
            where they are float32 and nothing is left.
        finish_val: the same for `val`.
        notes: sentences on what was left out, mended or is not there, for the user to read.
    """

    name: str
    train: Dataset
    val: Dataset
    num_classes: int
    in_channels: int
    image_size: int
    events: bool
    classes: tuple[str, ...]
    finish_train: Callable[[Tensor], Tensor] | None = None
    finish_val: Callable[[Tensor], Tensor] | None = None
    notes: tuple[str, ...] = ()
