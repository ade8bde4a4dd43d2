"""What the main kernels ask of a GPU, counted in their machine code, without a GPU.

    python benchmarks/static.py --capability 90

prints a line for each: registers of a thread, bytes that it spills, shared memory of a block, resident warps and bytes
in flight for each multiprocessor, how often a thread waits for memory in a pass of its main loop, how many loads of how
many bytes it has there, and instructions for each element. sass.py has the model behind it.

A memory-bound kernel of which fewer than IN_FLIGHT bytes are in flight cannot reach the bandwidth of an H200.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple
from unittest import mock

import torch

import sass
import without_gpu
from seal_fast.kernels.bn_lif import cupy as bn_lif_cuda
from seal_fast.kernels.bn_lif.norms import Norm
from seal_fast.kernels.lif import cupy as lif_cuda
from seal_fast.kernels.neuron.options import Options
from seal_fast.kernels.seal_loss import cupy as loss_cuda
from seal_fast.kernels.surrogate.reference import Surrogate

IN_FLIGHT = 22 << 10  # bytes for each multiprocessor
PUBLISHED = Options(2.0, False, 1.0, 0.0, Surrogate(), False)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COLUMNS = (
    *("backend", "kernel", "dtype", "layout", "T", "registers", "spilled", "shared", "warps", "in flight"),
    *("waits", "loads", "instructions"),
)


class Row(NamedTuple):
    """A kernel as it was compiled for one case."""

    backend: str
    kernel: str
    dtype: str
    layout: str
    T: str
    count: sass.Count
    streams: int  # tensors that it reads

    @property
    def memory_bound(self) -> bool:
        """Whether the least time of the kernel is that of its memory accesses."""
        return not self.kernel.startswith("loss")

    def cells(self) -> list[str]:
        """As in COLUMNS."""
        count = self.count
        loads = " + ".join(f"{times} x {size} B" for size, times in sorted(Counter(count.loads).items(), reverse=True))
        elements = sum(count.loads) / self.streams / DTYPES[self.dtype].itemsize
        return [
            *(self.backend, self.kernel, self.dtype, self.layout, self.T),
            *map(str, (count.registers, count.spilled_bytes, count.shared_bytes, count.warps)),
            f"{count.bytes_in_flight / 1024:.0f} KiB",
            *(str(count.trips), loads),
            f"{count.instructions / elements:.0f}" if self.memory_bound else "",
        ]


class Case(NamedTuple):
    """A call of an operator's room, and which of the kernels it starts are counted: (name, streams) by backend."""

    call: Callable  # of the room
    labels: tuple[str, ...]
    kernels: dict[str, dict[str, tuple[int, ...]]]  # backend -> function -> its streams, as in sass.count
    dtype: str
    layout: str
    T: str
    room: str


def cases() -> Iterator[Case]:
    """All that are in the table."""
    for dtype in DTYPES:
        yield Case(
            lambda room, dtype=dtype: _lif(room, 4, DTYPES[dtype]),
            ("LIF forward", "LIF backward"),
            {
                "triton": {"_forward": (0,), "_backward": (0, 1)},
                "cupy": {"lif_forward": (0,), "lif_backward": (0, 2)},
            },
            *(dtype, "any", "4", "lif"),
        )
    for dtype, layout in itertools.product(DTYPES, ("contiguous", "channels_last")):
        yield Case(
            lambda room, dtype=dtype, layout=layout: _batch_norm(room, _activations(4, DTYPES[dtype], layout)),
            ("batch norm statistics", "batch norm gradient"),
            {
                "triton": {"_statistics": (0,), "_normalised_gradient": (0, 1)},
                "cupy": {"moments": (0,), "normalised_gradient": (0, 1)},
            },
            *(dtype, layout, "any", "bn_lif"),
        )
        for T, residual in itertools.product((4, 10), (False, True)):
            if residual and (dtype, layout) != ("bfloat16", "channels_last"):
                continue
            suffix = " + residual" * residual
            yield Case(
                lambda room, dtype=dtype, layout=layout, T=T, residual=residual: _bn_lif(
                    room, _activations(T, DTYPES[dtype], layout), T, residual
                ),
                (f"batch norm{suffix} + LIF forward", f"batch norm{suffix} + LIF backward"),
                {
                    "triton": {"_forward": (0, 1), "_backward": (0, 1, 3)}
                    if residual
                    else {"_forward": (0,), "_backward": (0, 2)},
                    "cupy": {"bn_lif_forward": (0, 1), "bn_lif_backward": (0, 2, 3)}
                    if residual
                    else {"bn_lif_forward": (0,), "bn_lif_backward": (0, 2)},
                },
                *(dtype, layout, str(T), "bn_lif"),
            )
    for B, K in ((128, 100), (512, 1000)):
        yield Case(
            lambda room, B=B, K=K: _loss(room, 4, B, K),
            (f"loss of [4, {B}, {K}]",),
            {"triton": {"_seal_loss": (0, 1)}, "cupy": {"seal_loss": (0, 1)}},
            *("float32", "", "4", "seal_loss"),
        )


