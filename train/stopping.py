"""SIGTERM and SIGINT end a run after the step at hand, with its state saved."""

from __future__ import annotations

import multiprocessing
import multiprocessing.synchronize
import os
import signal
import sys
import threading

# Exit codes. 75 is EX_TEMPFAIL of sysexits.h, which a scheduler can take for "start it again"; a shell gives 130 to a
# program that Ctrl-C ended.
CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}


class Signals:
    """Within its context the first SIGTERM or SIGINT is only noted; a SIGINT after it ends the process at once.

    Attributes:
        received: The signal, or None.
        training: Set within the context, for the processes that load data.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self.training = multiprocessing.Event()
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # no other can handle signals
            self.training.set()
            self._before = {number: signal.signal(number, self._note) for number in CODES}
        return self

    def __exit__(self, *exception) -> None:
        self.training.clear()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGINT:
            print("\nSaving after this step; Ctrl-C again ends at once.", file=sys.stderr, flush=True)
        self.received = signal.Signals(number)


def leave_to_trainer(training: multiprocessing.synchronize.Event, _worker: int = 0) -> None:
    """In a process that loads data, ignore both signals while the trainer trains.

    They reach the whole process group, and the trainer still needs data for the step at hand. Once it has left its
    context, SIGTERM is what ends such a process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: None if training.is_set() else os._exit(0))
