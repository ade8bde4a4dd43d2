"""Spikes that are held as bits behave as the numbers that they stand for."""

import copy
import gc
import io
import pickle
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from seal_fast import SpikeTensor, bn_lif, dense_convolutions, lif, packed_spikes
from seal_fast.kernels.launch import cpu
from seal_fast.nn import LIFNode
from seal_fast.ops import spike_conv

pytestmark = pytest.mark.skipif(cpu.library() is None, reason=cpu.missing())

T, B, C, H = 4, 2, 16, 8
SHAPE = T, B, C, H, H


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch):
    """Let neurons of few elements give bits."""
    monkeypatch.setattr(spike_conv, "LEAST", 8)


def current(layout=torch.channels_last, dtype=torch.float32, shape=SHAPE):
    x = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    if len(shape) != 5:
        return x
    return x.flatten(0, 1).contiguous(memory_format=layout).unflatten(0, shape[:2])


def fired(x=None):
    """Spikes as bits, and the same as numbers."""
    x = current() if x is None else x
    spikes = lif(x)[0]
    assert type(spikes) is SpikeTensor
    assert spikes.packed.numel() == spikes.numel() / 8
    with dense_convolutions():
        numbers = lif(x)[0]
    assert type(numbers) is torch.Tensor
    return spikes, numbers


LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_stand_for_the_numbers_of_a_dense_neuron(layout, dtype):
    spikes, numbers = fired(current(LAYOUTS[layout], dtype))
    assert spikes.dtype == dtype
    assert spikes.stride() == numbers.stride()
    assert torch.equal(spikes, numbers)
    assert 0.05 < spikes.firing_rate() < 0.5
    assert spikes.firing_rate() == pytest.approx(numbers.double().mean().item())


