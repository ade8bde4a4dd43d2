"""The LIF operator's gradients against the closed-form backward pass, for every surrogate and every kind of neuron."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from seal_fast import lif
from seal_fast.kernels.surrogate.reference import SURROGATES, Surrogate

pytestmark = pytest.mark.usefixtures("each_backend")

TOLERANCE = 1e-12  # of the largest entry; measured 2e-15
SMOOTH = ("sigmoid", "atan", "piecewise_exp", "soft_sign", "super_spike", "erf")

T, B, C, N = 7, 3, 4, 5

# The derivatives once more, from the literature, with the default alpha.
DERIVATIVES = {
    "sigmoid": lambda u: 4 * np.exp(-4 * u) / (1 + np.exp(-4 * u)) ** 2,
    "atan": lambda u: 1 / (1 + (np.pi * u) ** 2),
    "piecewise_quadratic": lambda u: np.maximum(0, 1 - np.abs(u)),
    "piecewise_exp": lambda u: np.exp(-np.abs(u)) / 2,
    "soft_sign": lambda u: 1 / (4 * (0.5 + np.abs(u)) ** 2),
    "super_spike": lambda u: 1 / (1 + np.abs(u)) ** 2,
    "erf": lambda u: 2 / np.sqrt(np.pi) * np.exp(-4 * u**2),
    "triangle": lambda u: 0.3 * np.maximum(0, 1 - np.abs(u)),
    "rectangle": lambda u: np.where(np.abs(u) < 0.5, 1.0, 0.0),
}


def closed_form(x, v0, tau, threshold, a, c, *, decay_input, v_reset, detach_reset, derivative):
    """Gradients to x, v_init, tau and v_threshold of sum(a·spikes) + sum(c·v_last), by the recursion over time."""
    tau, threshold = tau.reshape(-1, 1), threshold.reshape(-1, 1)
    r = 0.0 if v_reset is None else v_reset
    v, h, s = [v0], [], []
    for x_t in x:
        current = (x_t - (v[-1] - r)) / tau if decay_input else x_t - (v[-1] - r) / tau
        h.append(v[-1] + current)
        s.append((h[-1] >= threshold).astype(float))
        v.append(h[-1] - s[-1] * threshold if v_reset is None else (1 - s[-1]) * h[-1] + s[-1] * r)

    grad_x = np.zeros_like(x)
    grad_threshold, grad_rate = np.zeros_like(v0), np.zeros_like(v0)  # rate = 1/tau
    for t in reversed(range(len(x))):
        g = derivative(h[t] - threshold)
        through_reset = 0.0 if detach_reset else (-threshold if v_reset is None else r - h[t])
        kept = 1.0 if v_reset is None else 1 - s[t]
        grad_h = a[t] * g + c * (kept + through_reset * g)
        reset_by_threshold = (-s[t] if v_reset is None else 0.0) - through_reset * g
        grad_threshold += -a[t] * g + c * reset_by_threshold
        grad_rate += grad_h * (x[t] - (v[t] - r) if decay_input else -(v[t] - r))
        grad_x[t] = grad_h / tau if decay_input else grad_h
        c = grad_h * (1 - 1 / tau)

    def per_channel(values):
        return values.sum((0, 2))

    return grad_x, c, per_channel(grad_rate) * -1 / tau.ravel() ** 2, per_channel(grad_threshold)


def random_run(seed=0):
    random = np.random.RandomState(seed)
    x = random.standard_normal((T, B, C, N)) * 2 + 0.5
    v0 = random.standard_normal((B, C, N))
    tau, threshold = 1 + random.rand(C) * 2, 0.5 + random.rand(C)
    a, c = random.standard_normal(x.shape), random.standard_normal(v0.shape)
    return x, v0, tau, threshold, a, c


def assert_close(got: torch.Tensor, expected: np.ndarray, name: str) -> None:
    assert np.abs(expected).max() > 0, name
    error = np.abs(got.numpy() - expected).max() / np.abs(expected).max()
    assert error <= TOLERANCE, f"{name}: {error:.1e}"


@pytest.mark.parametrize("detach_reset", [False, True], ids=["attached", "detached"])
@pytest.mark.parametrize("v_reset", [0.0, -0.3, None], ids=["hard", "hard to -0.3", "soft"])
@pytest.mark.parametrize("decay_input", [False, True], ids=["whole input", "decayed input"])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_gradients_equal_the_closed_form(surrogate, decay_input, v_reset, detach_reset):
    x, v0, tau, threshold, a, c = random_run()
    expected = closed_form(
        x,
        v0,
        tau,
        threshold,
        a,
        c,
        decay_input=decay_input,
        v_reset=v_reset,
        detach_reset=detach_reset,
        derivative=DERIVATIVES[surrogate],
    )
    leaves = [torch.tensor(value).requires_grad_() for value in (x, v0, tau, threshold)]
    spikes, v_last = lif(
        leaves[0],
        v_init=leaves[1],
        tau=leaves[2],
        v_threshold=leaves[3],
        decay_input=decay_input,
        v_reset=v_reset,
        detach_reset=detach_reset,
        surrogate=surrogate,
    )
    assert 0.1 < spikes.mean() < 0.9
    gradients = torch.autograd.grad((spikes * torch.tensor(a)).sum() + (v_last * torch.tensor(c)).sum(), leaves)
    for name, got, right in zip(("x", "v_init", "tau", "v_threshold"), gradients, expected, strict=True):
        assert_close(got, right, name)


@pytest.mark.parametrize("v_reset", [0.0, None])
@pytest.mark.parametrize("through", ["spikes", "v_last"])
def test_each_output_alone_passes_its_gradient(through, v_reset):
    x, _, tau, threshold, a, c = random_run(1)
    a, c = (a, 0 * c) if through == "spikes" else (0 * a, c)
    options = {"decay_input": True, "v_reset": v_reset, "detach_reset": False}
    rest = np.zeros(x.shape[1:])
    expected, *_ = closed_form(x, rest, tau, threshold, a, c, derivative=DERIVATIVES["sigmoid"], **options)
    leaf = torch.tensor(x).requires_grad_()
    spikes, v_last = lif(leaf, tau=torch.tensor(tau), v_threshold=torch.tensor(threshold), **options)
    output, upstream = (spikes, a) if through == "spikes" else (v_last, c)
    output.backward(torch.tensor(upstream))
    assert_close(leaf.grad, expected, "x")


@pytest.mark.parametrize("shape", [(), (1,)], ids=["scalar", "one channel"])
def test_a_tau_and_a_threshold_for_all_neurons_collect_every_gradient(shape):
    x, v0, _, _, a, c = random_run(2)
    x, v0, a, c = x[:, :, :1], v0[:, :1], a[:, :, :1], c[:, :1]
    options = {"decay_input": True, "v_reset": None, "detach_reset": False}
    tau, threshold = np.full(1, 1.7), np.full(1, 0.8)
    derivative = DERIVATIVES["sigmoid"]
    _, _, expected_tau, expected_threshold = closed_form(x, v0, tau, threshold, a, c, derivative=derivative, **options)
    leaves = [torch.full(shape, value, dtype=torch.float64, requires_grad=True) for value in (1.7, 0.8)]
    spikes, v_last = lif(torch.tensor(x), v_init=torch.tensor(v0), tau=leaves[0], v_threshold=leaves[1], **options)
    got = torch.autograd.grad((spikes * torch.tensor(a)).sum() + (v_last * torch.tensor(c)).sum(), leaves)
    assert [gradient.shape for gradient in got] == [shape, shape]
    assert_close(got[0].reshape(1), expected_tau, "tau")
    assert_close(got[1].reshape(1), expected_threshold, "v_threshold")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_large_tau_in_16_bits_gets_its_gradient(dtype):
    """300² is beyond float16."""
    x, found = torch.full((6, 50), 3.0), []
    for kind in (dtype, torch.float64):
        tau = torch.tensor(300.0, dtype=kind, requires_grad=True)
        lif(x.to(kind), tau=tau, v_threshold=0.05)[0].sum().backward()
        found.append(tau.grad.item())
    assert found[0] == pytest.approx(found[1], rel=2 * torch.finfo(dtype).eps)
    assert found[1] < 0


@pytest.mark.parametrize("v_reset", [0.0, None])
@pytest.mark.parametrize("number", [np.float32(3), np.float64(3), np.int64(3), 3, Fraction(10, 3)], ids=str)
def test_numbers_of_any_type_are_rounded_once(number, v_reset):
    """NumPy divides 1 by a float32 in float32."""
    x = torch.randn(8, 500, generator=torch.Generator().manual_seed(0)) * 2
    options = {"decay_input": False, "v_reset": v_reset}
    found = lif(x, tau=number, v_threshold=number, surrogate=Surrogate("atan", number), **options)
    expected = lif(x, tau=float(number), v_threshold=float(number), **options)
    for got, right in zip(found, expected, strict=True):
        assert torch.equal(got, right)


def test_a_surrogate_with_its_own_alpha_is_used():
    x, _, _, _, a, _ = random_run(3)
    leaf = torch.tensor(x[:1]).requires_grad_()
    spikes, _ = lif(leaf, decay_input=False, surrogate=Surrogate("atan", 5.0))
    spikes.backward(torch.tensor(a[:1]))
    assert_close(leaf.grad, a[:1] * 2.5 / (1 + (2.5 * np.pi * (x[:1] - 1)) ** 2), "x")


def test_gradient_of_one_frame_for_all_time_steps_is_summed_over_them():
    frame = torch.randn(B, C, N, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    repeated = frame.detach().repeat(T, 1, 1, 1).requires_grad_()
    upstream = torch.randn(repeated.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    lif(frame.expand(T, B, C, N))[0].backward(upstream)
    lif(repeated)[0].backward(upstream)
    assert_close(frame.grad, repeated.grad.sum(0).numpy(), "frame")


@pytest.mark.parametrize("v_reset", [0.0, None])
@pytest.mark.parametrize("surrogate", SMOOTH)
def test_double_backward_runs_and_is_finite(surrogate, v_reset):
    x = torch.tensor(random_run()[0]).requires_grad_()
    spikes, v_last = lif(x, v_reset=v_reset, surrogate=surrogate, backend="torch")
    (gradient,) = torch.autograd.grad(spikes.sum() + v_last.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), x)
    assert second.isfinite().all()
    assert second.abs().max() > 0


@pytest.mark.parametrize("surrogate", SMOOTH)
def test_double_backward_of_one_time_step_is_the_slope_of_the_surrogate(surrogate):
    x = torch.tensor(random_run()[0][:1]).requires_grad_()
    spikes, _ = lif(x, decay_input=False, surrogate=surrogate, backend="torch")
    (gradient,) = torch.autograd.grad(spikes.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    u, step = x.detach().numpy() - 1, 1e-6
    slope = (DERIVATIVES[surrogate](u + step) - DERIVATIVES[surrogate](u - step)) / (2 * step)
    np.testing.assert_allclose(second.numpy(), slope, rtol=0, atol=1e-8)  # measured 1e-10, from the difference quotient
