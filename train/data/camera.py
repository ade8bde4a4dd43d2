"""A simulated event camera that films scikit-learn's digits as CIFAR10-DVS films CIFAR-10.

CIFAR10-DVS (Li et al., Frontiers in Neuroscience 11:309, 2017) shows an image on a screen, moves it along a closed
smooth path again and again, and records it with a DVS128. Here the image moves on a rhombus in front of an ideal
sensor: a pixel sends an event each time its log intensity has changed by the contrast threshold since its last event
(Lichtsteiner et al., IEEE JSSC 43(2), 2008), at the time found by linear interpolation. There is no noise.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .aedat import SENSOR, Events, write_aedat
from .digits import read_digits
from .folders import is_folder, names
from .publish import near, one_at_a_time, publish, publish_files, scratch_folder

_EXTENT = 80  # side of the digit on the sensor, pixels
_CONTRAST = 5.0  # intensity of white paint over that of the black background
_REACH = 4.0  # half diagonal of the rhombus, pixels
_LOOPS = 2
_STEPS = 16  # simulated positions a loop; 4 on each side
_STEP_TIME = 12_500  # µs, so that a loop takes 0.2 s
_THRESHOLD = 0.6  # change of the natural log of intensity that an event stands for


def rhombus() -> np.ndarray:
    """Positions of the image: right corner, then down, left, up and back; float64 [steps + 1, (x, y)] in pixels."""
    phase = np.arange(_LOOPS * _STEPS + 1) / _STEPS

    def triangle(turn: np.ndarray) -> np.ndarray:
        return 4 * np.abs(turn % 1 - 0.5) - 1  # 1 at 0, −1 at a half

    return _REACH * np.stack([triangle(phase), triangle(phase - 0.25)], axis=1)


def _interpolation(shift: float, pixels: int) -> np.ndarray:
    """Bilinear weights [128, pixels] that spread an image's rows over the sensor, zero outside the image."""
    position = (np.arange(SENSOR) + 0.5 - (SENSOR - _EXTENT) / 2 - shift) * pixels / _EXTENT - 0.5
    return np.maximum(0.0, 1 - np.abs(position[:, None] - np.arange(pixels)))


def film(image: np.ndarray) -> Events:
    """Events of one digit that moves once along the path.

    Args:
        image: grey levels 0 to 16, [8,8].

    Returns:
        Events in the order of their times.
    """
    brightness = image.astype(np.float64) / 16 * (_CONTRAST - 1)

    def log_intensity(position: np.ndarray) -> np.ndarray:
        rows, columns = (_interpolation(position[axis], image.shape[1 - axis]) for axis in (1, 0))
        return np.log1p(rows @ brightness @ columns.T).ravel()

    positions = rhombus()
    before = log_intensity(positions[0])
    reference = before.copy()  # log intensity at each pixel's last event
    pieces = []
    for step, position in enumerate(positions[1:]):
        after = log_intensity(position)
        count = np.trunc((after - reference) / _THRESHOLD).astype(np.int64)
        pixels = np.flatnonzero(count)
        number = np.abs(count[pixels])
        pixel = np.repeat(pixels, number)
        # 1, 2, … within each pixel's events of this step
        order = np.arange(len(pixel)) - np.repeat(np.cumsum(number) - number, number) + 1
        level = reference[pixel] + np.sign(count[pixel]) * order * _THRESHOLD
        fraction = np.clip((level - before[pixel]) / (after[pixel] - before[pixel]), 0, 1)
        time = ((step + fraction) * _STEP_TIME).astype(np.int64)
        pieces.append((time, pixel, (count[pixel] > 0).astype(np.int64)))
        reference += count * _THRESHOLD
        before = after
    t, pixel, p = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
    order = np.argsort(t, kind="stable")
    return Events(t=t[order], x=pixel[order] % SENSOR, y=pixel[order] // SENSOR, p=p[order])


def write_digits(root: Path, per_class: int | None = None) -> None:
    """Film the digits to extract/<digit>/digit_<digit>_<number>.aedat; classes with recordings are left alone.

    Args:
        root: the dataset's folder; made if it is missing.
        per_class: how many samples of each digit; None films all 1,797.

    Raises:
        DataError: the files cannot be written, or what is there cannot be read.
    """
    images, labels = read_digits()
    with one_at_a_time(root):
        for digit in tqdm(range(10), desc="filming digits", leave=False, disable=None):
            destination = root / "extract" / str(digit)
            if is_folder(destination) and names(destination):
                continue
            with scratch_folder(near(root / "extract", root)) as scratch:
                for number, image in enumerate(images[labels == digit][:per_class]):
                    write_aedat(scratch / f"digit_{digit}_{number}.aedat", film(image))
                # A folder takes the place of none or of an empty one; hidden files stay where they are.
                beside = is_folder(destination) and os.listdir(destination)
                (publish_files if beside else publish)(scratch, destination)
