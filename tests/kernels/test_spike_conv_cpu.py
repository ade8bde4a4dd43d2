"""Convolutions that skip what did not fire, by native code, against dense ones in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from seal_fast.kernels.launch import cpu as native
from seal_fast.kernels.packing import cpu as native_packing
from seal_fast.kernels.packing import reference as packing
from seal_fast.kernels.spike_conv import cpu, reference

pytestmark = pytest.mark.skipif(native.library() is None, reason=native.missing())

LAYOUTS = [torch.channels_last, torch.contiguous_format]
# Of the largest element. Measured: 9.3e-7 and 7.7e-7 in float32; bfloat16 rounds the result to 8 bits: 3.8e-3 at most.
FORWARD = {torch.float32: 2e-6, torch.bfloat16: 4e-3}
WEIGHT_GRADIENT = {torch.float32: 1e-5, torch.bfloat16: 4e-3}


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def fire(*size, rate, layout=torch.channels_last):
    """Spikes [P, C, H, W], and their bits in the order of memory."""
    spikes = torch.rand(*size, generator=torch.Generator().manual_seed(1)) < rate
    spikes = spikes.float().contiguous(memory_format=layout)
    return spikes, packing.pack(spikes.unsqueeze(0))[0]


def words_of(spikes, packed, layout=torch.channels_last):
    return cpu.words(packed, tuple(spikes.shape), channels_last=layout is torch.channels_last)


# Of the largest sum of magnitudes, for the few shapes whose every sum cancels: float32 rounds to 6e-8 of what it adds.
CANCELLED = 2e-7


def assert_near(got, expected, magnitudes, tolerance):
    assert got.shape == expected.shape
    allowed = max(tolerance * expected.abs().max(), CANCELLED * magnitudes.max())
    assert (got.double() - expected).abs().max() <= allowed


def check(
    size, outputs, kernel, stride=(1, 1), padding=(0, 0), dilation=(1, 1), rate=0.2, dtype=torch.float32, weights=None
):
    """Both kernels against the reference in float64."""
    spikes, packed = fire(*size, rate=rate)
    words = words_of(spikes, packed)
    weight = random(outputs, size[1], *kernel, dtype=dtype).contiguous(memory_format=weights or torch.channels_last)
    bias = random(outputs, dtype=dtype, seed=2)
    geometry = stride, padding, dilation
    out = cpu.forward(words, size, weight, bias, *geometry)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    planes = cpu.forward(words, size, weight, bias, *geometry, channels_last=False)
    assert planes.is_contiguous()
    assert torch.equal(planes, out)
    expected, magnitudes = (
        reference.forward(spikes.double(), weights_of(weight.double()), weights_of(bias.double()), *geometry)
        for weights_of in (torch.clone, torch.abs)
    )
    assert_near(out, expected, magnitudes, FORWARD[dtype])
    grad_out = random(*out.shape, dtype=dtype, seed=3)
    grad = cpu.weight_gradient(words, size, grad_out, torch.full_like(weight, torch.nan), *geometry)
    expected, magnitudes = (
        reference.weight_gradient(spikes.double(), grads_of(grad_out.double()), weight.double(), *geometry)
        for grads_of in (torch.clone, torch.abs)
    )
    assert_near(grad, expected, magnitudes, WEIGHT_GRADIENT[dtype])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("C", [1, 7, 8, 63, 64, 65, 128, 200])
@pytest.mark.parametrize("pixels", [(1, 1), (3, 5), (8, 8), (9, 15)])
def test_words_hold_the_bits_of_either_layout(pixels, C, layout):
    spikes, packed = fire(3, C, *pixels, rate=0.4, layout=layout)
    words = words_of(spikes, packed, layout)
    bits = (words.unsqueeze(-1) >> torch.arange(64)) & 1
    assert words.shape == (3, pixels[0] * pixels[1], -(-C // 64))
    expected = F.pad(spikes.flatten(2).transpose(1, 2), (0, -C % 64))
    assert torch.equal(bits.flatten(2), expected.long())


def test_words_of_64_channels_are_the_bits_themselves():
    spikes, packed = fire(2, 128, 4, 4, rate=0.3)
    assert words_of(spikes, packed).data_ptr() == packed.data_ptr()


@pytest.mark.parametrize("dtype", FORWARD, ids=str)
@pytest.mark.parametrize("outputs", [1, 7, 32, 64, 65, 130])
@pytest.mark.parametrize("C", [1, 3, 17, 64, 65, 128, 200])
def test_every_remainder_of_channels(C, outputs, dtype):
    check((3, C, 6, 5), outputs, (3, 3), padding=(1, 1), dtype=dtype)


@pytest.mark.parametrize("dtype", FORWARD, ids=str)
@pytest.mark.parametrize("weights", LAYOUTS, ids=str)
@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (2, 1), (3, 4)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (2, 1), (3, 3)])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (1, 3), (5, 2)])
def test_every_geometry(kernel, stride, padding, weights, dtype):
    check((2, 70, 9, 7), 40, kernel, stride, padding, dtype=dtype, weights=weights)


@pytest.mark.parametrize("rate", [0.0, 0.005, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("size", [(5, 64, 20, 20), (64, 128, 1, 1), (1, 192, 33, 2)])
def test_every_firing_rate(size, rate):
    kernel, padding = ((1, 1), (0, 0)) if size[2] == 1 else ((3, 3), (1, 1))
    check(size, 64, kernel, padding=padding, rate=rate)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_convolution(data):
    draw = data.draw
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    kernel, stride, dilation = draw(st.tuples(st.integers(1, 4), st.integers(1, 4))), draw(pair), draw(pair)
    padding = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    reach = [apart * (k - 1) + 1 for apart, k in zip(dilation, kernel, strict=True)]
    height, width = (
        draw(st.integers(max(1, needed - 2 * pad), 14)) for needed, pad in zip(reach, padding, strict=True)
    )
    size = draw(st.integers(1, 4)), draw(st.integers(1, 150)), height, width
    rate = draw(st.sampled_from([0.0, 0.01, 0.15, 0.4, 1.0]))
    check(size, draw(st.integers(1, 140)), kernel, stride, padding, dilation, rate)


@pytest.mark.parametrize("size", [(40, 64, 16, 16), (64, 256, 4, 4), (3, 40, 50, 20)])
def test_any_number_of_threads_gives_the_same_bits(size):
    spikes, packed = fire(*size, rate=0.2)
    words = words_of(spikes, packed)
    weight = random(96, size[1], 3, 3)
    geometry = (1, 1), (1, 1), (1, 1)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            out = cpu.forward(words, size, weight, None, *geometry)
            grad = cpu.weight_gradient(words, size, random(*out.shape, seed=3), torch.empty_like(weight), *geometry)
            results.append((out, grad))
    finally:
        torch.set_num_threads(threads)
    for out, grad in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(grad, results[0][1])


def test_gradients_of_any_strides_are_written_where_they_belong():
    size, geometry = (4, 65, 6, 6), ((1, 1), (1, 1), (1, 1))
    spikes, packed = fire(*size, rate=0.3)
    grad_out = random(4, 33, 6, 6, seed=3)  # contiguous
    into = torch.full((3, 65, 3, 33), 7.0).permute(3, 1, 0, 2)
    got = cpu.weight_gradient(words_of(spikes, packed), size, grad_out, into, *geometry)
    assert got is into
    expected = reference.weight_gradient(spikes.double(), grad_out.double(), into.double(), *geometry)
    assert_near(got, expected, expected.abs(), WEIGHT_GRADIENT[torch.float32])


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 4096, 200_003])
def test_set_bits_are_counted(length):
    packed = torch.randint(0, 256, (length,), dtype=torch.uint8, generator=torch.Generator().manual_seed(length))
    assert (
        native_packing.count(packed) == packing.count(packed) == sum(bin(byte).count("1") for byte in packed.tolist())
    )


def test_a_dtype_without_code_is_refused():
    spikes, packed = fire(1, 8, 4, 4, rate=0.5)
    with pytest.raises(RuntimeError, match="no code for this dtype"):
        cpu.forward(
            words_of(spikes, packed),
            (1, 8, 4, 4),
            random(4, 8, 1, 1, dtype=torch.float64),
            None,
            (1, 1),
            (0, 0),
            (1, 1),
        )
