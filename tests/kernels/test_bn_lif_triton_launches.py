"""How few launches the Triton kernels of bn_lif take, and what their last programs make of the results of all.

On the GPU, or in Triton's interpreter where TRITON_INTERPRET=1.
"""

import os
import random

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    # The interpreter needs TRITON_INTERPRET=1 before the first import, so another process runs these tests.
    pytest.skip("torch finds no GPU; test_bn_lif_triton.py runs this file in the interpreter", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime import interpreter

import bn_lif_kernels as expected
from bn_lif_kernels import CASES, LAYOUTS, PUBLISHED
from seal_fast.kernels.bn_lif import triton as kernel
from seal_fast.kernels.bn_lif import triton_merge, triton_statistics, triton_tiles
from seal_fast.kernels.bn_lif.norms import Norm
from seal_fast.kernels.launch.triton import Launch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]


def norm_of(y, *, count=0, affine=True, seed=31):
    """A norm of y's channels, whose statistics are fixed where `count` is 0."""
    weight, bias, running_mean, running_var = expected.per_channel(y.shape[1], 4, y.dtype, seed, DEVICE)
    running_var = running_var.abs()
    running_var[0] = 0
    tracked = torch.zeros((), dtype=torch.int64, device=DEVICE) if count else None
    own = (weight, bias) if affine else (None, None)
    return Norm(*own, running_mean.clone(), running_var, tracked, 0.1, 1e-3, count, 1)


def noted(monkeypatch, name):
    """What a function gives to the launchers."""
    results = []
    for room in (kernel, triton_statistics):
        function = getattr(room, name, None)
        if function is not None:

            def call(*arguments, function=function, **options):
                result = function(*arguments, **options)
                results.append(result)
                return result

            monkeypatch.setattr(room, name, call)
    return results


def started(monkeypatch):
    """The names of the kernels that are launched from here on."""
    names, call = [], Launch.__call__

    def noted(self, *tensors):
        names.append(self.kernel.fn.__name__)
        call(self, *tensors)

    monkeypatch.setattr(Launch, "__call__", noted)
    return names


@pytest.fixture
def many_splits(monkeypatch):
    """Short runs of the smallest tiles."""
    monkeypatch.setattr(triton_merge, "MOST_ROWS", 2)
    monkeypatch.setattr(triton_tiles, "MOST_TURNS", 1)
    monkeypatch.setattr(triton_statistics, "AT_ONCE", 1)


