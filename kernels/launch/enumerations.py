"""Enumerations that languages share. What one of them numbers is found by its name in that one's own text."""

from __future__ import annotations

import re


def parse(text: str) -> tuple[str, ...]:
    """The names in `text`, what stands within SEAL_ENUM after the enumeration's name, in lower case."""
    return tuple(re.findall(r"\w+", text.lower()))


def known(name: str, enumeration: str, names: tuple[str, ...], backend: str) -> str:
    """Return `name` if it is among `names`, those that the enumeration has in the kernels of `backend`.

    Raises:
        ValueError: It is not.
    """
    if name not in names:
        what = enumeration.removesuffix("Kind").lower()
        raise ValueError(f"{what} {name!r} has no code in the {backend} kernels; backend='torch' can run it.")
    return name
