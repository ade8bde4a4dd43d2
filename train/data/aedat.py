"""Event recordings of the CIFAR10-DVS family: AEDAT 2.0 files of a DVS128, and SpikingJelly's npz files of them.

AEDAT 2.0 (https://docs.inivation.com/software/software-advanced-usage/file-formats/aedat-2.0.html): lines that begin
with "#", then big-endian uint32 pairs of an address and a timestamp in µs. A DVS128's address holds the polarity in
bit 0, x in bits 1 to 7 and y in bits 8 to 14.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from .errors import DataError
from .folders import shortened, unreadable

SENSOR = 128  # H = W of a DVS128, pixels
_VERSION = b"#!AER-DAT2.0"
_ZIP = (b"PK\x03\x04", b"PK\x05\x06")  # the first bytes of a zip file, and of one that holds nothing
_HEADER = _VERSION + b"\r\n# This is a raw AE data file - do not edit\r\n"


class Events(NamedTuple):
    """Events in the order of their recording, N of them.

    Attributes:
        t: timestamps in µs, int64 [N].
        x: columns, int64 [N].
        y: rows, int64 [N].
        p: polarities, int64 [N]; 1 is brighter, 0 is darker.
    """

    t: np.ndarray
    x: np.ndarray
    y: np.ndarray
    p: np.ndarray


def _fault(events: Events) -> str | None:
    """What is wrong with the events, as the end of a sentence, or None."""
    if len({array.shape for array in events}) != 1 or events.t.ndim != 1:
        return "has t, x, y and p of different lengths"
    if not events.t.size:
        return "holds no events"
    for name, array, limit in zip(Events._fields, events, (2**32, SENSOR, SENSOR, 2), strict=True):
        least, most = int(array.min()), int(array.max())
        if least < 0 or most >= limit:
            wrong = least if least < 0 else most
            return f"has an event with {name} = {wrong}, outside 0 to {limit - 1}"
    return None


def _skip_header(content: bytes) -> int:
    """Where the events begin: at the first line without "#".

    No event of a DVS128 begins with that byte, as its addresses end at bit 15.
    """
    position = 0
    while content[position : position + 1] == b"#":
        line_end = content.find(b"\n", position)
        position = len(content) if line_end < 0 else line_end + 1
    return position


def read_aedat(path: Path) -> Events:
    """Events of an AEDAT 2.0 file, turned as SpikingJelly turns CIFAR10-DVS: x = 127 − y_raw, y = 127 − x_raw.

    Raises:
        DataError: the file cannot be read, is no AEDAT 2.0 file of a DVS128, is truncated or holds no events.
    """
    try:
        content = path.read_bytes()
    except (OSError, MemoryError) as error:
        raise unreadable(path, error) from None
    if _VERSION.startswith(content[: len(_VERSION)]) and len(content) < len(_VERSION):
        raise DataError(f"{path} is truncated: it has {len(content)} bytes; unpack it again.")
    if not any(content[: len(_VERSION)]):
        raise DataError(
            f"{path} is no AEDAT 2.0 file: it begins with zeros, as a loss of power leaves them; unpack it again if "
            "you have its archive."
        )
    if not content.startswith(_VERSION):
        raise DataError(
            f"{path} is no AEDAT 2.0 file: it begins with {content[: len(_VERSION)]!r} instead of {_VERSION!r}."
        )
    start = _skip_header(content)
    if (len(content) - start) % 8:
        raise DataError(f"{path} is truncated in the middle of an event; unpack it again.")
    if start == len(content):
        raise DataError(f"{path} holds no events, only a header of {len(content)} bytes.")
    address, t = np.frombuffer(content, ">u4", offset=start).reshape(-1, 2).astype(np.int64).T
    if address.max() >= 2**16:
        raise DataError(
            f"{path} has the address {address.max()}, where those of a DVS128 end at {2**16 - 1}: is it another's?"
        )
    return Events(t=t, x=127 - (address >> 8 & 127), y=127 - (address >> 1 & 127), p=1 - (address & 1))


def write_aedat(path: Path, events: Events) -> None:
    """Write events so that `read_aedat` returns them.

    Raises:
        ValueError: an event lies outside the sensor or the 32 bits of a timestamp.
    """
    events = Events(*(np.asarray(array, dtype=np.int64) for array in events))
    fault = _fault(events)
    if fault:
        raise ValueError(f"events cannot be written: {path} {fault}")
    address = (127 - events.x) << 8 | (127 - events.y) << 1 | (1 - events.p)
    path.write_bytes(_HEADER + np.stack([address, events.t], axis=1).astype(">u4").tobytes())


def read_npz(path: Path) -> Events:
    """Events of a file of SpikingJelly's events_np folder, with arrays t, x, y and p.

    Raises:
        DataError: the file cannot be read, is truncated, lacks an array, or an event lies outside the sensor.
    """
    mend = "delete it, and it is read from extract or download if all recordings are there"
    try:
        with path.open("rb") as file:
            start = file.read(len(_ZIP[0]))
            if not any(magic.startswith(start) for magic in _ZIP):
                raise DataError(f"{path} is no npz file: it begins with {start!r} instead of {_ZIP[0]!r}.")
            if len(start) < len(_ZIP[0]):
                raise DataError(f"{path} is truncated or corrupt (it has {len(start)} bytes); {mend}.")
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                missing = [name for name in Events._fields if name not in arrays.files]
                if missing:
                    present = shortened([repr(name) for name in arrays.files]) or "nothing"
                    raise DataError(f"{path} holds no array {missing[0]}, one of t, x, y and p: it holds {present}.")
                events = Events(*(np.asarray(arrays[name]) for name in Events._fields))
    except DataError:
        raise
    except Exception as error:  # zipfile and numpy raise anything on headers that are cut or changed
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None):
            raise unreadable(path, error) from None
        if isinstance(error, ValueError) and "allow_pickle" in str(error):
            raise DataError(f"{path} holds Python objects instead of numbers; objects are not read.") from None
        raise DataError(f"{path} is truncated or corrupt ({type(error).__name__}); {mend}.") from None
    other = next((array for array in events if array.dtype.kind not in "iub"), None)
    if other is not None:
        raise DataError(f"{path} holds events of type {other.dtype} instead of whole numbers.")
    fault = _fault(events)
    if fault:
        raise DataError(f"{path} {fault}.")
    return Events(*(array.astype(np.int64) for array in events))
