"""Which kernels can run here, and why not.

A backend is chosen by name, by the argument `backend` of an operator or module. "auto" takes the fastest that can run
the call; the environment variable SEAL_FAST_BACKEND replaces "auto" by a name. A name that cannot run the call
raises.
"""

from __future__ import annotations

import functools
import os
import warnings
from typing import NamedTuple

import torch

from .kernels.launch import cpu

BACKENDS = ("triton", "cupy", "cpu", "torch")  # fastest first
OPERATORS = ("lif", "bn_lif", "seal_loss", "selective_alignment_weights")

# operator -> backends that have a kernel for it
_KERNELS: dict[str, tuple[str, ...]] = {
    "lif": ("cpu", "torch"),
    "bn_lif": ("cpu", "torch"),
    "seal_loss": ("torch",),
    "selective_alignment_weights": ("torch",),
}
_DEVICES = {"cpu": "cpu"}  # backend -> the only type of device that it serves
# backend -> why it cannot run here at all. Found out at import, as torch.compile cannot trace the loading of a library.
_MISSING = {"cpu": cpu.missing()}


class Availability(NamedTuple):
    """Whether a backend can run an operator here, and if not, why."""

    available: bool
    reason: str


def backends() -> dict[str, dict[str, Availability]]:
    """What can run here: operator -> backend -> (available, reason)."""
    return {operator: {name: _availability(operator, name) for name in BACKENDS} for operator in OPERATORS}


def available(operator: str) -> list[str]:
    """The backends that can run `operator` here, fastest first."""
    return [name for name, can in backends()[operator].items() if can.available]


def check_name(backend: str) -> str:
    """Return `backend` if it is a known name or "auto".

    Raises:
        ValueError: The name is unknown.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}; got {backend!r}.")
    return backend


def resolve(backend: str, operator: str, device: torch.device) -> str:
    """The backend that runs `operator` on tensors of `device` when the user asks for `backend`.

    Raises:
        ValueError: The name is unknown, or names a backend that cannot run the call.
    """
    check_name(backend)
    if backend == "auto":
        backend = check_name(os.environ.get("SEAL_FAST_BACKEND") or "auto")
    found = {name: _availability(operator, name, device) for name in BACKENDS}
    able = [name for name, availability in found.items() if availability.available]
    if backend == "auto":
        if able[0] == "torch" and device.type == "cpu" and "cpu" in _KERNELS[operator]:
            _say_once(found["cpu"].reason)
        return able[0]
    if backend not in able:
        raise ValueError(
            f"backend {backend!r} cannot run {operator}, because {found[backend].reason}; {' or '.join(able)} can."
        )
    return backend


def _availability(operator: str, backend: str, device: torch.device | None = None) -> Availability:
    if backend not in _KERNELS[operator]:
        return Availability(False, f"this version has no {backend} kernel for it")
    only = _DEVICES.get(backend)
    if device is not None and only not in (None, device.type):
        return Availability(False, f"it runs on {only} tensors, and these are on {device.type}")
    reason = _MISSING.get(backend, "")
    return Availability(not reason, reason)


@functools.cache
def _say_once(reason: str) -> None:
    warnings.warn(f"seal-fast runs its slower torch reference on the CPU: {reason}.", stacklevel=4)
