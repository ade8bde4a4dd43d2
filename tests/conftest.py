import os

import pytest
import torch

import seal_fast
from carry import carry
from seal_fast.backends import available

BACKENDS = [name for name, can in seal_fast.backends()["lif"].items() if can.available]


@pytest.fixture(scope="module", params=BACKENDS)
def each_backend(request):
    """Let "auto" mean each backend that runs here in turn, for tensors on the CPU. Of module scope for hypothesis."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEAL_FAST_BACKEND", request.param)
        if request.param in ("triton", "cupy") and os.environ.get("TRITON_INTERPRET") != "1":
            carry(patch, request.param)
        yield request.param
    torch._dynamo.reset()


@pytest.fixture(scope="module", params=[name for name in ("cpu", "torch") if name in available("seal_loss")])
def each_loss_backend(request):
    """Let "auto" mean each backend of the loss that computes in float64, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEAL_FAST_BACKEND", request.param)
        yield request.param
