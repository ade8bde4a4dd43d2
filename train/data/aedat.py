"""Event recordings of the CIFAR10-DVS family: AEDAT 2.0 files of a DVS128, and SpikingJelly's npz files of them.

AEDAT 2.0 (https://docs.inivation.com/software/software-advanced-usage/file-formats/aedat-2.0.html): lines that begin
with "#", then big-endian uint32 pairs of an address and a timestamp in µs. A DVS128's address holds the polarity in
bit 0, x in bits 1 to 7 and y in bits 8 to 14.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .errors import DataError

SENSOR = 128  # H = W of a DVS128, pixels
_VERSION = b"#!AER-DAT2.0"
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
        if array.min() < 0 or array.max() >= limit:
            wrong = array.min() if array.min() < 0 else array.max()
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
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); unpack it again.") from None
    if not content.startswith(_VERSION):
        raise DataError(f'{path} is no AEDAT 2.0 file, which begins with "{_VERSION.decode()}"; unpack it again.')
    start = _skip_header(content)
    if (len(content) - start) % 8:
        raise DataError(f"{path} is truncated in the middle of an event; unpack it again.")
    if start == len(content):
        raise DataError(f"{path} holds no events; unpack it again or delete it.")
    address, t = np.frombuffer(content, ">u4", offset=start).reshape(-1, 2).astype(np.int64).T
    if address.max() >= 2**16:
        raise DataError(f"{path} has addresses that no DVS128 has, so it is corrupt or of another camera; replace it.")
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
        DataError: the file cannot be read, lacks an array, or an event lies outside the sensor.
    """
    mend = "delete the events_np folder, so that the recordings are read from extract or download"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            events = Events(*(np.asarray(arrays[name]) for name in Events._fields))
    except KeyError as error:
        raise DataError(f"{path} cannot be read as events ({error.args[0]}); {mend}.") from None
    except (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is truncated or corrupt ({type(error).__name__}); {mend}.") from None
    if any(array.dtype.kind not in "iub" for array in events):
        raise DataError(f"{path} holds events that are not whole numbers; {mend}.")
    events = Events(*(array.astype(np.int64) for array in events))
    fault = _fault(events)
    if fault:
        raise DataError(f"{path} {fault}; {mend}.")
    return events
