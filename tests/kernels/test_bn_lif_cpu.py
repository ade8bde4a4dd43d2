"""The native CPU kernels of batch norm + residual + LIF against torch operations."""

import math
from dataclasses import replace

import pytest
import torch

from bn_lif_kernels import (
    CASES,
    KINDS,
    LAYOUTS,
    PUBLISHED,
    SHAPES,
    compare_backward,
    compare_forward,
    compare_normalised_gradient,
    compare_statistics,
    compare_table,
    normal,
    tensors_of,
)
from seal_fast.backends import available
from seal_fast.kernels.surrogate.reference import SURROGATES, Surrogate

if "cpu" not in available("bn_lif"):
    # Installing without a compiler is allowed: the torch reference serves, and there is nothing to test here.
    pytest.skip("the native library was not built: no compiler was found", allow_module_level=True)

from seal_fast.kernels.bn_lif import cpu as kernel

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LONG = (2, 24, 20, 20)  # more than one block of neurons, and a part of one


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "kind", "layout"), [*CASES, *((LONG, kind, "channels_last") for kind in KINDS)])
def test_equals_torch(shape, kind, layout, dtype):
    for T in (1, 4):
        y, residual, scales, static = tensors_of(shape, T, kind, dtype, layout)
        rate = compare_forward(kernel, y, residual, scales, PUBLISHED, T, static=static)
        assert 0.02 < rate < 0.98 or shape == (1, 3, 1, 1)  # three neurons may be silent
        compare_backward(kernel, y, residual, scales, PUBLISHED, T, static=static)
        compare_backward(kernel, y, residual, scales, PUBLISHED, T, static=static, with_m=True, parameters=True)


OPTIONS = {
    "soft reset": replace(PUBLISHED, v_reset=None),
    "reset to 0.2": replace(PUBLISHED, v_reset=0.2),
    "detached": replace(PUBLISHED, detach_reset=True),
    "input divided by tau 3": replace(PUBLISHED, decay_input=True, tau=3.0, v_threshold=0.4),
    "tau and threshold per channel": replace(
        PUBLISHED, tau=torch.linspace(1.5, 3, 24, dtype=torch.float64), v_threshold=torch.linspace(0.5, 1.5, 24)
    ),
    **{name: replace(PUBLISHED, surrogate=Surrogate(name)) for name in SURROGATES},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_kind_of_neuron(layout, name):
    for kind, T in (("residual", 10), ("static y", 3)):
        y, residual, scales, static = tensors_of(LONG, T, kind, torch.float32, layout)
        compare_forward(kernel, y, residual, scales, OPTIONS[name], T, static=static)
        compare_backward(kernel, y, residual, scales, OPTIONS[name], T, static=static, parameters=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [*SHAPES, LONG, (64, 16, 16, 16)])
def test_statistics_and_the_normalised_gradient(shape, layout, dtype):

    y = normal(shape, dtype, 0, layout)
    compare_statistics(kernel, y)
    compare_table(kernel, y)
    compare_table(kernel, y, affine=False)
    compare_table(kernel, y, batch=False)
    compare_normalised_gradient(kernel, normal(shape, dtype, 1, layout), y)
    compare_normalised_gradient(kernel, normal(shape, dtype, 1, layout), None)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [0.1, 1e30, 3.3e38])
def test_a_constant_channel_has_no_variance(value, layout):
    """Its mean of a few elements in float32 is another number, whose distance squared is infinite."""
    y = normal((60, 3, 5, 5), torch.float32, 0, layout)
    y[:, 1] = value
    mean, variance = kernel.statistics(y)
    assert mean[1] == y[0, 1, 0, 0]
    assert variance[1] == 0


@pytest.mark.parametrize("row", [0, 59])
@pytest.mark.parametrize(("value", "expected"), [(math.inf, math.inf), (-math.inf, -math.inf), (math.nan, math.nan)])
def test_the_mean_of_what_is_not_finite_is_torchs(value, expected, row):
    y = normal((60, 3, 5, 5), torch.float32, 0)
    y[row, 1, 0, 0] = value
    mean, variance = kernel.statistics(y)
    torch.testing.assert_close(mean[1], torch.tensor(expected), equal_nan=True)
    assert variance[1].isnan()
    assert mean[::2].isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_variance_far_from_zero(layout):
    """A mean of a thousand standard deviations costs few digits of the variance."""
    y = normal((64, 16, 16, 16), torch.float32, 0, layout) + 1000
    _, variance = kernel.statistics(y)
    expected = y.double().var([0, 2, 3], unbiased=False)
    torch.testing.assert_close(variance.double(), expected, rtol=1e-5, atol=0)  # measured 1e-6
