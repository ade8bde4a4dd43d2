"""Every kernel of the LIF neuron against the reference, over shapes, strides, dtypes and options."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seal_fast import lif
from seal_fast.kernels.packing.reference import pack
from seal_fast.kernels.surrogate.reference import SURROGATES

# Of the largest entry: float32 and float64 measured 1.9e-6 and 4e-15, 16-bit one unit in the last place of the result.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def strided(draw, values: torch.Tensor) -> torch.Tensor:
    """The same shape in one of the layouts that users have; a broadcast one repeats its first step."""
    layout = draw(st.sampled_from(["contiguous", "permuted", "sliced", "broadcast", "time last", "offset"]))
    if layout == "permuted":
        order = draw(st.permutations(range(1, values.dim())))
        inverse = [0, *(order.index(axis) + 1 for axis in range(1, values.dim()))]
        return values.permute(0, *order).contiguous().permute(*inverse)
    if layout == "sliced":
        return torch.stack([values, values + 1], -1)[..., 0]
    if layout == "broadcast":
        return values[:1].expand_as(values)
    if layout == "time last":
        return values.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "offset":  # its address is not aligned to more than one number
        return torch.cat([values.new_zeros(1), values.flatten()])[1:].view_as(values)
    return values


@st.composite
def runs(draw):
    """Input, upstream gradients and options of one call."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    steps = draw(st.integers(1, 9) | st.sampled_from([16, 17, 33]))
    neurons = draw(
        st.sampled_from([(1,), (255,), (257,), (1024,)])
        | st.tuples(st.integers(0, 5), st.integers(1, 9), *[st.integers(1, 9)] * draw(st.integers(0, 2)))
    )
    state = torch.promote_types(dtype, torch.float32)

    def normal(shape, dtype):
        values = torch.randn(shape, generator=generator)
        return (values * draw(st.sampled_from([0.5, 2.0])) + draw(st.sampled_from([0.0, 0.5]))).to(dtype)

    def parameter(low, high):
        forms = ["float", "scalar", "channels"] if len(neurons) > 1 else ["float", "scalar"]
        form = draw(st.sampled_from(forms))
        if form == "float":
            return draw(st.sampled_from([low, 2.0]) | st.floats(low, high))
        size = (neurons[1],) if form == "channels" else ()
        return (low + (high - low) * torch.rand(size, generator=generator)).requires_grad_()

    x = strided(draw, normal((steps, *neurons), dtype))
    upstream = strided(draw, normal(x.shape, dtype)), normal(neurons, state)
    options = {
        "tau": parameter(1.0, 20.0),
        "v_threshold": parameter(0.25, 1.5),
        "v_reset": draw(st.sampled_from([0.0, None, 0.25, -0.5])),
        "decay_input": draw(st.booleans()),
        "detach_reset": draw(st.booleans()),
        "surrogate": draw(st.sampled_from(list(SURROGATES))),
        "v_init": normal(neurons, state).requires_grad_() if draw(st.booleans()) else None,
    }
    return x, upstream, options


def outputs_and_gradients(backend, x, upstream, options):
    leaf = x.detach().requires_grad_()
    leaves = {"x": leaf, **{name: value for name, value in options.items() if isinstance(value, torch.Tensor)}}
    spikes, v_last, packed = lif(leaf, backend=backend, return_packed=True, **options)
    gradients = torch.autograd.grad((spikes, v_last), list(leaves.values()), upstream)
    return spikes, v_last, packed, dict(zip(leaves, gradients, strict=True))


def compare(run) -> None:
    x, upstream, options = run
    expected = outputs_and_gradients("torch", x, upstream, options)
    spikes, v_last, packed, gradients = outputs_and_gradients("auto", x, upstream, options)
    assert torch.equal(spikes, expected[0])
    assert torch.equal(v_last, expected[1])
    assert torch.equal(packed, pack(spikes.detach()))
    for name, got in gradients.items():
        right = expected[3][name]
        assert got.shape == right.shape
        # A parameter's gradient is a sum of terms of either sign whose roundings do not cancel; v_init's has T of them.
        terms = {"x": 1.0, "v_init": x.shape[0]}.get(name, max(x.numel(), 1) / max(got.numel(), 1))
        largest = right.double().abs().max().item() if right.numel() else 0.0
        # Of the gradients, x's alone is rounded to 16 bits; those of parameters are of the parameters' dtype.
        tolerance = TOLERANCE[x.dtype if name == "x" else got.dtype] * max(largest, math.sqrt(terms))
        tolerance *= max(1.0, x.shape[0] / 16)  # a step multiplies the gradient of the next; measured 6e-8 T
        error = distance(got, right)
        if error > tolerance:
            # The reference may be the one that is wrong: its sigmoid loses digits far above the threshold.
            exact = exact_gradients(x, upstream, options)[name]
            assert distance(got, exact) <= distance(right, exact), f"{name}: {error:.1e} is more than {tolerance:.1e}"


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return (left.double() - right.double()).abs().max().item() if left.numel() else 0.0


def exact_gradients(x, upstream, options):
    exact = {
        name: value.detach().double().requires_grad_() if isinstance(value, torch.Tensor) else value
        for name, value in options.items()
    }
    return outputs_and_gradients("torch", x.double(), [gradient.double() for gradient in upstream], exact)[3]


def sweep(examples: int) -> None:
    checked = settings(
        max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
    )
    checked(given(runs())(compare))()


@pytest.mark.usefixtures("each_fused_backend")
def test_kernels_equal_the_reference():
    sweep(100)


@pytest.mark.long
@pytest.mark.usefixtures("each_fused_backend")
def test_kernels_equal_the_reference_in_many_cases():
    sweep(2000)
