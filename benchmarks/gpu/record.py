"""What a stage finds out, written as it is found: a JSON object a line, so that nothing waits for a stage to end well.

A stage is a process that is told by its environment where to write (RESULTS) and how long to time a thing (SECONDS).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
import traceback
from collections.abc import Iterator

from gpu.sticky import is_sticky

LOCK = ".lock"  # ends the name of the file that belongs to the process that is alone
RESULTS, SECONDS = "SEAL_FAST_GPU_RESULTS", "SEAL_FAST_GPU_SECONDS"


def write(**entry) -> None:
    """Add a line to the results, or print it where there is no file for them."""
    line = json.dumps(entry, default=str) + "\n"
    path = os.environ.get(RESULTS)
    if path is None:
        sys.stdout.write(line)
        return
    with open(path, "a", encoding="utf-8") as file:  # one write: lines of several processes do not mix
        file.write(line)


def seconds(normal: float) -> float:
    """How long to time a thing: `normal`, or what the environment says."""
    return float(os.environ.get(SECONDS, normal))


def rehearsing() -> bool:
    """Whether nothing is timed: sizes that the kernels do not depend on, as that of the batch, may be small then."""
    return seconds(1) == 0


def shortened(text: str, length: int = 300) -> str:
    """`text` on one line, of so many characters at most."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Wait until no other process of the run is in here: they import what they need side by side, and time in turn."""
    path = os.environ.get(RESULTS)
    if path is None:
        yield
        return
    with open(f"{path}{LOCK}", "a", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed, if only by the process' end
        lock.truncate(0)
        lock.write(str(os.getpid()))  # run.py does not blame others for the time that they wait
        lock.flush()
        yield


@contextlib.contextmanager
def attempt(**facts) -> Iterator[dict]:
    """Write what the body adds to the entry that it is given, or why the body failed; then go on.

    Raises:
        SystemExit: The GPU is lost to this process.
    """
    entry = dict(facts)
    try:
        yield entry
    except Exception as error:
        traceback.print_exc()
        write(**facts, failed=shortened(f"{type(error).__name__}: {error}"))
        if is_sticky(error):
            sys.exit(f"the GPU is lost to this process: {error}")
    else:
        write(**entry)
