"""Each operator on each backend, forward and backward, against the CPU: errors as numbers, no verdicts.

python -m gpu.smoke OPERATOR BACKEND
"""

from __future__ import annotations

import os
import sys

import torch
from torch import nn

import seal_fast
from gpu import record

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
OPTIONS = {"decay_input": False}
WEIGHTS = {"alpha": 0.6, "beta": 0.15}


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest entry of `expected`."""
    got, expected = got.detach().cpu().double(), expected.detach().cpu().double()
    return ((got - expected).abs().max() / expected.abs().max().clamp_min(1e-300)).item()


def differing(got: torch.Tensor, expected: torch.Tensor) -> int:
    """How many entries are not equal."""
    return int((got.detach().cpu() != expected.detach().cpu()).sum())


def lif(backend: str) -> None:
    """The neuron: spikes, last potential and spikes as bits are to be equal, the gradient close to the reference's."""
    shapes = ((4, 3, 8, 33, 31), (10, 2, 64, 16, 16), (40, 2, 3, 1001), (1, 7), (4, 5, 128))
    for dtype in (F32, BF16, F16):
        for shape in shapes:
            with record.attempt(stage="smoke", operator="lif", backend=backend, dtype=str(dtype), shape=shape) as entry:
                x, upstream = (torch.randn(shape).to(dtype) for _ in range(2))
                got, expected = (_lif(x, upstream, *place) for place in (("cuda", backend), ("cpu", "torch")))
                entry.update(spikes=differing(got[0], expected[0]), v_last=error(got[1], expected[1]))
                entry.update(bits=differing(got[2], expected[2]), gradient=error(got[3], expected[3]))


def _lif(x, upstream, device, backend):
    leaf = x.to(device).requires_grad_()
    spikes, v_last, bits = seal_fast.lif(leaf, return_packed=True, backend=backend, **OPTIONS)
    return spikes, v_last, bits, torch.autograd.grad(spikes, leaf, upstream.to(device))[0]


def bn_lif(backend: str) -> None:
    """The layer: training and evaluation, each layout, with and without a residual that has a batch norm of its own."""
    sizes = ((4, 8, 64, 16), (4, 3, 24, 7), (10, 2, 128, 8), (33, 1, 8, 4))  # T, B, C, H and W
    for dtype in (F32, BF16):
        for layout in (torch.contiguous_format, torch.channels_last):
            for size in sizes:
                for kind in ("none", "plain", "normalised"):
                    facts = {"dtype": str(dtype), "layout": str(layout), "shape": size, "residual": kind}
                    with record.attempt(stage="smoke", operator="bn_lif", backend=backend, **facts) as entry:
                        _compare_layers(entry, backend, dtype, layout, size, kind)


def _compare_layers(entry, backend, dtype, layout, size, kind):
    T, B, C, H = size
    y, residual, upstream = (torch.randn(T * B, C, H, H).to(dtype, memory_format=layout) for _ in range(3))
    residual = None if kind == "none" else residual
    got = _layer(y, residual, upstream, T, kind, "cuda", backend)
    # In float32, as torch rounds what lies between the batch norm and the neuron to y's dtype, and the kernels do not.
    wide = (None if tensor is None else tensor.float() for tensor in (y, residual, upstream))
    expected = _layer(*wide, T, kind, "cpu", "torch")
    for name in ("spikes", "evaluated"):  # the share of the spikes that differ
        entry[name] = differing(got.pop(name), expected[name]) / y.numel()
    entry.update({name: error(value, expected[name]) for name, value in got.items()})


