"""The native kernels at sizes around vectors, bytes of packed spikes and blocks, in every dtype, against torch.

Tensors end where their numbers do, so that AddressSanitizer sees what is read or written beyond (make sanitize).
"""

import pytest
import torch
from torch import nn

from seal_fast import bn_lif, lif, seal_loss, selective_alignment_weights
from seal_fast.kernels.launch import cpu
from seal_fast.kernels.packing import reference
from seal_fast.nn import LIFNode

pytestmark = pytest.mark.skipif(cpu.library() is None, reason=cpu.missing())

BACKENDS = ("torch", "cpu")
SIZES = [1, 2, 3, 5, 7, 8, 9, 15, 17, 31, 33, 511, 512, 513, 1023, 1025]
# To the largest of a result's numbers or, of sums that may cancel, the square root of how many were added up.
# Measured: 3e-6, 7e-3, 9e-4 and 9e-15.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float64: 1e-13}

each_size = pytest.mark.parametrize("N", SIZES)
each_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


def normal(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_near(got, expected, dtype, added=1e-6):
    scale = expected.abs().max().double().clamp(min=added**0.5)
    assert ((got.double() - expected.double()).abs() / scale).max() < TOLERANCES[dtype]


@each_size
@each_dtype
def test_lif(dtype, N):
    x, upstream = normal(3, 1, N, dtype=dtype) + 0.5, normal(3, 1, N, dtype=dtype, seed=1)
    tau = 1.5 + torch.rand(N, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    results = []
    for backend in BACKENDS:
        leaves = [x.clone().requires_grad_(), tau.clone().requires_grad_()]
        spikes, v_last, packed = lif(leaves[0], tau=leaves[1], return_packed=True, backend=backend)
        grads = torch.autograd.grad((spikes, v_last), leaves, (upstream, torch.ones_like(v_last)))
        results.append(((spikes, v_last, packed), grads))
    (expected, expected_grads), (got, got_grads) = results
    assert all(torch.equal(left, right) for left, right in zip(got, expected, strict=True))
    for left, right in zip(got_grads, expected_grads, strict=True):
        assert_near(left, right, dtype)


@each_size
@each_dtype
@pytest.mark.parametrize("layout", ["channels", "positions"])
def test_bn_lif(layout, dtype, N):
    shape = (6, N, 1) if layout == "channels" else (6, 1, N)
    y, residual, upstream = (normal(*shape, dtype=dtype, seed=seed) for seed in range(3))
    state = torch.promote_types(dtype, torch.float32)  # torch's batch norm of 16-bit numbers would round between
    results = []
    for backend, arithmetic in zip(BACKENDS, (state, dtype), strict=True):
        bn = nn.BatchNorm1d(shape[1], dtype=state).eval()
        leaves = [tensor.to(arithmetic, copy=True).requires_grad_() for tensor in (y, residual)]
        spikes = bn_lif(leaves[0], bn, LIFNode(backend=backend), time_steps=3, residual=leaves[1])
        grads = torch.autograd.grad(spikes, (*leaves, bn.weight, bn.bias), upstream.to(arithmetic))
        results.append((spikes.to(dtype), *grads))
    (expected, *expected_grads), (got, *got_grads) = results
    assert torch.equal(got, expected)
    for left, right in zip(got_grads, expected_grads, strict=True):
        assert_near(left, right, dtype, added=y.numel())


@each_size
@each_dtype
@pytest.mark.parametrize("T", [1, 3])
def test_seal_loss(T, dtype, N):
    classes = N + 1
    logits, teacher = normal(T, 2, classes, dtype=dtype), normal(2, classes, dtype=dtype, seed=1)
    labels = torch.tensor([0, classes - 1])
    results = []
    for backend in BACKENDS:
        leaf = logits.clone().requires_grad_()
        parts = seal_loss(leaf, teacher, labels, alpha=0.6, beta=0.15, backend=backend)
        results.append((*parts, *torch.autograd.grad(parts.loss, leaf)))
        results[-1] += tuple(selective_alignment_weights(logits, backend=backend))
    for got, expected in zip(*reversed(results), strict=True):
        assert_near(got, expected, dtype)


@each_size
@each_dtype
def test_unpack(dtype, N):
    from seal_fast.kernels.packing import cpu as kernel

    spikes = (normal(3, N, dtype=torch.float32) > 0).to(dtype)
    assert torch.equal(kernel.unpack(reference.pack(spikes), N, dtype), spikes)
