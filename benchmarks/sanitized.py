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


def loss(backend: str) -> None:
    """Loss, gradient and weights: each dtype, on the chip and in two sweeps."""
    for dtype in (torch.float32, torch.bfloat16):
        for T, B, K in ((4, 9, 10), (1, 2, 3), (4, 3, 1001), (3, 2, 32768)):
            logits = torch.randn(T, B, K, device="cuda").to(dtype).requires_grad_()
            labels = torch.randint(0, K, (B,), device="cuda")
            teacher_logits = torch.randn(B, K, device="cuda")
            for objective in ("seal", "tdkd"):
                parts = seal_fast.seal_loss(
                    logits, teacher_logits, labels, alpha=0.6, beta=0.15, objective=objective, backend=backend
                )
                (2.0 * parts.loss).backward()
            seal_fast.selective_alignment_weights(logits, backend=backend)


if __name__ == "__main__":
    for name in ("triton", "cupy"):
        if name in available("lif"):
            lif(name)
        if name in available("seal_loss"):
            loss(name)
    torch.cuda.synchronize()
    print("every kernel ran")