def _layer(y, residual, upstream, T, kind, device, backend):
    bn, residual_bn = (nn.BatchNorm2d(y.shape[1], device=device) for _ in range(2))
    node = seal_fast.nn.LIFNode(backend=backend, **OPTIONS)
    leaf = y.to(device).requires_grad_()
    leaves = [leaf, bn.weight, bn.bias]
    options = {"time_steps": T}
    if residual is not None:
        options["residual"] = residual.to(device).requires_grad_()
        leaves.append(options["residual"])
    if kind == "normalised":
        options["residual_bn"] = residual_bn
    spikes = seal_fast.bn_lif(leaf, bn, node, **options)
    gradients = torch.autograd.grad(spikes, leaves, upstream.to(device))
    bn.eval(), residual_bn.eval()
    with torch.no_grad():
        evaluated = seal_fast.bn_lif(leaf, bn, node, **options)
    names = ("gradient", "weight", "bias", "residual_gradient")
    found = dict(zip(names, gradients, strict=False))
    running = {"running_mean": bn.running_mean, "running_var": bn.running_var, "tracked": bn.num_batches_tracked}
    return {"spikes": spikes, "evaluated": evaluated, **running, **found}


def seal_loss(backend: str) -> None:
    """The loss, its parts, gradient and weights against float64; T, B and K."""
    shapes = [(4, 128, 10), (4, 128, 100), (4, 65, 1000), (10, 32, 10), (64, 3, 100), (4, 3, 32768)]
    if backend == "cupy":  # which takes more than 64 time steps; beyond 232 it keeps its weights in global memory
        shapes += [(100, 2, 10), (240, 2, 10)]
    for dtype in (F32, BF16):
        for shape in shapes:
            for objective in ("seal", "kd", "tdkd"):
                facts = {"dtype": str(dtype), "shape": shape, "objective": objective}
                with record.attempt(stage="smoke", operator="seal_loss", backend=backend, **facts) as entry:
                    logits, teacher = (3 * torch.randn(*shape[first:]) for first in (0, 1))
                    labels = torch.randint(0, shape[2], shape[1:2])
                    rounded = logits.to(dtype)
                    on_gpu = (tensor.to("cuda") for tensor in (rounded, teacher, labels))
                    got = _loss(*on_gpu, objective, backend)
                    expected = _loss(rounded.double(), teacher.double(), labels, objective, "torch")
                    names = ("loss", "ce", "ela", "sta", "gradient", "weights", "confidence")
                    entry.update(zip(names, map(error, got, expected), strict=True))


def _loss(logits, teacher, labels, objective, backend):
    leaf = logits.requires_grad_()
    parts = seal_fast.seal_loss(leaf, teacher, labels, objective=objective, backend=backend, **WEIGHTS)
    (gradient,) = torch.autograd.grad(parts.loss, leaf)
    return *parts, gradient, *seal_fast.selective_alignment_weights(logits.detach(), backend=backend)


def packing(backend: str) -> None:
    """Spikes kept as bits give a convolution's backward pass the spikes that there were."""
    os.environ["SEAL_FAST_BACKEND"] = backend  # unpacks; this process does nothing else
    for dtype in (F32, BF16):
        with record.attempt(stage="smoke", operator="packing", backend=backend, dtype=str(dtype)) as entry:
            x = torch.randn(4, 2, 24, 9, 9, device="cuda").to(dtype)
            weight = torch.randn(8, 24, 3, 3, device="cuda").to(dtype).requires_grad_()
            gradients = []
            for packed in (False, True):
                with seal_fast.packed_spikes() if packed else torch.enable_grad():
                    spikes, _ = seal_fast.lif(x, backend=backend, **OPTIONS)
                    out = nn.functional.conv2d(spikes.flatten(0, 1), weight)
                gradients.append(torch.autograd.grad(out.square().sum(), weight)[0])
            entry["differing"] = differing(*gradients)


FIRST_ARGUMENTS = {function.__name__: function for function in (lif, bn_lif, seal_loss, packing)}

if __name__ == "__main__":
    torch.manual_seed(0)
    torch.backends.cudnn.deterministic = True  # two convolutions of the same spikes are to be equal
    FIRST_ARGUMENTS[sys.argv[1]](sys.argv[2])