READ = {
    "numpy": lambda s: torch.from_numpy(s.numpy()),
    "np.asarray": lambda s: torch.from_numpy(np.asarray(s)),
    "tolist": lambda s: torch.tensor(s.tolist()),
    "dlpack": torch.from_dlpack,
    "deepcopy": copy.deepcopy,
    "pickle": lambda s: pickle.loads(pickle.dumps(s)),
    "index": lambda s: s[1, :, 3],
    "gather": lambda s: s[torch.tensor([0, 2])],
    "iterate": lambda s: torch.stack([step * 2 for step in s]),
    "data": lambda s: s.data,
    "cpu": lambda s: s.cpu(),
    "double": lambda s: s.double(),
    "half": lambda s: s.half(),
    "bool": lambda s: s.bool(),
    "contiguous": lambda s: s.contiguous(),
    "permute": lambda s: s.permute(1, 0, 3, 4, 2).contiguous(),
    "transpose": lambda s: s.transpose(0, 1).flatten(0, 1) + 1,
    "reshape": lambda s: s.reshape(T * B, -1),
    "flatten": lambda s: s.flatten(0, 1),
    "unsqueeze": lambda s: s.unsqueeze(0).squeeze(),
    "expand": lambda s: s.unsqueeze(0).expand(3, *SHAPE),
    "chunk": lambda s: torch.cat(s.chunk(2)),
    "sum": lambda s: s.sum(),
    "sum in float64": lambda s: s.sum(dtype=torch.float64),
    "mean": lambda s: s.mean(),
    "mean over axes": lambda s: s.mean((0, 3, 4)),
    "count": lambda s: s.count_nonzero(),
    "pooling": lambda s: F.max_pool2d(s.flatten(0, 1), 2),
    "einsum": lambda s: torch.einsum("tbchw,tbdhw->cd", s, s),
    "product with others": lambda s: torch.arange(H) * s - s,
    "zeros_like": torch.zeros_like,
    "foreach": lambda s: torch._foreach_mul([s, s], 3)[1],
    "share_memory_": lambda s: s.share_memory_(),
    "clone": lambda s: s.clone(),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", READ)
def test_whatever_reads_them_gets_numbers(name, inference):
    with torch.inference_mode(inference):
        spikes, numbers = fired()
        got, expected = READ[name](spikes), READ[name](numbers)
        assert got.shape == expected.shape
        assert got.dtype == expected.dtype
        assert got.stride() == expected.stride()
        assert torch.equal(got, expected)


def doubled_through_a_view(s):
    s.flatten(0, 1).mul_(2)


def first_step_cleared(s):
    s[0].zero_()


def written_by_index(s):
    s[:, 0] = 5


WRITE = {
    "mul_": lambda s: s.mul_(2),
    "view": doubled_through_a_view,
    "step": first_step_cleared,
    "index": written_by_index,
    "copy_": lambda s: s.copy_(torch.ones(SHAPE)),
    "out": lambda s: torch.mul(torch.ones(SHAPE), 3, out=s),
    "foreach": lambda s: torch._foreach_add_([s], 1),
    "numpy": lambda s: s.numpy().fill(4) if type(s) is torch.Tensor else s.fill_(4),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", WRITE)
def test_whatever_writes_to_them_is_seen_by_all_views(name, inference):
    with torch.inference_mode(inference):
        spikes, numbers = fired()
        view, convolution = spikes.flatten(0, 1), nn.Conv2d(C, 3, 3)
        copied = spikes.to(torch.float64)
        before = numbers.double()
        WRITE[name](spikes)
        WRITE[name](numbers)
        assert torch.equal(spikes, numbers)
        assert torch.equal(view, numbers.flatten(0, 1))
        assert torch.equal(copied, before)
        assert torch.equal(convolution(view), convolution(numbers.flatten(0, 1)))
        assert not torch.equal(numbers.double(), before)


@pytest.mark.parametrize("change", ["unsqueeze_", "transpose_", "resize_"])
def test_another_shape_in_place_is_refused(change):
    spikes, numbers = fired()
    arguments = {"unsqueeze_": (0,), "transpose_": (0, 1), "resize_": ((3, 3),)}[change]
    with pytest.raises(NotImplementedError, match="in place"):
        getattr(spikes, change)(*arguments)
    assert torch.equal(spikes, numbers)


def test_methods_that_write_at_addresses():
    spikes, numbers = fired()
    with pytest.raises(TypeError, match="cannot be replaced"):
        spikes.data = torch.ones(3)
    spikes.apply_(lambda value: 2 * value)
    assert torch.equal(spikes, 2 * numbers)
    spikes.map_(numbers, lambda left, right: left + right)
    assert torch.equal(spikes, 3 * numbers)


def add_one(x):
    x.add_(1)


def test_operators_of_others_may_write():
    """As those of torch.distributed do, whose schemas do not tell."""
    spikes, numbers = fired()
    library = torch.library.Library("seal_fast_test", "DEF")
    library.define("write(Tensor x) -> ()")
    library.impl("write", add_one, "CPU")
    torch.ops.seal_fast_test.write(spikes)
    assert torch.equal(spikes, numbers + 1)


def test_spikes_from_outside_can_be_used_in_inference_mode():
    spikes, numbers = fired()
    with torch.inference_mode():
        assert torch.equal(spikes.detach().flatten(0, 1), numbers.flatten(0, 1))
        assert torch.equal(spikes[0], numbers[0])
        assert torch.equal(nn.Conv2d(C, 3, 1)(spikes.flatten(0, 1)) * 0, torch.zeros(T * B, 3, H, H))
    assert not spikes[0].is_inference()
    assert torch.equal(spikes.add_(1), numbers + 1)


def test_an_output_that_is_given_is_returned():
    spikes, numbers = fired()
    out = torch.empty(SHAPE)
    assert torch.mul(spikes, 3, out=out) is out
    assert torch.equal(out, 3 * numbers)
    assert spikes.add_(1) is spikes
    assert out.add_(spikes) is out
    assert torch.equal(out, 4 * numbers + 1)


def test_leaves_are_copied_with_their_wish_for_a_gradient():
    spikes, numbers = fired()
    copied = copy.deepcopy(spikes.detach().requires_grad_())
    assert copied.requires_grad
    assert torch.equal(copied, numbers)


def test_fake_tensors_do_not_reach_kernels():
    spikes, _ = fired()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        out = F.conv2d(spikes.flatten(0, 1), torch.ones(3, C, 3, 3))
    assert out.shape == (T * B, 3, H - 2, H - 2)


def test_inductor_is_given_the_numbers_of_a_view():
    spikes, numbers = fired()
    convolution = nn.Conv2d(C, 3, 3)
    torch._dynamo.reset()
    compiled = torch.compile(convolution)
    got, expected = compiled(spikes.flatten(0, 1)), convolution(numbers.flatten(0, 1))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(out.square().sum(), convolution.weight)[0] for out in (got, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-4)


def test_a_change_in_place_after_they_were_saved_is_refused():
    spikes, _ = fired()
    out = nn.Conv2d(C, 3, 3)(spikes.flatten(0, 1))
    spikes.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_looking_at_them_leaves_bits():
    spikes, _ = fired()
    packed = spikes.packed.data_ptr()
    repr(spikes), spikes.sum(), spikes.mean(), spikes.numpy(), spikes.max(), torch.zeros_like(spikes), spikes.bfloat16()
    assert spikes.packed.data_ptr() == packed
    assert spikes.flatten(0, 1).detach().packed.data_ptr() == packed
    assert repr(spikes).startswith("SpikeTensor([[[[[")


def test_saved_files_need_no_class_of_ours(tmp_path):
    spikes, numbers = fired()
    torch.save({"spikes": spikes}, tmp_path / "spikes.pt")
    loaded = torch.load(tmp_path / "spikes.pt", weights_only=True)["spikes"]
    assert type(loaded) is torch.Tensor
    assert torch.equal(loaded, numbers)
    buffer = io.BytesIO()
    module = nn.Module()
    module.register_buffer("spikes", spikes)
    torch.save(module.state_dict(), buffer)


def gradients(use, bits: bool):
    """Of the current and of a convolution's parameters, of what `use` makes of spikes [T·B, C, H, W]."""
    x = current().requires_grad_()
    torch.manual_seed(1)
    convolution = nn.Conv2d(C, C, 3, padding=1)
    with dense_convolutions() if not bits else packed_spikes() if bits == "packed" else torch.enable_grad():
        spikes = lif(x)[0].flatten(0, 1)
        assert (type(spikes) is SpikeTensor) == bool(bits)
        out = use(spikes, convolution)
    out.square().sum().backward()
    return [leaf.grad for leaf in (x, *convolution.parameters())]


USES = {
    "products": lambda s, conv: s * conv.weight.sum() + s,
    "convolution": lambda s, conv: conv(s),
    "twice": lambda s, conv: conv(s) + conv(conv(s) + s),
    "checkpoint": lambda s, conv: checkpoint(conv, s, use_reentrant=False),
    "reentrant checkpoint": lambda s, conv: checkpoint(conv, s, use_reentrant=True),
    "index": lambda s, conv: conv(s)[1:] * s[:-1],
    "hook": lambda s, conv: [s.register_hook(lambda grad: 2 * grad), conv(s)][1],
    "cast": lambda s, conv: conv(s.double().float()),
}


@pytest.mark.parametrize("bits", [True, "packed"])
@pytest.mark.parametrize("use", USES)
def test_gradients_pass(use, bits):
    for got, expected in zip(gradients(USES[use], bits), gradients(USES[use], bits=False), strict=True):
        if expected is None:
            assert got is None
            continue
        assert expected.abs().sum() > 0
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())  # measured 5e-7


def test_a_graph_keeps_bits_alone():
    x = current().requires_grad_()
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    convolution = nn.Conv2d(C, 3, 3)
    spikes = lif(x)[0].flatten(0, 1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = convolution(spikes)
    (saved,) = (tensor for tensor in kept if tensor.shape == spikes.shape)
    assert saved.packed is not None
    memory = weakref.ref(saved._memory)
    del out, saved, spikes
    kept.clear()
    gc.collect()
    assert memory() is None


COMPILED = {
    "product": lambda s, _: (2 * s).flatten(0, 1).sum(0),
    "convolution": lambda s, conv: conv(s.flatten(0, 1)).relu(),
    "lif": lambda s, _: lif(2 * s)[0],
    "bn_lif": lambda s, _: bn_lif(s.flatten(0, 1) * 2, BN, NEURON, time_steps=T, residual=s.flatten(0, 1)),
}
BN, NEURON = nn.BatchNorm2d(C).eval(), LIFNode()


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_code_takes_them(name):
    spikes, numbers = fired()
    convolution = nn.Conv2d(C, 3, 3)
    torch._dynamo.reset()
    compiled = torch.compile(lambda s: COMPILED[name](s, convolution), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(spikes), COMPILED[name](numbers, convolution), rtol=1e-5, atol=1e-6)
    if name == "convolution":
        compiled(spikes).sum().backward()
        got, convolution.weight.grad = convolution.weight.grad, None
        convolution(numbers.flatten(0, 1)).relu().sum().backward()
        torch.testing.assert_close(got, convolution.weight.grad, rtol=1e-5, atol=1e-5)


def test_traced_networks_have_dense_spikes():
    seen = []
    network = nn.Sequential(nn.Conv2d(3, C, 3), LIFNode(step_mode="s", backend="cpu"))
    network[1].register_forward_hook(lambda module, args, output: seen.append(type(output)))
    with torch.no_grad():
        torch.jit.trace(network, torch.randn(2, 3, 10, 10), check_trace=False)
        network[1].reset()
        torch.fx.experimental.proxy_tensor.make_fx(network)(torch.randn(2, 3, 10, 10))
    assert seen == [torch.Tensor, torch.Tensor]


TRANSFORMS = {
    "vmap": lambda s: torch.func.vmap(lambda step: 2 * step)(s),
    "grad": lambda s: torch.func.grad(lambda step: step.square().sum())(s),
    "jvp": lambda s: torch.func.jvp(lambda step: 2 * step, (s,), (torch.ones(SHAPE),))[0],
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_take_them(name):
    spikes, numbers = fired()
    assert torch.equal(TRANSFORMS[name](spikes), TRANSFORMS[name](numbers))


@pytest.mark.parametrize("shape", [(T, 3, 1, 5, 5), (3, 7), (T, 5)])
def test_rows_that_end_within_a_byte_are_numbers(shape):
    assert type(lif(torch.randn(shape))[0]) is torch.Tensor


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_dtypes_without_a_convolution_kernel_are_numbers(dtype):
    assert type(lif(current(dtype=dtype))[0]) is torch.Tensor
