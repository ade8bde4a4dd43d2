"""scikit-learn's handwritten digits: 1,797 images of 8×8 pixels and 17 grey levels that come with the package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .splits import Splits
from .transforms import Transform, digit_transforms


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Images float32 [1797,8,8] with grey levels 0 to 16, and labels int64 [1797]."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images.astype(np.float32), digits.target.astype(np.int64)


class DigitImages(Dataset):
    """Digits in memory.

    Args:
        images: float32 [N,8,8].
        labels: int64 [N].
        transform: float32 [1,8,8] → float32 [1,8,8].
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, transform: Transform) -> None:
        self.images = torch.from_numpy(images).unsqueeze(1)
        self.labels = labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def load(
    name: str,
    root: Path | None,
    *,
    role: str,
    time_steps: int,
    auto_aug: bool | None = None,
    cutout: bool | None = None,
) -> Splits:
    """The digits, a stratified fifth of them held out; the arguments are those of `seal_fast.train.data.load`.

    Both roles get the same augmentation, and `root` is not looked at.
    """
    from sklearn.model_selection import train_test_split

    if auto_aug:
        raise ValueError("auto_aug must be False or None for DIGITS: no AutoAugment policy was found for grey digits")
    images, labels = read_digits()
    train_images, val_images, train_labels, val_labels = train_test_split(
        images, labels, test_size=0.2, stratify=labels, random_state=0
    )
    train_transform, val_transform = digit_transforms(
        float(train_images.mean()), float(train_images.std()), cutout=cutout
    )
    return Splits(
        name,
        DigitImages(train_images, train_labels, train_transform),
        DigitImages(val_images, val_labels, val_transform),
        num_classes=10,
        in_channels=1,
        image_size=8,
        events=False,
        classes=tuple("0123456789"),
    )
