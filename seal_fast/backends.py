"""Which kernels can run here, and why not.

A backend is chosen by name, by the argument `backend` of an operator or module. "auto" takes the fastest that can run
the call; the environment variable SEAL_FAST_BACKEND replaces "auto" by a name. A name that cannot run the call
raises.
"""

from __future__ import annotations

import os
from typing import NamedTuple

BACKENDS = ("triton", "cupy", "cpu", "torch")  # fastest first
OPERATORS = ("lif", "bn_lif", "seal_loss", "selective_alignment_weights")

# operator -> backends that have a kernel for it
_KERNELS: dict[str, tuple[str, ...]] = {name: ("torch",) for name in OPERATORS}


class Availability(NamedTuple):
    """Whether a backend can run an operator here, and if not, why."""

    available: bool
    reason: str


def backends() -> dict[str, dict[str, Availability]]:
    """What can run here: operator -> backend -> (available, reason)."""
    return {operator: {name: _availability(operator, name) for name in BACKENDS} for operator in OPERATORS}


def check_name(backend: str) -> str:
    """Return `backend` if it is a known name or "auto".

    Raises:
        ValueError: The name is unknown.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}; got {backend!r}.")
    return backend


def resolve(backend: str, operator: str) -> str:
    """The backend that runs `operator` when the user asks for `backend`.

    Raises:
        ValueError: The name is unknown, or names a backend that cannot run the operator.
    """
    check_name(backend)
    if backend == "auto":
        backend = check_name(os.environ.get("SEAL_FAST_BACKEND") or "auto")
    able = [name for name in BACKENDS if _availability(operator, name).available]
    if backend == "auto":
        return able[0]
    if backend not in able:
        reason = _availability(operator, backend).reason
        raise ValueError(f"backend {backend!r} cannot run {operator}, because {reason}; {' or '.join(able)} can.")
    return backend


def _availability(operator: str, backend: str) -> Availability:
    if backend in _KERNELS[operator]:
        return Availability(True, "")
    return Availability(False, f"this version has no {backend} kernel for it")
