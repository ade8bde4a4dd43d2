"""What checkpoints hold beside tensors: NumPy's numbers, options and paths, read without anything of theirs that runs.

torch.load refuses them, as their own code would build them. Here stand-ins take their place, which keep plain values.
"""

from __future__ import annotations

import functools
import re
import struct

_FORMATS = {"b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q"}
_LONGEST = 4096  # characters of a path, as in Linux
_FORMATS |= {"f2": "e", "f4": "f", "f8": "d"}


class Namespace:
    """Options, as argparse keeps them: attributes and nothing else."""


class DType:
    """A NumPy data type of numbers.

    Args:
        name: Kind and bytes, as "f8"; others are kept, and give no value.
    """

    def __init__(self, name: object = "", *_more):
        self.name, self.order = name if isinstance(name, str) else "", "="

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|"):
            self.order = state[1]


class Array:
    """A NumPy array, whose elements are left alone."""

    def __init__(self, *_arguments):
        pass

    def __setstate__(self, _state: object) -> None:
        pass


def scalar(dtype: object = None, content: object = b"", *_more) -> bool | int | float | None:
    """A number of NumPy's as Python's own; None where it is no number."""
    if not isinstance(dtype, DType) or dtype.name not in _FORMATS or not isinstance(content, bytes):
        return None
    layout = (dtype.order if dtype.order in "<>" else "=") + _FORMATS[dtype.name]
    return struct.unpack(layout, content)[0] if struct.calcsize(layout) == len(content) else None


def path(*parts: object) -> str:
    """A path as text; empty where it is none, as what was put together to fill the memory."""
    if not all(isinstance(part, str) for part in parts) or sum(map(len, parts)) > _LONGEST:
        return ""
    return re.sub("/{2,}", "/", "/".join(parts))


@functools.cache
def harmless() -> list[tuple[object, str]]:
    """The stand-ins and whose place they take, as torch.serialization.safe_globals wants them.

    The same ones come under the names that NumPy 1 and 2 and releases of Python have used.
    """
    found: list[tuple[object, str]] = [
        (Namespace, "argparse.Namespace"),
        (DType, "numpy.dtype"),
        (Array, "numpy.ndarray"),
    ]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        found += [(scalar, f"{module}.scalar"), (Array, f"{module}._reconstruct")]
    for module in ("pathlib", "pathlib._local"):
        found += [(path, f"{module}.{kind}") for kind in ("Path", "PosixPath", "WindowsPath", "PurePosixPath")]
    return found
