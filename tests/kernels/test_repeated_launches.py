"""A plan remembers its launches: what differs between two calls that share one is seen at each of them.

CUDA kernels run on the CPU; Triton's do where test_lif_triton.py runs this file in the interpreter.
"""

import contextlib
import functools
import importlib
import os
import sys

import pytest
import torch
from torch import nn

import cuda_host
from seal_fast import bn_lif, lif
from seal_fast.nn import LIFNode

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKEND = "triton" if INTERPRETED else "cupy"
pytestmark = pytest.mark.skipif(not INTERPRETED and bool(cuda_host.missing()), reason=cuda_host.missing())

T, B, C, SIDE = 4, 2, 8, 4


@contextlib.contextmanager
def on_the_cpu(run):
    """The backend takes CPU tensors; CUDA kernels are compiled after a first `run` has said which."""
    if INTERPRETED:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        for name in ("lif", "bn_lif"):
            patch.setattr(sys.modules[f"seal_fast.ops.{name}"], "resolve", lambda backend, *_: backend)
            cuda_host.install(patch, importlib.import_module(f"seal_fast.kernels.{name}.cupy"))
        with cuda_host.planning():
            run()
        yield


def plans(operator: str) -> dict:
    return sys.modules[f"seal_fast.ops.{operator}"]._plans


def normal(*shape, seed, dtype=torch.float32, shift=0):
    """Random numbers that begin so many of them after an aligned address."""
    size = torch.Size(shape).numel()
    memory = torch.empty(size + shift, dtype=dtype)
    values = memory[shift:].view(shape)
    return values.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def upstream_of(out, kind, seed):
    if kind == "expanded":  # the same at each time step
        return normal(*out.shape[1:], seed=seed, dtype=out.dtype).expand(out.shape)
    return normal(*out.shape, seed=seed, dtype=out.dtype, shift=kind == "unaligned")


# Triton's launches tell apart by themselves where tensors begin, and the interpreter takes long.
SHIFTS, UPSTREAMS = ((0, 1), ("whole", "expanded")) if INTERPRETED else ((0, 1, 4), ("whole", "expanded", "unaligned"))
CALLS = [(shift, upstream) for shift in SHIFTS for upstream in UPSTREAMS]


def neuron_calls(backend, dtype):
    """Spikes and gradients of calls that share a plan: tensors aligned and not, and gradients of other strides."""
    found = []
    for seed, (shift, kind) in enumerate([*CALLS, *CALLS[::-1]]):
        x = normal(T, B, C, SIDE, seed=seed, dtype=dtype, shift=shift).requires_grad_()
        v_init = normal(B, C, SIDE, seed=seed + 50, shift=shift).requires_grad_()
        spikes, v_last = lif(x, v_init=v_init, backend=backend)
        ends = (spikes, v_last) if seed % 2 else (spikes,)  # with and without a gradient of v_last
        grads = [upstream_of(spikes, kind, seed + 99), torch.ones_like(v_last)]
        found += [spikes.detach(), v_last.detach(), *torch.autograd.grad(ends, (x, v_init), grads[: len(ends)])]
        with torch.no_grad():
            found.append(lif(x, v_init=v_init, backend=backend)[0])
    return found


