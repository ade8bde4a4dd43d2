"""The CUDA kernels of the LIF neuron, run by their CuPy launcher on the CPU, against the reference."""

import contextlib
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cuda_host
from cuda_host_lif import F32, FORMS, GRADIENT, LAYOUTS, NARROW, SETUPS, SHAPES, WIDE, Setup, call, in_place, on_the_cpu
from golden import CASES, DTYPES, arrays, tensor
from seal_fast import lif
from seal_fast.kernels.launch import cupy as launcher
from seal_fast.kernels.lif import cupy as room
from seal_fast.kernels.neuron.options import Options
from seal_fast.kernels.surrogate.reference import Surrogate

pytestmark = pytest.mark.skipif(bool(cuda_host.missing()), reason=cuda_host.missing())

OF_CHANNELS = [setup for setup in SETUPS if setup.form == "channels" and setup.dtype == F32][:4]


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """All that are needed here, compiled at once."""
    with on_the_cpu():
        with cuda_host.planning():
            for setup in SETUPS:
                for shape in (WIDE, NARROW):
                    call(setup, shape).run()
            for case in CASES["lif"]:
                for precision in DTYPES:
                    golden_run(case, precision)
            for setup in OF_CHANNELS:
                call(replace(setup, packed=True), (2, 3, 43)).run()
            outputs_with(float)
        yield


def golden_run(case, precision):
    x = tensor("lif", f"{case['i']}_x", DTYPES[precision]).requires_grad_()
    options = {"tau": case["tau"], "v_reset": case["v_reset"], "detach_reset": case["detach_reset"]}
    spikes, v_last = lif(x, decay_input=False, backend="cupy", **options)
    spikes.backward(tensor("lif", f"{case['i']}_gs", DTYPES[precision]))
    return spikes.detach(), v_last.detach(), x.grad


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("case", CASES["lif"], ids=lambda case: f"case{case['i']}")
def test_published_spikes_membrane_and_gradient(case, precision):
    golden, i = arrays("lif"), case["i"]
    spikes, v_last, gradient = golden_run(case, precision)
    expected = golden[f"{i}_gx_{precision}"]
    assert 0 < spikes.mean() < 1
    np.testing.assert_array_equal(spikes.numpy(), golden[f"{i}_spikes_{precision}"])
    np.testing.assert_array_equal(v_last.numpy(), golden[f"{i}_v_{precision}"])
    error = np.abs(gradient.numpy() - expected).max() / np.abs(expected).max()
    assert error <= {"f32": 2e-6, "f64": 1e-12}[precision]  # measured 2e-7, 3e-16


def test_setups_reach_every_template_argument():
    kinds = {(setup.options(2).charge_kind, setup.v_reset is None) for setup in SETUPS if setup.dtype == F32}
    of_either_reset = product(["decay", "filter_divide", "filter_multiply"], [False, True])
    assert kinds == {*of_either_reset, ("leak_divide", False), ("leak_multiply", False)}
    long_and_packed = set(product([False, True], repeat=2))
    for dtype in GRADIENT:
        assert {setup.T for setup in SETUPS if setup.dtype == dtype} >= {1, 4, 16, 33}
    for form in FORMS:
        assert {(setup.T > 16, setup.packed) for setup in SETUPS if setup.form == form} == long_and_packed


@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: f"{setup.dtype}, T={setup.T}, {setup.surrogate}")
def test_kernels_equal_the_reference_for_every_shape(setup):
    fired = 0.0
    shapes = [shape for shape in SHAPES if shape[1] > 1 or "channel" not in setup.form]
    for seed, shape in enumerate(shapes):
        fired += call(setup, shape, seed=seed, state=seed % 3 > 0, keep_v=seed % 4 > 0).check()
    assert 0.05 < fired / len(shapes) < 0.9


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
def test_kernels_equal_the_reference_in_every_layout(layout, grad_layout):
    names = list(LAYOUTS)
    first = names.index(layout) * len(names) + names.index(grad_layout)
    for seed, setup in enumerate(SETUPS[first % 12 :: 12]):
        for shape in ((2, 4, 8), (3, 5, 7)):
            call(setup, shape, layout, grad_layout, seed).check()


def test_layouts_are_read_in_place():
    for layout in LAYOUTS:
        x = LAYOUTS[layout](torch.randn(4, 2, 3, 5))
        assert in_place(x) == (layout != "time innermost")


def test_kernels_equal_the_reference_anywhere():
    layouts = st.sampled_from(sorted(LAYOUTS))
    shapes = st.tuples(st.integers(1, 4), st.integers(2, 5), st.integers(1, 300))

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(st.sampled_from(SETUPS), shapes, layouts, layouts, st.integers(0, 2**31), st.booleans(), st.booleans())
    def sweep(setup, shape, layout, grad_layout, seed, state, keep_v):
        call(setup, shape, layout, grad_layout, seed, state, keep_v).check()

    sweep()


def test_no_neurons_need_no_kernel(monkeypatch):
    monkeypatch.setattr(launcher, "start", None)
    (spikes, v_last, packed), (grad_x, *_) = call(SETUPS[0], (0, 3, 5)).run()
    assert spikes.shape == grad_x.shape == (SETUPS[0].T, 0, 3, 5)
    assert v_last.shape == (0, 3, 5)
    assert packed is None or packed.numel() == 0


