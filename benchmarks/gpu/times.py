"""How long each operator's kernels take on large tensors, beside a copy of as many bytes.

    python -m gpu.times OPERATOR BACKEND                as the library is
    python -m gpu.times OPERATOR BACKEND candidates     with other values of tuned constants

`forward_TB_s` and the like are the bytes that the kernels of the call read and write, over the time that it takes, and
`forward_wall_ms` is what a call takes that begins on an idle GPU. The profiler then tells the kernels of a call apart.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from unittest import mock

import torch
from torch import nn

import seal_fast
from gpu import clock, record
from gpu.machine import copy_bandwidth
from seal_fast.ops._dispatch import Plans

F32, BF16 = torch.float32, torch.bfloat16
LAYOUTS = (torch.channels_last, torch.contiguous_format)
OPTIONS = {"decay_input": False}
SECONDS = 0.1  # for each figure
# [T, B, C, H, W], several times the 50 or 60 MB of a Hopper GPU's L2 cache in 16 bits, too.
SHAPE = (4, 2 if record.rehearsing() else 256, 64, 32, 32)
# What ResNet-18 for CIFAR has at a batch of 128 beside the first: SHAPE of its stages, for tuning.
STAGES = [(4, SHAPE[1] // 2, 64 << i, 32 >> i, 32 >> i) for i in range(4)]
BLOCKS_OF = ("moments", "backward", "backward, 16 bits", "backward, contiguous", "gradient")
# operator -> backend -> other values of constants of kernels/: several at once, or one
CANDIDATES: dict[str, dict[str, list[dict[str, object]]]] = {
    "lif": {
        "triton": [{"lif.triton.THREADS": 256}, {"lif.triton.NEIGHBOURS": 8}],
        "cupy": [{"lif.cupy.HISTORY": 64}],
    },
    "bn_lif": {
        "triton": [
            *({"bn_lif.triton_statistics.PROGRAMS": {"statistics": n, "gradient": 2 * n}} for n in (2, 3, 5, 6, 8)),
            *({"bn_lif.triton_statistics.STAGES": {"wide": n, "narrow": n}} for n in (2, 3)),
            *({"bn_lif.triton_statistics.ACCESSES": n} for n in (1, 2)),
            *({"bn_lif.triton.PROGRAMS": dict.fromkeys(("few", "many"), n)} for n in (2, 3, 4, 6, 12)),
            {"bn_lif.triton.THREADS": 64, "bn_lif.triton.PROGRAMS": dict.fromkeys(("few", "many"), 4)},
            {"bn_lif.triton.STAGES": 4},
        ],
        "cupy": [
            {"bn_lif.cupy.NEIGHBOURS_16_BIT": 8},
            *({"bn_lif.cupy.BLOCKS": dict.fromkeys(BLOCKS_OF, n)} for n in (2, 3, 4, 5, 6, 8, 16)),
        ],
    },
}


def lif(backend: str, dtype: torch.dtype, **facts) -> None:
    """Reads x and writes spikes forward; reads x and the spikes' gradient, and writes that of x, backward."""
    with record.attempt(stage="times", operator="lif", backend=backend, dtype=str(dtype), **facts) as entry:
        x, upstream = (torch.randn(SHAPE, device="cuda").to(dtype) for _ in range(2))
        run = functools.partial(seal_fast.lif, return_v_last=False, backend=backend, **OPTIONS)
        spikes, _ = run(x.requires_grad_())
        with torch.no_grad():
            _note(entry, "forward", lambda: run(x), 2 * x.nbytes)
        _note(entry, "backward", lambda: torch.autograd.grad(spikes, x, upstream, retain_graph=True), 3 * x.nbytes)


def bn_lif(backend: str, dtype: torch.dtype, **facts) -> None:
    """Each layout, without and with a residual; to tune, each stage of a network instead of the residual."""
    cases = [(layout, residual, SHAPE) for layout in LAYOUTS for residual in (False, True)]
    if "candidate" in facts:
        cases = [*((layout, False, SHAPE) for layout in LAYOUTS), *((LAYOUTS[0], False, shape) for shape in STAGES)]
    for layout, residual, shape in cases:
        known = {"dtype": str(dtype), "layout": str(layout), "residual": residual, "shape": shape, **facts}
        with record.attempt(stage="times", operator="bn_lif", backend=backend, **known) as entry:
            _layer(entry, backend, dtype, layout, residual, shape)


