"""How much a layer starts: two kernels each way in training, one in evaluation, and no operation of torch."""

import contextlib
import importlib
import sys

import pytest
import torch
from torch import nn

import cuda_host
import launches
from seal_fast import bn_lif
from seal_fast.kernels.launch import cpu
from seal_fast.nn import LIFNode

T, C = 4, 8
# Triton's kernels are counted where they are compiled: test_bn_lif_triton_compile.py.
# On the CPU one call of native code does what two launches do on a GPU.
NATIVE = {
    "forward": ["seal_bn_lif_forward"],
    "backward": ["seal_bn_lif_backward"],
    "evaluation": ["seal_bn_lif_forward"],
}
EXPECTED = {
    "cpu": NATIVE,
    "cupy": {
        "forward": ["moments", "bn_lif_forward"],
        "backward": ["bn_lif_backward", "normalised_gradient"],
        "evaluation": ["bn_lif_forward"],
    },
}
# Of a norm of the residual's own: its statistics, and the gradient that passes it.
MORE = {"forward": 1, "backward": 1, "evaluation": 0}


@contextlib.contextmanager
def running(backend, run):
    """`backend` takes CPU tensors; CUDA kernels are compiled for the CPU after a first `run` has said which."""
    if backend != "cupy":
        yield
        return
    operator = sys.modules["seal_fast.ops.bn_lif"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operator, "resolve", lambda name, *_: name)
        cuda_host.install(patch, importlib.import_module("seal_fast.kernels.bn_lif.cupy"))
        with cuda_host.planning():
            run()
        yield


BACKENDS = [
    pytest.param("cpu", marks=pytest.mark.skipif(bool(cpu.missing()), reason=cpu.missing())),
    pytest.param("cupy", marks=pytest.mark.skipif(bool(cuda_host.missing()), reason=cuda_host.missing())),
]


@pytest.mark.parametrize("residual", ["none", "spikes", "normalised"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_starts_so_many_kernels_and_no_operation_of_torch(backend, residual):
    torch.manual_seed(0)
    y, upstream = torch.randn(2 * T, C, 3, 3, requires_grad=True), torch.randn(2 * T, C, 3, 3)
    bn, residual_bn, node = nn.BatchNorm2d(C), nn.BatchNorm2d(C), LIFNode(decay_input=False, backend=backend)
    added, options = torch.randn(y.shape, requires_grad=True), {"time_steps": T}
    if residual != "none":
        options["residual"] = added
    if residual == "normalised":
        options["residual_bn"] = residual_bn
    leaves = [y, bn.weight, bn.bias, *([] if residual == "none" else [added])]
    made = []

    def forward():
        made.append(bn_lif(y, bn, node, **options))

    def backward():
        torch.autograd.grad(made.pop(), leaves, upstream)

    def evaluation():
        with torch.no_grad():
            bn_lif(y, bn.eval(), node, **options)

    def everything():
        for norm in (bn, residual_bn):
            norm.train()
        forward(), backward()
        for norm in (bn, residual_bn):
            norm.eval()
        evaluation()

    with running(backend, everything):
        everything()
        for norm in (bn, residual_bn):
            norm.train()
        for name, run in {"forward": forward, "backward": backward, "evaluation": evaluation}.items():
            if name == "evaluation":
                residual_bn.eval()
            counts = launches.counted(run)
            expected = EXPECTED[backend][name]
            more = MORE[name] if residual == "normalised" and backend != "cpu" else 0
            assert len(counts.kernels) == len(expected) + more, counts.kernels
            assert set(counts.kernels) == set(expected)
            assert counts.operations == []
    assert bn.num_batches_tracked == 2
