"""A trainer's command line: whatever ends it becomes one sentence on standard error and an exit code."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable

import torch.distributed as dist

from seal_fast.train import ranks
from seal_fast.train.data import DataError
from seal_fast.train.errors import StoppedError, ToldElsewhereError, TrainingError, UsageError
from seal_fast.train.stopping import CODES

WHOLE = "the checkpoints in the run's folder are whole, and --resume auto goes on"


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
        The exit code: 0; 2 for a mistake in the command or the data; 1 for a run that cannot go on; 75 after SIGTERM
        and 130 after Ctrl-C, with the state saved if there is one.
    """
    try:
        run(parser.parse_args(argv))
    except (Exception, KeyboardInterrupt) as error:
        told = isinstance(error, ToldElsewhereError)
        sentence, code, tells = _explained(error.error if told else error, left)
        if not sentence:
            raise
        if tells and not told:
            print(f"{parser.prog}: error: {sentence}", file=sys.stderr)
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
    if isinstance(error, OSError):
        return f"{_first_line(error.strerror or text)}{_of_file(error)}; {left}.", 1, True
    if isinstance(error, RuntimeError) and "DataLoader worker" in text:
        return f"a process that loads data died ({_first_line(text)}); {left}.", 1, True
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in text.lower()):
        return f"rank {ranks.rank()} lost the others ({_first_line(text)}); {left}.", 1, True
    return "", 1, True


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0].rstrip(".")


def _of_file(error: OSError) -> str:
    return f": {error.filename}" if error.filename else ""
