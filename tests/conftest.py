import os

import pytest
import torch

import seal_fast
from carry import carry
from seal_fast.backends import available
from seal_fast.kernels.launch import cpu

if "other sources" in cpu.missing():  # its tests would be skipped
    raise pytest.UsageError(cpu.missing())

BACKENDS = [name for name, can in seal_fast.backends()["lif"].items() if can.available]


CHOSEN = []


def chosen(backend: str):
    """Let "auto" mean `backend`, for tensors on the CPU.

    Two fixtures of module scope do not end in reverse order: a module can have only one of those below.
    """
    assert not CHOSEN, f"{CHOSEN} is still chosen: this module asks for two of the fixtures that choose a backend"
    CHOSEN.append(backend)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEAL_FAST_BACKEND", backend)
        if backend in ("triton", "cupy") and os.environ.get("TRITON_INTERPRET") != "1":
            carry(patch, backend)
        yield backend
    CHOSEN.clear()
    torch._dynamo.reset()


@pytest.fixture(scope="module", params=BACKENDS)
def each_backend(request):
    """Let "auto" mean each backend that runs here in turn. Of module scope, as hypothesis needs."""
    yield from chosen(request.param)


@pytest.fixture(scope="module", params=[name for name in BACKENDS if name != "torch"])
def each_fused_backend(request):
    """Let "auto" mean each backend but the reference, for tests that compare with it."""
    yield from chosen(request.param)


@pytest.fixture(scope="module", params=[name for name in ("cpu", "torch") if name in available("seal_loss")])
def each_loss_backend(request):
    """Let "auto" mean each backend of the loss that computes in float64, too."""
    yield from chosen(request.param)
