"""A trainer's command line: whatever ends it becomes one sentence on standard error and an exit code."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable

import torch.distributed as dist

from seal_fast.train import ranks
from seal_fast.train.data import DataError
from seal_fast.train.errors import StoppedError, ToldElsewhereError, TrainingError, UsageError
from seal_fast.train.output import tolerant
from seal_fast.train.stopping import CODES

WHOLE = "what the run has saved is whole, and --resume goes on from it"


def command(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], object],
    argv: list[str] | None,
    left: str = WHOLE,
) -> int:
    """Run a trainer's command line.

    Args:
        parser: Of its options.
        run: What it does with them.
        argv: The words after its name; None for those of this process.
        left: How it leaves things when something else ends it.

    Returns:
        The exit code: 0; 2 for a mistake in the command or the data; 1 for a run that cannot go on; 130 after Ctrl-C
        and 75 after the other signals of `stopping.CODES`, with the state saved if there is one.
    """
    with tolerant():
        try:
            run(parser.parse_args(argv))
        except (Exception, KeyboardInterrupt) as error:
            told = isinstance(error, ToldElsewhereError)
            sentence, code, tells = _explained(error.error if told else error, left)
            if not sentence:
                raise
            if tells and not told:
                asked = isinstance(error, StoppedError | KeyboardInterrupt)
                print(f"{parser.prog}: {'' if asked else 'error: '}{sentence}", file=sys.stderr)
            if isinstance(error, StoppedError):
                ranks.finish()
            return code
        ranks.finish()
        return 0


def _explained(error: BaseException, left: str) -> tuple[str, int, bool]:
    """The sentence, the exit code, and whether this rank prints it; no sentence for an error that is none of these.

    All ranks come to the same conclusion about a command and about a training that cannot go on.
    """
    text = getattr(error, "sentence", str(error))
    if isinstance(error, UsageError):
        return text, 2, os.environ.get("LOCAL_RANK", "0") == "0"
    if isinstance(error, DataError):
        return text, 2, True
    if isinstance(error, TrainingError):
        return f"{text.rstrip('.')}.", 1, ranks.first()
    if isinstance(error, StoppedError):
        return text, error.code, ranks.first()
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted; {left}.", CODES[signal.SIGINT], ranks.first()
    if isinstance(error, OSError | RuntimeError) and any(word in text for word in _OF_A_LOADER):
        cause = _cause(text)
        how = "died" if any(word in cause for word in ("exited", "killed", "ended")) else "failed"
        return f"a process that loads data {how} ({cause}){_remedy(text)}; {left}.", 1, True
    if isinstance(error, OSError):
        # Of a file there is a name; what has none, as a semaphore, is in shared memory.
        where = f": {error.filename}" if error.filename else _remedy(text)
        return f"{_first_line(error.strerror or text)}{where}; {left}.", 1, True
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in text.lower()):
        return f"rank {ranks.rank()} lost the others ({_first_line(text)}); {left}.", 1, True
    return "", 1, True


# Words of torch's errors about processes that load data, and about the memory that hands their batches over.
_OF_A_LOADER = ("DataLoader worker", "</torch_", "shared memory", "ancdata")


def _remedy(text: str) -> str:
    """What helps where processes cannot hand over data; empty for other errors."""
    if "ancdata" in text or "Too many open files" in text:
        return "; this process may open too few files: raise the limit (ulimit -n), or pass --num_workers 0"
    shared = any(word in text for word in ("</torch_", "shared memory", "Bus error"))
    if not shared and "No space left on device" not in text:
        return ""
    try:
        found = shutil.disk_usage("/dev/shm")
        size = f" of {found.total / 2**20:.3g} MiB"
    except OSError:
        found, size = None, ""
    if not shared and (found is None or found.free > found.total / 2):  # another disk
        return ""
    remedy = "enlarge it (docker run --shm-size 8g), or pass --num_workers 0"
    return f"; /dev/shm{size}, through which processes hand data over, may be full: {remedy}"


def _cause(text: str) -> str:
    """The first line of a message, or of the error below the traceback that a DataLoader puts in its place."""
    lines = text.strip().splitlines()
    if not text.startswith("Caught "):
        return _first_line(text)
    indented = [number for number, line in enumerate(lines) if line.startswith("  ")]
    told = _first_line("\n".join(lines[indented[-1] + 1 :]) if indented else text)
    return re.sub(r"^[\w.]+: ", "", told)  # the kind of the error


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0].rstrip(".")
