"""A call of every GPU kernel, small and of awkward sizes, for compute-sanitizer to watch."""

from __future__ import annotations

import torch

import seal_fast
from seal_fast.backends import available


def lif(backend: str) -> None:
    """Forward and backward of the neuron: each dtype, short and long runs, aligned and not, with all outputs."""
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((4, 2, 3, 1000), (1, 1, 3, 333), (33, 2, 3, 17)):
            x = torch.randn(shape, device="cuda").to(dtype).requires_grad_()
            v_init = torch.randn(shape[1:], device="cuda", requires_grad=True)
            tau = torch.full((3,), 1.7, device="cuda", requires_grad=True)
            for time_constant in (2.0, tau):
                spikes, v_last, packed = seal_fast.lif(
                    x, tau=time_constant, v_init=v_init, return_packed=True, backend=backend
                )
                (spikes.float().sum() + v_last.sum()).backward()
                assert packed.shape[0] == shape[0]


if __name__ == "__main__":
    for name in available("lif"):
        if name in ("triton", "cupy"):
            lif(name)
    torch.cuda.synchronize()
    print("every kernel ran")
