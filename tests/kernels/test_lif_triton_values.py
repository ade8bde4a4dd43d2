"""Values of the Triton kernels of the LIF neuron: on the GPU, or in Triton's interpreter where TRITON_INTERPRET=1.

Spikes and potentials equal the reference's, bit for bit; gradients are its own but for rounding.
"""

import itertools
import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    # The interpreter needs TRITON_INTERPRET=1 before the first import, so another process runs these tests.
    pytest.skip("torch finds no GPU; test_lif_triton.py runs this file in the interpreter", allow_module_level=True)

from seal_fast import lif
from seal_fast.kernels.launch.triton import Launch
from seal_fast.kernels.lif import triton as kernel
from seal_fast.kernels.neuron.options import Options
from seal_fast.kernels.packing.reference import pack
from seal_fast.kernels.surrogate.reference import SURROGATES, Surrogate

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
BLOCK = {dtype: kernel.THREADS * kernel.ACCESS // dtype.itemsize for dtype in (torch.float32, torch.bfloat16)}
# Of the largest entry. Measured 1e-6, 2e-4, 2e-5 and 2e-15; a 16-bit result may differ by a unit in its last place.
GRADIENT = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float64: 1e-14}
FIRED = {"spikes": 0, "all": 0}


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(backend, device, x, upstream, upstream_v, options):
    """Outputs and gradients on the CPU; gradients are of x and of those options that are tensors."""
    leaf = x.to(device).detach().requires_grad_()
    leaves, given = {"x": leaf}, {}
    for name, value in options.items():
        given[name] = value
        if isinstance(value, torch.Tensor):
            given[name] = leaves[name] = value.to(device).detach().requires_grad_()
    spikes, v_last, *packed = lif(leaf, **given, backend=backend, return_packed=True)
    gradients = torch.autograd.grad(
        (spikes, v_last), list(leaves.values()), (upstream.to(device), upstream_v.to(device))
    )
    return (spikes, v_last, *packed), dict(zip(leaves, gradients, strict=True))


def exact_gradients(x, upstream, upstream_v, options):
    options = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    return run("torch", "cpu", x.double(), upstream.double(), upstream_v.double(), options)[1]


def check(x, options=None):
    """Compare everything that the operator returns for x with the reference."""
    options = options or {}
    upstream = numbers(*x.shape, seed=1, dtype=x.dtype)
    upstream_v = numbers(*x.shape[1:], seed=2, dtype=torch.promote_types(x.dtype, torch.float32))
    expected, expected_gradients = run("torch", "cpu", x, upstream, upstream_v, options)
    got, gradients = run("triton", DEVICE, x, upstream, upstream_v, options)
    assert len(got) == len(expected)
    for name, left, right in zip(("spikes", "v_last", "packed"), got, expected, strict=False):
        assert left.dtype == right.dtype, name
        assert torch.equal(left.cpu(), right), name
    of_x = expected_gradients["x"].double().abs()
    for name, gradient in gradients.items():
        right = expected_gradients[name].double()
        assert gradient.dtype == expected_gradients[name].dtype, name
        # A gradient may cancel; the error of a sum over neurons is one of its terms, for which those of x stand.
        summed = name in ("tau", "v_threshold")
        size = torch.maximum(right.abs().max(), of_x.sum() / right.numel() if summed else of_x.max()).clamp_min(1e-30)
        error = (gradient.cpu().double() - right).abs().max() / size
        if error > GRADIENT[gradient.dtype]:
            # The reference may be the one that is wrong: its sigmoid loses digits far from the threshold.
            exact = exact_gradients(x, upstream, upstream_v, options)[name]
            far, reference_far = (gradient.cpu().double() - exact).abs().max(), (right - exact).abs().max()
            assert far <= reference_far, f"{name}: {error:.1e} from the reference, and {far:.1e} from float64"
    FIRED["spikes"] += expected[0].sum().item()
    FIRED["all"] += expected[0].numel()


