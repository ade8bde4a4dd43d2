"""Spikes that wait for the backward pass as bits."""

import contextlib
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from seal_fast import lif, models, packed_spikes
from seal_fast.nn import LIFNode, reset_net
from seal_fast.ops import _packed

pytestmark = pytest.mark.usefixtures("each_backend")


class Mixed(nn.Module):
    """A user's network: spikes go into a convolution, a pooling, a product, a linear layer, and are seen as views."""

    def __init__(self):
        super().__init__()
        self.stem, self.convolution = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.first, self.second = LIFNode(), LIFNode()
        self.scale = nn.Parameter(torch.ones(6, 1, 1))
        self.readout = nn.Linear(6 * 9, 3)

    def forward(self, x):  # [T, B, 2, 6, 6]
        spikes = self.first(self.stem(x.flatten(0, 1)).unflatten(0, x.shape[:2]) * 3)
        inner = self.convolution(spikes.flatten(0, 1)) + spikes.flatten(0, 1) * self.scale
        spikes = self.second(inner.unflatten(0, x.shape[:2]))
        pooled = F.max_pool2d(spikes.flatten(0, 1), 2)
        return self.readout(pooled.flatten(1)) + spikes.transpose(0, 1).mean((2, 3, 4)).sum(1).repeat(len(x)).unsqueeze(
            1
        )


def gradients_of(network, x, packed: bool):
    network.zero_grad()
    reset_net(network)
    x = x.clone().requires_grad_()
    with packed_spikes() if packed else contextlib.nullcontext():
        out = network(x)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7))
    (out * upstream.to(out.dtype)).sum().backward()
    return [x.grad, *(parameter.grad for parameter in network.parameters())]


def assert_same(network, x):
    plain, packed = (gradients_of(network, x, mode) for mode in (False, True))
    for got, expected in zip(packed, plain, strict=True):
        assert torch.equal(got, expected)
    assert sum(expected.abs().sum() > 0 for expected in plain) > len(plain) // 2


def test_a_users_network_has_the_same_gradient_to_the_bit():
    torch.manual_seed(0)
    assert_same(Mixed(), torch.randn(4, 3, 2, 6, 6))
    assert_same(Mixed().double(), torch.randn(4, 3, 2, 6, 6, dtype=torch.float64))


@pytest.mark.parametrize(
    ("arch", "images"),
    [("resnet8", (2, 3, 16, 16)), ("resnet8", (2, 2, 3, 16, 16)), ("preact_resnet34", (2, 3, 32, 32))],
)
def test_students_have_the_same_gradients_to_the_bit(arch, images):
    torch.manual_seed(0)
    network = models.student(arch, num_classes=3, time_steps=2).to(memory_format=torch.channels_last)
    assert_same(network, torch.randn(images))


def test_bfloat16_autocast_has_the_same_gradients_to_the_bit():
    torch.manual_seed(0)
    network = models.student("resnet8", num_classes=3, time_steps=2)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(network, torch.randn(2, 3, 16, 16))


def test_an_eighth_of_a_byte_is_kept_for_each_spike_whoever_saves_it():
    shape = 4, 2, 8, 16, 16
    convolution, readout = nn.Conv2d(8, 8, 3), nn.Linear(16, 1)
    with packed_spikes():
        spikes, _ = lif(torch.randn(shape))
        storage = StorageWeakRef(spikes.untyped_storage())
        out = convolution(spikes.flatten(0, 1)).sum() + readout(spikes).sum()
        del spikes
    assert storage.expired()  # nobody keeps the numbers
    out.backward()


def test_bits_are_shared_by_all_who_save():
    with packed_spikes() as context:
        spikes, _ = lif(torch.randn(4, 2, 8, 16, 16, requires_grad=True))
        kept = [context._pack(view) for view in (spikes, spikes.flatten(0, 1), spikes[1:, :, 2])]
    assert {handle.packed.data_ptr() for handle in kept} == {kept[0].packed.data_ptr()}
    assert kept[0].packed.numel() == spikes.numel() // 8


