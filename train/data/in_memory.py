"""Images that fit into memory."""

from __future__ import annotations

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .transforms import Transform


class ImagesInMemory(Dataset):
    """Images in memory, each turned into a tensor when it is asked for.

    Args:
        images: uint8 [N,H,W,3], or [N,H,W] if they are grey.
        labels: int64 [N].
        transform: PIL image → uint8 [C,H,W].
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, transform: Transform) -> None:
        self.images = images
        self.labels = labels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])