@pytest.mark.parametrize("setup", OF_CHANNELS, ids=lambda setup: f"T={setup.T}, {setup.surrogate}")
def test_the_operator_passes_every_gradient(setup):
    """Through torch.library and autograd: tau, threshold and v_init are leaves."""
    given_ = call(setup, (2, 3, 43))
    options = given_.options
    results = []
    for backend in ("torch", "cupy"):
        tau, threshold = (value.float().requires_grad_() for value in (options.tau, options.v_threshold))
        x, v_init = given_.x.clone().requires_grad_(), given_.v_init.clone().requires_grad_()
        spikes, v_last, packed = lif(
            x,
            tau=tau,
            v_threshold=threshold,
            decay_input=setup.decay_input,
            v_reset=setup.v_reset,
            surrogate=setup.surrogate,
            detach_reset=setup.detach_reset,
            v_init=v_init,
            return_packed=True,
            backend=backend,
        )
        outputs, upstream = (spikes, v_last), (given_.grad_spikes, given_.grad_v_last)
        gradients = torch.autograd.grad(outputs, (x, v_init, tau, threshold), upstream, allow_unused=True)
        results.append((spikes, v_last, packed, gradients))
    (*expected, expected_gradients), (*got, gradients) = results
    assert all(torch.equal(left, right) for left, right in zip(got, expected, strict=True))
    for left, right in zip(gradients, expected_gradients, strict=True):
        right = torch.zeros_like(left) if right is None else right
        torch.testing.assert_close(left, right, rtol=0, atol=1e-5 * max(1.0, right.abs().max()))  # measured 1e-6


def outputs_with(number) -> list[torch.Tensor]:
    """With tau, the threshold, v_reset and alpha as numbers of one type."""
    options = Options(number(2), False, number(1), number(0), Surrogate("sigmoid", number(4)), False)
    x = torch.linspace(-1, 3, 4 * 128).reshape(4, 1, 4, 32)
    spikes, v_last, _ = room.forward(x, None, options, keep_v=True, pack=False)
    return [spikes, v_last, room.backward(x, None, x, None, options, parameters=False)[0]]


def test_numbers_of_any_python_type_reach_the_kernel_as_floats():
    """An int is no int64 to the kernel."""
    with_floats = outputs_with(float)
    assert 0 < with_floats[0].mean() < 1
    assert all(torch.equal(*pair) for pair in zip(outputs_with(int), with_floats, strict=True))


BREAKS = {
    "nothing": ("", ""),
    "fires above the threshold only": (
        "const Real spike = fire(h, of.threshold(i));",
        "const Real spike = h > of.threshold(i) ? 1 : 0;",
    ),
    "1/tau for the decay": (
        "decay(int i) const { return set[i % SETS][2]",
        "decay(int i) const { return set[0][1]",
    ),
    "sign of the reset's slope": ("multiply_add(c.at[i], slope,", "multiply_add(-c.at[i], slope,"),
    "no bound in forward": ("const bool inside = n < N;", "const bool inside = true;"),
    "no bound in backward": ("if (n >= N) return;", ""),
    "rows of x N apart": ("rows = {x, x_stride, n}", "rows = {x, N, n}"),
    "rows of the gradient N apart": ("(first + t) * grad_stride + n", "(first + t) * N + n"),
    "another chunk's checkpoint": ("checkpoints + (chunk - 1) * N + n)", "checkpoints + chunk * N + n)"),
    "no v_init": ("inside ? v_init : nullptr, n, reset", "inside ? nullptr : v_init, n, reset"),
    "channels not wrapped": ("channel = channel + 1 < channels ? channel + 1 : 0;", ""),
    "packed rows too short": ("packed + (first + t) * ((N + 7) / 8)", "packed + (first + t) * (N / 8)"),
    "bits of the wrong neighbour": ("<< (lanes * VECTOR)", "<< lanes"),
    "the last step of a chunk left out": ("int t = STEPS - 1; t >= 0; --t", "int t = STEPS - 2; t >= 0; --t"),
    "tau's gradient from the last potential": ("before.at[i]) - reset;", "v.at[i]) - reset;"),
}


@pytest.mark.parametrize("line", BREAKS)
def test_a_broken_line_is_noticed(line, monkeypatch):
    setup = Setup(F32, 33, False, 0.0, 1.7, "sigmoid", False, "channels", True)
    strided = "every other time step", "every other time step"
    calls = [call(setup, WIDE, *strided, state=False), call(setup, NARROW, *strided)]
    text = launcher.source(room.SOURCE)
    assert BREAKS[line][0] in text
    broken = cuda_host.Kernels(text.replace(*BREAKS[line]))
    monkeypatch.setattr(cuda_host, "kernels", lambda path: broken)
    with cuda_host.planning():
        for each in calls:
            each.run()
    with contextlib.nullcontext() if line == "nothing" else pytest.raises(AssertionError):
        for each in calls:
            each.check()