def test_spikes_that_were_changed_in_place_are_kept_as_they_are():
    x, weight = torch.randn(4, 3, 8, requires_grad=True), torch.randn(2, 8, requires_grad=True)
    gradients = []
    for packed in (False, True):
        with packed_spikes() if packed else torch.enable_grad():
            spikes, _ = lif(3 * x.detach())
            spikes.mul_(0.5)
            out = F.linear(spikes, weight)
        gradients.append(torch.autograd.grad(out.sum(), weight)[0])
    assert torch.equal(*gradients)
    assert gradients[0].abs().sum() > 0


def test_memory_of_spikes_that_were_freed_does_not_pass_for_them():
    """Other tensors come to lie where spikes were; none is taken for them."""
    weight = torch.randn(5, 64, requires_grad=True)
    with packed_spikes():
        for seed in range(50):  # the spikes of each pass lie where those of the one before did
            lif(torch.randn(4, 16, 64))
            other = torch.rand(4, 16, 64, generator=torch.Generator().manual_seed(seed))
            out = F.linear(other, weight)
            (grad,) = torch.autograd.grad(out.sum(), weight)
            torch.testing.assert_close(grad, other.flatten(0, 1).sum(0).expand(5, -1), rtol=1e-5, atol=0)


def test_contexts_nest_and_end():
    x = 3 * torch.randn(4, 3, 8, requires_grad=True)
    weight = torch.randn(2, 8, requires_grad=True)
    with packed_spikes():
        with packed_spikes():
            inner = F.linear(lif(x)[0], weight)
        outer = F.linear(lif(x)[0], weight)
    after = F.linear(lif(x)[0], weight)
    grads = [torch.autograd.grad(out.square().sum(), weight)[0] for out in (inner, outer, after)]
    assert torch.equal(grads[0], grads[2])
    assert torch.equal(grads[1], grads[2])


def test_a_context_within_itself_ends_with_the_outermost():
    context = packed_spikes()
    x = torch.randn(4, 2, 16, requires_grad=True)
    with context:
        spikes, _ = lif(x)
        with context:
            pass
        assert isinstance(context._pack(spikes), _packed._Saved)
    lif(x)
    assert not context._bits


def test_what_no_backward_pass_used_is_freed_with_its_graph():
    """An output that its own node saves, as sigmoid's, does not keep both alive."""
    weight = torch.randn(9, 9, requires_grad=True)
    gc.disable()
    try:
        with packed_spikes():
            out = torch.sigmoid(weight)
        storage = StorageWeakRef(out.untyped_storage())
        del out
        assert storage.expired()
    finally:
        gc.enable()


@pytest.mark.parametrize("changed", ["an output that its own node saved", "a parameter"])
def test_a_change_between_forward_and_backward_is_noticed_as_without_packing(changed):
    x, weight = torch.randn(8, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    for packed in (False, True):
        with packed_spikes() if packed else contextlib.nullcontext():
            inner = torch.tanh(x)
            loss = F.linear(inner * 2, weight).sum()
        with torch.no_grad():
            (weight if changed == "a parameter" else inner).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_data_of_parameters_may_move_as_without_packing():
    """Libraries that shard parameters give them other memory between forward and backward."""
    found = []
    for packed in (False, True):
        x, weight = torch.ones(8, 4, requires_grad=True), nn.Parameter(torch.ones(4))
        with packed_spikes() if packed else contextlib.nullcontext():
            loss = (x * weight).sum()
        former = StorageWeakRef(weight.untyped_storage())
        weight.data = torch.full((4,), 3.0)
        assert former.expired()
        loss.backward()
        found.append(x.grad)
    assert torch.equal(*found)


def test_second_derivatives_pass_what_was_kept():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    found = []
    for packed in (False, True):
        with packed_spikes() if packed else contextlib.nullcontext():
            out = torch.sigmoid(x * x).prod(-1).sum()
        (first,) = torch.autograd.grad(out, x, create_graph=True)
        found.append((first, *torch.autograd.grad(first.sin().sum(), x)))
    for got, right in zip(*found, strict=True):
        assert torch.equal(got, right)
    assert found[0][1].abs().sum() > 0


def test_nothing_is_packed_without_gradients():
    with torch.no_grad(), packed_spikes() as context:
        lif(torch.randn(4, 3, 8))
        assert not context._bits
