"""From the events of one recording to the frames that a network sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torchvision.transforms.v2 import functional

from .aedat import SENSOR, Events, read_aedat, read_npz

FRAME_SIZE = 48  # H = W of a frame as published, pixels


def frames_by_number(events: Events, T: int, H: int, W: int) -> np.ndarray:
    """Count events in T segments of the same number of events, float32 [T,2,H,W].

    Each of the segments holds N // T of the N events; the last takes what is left over. The second axis is the
    polarity. The split is SpikingJelly's `split_by="number"`.
    """
    number = len(events.x)
    length = number // T
    # With fewer events than segments, all segments but the last are empty.
    segment = np.minimum(np.arange(number) // length, T - 1) if length else np.full(number, T - 1)
    polarity = np.asarray(events.p) != 0
    position = ((segment * 2 + polarity) * H + np.asarray(events.y, np.int64)) * W + np.asarray(events.x, np.int64)
    return np.bincount(position, minlength=T * 2 * H * W).reshape(T, 2, H, W).astype(np.float32)


def recording_to_frames(path: Path, T: int, size: int = FRAME_SIZE) -> np.ndarray:
    """Frames of one .aedat or .npz recording, resized bilinearly: float32 [T,2,size,size].

    Raises:
        DataError: the recording cannot be read.
    """
    events = read_npz(path) if path.suffix == ".npz" else read_aedat(path)
    frames = torch.from_numpy(frames_by_number(events, T, SENSOR, SENSOR))
    return functional.resize(frames, [size, size], antialias=True).numpy()
