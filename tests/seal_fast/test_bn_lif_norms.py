"""Batch norms that kernels cannot take as they are: torch's own module says what `bn_lif` does with them, or raises."""

import pytest
import torch
from torch import nn

from seal_fast import bn_lif
from seal_fast.backends import available
from seal_fast.nn import LIFNode

if "cpu" not in available("bn_lif"):
    # Installing without a compiler is allowed: the torch reference serves, and is compared with nothing here.
    pytest.skip("the native library was not built: no compiler was found", allow_module_level=True)

T, B, C = 2, 3, 4


def batch_norm(**changes):
    """A batch norm of which some attributes are others."""
    bn = nn.BatchNorm1d(C)
    for name, value in changes.items():
        setattr(bn, name, value)
    return bn


def rows():
    """[T·B, C, 5], always the same."""
    return torch.randn(T * B, C, 5, generator=torch.Generator().manual_seed(0))


def membrane_input(bn):
    return bn_lif(rows(), bn, LIFNode(backend="cpu"), time_steps=T, return_membrane_input=True)[1]


ODD = {
    "no running statistics, but tracked": lambda: {"running_mean": None, "running_var": None},
    "no count": lambda: {"num_batches_tracked": None},
    "no count, and a mean of all": lambda: {"num_batches_tracked": None, "momentum": None},
    "count in float32": lambda: {"num_batches_tracked": torch.full((2,), 3.0)[0]},  # as wide as an int64
    "every second number": lambda: {"running_mean": torch.zeros(2 * C)[::2], "running_var": torch.ones(2 * C)[::2]},
}


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("changes", ODD.values(), ids=ODD)
def test_odd_norms_do_as_torch(changes, trains):
    results = []
    for module in (False, True):
        bn = batch_norm(**changes()).train(trains)
        m = bn(rows()) if module else membrane_input(bn)
        results.append((m, bn.running_mean, bn.running_var, bn.num_batches_tracked))
    for got, expected in zip(*results, strict=True):
        if expected is None:
            assert got is None
        else:
            torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)  # measured 4e-7


REFUSED = {
    "weight": lambda: {"weight": nn.Parameter(torch.ones(2 * C))},
    "bias": lambda: {"bias": nn.Parameter(torch.zeros(C - 1))},
    "running_mean": lambda: {"running_mean": torch.zeros(C - 1)},
    "running_var": lambda: {"running_var": torch.ones(2 * C)},
    "bias elsewhere": lambda: {"bias": nn.Parameter(torch.zeros(C, device="meta"))},
    "running_var elsewhere": lambda: {"running_var": torch.ones(C, device="meta")},
}


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("changes", REFUSED.values(), ids=REFUSED)
def test_norms_of_other_sizes_or_devices_are_refused(changes, trains):
    with pytest.raises((RuntimeError, ValueError), match=r"size|bn must be on the device of y, cpu; got meta"):
        membrane_input(batch_norm(**changes()).train(trains))


@pytest.mark.parametrize("trains", [True, False])
def test_a_norm_of_tensor_subclasses_goes_through_torch(trains):
    class Seen(torch.Tensor):
        calls = 0

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            cls.calls += getattr(function, "__name__", "") == "lerp_" or function in (torch.rsqrt, torch.addcmul)
            return super().__torch_function__(function, types, args, kwargs or {})

    bn = batch_norm(running_mean=torch.zeros(C).as_subclass(Seen)).train(trains)
    membrane_input(bn)
    assert Seen.calls > 0


def test_gradients_of_weight_and_bias_change_apart():
    bn = nn.BatchNorm1d(C)
    loss = membrane_input(bn).square().sum()
    of_weight, of_bias = torch.autograd.grad(loss, (bn.weight, bn.bias))
    kept, version = of_bias.clone(), of_bias._version
    of_weight.detach_().add_(torch.ones(C, requires_grad=True))
    assert torch.equal(of_bias, kept)
    assert of_bias._version == version
