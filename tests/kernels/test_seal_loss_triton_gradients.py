"""Gradients of the Triton kernels of the distillation loss scaled: on the GPU, or in the interpreter."""

import math
import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    # The interpreter needs TRITON_INTERPRET=1 before the first import, so another process runs these tests.
    pytest.skip(
        "torch finds no GPU; test_seal_loss_triton.py runs this file in the interpreter", allow_module_level=True
    )

from seal_fast.kernels.seal_loss import reference
from seal_fast.kernels.seal_loss import triton as kernel
from small_gradients import FACTOR, OBJECTIVES, PUBLISHED, check, inputs

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(1,), (3, 1365), (4, 1024), (5000,)])
def test_scaling_a_gradient(size, dtype):
    wide = reference.gradient_dtype(dtype)
    grad = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(wide)
    for factor in (-2.5, 0.0, 1.0, 1e-6, math.inf):
        given = grad.to(DEVICE, copy=True)
        scaled = kernel.scaled(given, torch.tensor(factor, device=DEVICE), dtype)
        assert torch.equal(scaled.cpu(), (grad.float() * factor).to(dtype))
        if wide == dtype:
            assert scaled is given
        else:
            assert torch.equal(given.cpu(), grad)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("classes", [37, 16])
def test_what_float16_cannot_hold_before_it_is_scaled_is_kept(classes, objective):
    tensors = inputs(K=classes)
    given = (tensor.to(DEVICE) for tensor in tensors)
    _, grad = kernel.forward(*given, **PUBLISHED, objective=objective, gradient=True)
    check(kernel.scaled(grad, torch.tensor(FACTOR, device=DEVICE), torch.float16).cpu(), tensors, objective)
