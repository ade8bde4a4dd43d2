"""Runs of so many steps that memory is short: native code says so, and the process goes on."""

import subprocess
import sys

import pytest

from seal_fast.kernels.launch import cpu

pytestmark = [
    pytest.mark.skipif(cpu.library() is None, reason=cpu.missing()),
    pytest.mark.skipif(sys.platform != "linux", reason="a process's memory is limited through Linux's /proc"),
]

# `limited(megabytes)`: the process gets so much more memory than it has.
PROGRAM = """
import resource, torch, seal_fast
from torch import nn

def limited(megabytes):
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (megabytes << 20), resource.RLIM_INFINITY))

def refused(call, *words):
    try:
        call()
    except MemoryError as error:
        assert all(word in str(error) for word in words), error
    else:
        raise AssertionError("there was enough memory")

torch.set_num_threads(2)
torch.manual_seed(0)

def small():
    leaf = torch.randn(4, 3, 5000, requires_grad=True)
    bn = nn.BatchNorm1d(3)
    node = seal_fast.nn.LIFNode()
    seal_fast.lif(leaf, backend="cpu")[0].sum().backward()
    seal_fast.bn_lif(leaf.detach().requires_grad_(), bn, node, time_steps=4).sum().backward()
    z, labels = torch.randn(4, 64, 100, requires_grad=True), torch.arange(64)
    seal_fast.seal_loss(z, torch.randn(64, 100), labels, alpha=0.6, beta=0.15, backend="cpu").loss.backward()
    assert leaf.grad.isfinite().all() and z.grad.any()

small()  # starts the threads
"""

LIF = """
T, N = {T}, {N}
x = (torch.randn(T, N) + 0.5).requires_grad_()
ones = torch.ones(()).expand(T, N)
limited({forward})
spikes, _ = seal_fast.lif(x, backend="cpu")
assert torch.equal(spikes[:50], seal_fast.lif(x[:50], backend="torch")[0])
limited({backward})
refused(lambda: spikes.backward(ones), "seal_lif_backward", str(T))
small()
"""
BN_LIF = """
T, N = {T}, {N}
y = torch.randn(T, N, requires_grad=True)
bn, node = nn.BatchNorm1d(N), seal_fast.nn.LIFNode(backend="cpu")
ones = torch.ones(()).expand(T, N)
limited({forward})
spikes = seal_fast.bn_lif(y, bn, node, time_steps=T)
m = (y - y.mean(0)) * torch.rsqrt(y.var(0, correction=0) + bn.eps)
assert (spikes[:50] == seal_fast.lif(m[:50], backend="torch")[0]).float().mean() > 0.99
del m
limited({backward})
refused(lambda: spikes.backward(ones), "seal_bn_lif_backward", str(T))
small()
"""
LOSS = """
T = 30_000
z = torch.randn(T, 2, 3, requires_grad=True)
limited(1000)
for objective in ("seal", "tdkd"):
    loss = lambda: seal_fast.seal_loss(
        z, torch.randn(2, 3), torch.tensor([0, 1]), alpha=0.6, beta=0.15, objective=objective, backend="cpu"
    )
    refused(loss, "seal_loss", str(T))
small()
"""
# A block of 512 neurons keeps 2 KB of each step; 40 000 steps and two threads come to 320 MB.
CASES = {
    "lif, many steps": LIF.format(T=1_500_000, N=1, forward=200, backward=1000),
    "lif, two threads": LIF.format(T=40_000, N=520, forward=150, backward=200),
    "bn_lif, many steps": BN_LIF.format(T=1_500_000, N=1, forward=200, backward=1000),
    "bn_lif, two threads": BN_LIF.format(T=40_000, N=520, forward=500, backward=200),
    "seal_loss": LOSS,
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_too_little_memory_is_an_error_and_not_the_end(case):
    result = subprocess.run([sys.executable, "-c", PROGRAM + case], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