SHAPES = {"contiguous": (61, 2, 3, 7), "channels_last": (5, 66, 7, 1)}  # of 2 groups of channels


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["residual", "normalised residual"])
@pytest.mark.usefixtures("many_splits")
def test_a_layer_launches_few_kernels_and_leaves_its_counters_zero(kind, layout, monkeypatch):
    """One for the statistics of each norm and one for the layer; then one, and one for each norm."""
    T, C, shape = 2, SHAPES[layout][1], SHAPES[layout]
    y, residual, scales, _ = expected.tensors_of(shape, T, kind, torch.float32, layout, DEVICE)
    normalised = (y, residual)[: len(scales) // 2]
    norms = [norm_of(x, count=x.numel() // C, seed=i) for i, x in enumerate(normalised)]
    table = torch.empty(2 * len(scales), C, device=DEVICE)
    names, counters, merges = started(monkeypatch), *(noted(monkeypatch, name) for name in ("counters", "merging"))

    def forward(scales, norms=()):
        options = {"time_steps": T, "static": False, "keep_m": False, "pack": False}
        return kernel.forward(y, residual, scales, PUBLISHED, **options, norms=norms)

    for i, (x, norm) in enumerate(zip(normalised, norms, strict=True)):
        kernel.fill_table(table, i, x, norm)
    forward(table[: len(scales)])
    assert names == ["_statistics"] * len(norms) + ["_forward"]
    names.clear()
    options = {"time_steps": T, "static": False, "steps": True, "total": False, "parameters": False}
    out = kernel.backward(y, None, y, residual, table, PUBLISHED, counts=tuple(norm.count for norm in norms), **options)
    for x, coefficients in zip(normalised, out.coefficients.split(3), strict=True):
        kernel.normalised_gradient(out.grad_steps, x, coefficients, in_place=False)
    assert names == ["_backward"] + ["_normalised_gradient"] * len(norms)
    names.clear()
    forward(None, tuple(norm._replace(count=0, num_batches_tracked=None) for norm in norms))
    assert names == ["_forward"]
    kernel.statistics(y)
    assert names == ["_forward", "_statistics"]
    assert len(merges) == len(counters) == len(norms) + 2
    for merge, counter in zip(merges, counters, strict=True):
        assert merge.counters >= 3 * 2  # two runs and one of them, in each group of channels
        assert len(counter) >= merge.counters
        assert counter.count_nonzero() == 0


@pytest.mark.skipif(not INTERPRETED, reason="the order of programs is the GPU's own")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("many_splits")
def test_programs_that_finish_in_any_order_give_the_same(layout, monkeypatch):
    T, shape, C = 2, SHAPES[layout], SHAPES[layout][1]
    y, residual, scales, _ = expected.tensors_of(shape, T, "normalised residual", torch.float32, layout, DEVICE)
    builder = interpreter.interpreter_builder
    set_program, order = builder.set_grid_idx, random.Random(0)
    orders = {}

    def results():
        table, norm = torch.empty(8, C), norm_of(y, count=y.numel() // C)
        for i, x in enumerate((y, residual)):
            kernel.fill_table(table, i, x, norm)
        options = {"counts": (9, 8), "time_steps": T, "static": False, "steps": True, "total": True}
        given = y, None, y, residual, expected.table_of(scales, y.dtype), PUBLISHED
        out = kernel.backward(*given, **options, parameters=False)
        return [table, norm.running_mean, norm.running_var, norm.num_batches_tracked, *out[:2], *out[4:]]

    def shuffled(x, y, z):
        programs = builder.grid_dim[0]
        if programs not in orders:
            orders[programs] = order.sample(range(programs), programs)
        set_program(orders[programs][x], y, z)

    first = results()
    assert first[3] == 2
    monkeypatch.setattr(builder, "set_grid_idx", shuffled)
    for _ in range(2):
        orders.clear()
        assert all(torch.equal(*pair) for pair in zip(results(), first, strict=True))
        assert any(each != sorted(each) for each in orders.values())


@triton.jit
def _merge_given(
    given,  # [splits, 3, C]
    out,  # [3, C]
    partials,
    counters,
    C,
    blocks,
    COLS: tl.constexpr,
    NORMALISED: tl.constexpr,
    RUN: tl.constexpr,
):
    c = tl.program_id(0) % blocks * COLS + tl.arange(0, COLS)[None, :]
    row = given + tl.program_id(0) // blocks * (3 * C) + c
    of_m, of_y = tl.load(row, c < C, other=0.0), tl.load(row + C, c < C, other=0.0)
    of_residual = tl.load(row + 2 * C, c < C, other=0.0)
    last, of_m, of_y, of_residual = triton_merge.merge_sums(
        of_m, of_y, of_residual, partials, counters, blocks, NORMALISED, COLS, RUN
    )
    if last:
        tl.store(out + c, of_m, c < C)
        tl.store(out + C + c, of_y, c < C)
        tl.store(out + 2 * C + c, of_residual, c < C)


@pytest.mark.parametrize("normalised", [False, True], ids=["a norm", "two norms"])
@pytest.mark.parametrize("splits", [1, 2, 4, 5, 16, 17, 70])
@pytest.mark.parametrize("state", [torch.float32, torch.float64], ids=str)
def test_partial_sums_are_added(splits, state, normalised, monkeypatch):
    """Of runs of 4, of channels that fill no program; within the room and the counters that there are."""
    C, COLS, RUN = 11, 8, 4
    monkeypatch.setattr(triton_merge, "MOST_ROWS", RUN)
    tiles = triton_tiles.Tiling(2 * splits, splits, 1, (C, 1, splits, 1, 2), {"LAST": True, "COLS": COLS})
    merge = triton_merge.merging(tiles, "sums", state)
    assert merge.run == RUN
    given = expected.normal((splits, 3, C), state, splits, "contiguous", DEVICE)
    out = torch.full((3, C), torch.nan, dtype=state, device=DEVICE)
    used = (2 + normalised) * merge.numbers
    partials = torch.full((used + 100,), torch.nan, dtype=state, device=DEVICE)
    counters = torch.full((merge.counters + 3,), 1000, dtype=torch.int32, device=DEVICE)
    counters[: merge.counters] = 0
    for _ in range(2):  # the second launch counts as the first one did
        _merge_given[(2 * splits,)](given, out, partials, counters, C, 2, COLS, normalised, RUN)
        assert counters.tolist() == [0] * merge.counters + [1000] * 3
    assert partials[:used].isfinite().all()
    assert partials[used:].isnan().all()
    unit = {torch.float32: 1e-6, torch.float64: 1e-15}[state]  # of the sum of magnitudes; measured 1.6e-7 and 1.5e-16
    apart = (out.double() - given.double().sum(0)).abs()[: 2 + normalised]
    assert (apart <= unit * given.double().abs().sum(0)[: 2 + normalised]).all()


# The interpreter runs the programs one after the other, of which contiguous tensors of many channels have most.
EVALUATED = [case for case in CASES if not INTERPRETED or case[0][1] < 48 or case[2] == "channels_last"]


@pytest.mark.parametrize("index", range(len(EVALUATED)), ids=lambda i: "-".join(map(str, EVALUATED[i])))
def test_evaluation_in_one_launch_equals_that_with_a_table(index):
    """All that it gives, bit for bit."""
    shape, kind, layout = EVALUATED[index]
    T, dtype = 2, DTYPES[(index + index // 12) % 4]
    y, residual, scales, static = expected.tensors_of(shape, T, kind, dtype, layout, DEVICE)
    norms = tuple(norm_of(y, affine=(index + i) % 3 > 0, seed=i) for i in range(len(scales) // 2))
    norms = (norms[0], *(norm._replace(eps=1e-5) for norm in norms[1:]))
    table = torch.full((2 * len(scales), shape[1]), torch.nan, dtype=scales.dtype, device=DEVICE)
    for i, norm in enumerate(norms):
        kernel.fill_table(table, i, y, norm)
    options = {"time_steps": T, "static": static, "keep_m": True, "pack": True}
    given = kernel.forward(y, residual, table[: len(scales)], PUBLISHED, **options)
    made = kernel.forward(y, residual, None, PUBLISHED, **options, norms=norms)
    assert given[1].isfinite().all()
    assert given[0].count_nonzero() > 0 or y.numel() < 20
    assert all(torch.equal(*pair) for pair in zip(made, given, strict=True))