@pytest.mark.parametrize(
    ("T", "N"),
    [
        *[(1, 1), (1, 516), (4, 1), (4, 127), (4, 128), (4, 129), (4, 508), (4, 512), (4, 516)],
        *[(16, 127), (16, 260), (17, 1), (17, 260), (33, 127), (33, 132)],
    ],
)
def test_any_number_of_steps_and_neurons(T, N):
    check(numbers(T, N) + 0.5, {"tau": 1.7, "v_init": numbers(N, seed=3)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("T", "N"), [(1, 8), (4, 1032), (16, 41), (17, 64), (34, 9)])
def test_any_dtype(T, N, dtype):
    check((numbers(T, N) + 0.5).to(dtype), {"tau": 1.7, "decay_input": False, "v_reset": None})


@pytest.mark.parametrize("detach_reset", [False, True], ids=["attached", "detached"])
@pytest.mark.parametrize("decay_input", [False, True], ids=["whole input", "decayed input"])
@pytest.mark.parametrize("v_reset", [0.0, -0.3, None], ids=["hard", "hard to -0.3", "soft"])
@pytest.mark.parametrize("tau", [1.0, 2.0, 3.7])
def test_any_neuron(tau, v_reset, decay_input, detach_reset):
    options = {"tau": tau, "v_reset": v_reset, "decay_input": decay_input, "detach_reset": detach_reset}
    check(numbers(4, 60) * 2, options)


@pytest.mark.parametrize("v_reset", [0.0, -0.3, None], ids=["hard", "hard to -0.3", "soft"])
def test_neurons_without_a_leak(v_reset):
    check(
        numbers(4, 60) * 2, {"tau": math.inf, "decay_input": False, "v_reset": v_reset, "v_init": numbers(60, seed=3)}
    )


@pytest.mark.parametrize("alpha", [None, 0.7])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_any_surrogate(surrogate, alpha):
    check(numbers(3, 200) * 2, {"surrogate": Surrogate(surrogate, alpha), "decay_input": False})


CONSTANTS = {
    "a tensor and a float": lambda C: {"tau": torch.tensor(1.7), "v_threshold": 0.8},
    "a float and a tensor": lambda C: {"tau": 1.7, "v_threshold": torch.tensor(0.8)},
    "a float and channels": lambda C: {"tau": 2.0, "v_threshold": torch.linspace(0.3, 1.2, C)},
    "channels": lambda C: {"tau": torch.linspace(1.0, 4.0, C), "v_threshold": torch.linspace(0.3, 1.2, C)},
    "channels and a tensor": lambda C: {"tau": torch.linspace(1.0, 4.0, C), "v_threshold": torch.tensor(0.8)},
}


@pytest.mark.parametrize("v_reset", [0.0, None, 0.2])
@pytest.mark.parametrize("decay_input", [False, True])
@pytest.mark.parametrize("constants", CONSTANTS)
def test_learned_constants(constants, decay_input, v_reset):
    options = {**CONSTANTS[constants](3), "decay_input": decay_input, "v_reset": v_reset}
    check(numbers(4, 2, 3, 7) * 2, {**options, "v_init": numbers(2, 3, 7, seed=3)})


@pytest.mark.parametrize("size", [1, 3, 127, 128, 129, 600])
@pytest.mark.parametrize("channels", [2, 5])
def test_every_neuron_has_its_channel(channels, size):
    """Channels narrower and wider than a program."""
    x = torch.full((1, 3, channels, size), 0.5)
    threshold = torch.linspace(0.1, 0.9, channels)
    spikes, _ = lif(x.to(DEVICE), decay_input=False, v_threshold=threshold.to(DEVICE), backend="triton")
    assert torch.equal(spikes.cpu(), (x >= threshold[:, None]).float())
    x = x.transpose(2, 3).contiguous().transpose(2, 3)  # channels innermost
    spikes, _ = lif(x.to(DEVICE), decay_input=False, v_threshold=threshold.to(DEVICE), backend="triton")
    assert torch.equal(spikes.cpu(), (x >= threshold[:, None]).float())


def channels_last(tensor):
    return tensor.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, tensor.shape[:2])


