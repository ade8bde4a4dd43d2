"""SIGTERM and SIGINT end a run after the step at hand, with its state saved."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.synchronize
import os
import signal
import sys
import threading
from collections.abc import Iterator

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


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Let both signals wait, here and in processes that are started within: those take them in `leave_to_trainer`.

    Else a signal could end such a process before it has come there.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, CODES)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_to_trainer(training: multiprocessing.synchronize.Event, _worker: int = 0) -> None:
    """In a process that loads data, ignore both signals while the trainer trains.

    They reach the whole process group, and the trainer still needs data for the step at hand. Once it has left its
    context, SIGTERM is what ends such a process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: None if training.is_set() else os._exit(0))
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, CODES)