def _layer(entry: dict, backend: str, dtype: torch.dtype, layout, has_residual: bool, shape: tuple[int, ...]) -> None:
    """Forward reads y twice; backward, too, and it writes and reads the gradient of the membrane input in between."""
    T, B, *image = shape
    y, residual, upstream = (
        torch.randn(T * B, *image, device="cuda").to(dtype, memory_format=layout).requires_grad_() for _ in range(3)
    )
    bn, node = nn.BatchNorm2d(image[0], device="cuda"), seal_fast.nn.LIFNode(backend=backend, **OPTIONS)
    options = {"time_steps": T, "residual": residual if has_residual else None}
    run = functools.partial(seal_fast.bn_lif, y, bn, node, **options)
    spikes, leaves = run(), (y, bn.weight, bn.bias, *([residual] if has_residual else []))
    backward = functools.partial(torch.autograd.grad, spikes, leaves, upstream.detach(), retain_graph=True)
    with torch.no_grad():
        _note(entry, "forward", run, (3 + has_residual) * y.nbytes)
    _note(entry, "backward", backward, (6 + has_residual) * y.nbytes)
    bn.eval()
    with torch.no_grad():
        _note(entry, "evaluation", run, (2 + has_residual) * y.nbytes)


def seal_loss(backend: str, dtype: torch.dtype, **facts) -> None:
    """Loss and gradient; the formulation in torch's operations beside it."""
    for shape in ((4, 128, 100), (4, 512, 1000), (10, 32, 10)):
        known = {"dtype": str(dtype), "shape": shape, **facts}
        with record.attempt(stage="times", operator="seal_loss", backend=backend, **known) as entry:
            logits = torch.randn(shape, device="cuda").to(dtype).requires_grad_()
            teacher, labels = torch.randn(shape[1:], device="cuda"), torch.randint(shape[2], shape[1:2], device="cuda")

            def run(name, leaf=logits, teacher=teacher, labels=labels):
                loss = seal_fast.seal_loss(leaf, teacher, labels, alpha=0.6, beta=0.15, backend=name).loss
                return torch.autograd.grad(loss, leaf)

            _note(entry, "both", lambda run=run: run(backend), 2 * logits.nbytes)
            _note(entry, "reference", lambda run=run: run("torch"), 2 * logits.nbytes)


def packing(backend: str, dtype: torch.dtype, **facts) -> None:
    """Spikes from their bits."""
    kernel = importlib.import_module(f"seal_fast.kernels.packing.{backend}")
    with record.attempt(stage="times", operator="packing", backend=backend, dtype=str(dtype), **facts) as entry:
        neurons = torch.Size(SHAPE[1:]).numel()
        packed = torch.randint(256, (SHAPE[0], neurons // 8), device="cuda").to(torch.uint8)
        unpack = functools.partial(kernel.unpack, packed, neurons, dtype)
        _note(entry, "unpack", unpack, packed.nbytes + unpack().nbytes)


def _note(entry: dict, name: str, run, moved: int) -> None:
    if entry.get("profiled"):
        if record.rehearsing():
            run()
            return
        entry[f"{name}_kernels"] = clock.kernels(run)
        return
    found = clock.operator(run, SECONDS)
    entry.update({f"{name}_{key}": value for key, value in found.items() if key != "rounds"})
    entry[f"{name}_TB_s"] = moved / found["ms"] / 1e9
    entry[f"{name}_wall_ms"] = clock.step(run, SECONDS)["ms"]


FIRST_ARGUMENTS = {function.__name__: function for function in (lif, bn_lif, seal_loss, packing)}


def main(operator: str, backend: str) -> None:
    """Time as the library is, then profile."""
    with record.attempt(stage="times", operator="copy", backend=backend) as entry:
        entry["copy_TB_s"] = copy_bandwidth()
    for dtype in (F32, BF16):
        FIRST_ARGUMENTS[operator](backend, dtype)
    for dtype in (F32, BF16):
        FIRST_ARGUMENTS[operator](backend, dtype, profiled=True)


def candidates(operator: str, backend: str) -> None:
    """Profile in 16 bits as the library is, and then with each candidate in place of tuned constants."""
    for settings in ({}, *CANDIDATES[operator][backend]):
        with contextlib.ExitStack() as patches:
            for name, value in settings.items():
                place, _, constant = name.rpartition(".")
                module = importlib.import_module(f"seal_fast.kernels.{place}")
                patches.enter_context(mock.patch.object(module, constant, value))
            for name in ("lif", "bn_lif"):  # plans keep launches, which are made with the candidate's values
                module = importlib.import_module(f"seal_fast.ops.{name}")
                patches.enter_context(mock.patch.object(module, "_plans", Plans()))
            shown = ", ".join(f"{name} = {value}" for name, value in settings.items()) or "as it is"
            FIRST_ARGUMENTS[operator](backend, BF16, candidate=shown, profiled=True)


if __name__ == "__main__":
    with record.alone():
        (candidates if sys.argv[3:] == ["candidates"] else main)(*sys.argv[1:3])