LAYOUTS = {
    "contiguous": lambda tensor: tensor,
    "channels_last": channels_last,
    "one row for all time steps": lambda tensor: tensor[:1].expand_as(tensor),
    "one channels_last row for all time steps": lambda tensor: channels_last(tensor)[:1].expand_as(tensor),
    "one number": lambda tensor: tensor[:1, :1, :1, :1, :1].expand_as(tensor),
    "every other time step": lambda tensor: tensor.repeat_interleave(2, 0)[::2],
    "every other column": lambda tensor: tensor.repeat_interleave(2, -1)[..., ::2],
    "beginning off an aligned address": lambda tensor: torch.cat([tensor[0].flatten()[:1], tensor.flatten()])[
        1:
    ].unflatten(0, tensor.shape),
}


@pytest.mark.parametrize(
    ("of_x", "of_gradient"),
    sorted(
        {*itertools.product(LAYOUTS, ["contiguous", "channels_last", "one number"])}
        | {("contiguous", layout) for layout in LAYOUTS}
    ),
)
def test_any_strides(of_x, of_gradient):
    shape = (4, 2, 3, 4, 4)
    x, upstream = (
        LAYOUTS[of_x](numbers(*shape).to(DEVICE) * 2),
        LAYOUTS[of_gradient](numbers(*shape, seed=1).to(DEVICE)),
    )
    leaf, plain = x.detach().requires_grad_(), x.detach().cpu().contiguous().requires_grad_()
    options = {"v_threshold": 0.3, "tau": 1.7}
    spikes, v_last, packed = lif(leaf, **options, backend="triton", return_packed=True)
    expected, v_expected = lif(plain, **options, backend="torch")
    assert torch.equal(spikes.cpu(), expected)
    assert torch.equal(v_last.cpu(), v_expected)
    assert torch.equal(packed, pack(spikes.detach()))
    (gradient,) = torch.autograd.grad(spikes, leaf, upstream)
    (right,) = torch.autograd.grad(expected, plain, upstream.cpu())
    torch.testing.assert_close(gradient.cpu(), right, rtol=2e-6, atol=1e-6)  # measured 2e-7


