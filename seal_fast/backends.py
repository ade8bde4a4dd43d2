"""Which kernels can run here, and why not.

A backend is chosen by name, by the argument `backend` of an operator or module. "auto" takes the fastest that can run
the call; the environment variable SEAL_FAST_BACKEND replaces "auto" by a name. A name that cannot run the call
raises.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import warnings
from typing import NamedTuple

import torch
from torch.autograd import forward_ad

from .kernels import seal_loss
from .kernels.launch import cpu, cupy

BACKENDS = ("triton", "cupy", "cpu", "torch")
_OF_LOGITS = ("seal_loss", "selective_alignment_weights")
_OF_SPIKES = ("spike_conv2d", "spike_linear")

# operator -> backends that have a kernel for it, in the order in which "auto" prefers them
_KERNELS: dict[str, tuple[str, ...]] = {
    "lif": BACKENDS,
    "bn_lif": BACKENDS,
    # On an H200 batch norm and LIF of [4, 256, 64, 32, 32] in bfloat16 take 0.37 ms in Triton and 0.40 or 0.41 in CuPy;
    # in float32 they differ by 7 % at most. The loss takes 51 us in Triton and 28 in CuPy for logits [4, 512, 1000].
    **dict.fromkeys(_OF_LOGITS, ("cupy", "triton", "cpu", "torch")),
    # They skip what did not fire; torch's are dense.
    **dict.fromkeys(_OF_SPIKES, ("cpu", "torch")),
}
OPERATORS = tuple(_KERNELS)
_DEVICES = {"triton": "cuda", "cupy": "cuda", "cpu": "cpu"}  # backend -> the type of device that it serves
# backend -> why it cannot run here at all. Found out at import, as torch.compile cannot trace the search.
_MISSING = {
    "triton": "" if importlib.util.find_spec("triton") else "Triton is not installed",
    "cupy": cupy.missing(),
    "cpu": cpu.missing(),
}


class Availability(NamedTuple):
    """Whether a backend can run an operator here, and if not, why."""

    available: bool
    reason: str


def backends() -> dict[str, dict[str, Availability]]:
    """What can run here: operator -> backend -> (available, reason)."""
    return {operator: _found(operator) for operator in OPERATORS}


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


def is_transformed() -> bool:
    """Whether a transform of torch.func is running, or forward-mode AD."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def resolve(
    backend: str, operator: str, device: torch.device, dtype: torch.dtype | None = None, time_steps: int = 1
) -> str:
    """The backend that runs `operator` on tensors of `device`, `dtype` and T when the user asks for `backend`.

    Raises:
        ValueError: The name is unknown, or names a backend that cannot run the call: within torch.func's transforms and
            forward-mode AD that is any but "torch".
    """
    default = os.environ.get("SEAL_FAST_BACKEND")
    if is_transformed():
        return _resolve_transformed(backend, operator, default)
    interpreter = os.environ.get("TRITON_INTERPRET") if "triton" in (backend, default) else None  # else of no matter
    find = _resolve if torch.compiler.is_compiling() else _resolve_once
    return find(backend, operator, device, dtype, time_steps, default, interpreter, *_DEVICES.values())


def _resolve(backend, operator, device, dtype, time_steps, default, *_settings) -> str:
    """As `resolve`, of all that its answer depends on."""
    check_name(backend)
    if backend == "auto":
        backend = check_name(default or "auto")
    found = _found(operator, device, dtype, time_steps)
    able = [name for name, availability in found.items() if availability.available]
    if backend == "auto":
        if device.type == "cpu":
            able = [name for name in able if name != "triton"]  # its interpreter is for tests that ask for it
        if able[0] == "torch" and device.type == "cpu" and "cpu" in _KERNELS[operator]:
            _say_once(found["cpu"].reason)
        return able[0]
    if backend not in able:
        raise ValueError(
            f"backend {backend!r} cannot run {operator}, because {found[backend].reason}; {' or '.join(able)} can."
        )
    return backend


_resolve_once = functools.lru_cache(_resolve)


def _resolve_transformed(backend, operator, default) -> str:
    """Only torch's own operations can be transformed: they have a forward-mode derivative and a rule for vmap."""
    check_name(backend)
    if backend == "auto":
        backend = check_name(default or "auto")
    if backend not in ("auto", "torch"):
        raise ValueError(
            f"backend {backend!r} cannot run {operator} in a transform of torch.func, nor in forward-mode AD; 'torch' "
            "can, and 'auto' takes it there unless SEAL_FAST_BACKEND names another."
        )
    return "torch"


def skips_zeros(device: torch.device, dtype: torch.dtype | None = None) -> bool:
    """Whether convolutions of spikes skip zeros where that is faster; else all of them are torch's."""
    try:
        return resolve("auto", "spike_conv2d", device, dtype) == "cpu"
    except ValueError:  # SEAL_FAST_BACKEND names a kernel of neurons that has none for convolutions
        return False


def shown(backend: str, operator: str) -> str:
    """`backend` as the text of a module shows it: with "auto", what it stands for on each type of device here."""
    if backend != "auto":
        return backend
    types = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    chosen = []
    for name in types:
        with contextlib.suppress(ValueError):  # SEAL_FAST_BACKEND names a kernel for devices of another type
            chosen.append(f"{resolve(backend, operator, torch.device(name))} on {name}")
    return f"auto ({', '.join(chosen)})"


def shown_spikes(backend: str) -> str:
    """What large layers of `backend` give, as a neuron's text shows it: bits, whose zeros are skipped, or numbers."""
    cpu = torch.device("cpu")
    with contextlib.suppress(ValueError):
        if resolve(backend, "lif", cpu) == "cpu" and skips_zeros(cpu):
            return "bits on cpu"
    return "numbers"


def _found(operator: str, device=None, dtype=None, time_steps: int = 1) -> dict[str, Availability]:
    """Backend -> whether it can run `operator`, fastest first."""
    names = dict.fromkeys((*_KERNELS[operator], *BACKENDS))
    return {name: _availability(operator, name, device, dtype, time_steps) for name in names}


def _availability(
    operator: str, backend: str, device: torch.device | None, dtype: torch.dtype | None, time_steps: int
) -> Availability:
    if backend not in _KERNELS[operator]:
        return Availability(False, f"this version has no {backend} kernel for it")
    serves = _DEVICES.get(backend)
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if device is not None and serves not in (None, device.type) and not interpreted:
        return Availability(False, f"it runs on {serves} tensors, and these are on {device.type}")
    if operator in _OF_SPIKES and backend == "cpu" and dtype not in (None, torch.float32, torch.bfloat16):
        return Availability(False, f"it takes float32 and bfloat16, and these are {dtype}")
    if dtype == torch.float64 and serves == "cuda" and operator in _OF_LOGITS:
        return Availability(False, "it computes in float32, and these are float64")
    if backend == "triton" and operator in _OF_LOGITS and time_steps > seal_loss.MOST_STEPS:
        return Availability(False, f"it takes up to {seal_loss.MOST_STEPS} time steps, and these are {time_steps}")
    reason = _MISSING.get(backend, "")
    if not reason and device is None and serves == "cuda" and not interpreted and not torch.cuda.is_available():
        reason = "torch finds no CUDA GPU"
    return Availability(not reason, reason)


@functools.cache
def _say_once(reason: str) -> None:
    warnings.warn(f"seal-fast runs its slower torch reference on the CPU: {reason}.", stacklevel=4)
