"""Spikes as bits, and back."""

import pytest
import torch

from seal_fast.backends import available
from seal_fast.kernels.packing import reference

UNPACK = {"torch": reference.unpack}
if "cpu" in available("lif"):
    from seal_fast.kernels.packing import cpu

    UNPACK["cpu"] = cpu.unpack


@pytest.mark.parametrize("backend", UNPACK)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("N", [1, 7, 8, 9, 64, 1000, 200_003])
def test_unpacking_gives_what_was_packed(N, dtype, backend):
    spikes = (torch.rand(3, N, generator=torch.Generator().manual_seed(N)) < 0.3).to(dtype)
    unpacked = UNPACK[backend](reference.pack(spikes), N, dtype)
    assert unpacked.dtype == dtype
    assert torch.equal(unpacked, spikes)
