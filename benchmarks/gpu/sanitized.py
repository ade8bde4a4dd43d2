"""Small calls of awkward sizes of every kernel of an operator, for compute-sanitizer to watch.

python -m gpu.sanitized OPERATOR BACKEND
"""

from __future__ import annotations

import sys

import torch

import seal_fast

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there with TRITON_INTERPRET=1


def lif(backend: str) -> None:
    """Forward and backward of the neuron: each dtype, short and long runs, aligned and not, with all outputs."""
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((4, 2, 3, 1000), (1, 1, 3, 333), (33, 2, 3, 17)):
            x = torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()
            v_init = torch.randn(shape[1:], device=DEVICE, requires_grad=True)
            tau = torch.full((3,), 1.7, device=DEVICE, requires_grad=True)
            for time_constant in (2.0, tau):
                spikes, v_last, packed = seal_fast.lif(
                    x, tau=time_constant, v_init=v_init, return_packed=True, backend=backend
                )
                (spikes.float().sum() + v_last.sum()).backward()
                assert packed.shape[0] == shape[0]


def bn_lif(backend: str) -> None:
    """A layer with batch norm and residual, and spikes as bits: each dtype, both memory layouts, static and not."""
    node = seal_fast.nn.LIFNode(backend=backend)
    for dtype in (torch.float32, torch.bfloat16):
        for layout in (torch.contiguous_format, torch.channels_last):
            for T, B, shape in ((4, 3, (24, 7, 7)), (1, 2, (3, 5, 5)), (33, 1, (8, 4, 4))):
                bn, residual_bn = (torch.nn.BatchNorm2d(shape[0], device=DEVICE) for _ in range(2))
                for static in (False, True):
                    y = torch.randn(B if static else T * B, *shape, device=DEVICE).to(dtype, memory_format=layout)
                    residual = torch.randn(T * B, *shape, device=DEVICE).to(dtype, memory_format=layout)
                    leaves = y.requires_grad_(), residual.requires_grad_()
                    options = {"time_steps": T, "static": static, "residual": leaves[1]}
                    with seal_fast.packed_spikes():
                        spikes, m = seal_fast.bn_lif(
                            leaves[0], bn, node, residual_bn=residual_bn, return_membrane_input=True, **options
                        )
                        out = (spikes * spikes).float().sum() + m.float().sum()
                    out.backward()


def seal_loss(backend: str) -> None:
    """Loss, gradient and weights: each dtype, in shared memory, in two sweeps, and with CuPy in a workspace."""
    shapes = [(4, 9, 10), (1, 2, 3), (4, 3, 1001), (3, 2, 32768), *([(240, 2, 10)] if backend == "cupy" else [])]
    for dtype in (torch.float32, torch.bfloat16):
        for T, B, K in shapes:
            logits = torch.randn(T, B, K, device=DEVICE).to(dtype).requires_grad_()
            labels = torch.randint(0, K, (B,), device=DEVICE)
            teacher_logits = torch.randn(B, K, device=DEVICE)
            for objective in ("seal", "tdkd"):
                parts = seal_fast.seal_loss(
                    logits, teacher_logits, labels, alpha=0.6, beta=0.15, objective=objective, backend=backend
                )
                (2.0 * parts.loss).backward()
            seal_fast.selective_alignment_weights(logits, backend=backend)


FIRST_ARGUMENTS = {function.__name__: function for function in (lif, bn_lif, seal_loss)}

if __name__ == "__main__":
    FIRST_ARGUMENTS[sys.argv[1]](sys.argv[2])
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print("every kernel ran")
