"""The LIF operator's spikes and membrane potential against a naive loop, bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seal_fast import lif

pytestmark = pytest.mark.usefixtures("each_backend")


def naive_lif(x, *, tau, decay_input, v_threshold, v_reset, v_init):
    """Neuron by neuron, one float32 operation at a time; tau and v_threshold are numbers, or lists by channel."""
    one = np.float32(1)
    reset = np.float32(0 if v_reset is None else v_reset)
    spikes, v_last = np.zeros_like(x), np.zeros(x.shape[1:], np.float32)
    for index in np.ndindex(x.shape[1:]):
        exact_tau = tau[index[1]] if isinstance(tau, list) else tau
        threshold = np.float32(v_threshold[index[1]] if isinstance(v_threshold, list) else v_threshold)
        time_constant, decay = np.float32(exact_tau), np.float32(1.0 - 1.0 / exact_tau)
        v = reset if v_init is None else v_init[index]
        for t in range(x.shape[0]):
            x_t = x[(t, *index)]
            if not decay_input and reset == 0:
                h = v * decay + x_t
            elif not decay_input:
                h = v - (v - reset) / time_constant + x_t
            elif reset == 0:
                h = v + (x_t - v) / time_constant
            else:
                h = v + (x_t - (v - reset)) / time_constant
            s = one if h >= threshold else np.float32(0)
            v = h - s * threshold if v_reset is None else (one - s) * h + s * reset
            spikes[(t, *index)] = s
        v_last[index] = v
    return spikes, v_last


def bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.int32)


# Every fourth neuron shape has no neuron in it; those of two and more axes have channels.
SHAPES = [(), (7,), (9,), (0,), (4, 3), (3, 2), (1, 4), (0, 3), (2, 3, 4), (1, 3, 5), (2, 2, 2, 3), (2, 3, 0)]


@st.composite
def neuron_runs(draw):
    shape = draw(st.sampled_from(SHAPES))
    random = np.random.RandomState(draw(st.integers(0, 2**31)))
    x = (random.standard_normal((draw(st.integers(1, 16)), *shape)) * draw(st.sampled_from([0.3, 1, 5]))).astype("f4")
    if draw(st.booleans()):
        x = np.round(x * 4) / np.float32(4)  # membrane potentials exactly at the threshold

    def number_or_tensor(numbers):
        """A number in each form that the operator takes, and what it means."""
        form = draw(st.sampled_from(["float", "scalar", "channels"]))
        if form == "float":
            value = draw(numbers)
            return value, value
        if form == "scalar" or len(shape) < 2:
            value = torch.tensor(draw(numbers))
            return value, value.item()
        value = torch.tensor([draw(numbers) for _ in range(shape[1])])
        return value, value.tolist()

    tau = number_or_tensor(st.sampled_from([1.0, 1.25, 2.0, 3.7]) | st.floats(1, 50))
    threshold = number_or_tensor(st.sampled_from([0.5, 1.0]) | st.floats(-0.5, 2))
    v_init = draw(st.booleans())
    v_init = random.standard_normal(shape).astype("f4") if v_init else None
    v_reset = draw(st.sampled_from([None, None, 0.0, 0.0, 0.25, -0.3]))
    return x, tau, threshold, v_reset, draw(st.booleans()), v_init if v_init is None else np.asarray(v_init)


def test_spikes_and_last_membrane_equal_a_naive_float32_loop():
    fired = silent = 0

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(neuron_runs())
    def sweep(run):
        nonlocal fired, silent
        x, (tau, tau_meaning), (threshold, threshold_meaning), v_reset, decay_input, v_init = run
        expected_spikes, expected_v = naive_lif(
            x, tau=tau_meaning, decay_input=decay_input, v_threshold=threshold_meaning, v_reset=v_reset, v_init=v_init
        )
        spikes, v_last = lif(
            torch.from_numpy(x),
            tau=tau,
            decay_input=decay_input,
            v_threshold=threshold,
            v_reset=v_reset,
            v_init=None if v_init is None else torch.from_numpy(v_init),
        )
        assert spikes.shape == x.shape
        np.testing.assert_array_equal(bits(spikes.numpy()), bits(expected_spikes))
        np.testing.assert_array_equal(bits(v_last.numpy()), bits(expected_v))
        fired += expected_spikes.sum()
        silent += (1 - expected_spikes).sum()

    sweep()
    assert fired > 500
    assert silent > 500


def dense_channels_last(generator):
    return torch.randn(8, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last).unflatten(0, (4, 2))


LAYOUTS = {
    "contiguous": lambda g: torch.randn(4, 2, 3, 4, 5, generator=g),
    "channels_last": dense_channels_last,
    "transposed": lambda g: torch.randn(4, 5, 3, 4, 2, generator=g).transpose(1, 4),
    "permuted": lambda g: torch.randn(4, 5, 3, 2, 4, generator=g).permute(0, 3, 2, 4, 1),
    "one sample, channels_last": lambda g: dense_channels_last(g)[:, :1],
    "time innermost": lambda g: torch.randn(2, 3, 4, 5, 4, generator=g).movedim(-1, 0),
    "batch outermost": lambda g: torch.randn(2, 4, 3, 4, 5, generator=g).transpose(0, 1),
    "every other column": lambda g: torch.randn(4, 2, 3, 4, 10, generator=g)[..., ::2],
    "some channels": lambda g: torch.randn(4, 2, 7, 4, 5, generator=g)[:, :, 2:5],
    "every other time step": lambda g: torch.randn(8, 2, 3, 4, 5, generator=g)[::2],
    "one frame for all time steps": lambda g: torch.randn(2, 3, 4, 5, generator=g).expand(4, 2, 3, 4, 5),
    "one sample for the batch": lambda g: torch.randn(4, 1, 3, 4, 5, generator=g).expand(4, 2, 3, 4, 5),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_give_the_result_of_contiguous_input(layout):
    x = LAYOUTS[layout](torch.Generator().manual_seed(0)).requires_grad_()
    contiguous = x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    tau = torch.tensor([1.5, 2.0, 3.0])
    got, v_got = lif(x, tau=tau, v_threshold=0.3)
    expected, v_expected = lif(contiguous, tau=tau, v_threshold=0.3)

    assert 0.05 < expected.mean() < 0.95
    assert torch.equal(got, expected)
    assert torch.equal(v_got, v_expected)
    (gradient,) = torch.autograd.grad((got * upstream).sum() + v_got.sum(), x)
    (expected_gradient,) = torch.autograd.grad((expected * upstream).sum() + v_expected.sum(), contiguous)
    # The exponential rounds differently in and outside of vector registers; measured 1e-7.
    torch.testing.assert_close(gradient, expected_gradient, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "permuted"])
def test_spikes_of_a_dense_input_keep_its_strides(layout):
    x = LAYOUTS[layout](torch.Generator().manual_seed(0))
    assert lif(x)[0].stride() == x.stride()


def test_spikes_of_one_frame_for_all_time_steps_are_not_one_frame():
    x = torch.full((1, 3), 0.8).expand(4, 1, 3)
    spikes, _ = lif(x, decay_input=False)
    assert x.stride(0) == 0
    assert spikes[:, 0, 0].tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("v_reset", [0.0, None, -0.3])
def test_16_bit_input_runs_in_float32(dtype, v_reset):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(8, 4, 3, 5, generator=generator) * 2).to(dtype).requires_grad_()
    upstream = torch.randn(x.shape, generator=generator).to(dtype)
    upcast = x.detach().float().requires_grad_()
    spikes, v_last = lif(x, tau=1.7, v_reset=v_reset)
    expected, v_expected = lif(upcast, tau=1.7, v_reset=v_reset)

    assert spikes.dtype == x.dtype == dtype
    assert v_last.dtype == torch.float32
    assert 0.05 < expected.mean() < 0.95
    assert torch.equal(spikes.float(), expected)
    assert torch.equal(v_last, v_expected)
    spikes.backward(upstream)
    expected.backward(upstream.float())
    assert torch.equal(x.grad, upcast.grad.to(dtype))


def test_16_bit_input_keeps_a_float32_state():
    """Over 64 steps, no more than one spike in a million differs from a float64 state on the same bfloat16 input."""
    x = (torch.randn(64, 40_000, generator=torch.Generator().manual_seed(3)) + 1).bfloat16()
    for tau in (2.0, 20.0):
        spikes = lif(x, tau=tau)[0]
        exact = lif(x.double(), tau=tau)[0]
        assert exact.mean() > 0.01
        assert (spikes.double() != exact).double().mean() <= 1e-6


@pytest.mark.parametrize("v_reset", [0.0, None])
def test_nan_never_fires_and_stays_with_its_neuron(v_reset):
    x = torch.full((4, 3), 3.0)
    x[1, 1] = float("nan")
    spikes, v_last = lif(x, v_reset=v_reset)
    assert spikes.t().tolist() == [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert v_last.isnan().tolist() == [False, True, False]


def test_membrane_exactly_at_the_threshold_fires():
    x = torch.tensor([[1.0], [torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))]]).t().unsqueeze(0)
    assert lif(x, decay_input=False)[0].flatten().tolist() == [1, 0]


def test_two_halves_that_pass_the_membrane_on_equal_one_run():
    x = torch.randn(8, 2, 3, generator=torch.Generator().manual_seed(0)) * 2
    whole, v_whole = lif(x, v_reset=-0.3)
    first, v = lif(x[:3], v_reset=-0.3)
    second, v_last = lif(x[3:], v_reset=-0.3, v_init=v)
    assert torch.equal(torch.cat([first, second]), whole)
    assert torch.equal(v_last, v_whole)
