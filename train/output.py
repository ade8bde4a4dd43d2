"""Standard output and error of a trainer: they may be full, closed, or of another encoding, and the run goes on."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO


class Tolerant:
    """A text stream that drops what it cannot write: the reader of a pipe may be gone, a terminal closed, a disk full.

    Args:
        stream: Where it writes; None, as Python has it for a descriptor that was closed at the start, for nowhere.
    """

    def __init__(self, stream: TextIO | None):
        # Never closed: tqdm and others may keep it.
        self._stream = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115
        if hasattr(self._stream, "reconfigure"):
            self._stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Write what can be written; returns the length of the text in any case."""
        with contextlib.suppress(OSError, ValueError):  # ValueError where the stream is closed
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Write out what waits, if that is possible."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def finish(self) -> None:
        """Let the interpreter end well: its own last flush would fail and change the exit code."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


@contextlib.contextmanager
def tolerant() -> Iterator[None]:
    """Let `sys.stdout` and `sys.stderr` drop what they cannot write."""
    _open_standard_descriptors()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = streams = [Tolerant(stream) for stream in before]
    try:
        yield
    finally:
        for stream in streams:
            stream.finish()
        sys.stdout, sys.stderr = before


def _open_standard_descriptors() -> None:
    """Where descriptor 0, 1 or 2 is closed, open it: a checkpoint would get its number, and messages of C with it."""
    number = 0
    while number <= 2:
        number = os.open(os.devnull, os.O_RDWR)
        if number <= 2:
            os.set_inheritable(number, True)
    os.close(number)
