"""Operators work where their tensors are, whatever torch's default device is."""

import contextlib

import pytest
import torch
from torch import nn

from seal_fast import bn_lif, lif, packed_spikes, seal_loss, selective_alignment_weights
from seal_fast.backends import available
from seal_fast.nn import LIFNode

BACKENDS = [name for name in ("cpu", "torch") if name in available("lif")]
OPTIONS = {
    "numbers": {},
    "soft reset": {"v_reset": None, "decay_input": False, "surrogate": "atan"},
    "tensors": {"tau": torch.tensor([2.0, 3.0, 1.5]), "v_threshold": torch.tensor(0.9)},
}


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def alike(call):
    """What `call` returns where tensors are made on the meta device is on the CPU, and equals what it returns else."""
    results = []
    for place in (contextlib.nullcontext(), torch.device("meta")):
        with place:
            results.append(call())
    assert len(results[0]) == len(results[1])
    for expected, got in zip(*results, strict=True):
        assert got.device.type == "cpu"
        assert torch.equal(got, expected)


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_lif(options, dtype, backend):
    x, v_init = normal(4, 2, 3, 30, dtype=dtype), normal(2, 3, 30)
    upstream, upstream_v = normal(4, 2, 3, 30, dtype=dtype), normal(2, 3, 30)
    learned = {name: value for name, value in options.items() if isinstance(value, torch.Tensor)}

    def call():
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, v_init, *learned.values())]
        given = options | dict(zip(learned, leaves[2:], strict=True))
        spikes, v_last, packed = lif(leaves[0], v_init=leaves[1], return_packed=True, backend=backend, **given)
        outputs = (spikes, v_last)
        grads = torch.autograd.grad(outputs, leaves, (upstream, upstream_v.to(v_last.dtype)))
        return *outputs, packed, *grads

    alike(call)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [None, "as it is", "normalised"])
def test_bn_lif(residual, training, backend):
    node = LIFNode(backend=backend)
    y, added = normal(8, 3, 5, 5), normal(8, 3, 5, 5)
    bn, second = (nn.BatchNorm2d(3).train(training) for _ in range(2))
    state = {name: value.clone() for name, value in bn.state_dict().items()}
    options = {} if residual is None else {"residual": added}
    if residual == "normalised":
        options["residual_bn"] = second

    def call():
        for module in (bn, second):
            module.load_state_dict(state)
        leaf = y.clone().requires_grad_()
        spikes = bn_lif(leaf, bn, node, time_steps=4, **options)
        parameters = (leaf, bn.weight, bn.bias)
        return spikes, *torch.autograd.grad(spikes, parameters, y), bn.running_mean.clone(), bn.running_var.clone()

    alike(call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("objective", ["seal", "kd", "tdkd"])
def test_seal_loss(objective, dtype, backend):
    logits, teacher, labels = normal(3, 5, 7, dtype=dtype), normal(5, 7), torch.tensor([0, 1, -100, 3, 6])

    def call():
        leaf = logits.clone().requires_grad_()
        parts = seal_loss(leaf, teacher, labels, alpha=0.6, beta=0.15, objective=objective, backend=backend)
        return *parts, *torch.autograd.grad(parts.loss, leaf)

    alike(call)


def test_selective_alignment_weights(backend):
    logits = normal(3, 5, 7)
    alike(lambda: tuple(selective_alignment_weights(logits, backend=backend)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_spikes(dtype, backend):
    x, weight = normal(4, 2, 3, 30, dtype=dtype), normal(30, 10, dtype=dtype)

    def call():
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight)]
        with packed_spikes():
            spikes, _ = lif(leaves[0], backend=backend)
            product = spikes @ leaves[1]
        return product, *torch.autograd.grad(product.sum(), leaves)

    alike(call)