def layer_calls(backend, dtype, rows=T * B):
    """The same of a layer with a residual, in training and evaluation, with and without a gradient of m."""
    torch.manual_seed(0)
    bn, residual_bn, node = nn.BatchNorm2d(C), nn.BatchNorm2d(C), LIFNode(decay_input=False, backend=backend)
    found = []
    for seed, (shift, kind) in enumerate([*CALLS, *CALLS[::-1]]):
        shape = (T * B, C, SIDE, SIDE)
        y = normal(*shape, seed=seed, dtype=dtype, shift=shift).requires_grad_()
        residual = normal(rows, *shape[1:], seed=seed + 50, dtype=dtype, shift=4 - shift).requires_grad_(seed % 3 > 0)
        options = {"residual": residual, "residual_bn": residual_bn, "time_steps": T, "return_membrane_input": True}
        bn.train(seed % 4 < 2)
        residual_bn.train(seed % 8 < 4)
        spikes, m = bn_lif(y, bn, node, **options)
        leaves = (y, bn.weight, residual_bn.bias, *([residual] if residual.requires_grad else []))
        ends = (spikes, m) if seed % 3 == 1 else (spikes,)
        grads = [upstream_of(spikes, kind, seed + 99), upstream_of(m, kind, seed + 199)][: len(ends)]
        found += [spikes.detach(), m.detach(), *torch.autograd.grad(ends, leaves, grads)]
        with torch.no_grad():
            found.append(bn_lif(y, bn, node, **options)[0])
    return [*found, bn.running_mean, residual_bn.running_var]


# The largest differences between the backends that were measured: 4e-7 in float32, relative to the largest number.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


CASES = {  # calls, and of how many kinds they are, whatever else differs between them
    "lif": (neuron_calls, 1),
    "bn_lif": (layer_calls, 4),
    "bn_lif, one residual for all time steps": (functools.partial(layer_calls, rows=B), 4),
}


@pytest.mark.parametrize("backend", [BACKEND])
@pytest.mark.parametrize("dtype", [*TOLERANCE][: 1 if INTERPRETED else None], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_calls_that_share_a_plan(case, dtype, backend):
    operator, (calls, kinds) = case.partition(",")[0], CASES[case]
    expected = calls("cpu", dtype)
    with on_the_cpu(lambda: calls(backend, dtype)):
        plans(operator).clear()
        found = calls(backend, dtype)
        assert len(plans(operator)) == kinds
        made = sum(len(plan.launches) for plan in plans(operator).values())
        again = calls(backend, dtype)
        assert sum(len(plan.launches) for plan in plans(operator).values()) == made > kinds  # each is found again
    for i, (left, right, same) in enumerate(zip(found, expected, again, strict=True)):
        assert (left - right).abs().max() <= TOLERANCE[dtype] * right.abs().max(), i
        assert torch.equal(left, same), i


def contiguous(tensor):
    """What a hook that moves saved tensors elsewhere may give back."""
    return tensor.clone(memory_format=torch.contiguous_format)


def hooked_calls(backend):
    """Gradients of inputs whose copies come back contiguous in the backward pass, each after one without hooks."""
    torch.manual_seed(0)
    x = normal(T, B, C, SIDE, SIDE, seed=1).transpose(2, 4).contiguous().transpose(2, 4)
    gaps, y = normal(T, 2 * B, C, SIDE, seed=2)[:, :B], x.flatten(0, 1)
    bn, node, tau = nn.BatchNorm2d(C), LIFNode(decay_input=False, backend=backend), torch.linspace(1.5, 3.0, C)
    found = []
    for leaf, run in (
        (gaps, lambda leaf: lif(leaf, backend=backend)[0]),
        (x, lambda leaf: lif(leaf, tau=tau, backend=backend)[0]),
        (y, lambda leaf: bn_lif(leaf, bn, node, time_steps=T, residual=leaf.detach())),
    ):
        leaf = leaf.detach().requires_grad_()
        for hooks in (contextlib.nullcontext(), torch.autograd.graph.saved_tensors_hooks(contiguous, contiguous)):
            with hooks:
                spikes = run(leaf)
            found += torch.autograd.grad(spikes, leaf, normal(*spikes.shape, seed=3))
    return found


@pytest.mark.parametrize("backend", [BACKEND])
def test_what_was_saved_may_come_back_in_another_layout(backend):
    expected = hooked_calls("torch")
    with on_the_cpu(lambda: hooked_calls(backend)):
        found = hooked_calls(backend)
    for i, (left, right) in enumerate(zip(found, expected, strict=True)):
        assert (left - right).abs().max() <= TOLERANCE[torch.float32] * right.abs().max(), i
