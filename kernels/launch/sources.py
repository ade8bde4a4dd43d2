"""What the native library is built from: setup.py compiles the digest in, and cpu.py compares it. Needs no torch."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path


def read(folder: Path) -> dict[str, bytes]:
    """Each room's cpu.cpp in the folder of the kernels, and all that they include: relative path -> content."""
    names = sorted(f"{file.parent.name}/{file.name}" for file in folder.glob("*/cpu.cpp"))
    found = {}
    for name in names:  # which grows meanwhile
        try:
            found[name] = (folder / name).read_bytes()
        except FileNotFoundError:
            found[name] = b""
        for included in re.findall(rb'^#include "(.+)"', found[name], re.MULTILINE):
            path = os.path.normpath(os.path.join(os.path.dirname(name), included.decode())).replace(os.sep, "/")
            if path not in names:
                names.append(path)
    return found


def digest(folder: Path) -> int:
    """64 bits of all sources' names and contents; 0 where there are none."""
    found = read(folder)
    hashed = hashlib.blake2b(digest_size=8)
    for name, content in sorted(found.items()):
        hashed.update(f"{name}\0{len(content)}\0".encode() + content)
    return int.from_bytes(hashed.digest(), "big") if found else 0