@pytest.mark.parametrize("dtype", BLOCK, ids=str)
def test_packed_spikes_at_the_edges_of_programs(dtype):
    block = BLOCK[dtype]
    for T, N in [*((2, N) for N in (1, 7, 8, 9, 127, 128, 129, block - 8, block, block + 8)), (17, 9), (18, block)]:
        x = numbers(T, N, seed=N, dtype=dtype).to(DEVICE) * 3
        spikes, v_last, packed = lif(x, backend="triton", return_v_last=False, return_packed=True)
        assert v_last is None
        assert packed.shape == (T, -(-N // 8))
        assert torch.equal(packed, pack(spikes))


@pytest.mark.parametrize(("T", "sizes"), [(3, (1, 63, 64, 65, 600)), (35, (65,))])
def test_all_of_the_outputs_are_written(T, sizes, monkeypatch):
    """Memory poisoned with NaN, or 255, beforehand holds none afterwards."""

    def poisoned(allocate):
        def allocate_poisoned(*arguments, **options):
            tensor = allocate(*arguments, **options)
            return tensor.fill_(torch.nan if tensor.is_floating_point() else 255)

        return allocate_poisoned

    options = Options(torch.tensor([2.0], device=DEVICE), True, 1.0, 0.0, Surrogate(), False)
    for size in sizes:
        x = numbers(T, 2, size).to(DEVICE)
        with monkeypatch.context() as patch:
            for owner, name in ((torch, "empty_strided"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
                patch.setattr(owner, name, poisoned(getattr(owner, name)))
            spikes, v_last, packed = kernel.forward(x, None, options, keep_v=True, pack=True)
            gradients = kernel.backward(x, x[0], x, x[0], options, parameters=True)
        outputs = (spikes, v_last, *gradients)
        assert len(outputs) == 6
        assert all(not output.isnan().any() for output in outputs)
        assert torch.equal(packed, pack(spikes))


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy's, of the interpreter
@pytest.mark.parametrize("v_reset", [0.0, None, 0.3])
def test_infinite_subnormal_and_undefined_inputs(v_reset):
    special = [float("inf"), -float("inf"), float("nan"), 1e-45, -1e-45, 1e-39, -0.0, 3e38, -3e38, 1.0]
    x = torch.cartesian_prod(*[torch.tensor(special)] * 3).t().contiguous()
    for tau, decay_input in ((1.7, True), (1.7, False), (2.0, True), (2.0, False)):
        options = {"tau": tau, "decay_input": decay_input, "v_reset": v_reset}
        expected, v_expected = lif(x, **options, backend="torch")
        spikes, v_last = lif(x.to(DEVICE), **options, backend="triton")
        assert torch.equal(spikes.cpu(), expected)
        torch.testing.assert_close(v_last.cpu(), v_expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_gradients_are_rounded_to_nearest(dtype):
    values = torch.cat([torch.linspace(-8, 8, 4001), torch.logspace(-10, 4, 999, base=10.0)])
    # One step from rest far below a distant threshold: the gradient of x is that of v_last, rounded.
    x = torch.full((1, 5000), -50.0, dtype=dtype, device=DEVICE, requires_grad=True)
    _, v_last = lif(x, decay_input=False, surrogate="rectangle", backend="triton")
    (gradient,) = torch.autograd.grad(v_last, x, values.to(DEVICE))
    assert torch.equal(gradient[0].cpu(), values.to(dtype))


def test_each_call_starts_one_kernel(monkeypatch):
    """That "triton" means this module's kernels; and no neuron, no kernel."""
    started = []

    def counted(self, *tensors):
        started.append(self.kernel)
        call(self, *tensors)

    call = Launch.__call__
    monkeypatch.setattr(Launch, "__call__", counted)
    x = numbers(4, 2, 3).to(DEVICE).requires_grad_()
    lif(x, backend="triton")[0].sum().backward()
    assert started == [kernel._forward, kernel._backward]
    empty = torch.zeros(4, 2, 0, device=DEVICE, requires_grad=True)
    lif(empty, backend="triton")[0].sum().backward()
    assert len(started) == 2
    assert empty.grad.shape == empty.shape


@st.composite
def runs(draw):
    """An input of any shape, and any options."""
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    shape = draw(st.sampled_from([(), (1,), (8,), (130,), (2, 3), (3, 4, 4), (2, 5, 3, 3), (1, 2, 70)]))
    x = numbers(draw(st.integers(1, 5) | st.sampled_from([16, 17, 33])), *shape, seed=draw(st.integers(0, 999))) * draw(
        st.sampled_from([0.5, 1, 4])
    )
    if draw(st.booleans()):
        x = (x * 4).round() / 4  # potentials exactly at the threshold

    def number_or_tensor(choices):
        form = draw(st.sampled_from(["float", "scalar", "channels"] if len(shape) > 1 else ["float", "scalar"]))
        if form == "float":
            return draw(choices)
        return torch.tensor([draw(choices) for _ in range(shape[1])] if form == "channels" else draw(choices))

    options = {
        "tau": number_or_tensor(st.sampled_from([1.0, 2.0, 1.25, 3.7]) | st.floats(1, 50)),
        "v_threshold": number_or_tensor(st.sampled_from([0.5, 1.0]) | st.floats(-0.5, 2)),
        "v_reset": draw(st.sampled_from([None, 0.0, 0.25, -0.3])),
        "decay_input": draw(st.booleans()),
        "detach_reset": draw(st.booleans()),
        "surrogate": draw(st.sampled_from(list(SURROGATES))),
    }
    if draw(st.booleans()):
        options["v_init"] = numbers(*shape, seed=3)
    return x.to(dtype), options


@pytest.mark.parametrize("examples", [24, pytest.param(2000, marks=pytest.mark.long)])
def test_any_run(examples):
    @settings(max_examples=examples, deadline=None, derandomize=True)
    @given(runs())
    def sweep(run):
        check(*run)

    before = dict(FIRED)
    sweep()
    fired, neurons = FIRED["spikes"] - before["spikes"], FIRED["all"] - before["all"]
    assert 0.05 < fired / neurons < 0.95
