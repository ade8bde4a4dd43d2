"""What ends a run, each in one sentence."""

from __future__ import annotations


class UsageError(ValueError):
    """What is wrong with the command, in one sentence."""


class TrainingError(RuntimeError):
    """Why a run cannot go on, in one sentence."""


class NonFiniteError(TrainingError):
    """A loss that is not finite, or weights after one that is.

    Args:
        step: Of the epoch, counted from 1.
        parts: The loss and its parts by name; none of them where it is the weights.
        in_a_row: How many steps before it, it included, were so.
    """

    def __init__(self, step: int, parts: dict[str, float], in_a_row: int = 1):
        shown = ", ".join(f"{name} {value:.4g}" for name, value in parts.items())
        since = f", as in the {in_a_row - 1} steps before" if in_a_row > 1 else ""
        where = (
            f"the loss is not finite at step {step} ({shown})" if parts else f"weights are not finite after step {step}"
        )
        super().__init__(where + since)
        self.step, self.parts = step, parts


class StoppedError(Exception):
    """A signal ended the run, and its state is saved.

    Args:
        code: Exit code.
        sentence: Where it goes on.
    """

    def __init__(self, code: int, sentence: str):
        super().__init__(sentence)
        self.code = code


class ToldElsewhereError(Exception):
    """An error that the first rank found and tells; the others end with it in silence.

    Args:
        error: What the first rank raised.
    """

    def __init__(self, error: Exception):
        super().__init__(error)
        self.error = error
