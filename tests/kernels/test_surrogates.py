"""Surrogate gradients against SpikingJelly's and against their integrals."""

import numpy as np
import pytest
import torch

from seal_fast.kernels.surrogate.reference import SURROGATES, Fire, Surrogate

SPIKINGJELLY = {
    "sigmoid": "Sigmoid",
    "atan": "ATan",
    "piecewise_quadratic": "PiecewiseQuadratic",
    "piecewise_exp": "PiecewiseExp",
    "soft_sign": "SoftSign",
    "super_spike": "SuperSpike",
    "erf": "Erf",
    "rectangle": "Rect",
}
INTEGRALS = {"super_spike": lambda alpha: 2 * alpha, "triangle": lambda alpha: alpha}  # 1 for all others


def potentials() -> torch.Tensor:
    """Points in float64, close to and far from the threshold; none lies on a kink."""
    points = torch.randn(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return points * torch.logspace(-3, 1, 4000, dtype=torch.float64)


@pytest.mark.parametrize("alpha", [None, 0.7, 5.0])
@pytest.mark.parametrize("name", SPIKINGJELLY)
def test_derivative_equals_spikingjelly(name, alpha):
    surrogate = pytest.importorskip("spikingjelly.activation_based.surrogate", reason="spikingjelly is not installed")
    if not hasattr(surrogate, SPIKINGJELLY[name]):
        pytest.skip(f"this version of SpikingJelly has no {SPIKINGJELLY[name]}; 2.0.0 has")
    theirs = getattr(surrogate, SPIKINGJELLY[name])(**({} if alpha is None else {"alpha": alpha}))
    ours = Surrogate(name, alpha)
    assert ours.alpha == theirs.alpha
    u = potentials().requires_grad_()
    (expected,) = torch.autograd.grad(theirs(u).sum(), u)
    assert expected.max() > 0
    # Measured 4e-16, relative.
    torch.testing.assert_close(ours.derivative(u.detach()), expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("alpha", [None, 1.5])
def test_triangle_is_its_formula(alpha):
    u = potentials()
    expected = (0.3 if alpha is None else alpha) * np.maximum(0.0, 1.0 - np.abs(u.numpy()))
    np.testing.assert_allclose(Surrogate("triangle", alpha).derivative(u).numpy(), expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize("alpha", [None, 0.5, 3.0])
@pytest.mark.parametrize("name", SURROGATES)
def test_derivative_is_not_negative_and_has_its_integral(name, alpha):
    surrogate = Surrogate(name, alpha)
    w = torch.linspace(-25, 25, 400_001, dtype=torch.float64)  # u = sinh(w) reaches far out, where tails are heavy
    values = surrogate.derivative(torch.sinh(w))
    assert (values >= 0).all()
    integral = torch.trapezoid(values * torch.cosh(w), w).item()
    expected = INTEGRALS.get(name, lambda alpha: 1.0)(surrogate.alpha)
    assert integral == pytest.approx(expected, rel=1e-3)  # measured 2e-4 at the edges of rectangle, else 4e-8


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_derivative_keeps_the_dtype_and_stays_finite_far_from_the_threshold(name, dtype):
    u = torch.tensor([-3e4, -20.0, 0.0, 20.0, 3e4], dtype=dtype)
    values = Surrogate(name).derivative(u)
    assert values.dtype == dtype
    assert values.isfinite().all()
    assert values[2] > 0
    assert values[2] == values.max()


def test_fire_is_one_from_the_threshold_on_and_zero_for_nan():
    u = torch.tensor([-1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, float("inf"), float("-inf"), float("nan")])
    assert Fire.apply(u, Surrogate()).tolist() == [0, 0, 1, 1, 1, 1, 1, 0, 0]


def test_surrogates_of_equal_name_and_alpha_are_equal():
    assert Surrogate("atan") == Surrogate("atan", 2.0)
    assert Surrogate("atan") != Surrogate("atan", 3.0)
    assert hash(Surrogate("atan")) == hash(Surrogate("atan", 2.0))


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_alpha_that_is_no_sharpness_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha must be a positive number"):
        Surrogate("sigmoid", alpha)


def test_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"surrogate must be one of sigmoid, .*rectangle; got 'relu'\."):
        Surrogate("relu")
