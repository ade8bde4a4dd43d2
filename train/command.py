"""A trainer's command line: whatever ends it becomes one sentence on standard error and an exit code."""

from __future__ import annotations

import argparse
import os
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
        return f"{_of_loader(text)}; {left}.", 1, True
    if isinstance(error, OSError):
        return f"{_first_line(error.strerror or text)}{_of_file(error)}; {left}.", 1, True
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in text.lower()):
        return f"rank {ranks.rank()} lost the others ({_first_line(text)}); {left}.", 1, True
    return "", 1, True


# Words of torch's errors about processes that load data, and about the memory that hands their batches over.
_OF_A_LOADER = ("DataLoader worker", "</torch_", "shared memory", "ancdata")


def _of_loader(text: str) -> str:
    """Why a process that loads data failed, and what helps."""
    cause = _cause(text)
    told = f"a process that loads data {'died' if 'exited' in cause or 'killed' in cause else 'failed'} ({cause})"
    if "ancdata" in text or "Too many open files" in text:
        return f"{told}; this process may open too few files: raise the limit (ulimit -n), or pass --num_workers 0"
    if "</torch_" in text or "shared memory" in text or "Bus error" in text:
        try:
            size = f" of {shutil.disk_usage('/dev/shm').total / 1e6:.0f} MB"
        except OSError:
            size = ""
        remedy = "enlarge it (docker run --shm-size 8g), or pass --num_workers 0"
        return f"{told}; /dev/shm{size}, through which such processes hand batches over, may be full: {remedy}"
    return told


def _cause(text: str) -> str:
    """The first line of a message, or of the error below the traceback that a DataLoader puts in its place."""
    lines = text.strip().splitlines()
    if not text.startswith("Caught "):
        return _first_line(text)
    indented = [number for number, line in enumerate(lines) if line.startswith("  ")]
    return _first_line("\n".join(lines[indented[-1] + 1 :]) if indented else text)


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0].rstrip(".")


def _of_file(error: OSError) -> str:
    return f": {error.filename}" if error.filename else ""
