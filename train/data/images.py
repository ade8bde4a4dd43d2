"""Image files as RGB images of 8 bits, whatever their pixels are."""

from __future__ import annotations

import os

import numpy as np
from PIL import Image, UnidentifiedImageError

from .errors import DataError
from .folders import unreadable

# Formats in which Pillow gives grey levels of more than 8 bits as 0 to 65535; their mode is "I" or, in newer versions
# for some, "I;16".
_FULL_RANGE = ("PNG", "PPM")


def read_image(path: str) -> Image.Image:
    """The image as RGB. Grey levels of 16 bits are scaled to 8, rounded to the nearest.

    Raises:
        DataError: the file is missing, cannot be read, is truncated or no image, or has numbers of unknown range.
    """
    empty = False
    try:
        with open(path, "rb") as file:
            empty = not os.fstat(file.fileno()).st_size
            image = Image.open(file)
            if image.mode.startswith(("I", "F")):
                image = _eight_bits(image, path)
            return image.convert("RGB")
    except DataError:
        raise
    except Exception as error:  # Pillow's format readers raise anything on files that are cut or changed
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None):
            raise unreadable(path, error) from None
        reason = str(error).replace("\n", " ") or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "of no format that Pillow knows" if not empty else "truncated: it is empty"
        advice = "; unpack it again" if "truncated" in reason.lower() else ""
        raise DataError(f"{path} cannot be read as an image ({reason}){advice}.") from None


def _eight_bits(image: Image.Image, path: str) -> Image.Image:
    """A grey image of more than 8 bits, which Pillow would clip at 255.

    Raises:
        DataError: it is not known which number is white.
    """
    bits = image.tag_v2.get(258, (16,)) if image.format == "TIFF" else (16,)  # BitsPerSample
    if image.mode == "F" or (image.mode == "I" and image.format not in _FULL_RANGE) or bits != (16,):
        raise DataError(
            f"{path} holds pixels of Pillow's mode {image.mode}, and {image.format} does not say which of their "
            "numbers are black and white; save it with 8 or 16 bits for each pixel."
        )
    levels = np.asarray(image).astype(np.int64)
    return Image.fromarray(((levels + 128) // 257).astype(np.uint8))  # 65535 / 257 is 255