def rows(backend: str, capability: int) -> Iterator[Row]:
    """The table of one backend and architecture."""
    compiled = without_gpu.triton_kernels if backend == "triton" else without_gpu.cuda_kernels
    with _as_on(capability):
        for case in cases():
            call = functools.partial(case.call, _room(backend, case.room))
            found = {kernel.name: kernel for kernel in compiled(capability, call)}
            for label, (name, streams) in zip(case.labels, case.kernels[backend].items(), strict=True):
                kernel = found[name]
                count = sass.count(kernel.cubin, capability, kernel.threads, kernel.dynamic_shared, streams)
                yield Row(backend, label, case.dtype, case.layout, case.T, count, len(streams))


def line(cells: Iterable[str]) -> str:
    """Of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def compiler(backend: str) -> str:
    """What makes machine code of a backend's kernels, and its version."""
    if backend == "triton":
        import triton

        return f"Triton {triton.__version__}"
    from cupy.cuda import nvrtc

    return f"NVRTC {'.'.join(map(str, nvrtc.getVersion()))}"


def _room(backend: str, name: str):
    if backend == "cupy":
        return {"lif": lif_cuda, "bn_lif": bn_lif_cuda, "seal_loss": loss_cuda}[name]
    from seal_fast.kernels.bn_lif import triton as bn_lif_triton
    from seal_fast.kernels.lif import triton as lif_triton
    from seal_fast.kernels.seal_loss import triton as loss_triton

    return {"lif": lif_triton, "bn_lif": bn_lif_triton, "seal_loss": loss_triton}[name]


@contextlib.contextmanager
def _as_on(capability: int) -> Iterator[None]:
    """What CuPy's launchers ask a GPU for."""

    def counters(_device, number):
        return torch.zeros(number, dtype=torch.int32)

    with (
        mock.patch.object(loss_cuda, "shared_memory", return_value=without_gpu.SHARED_MEMORY[capability]),
        mock.patch.object(loss_cuda, "counters", counters),
        mock.patch.object(bn_lif_cuda, "counters", counters),
    ):
        yield


def _lif(room, T: int, dtype: torch.dtype) -> None:
    x = torch.empty(T, 1 << 16, dtype=dtype)
    room.forward(x, None, PUBLISHED, keep_v=False, pack=False)
    room.backward(x, None, x, None, PUBLISHED, parameters=False)


def _activations(T: int, dtype: torch.dtype, layout: str) -> torch.Tensor:
    y = torch.empty(2 * T, 64, 16, 16, dtype=dtype)
    return y.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else y


def _batch_norm(room, y: torch.Tensor) -> None:
    C = y.shape[1]
    norm = Norm(*torch.zeros(4, C), torch.zeros((), dtype=torch.int64), 0.1, 1e-5, y.numel() // C, 1)
    room.fill_table(torch.zeros(4, C), 0, y, norm)
    room.normalised_gradient(y, y, torch.zeros(3, C), in_place=True)


def _bn_lif(room, y: torch.Tensor, T: int, residual: bool) -> None:
    C = y.shape[1]
    added = y if residual else None
    options = {"time_steps": T, "static": False}
    table = torch.zeros(4, C)
    room.forward(y, added, table[:2], PUBLISHED, **options, keep_m=False, pack=False)
    options |= {"counts": (y.numel() // C,), "steps": True, "total": False, "parameters": False}
    room.backward(y, None, y, added, table, PUBLISHED, **options)


def _loss(room, T: int, B: int, K: int) -> None:
    tensors = torch.zeros(T, B, K), torch.zeros(B, K), torch.zeros(B, dtype=torch.int64)
    room.forward(*tensors, alpha=0.6, beta=0.15, temperature=3.0, objective="seal", gradient=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, choices=(80, 90, 100), help="90 for sm_90; all by default")
    parser.add_argument("--backend", choices=("triton", "cupy"), help="both by default")
    chosen = parser.parse_args(arguments)
    for capability in (80, 90, 100) if chosen.capability is None else (chosen.capability,):
        backends = [
            backend
            for backend in ("triton", "cupy")
            if chosen.backend in (None, backend) and capability in without_gpu.known(backend)
        ]
        print(f"\nsm_{capability}: {', '.join(map(compiler, backends))}\n")
        print(line(COLUMNS), line(["---"] * len(COLUMNS)), sep="\n")
        for backend in backends:
            for row in rows(backend, capability):
                print(line(row.cells()), flush=True)


if __name__ == "__main__":
    main()
