"""Signals that ask a run to stop end it after the step at hand, with its state saved."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.synchronize
import os
import signal
import threading
from collections.abc import Iterator

# Exit codes. A shell gives 130 to a program that Ctrl-C ended; 75 is EX_TEMPFAIL of sysexits.h, which a scheduler can
# take for "start it again". A terminal that closes sends SIGHUP, Slurm's --signal=USR1@120 SIGUSR1 before a time limit;
# torchrun hands on SIGTERM, SIGHUP and SIGINT, but SIGUSR1 ends it.
CODES = {signal.SIGINT: 130, signal.SIGTERM: 75}
CODES |= {getattr(signal, name): 75 for name in ("SIGHUP", "SIGUSR1") if hasattr(signal, name)}  # Windows has neither


def name_of(number: signal.Signals) -> str:
    """A signal as its sender knows it."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


class Signals:
    """Within its context the first signal of `CODES` is only noted; a SIGINT after it ends the process at once.

    A signal that is ignored when the context begins stays ignored: so nohup starts a program.

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
            handlers = {number: signal.getsignal(number) for number in CODES}
            # None is a handler that is not Python's.
            self._before = {number: now for number, now in handlers.items() if now not in (signal.SIG_IGN, None)}
            for number in self._before:
                signal.signal(number, self._note)
        return self

    def __exit__(self, *exception) -> None:
        self.training.clear()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGINT:
            # Past sys.stderr, which the signal may have interrupted, and which takes no second call then.
            with contextlib.suppress(OSError):
                os.write(2, b"\nSaving after this step; Ctrl-C again ends at once.\n")
        self.received = signal.Signals(number)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Let these signals wait, here and in processes that are started within: those take them in `leave_to_trainer`.

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
    """In a process that loads data, ignore these signals while the trainer trains.

    They reach the whole process group, and the trainer still needs data for the step at hand. Once it has left its
    context, SIGTERM is what ends such a process.
    """
    for number in CODES:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: None if training.is_set() else os._exit(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, CODES)
