"""The CUDA kernels of batch norm, residual and LIF, run by their CuPy launcher on the CPU, against torch."""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

import cuda_host
from bn_lif_kernels import (
    LAYOUTS,
    PUBLISHED,
    SHAPES,
    compare_backward,
    compare_forward,
    compare_normalised_gradient,
    compare_statistics,
    compare_table,
    normal,
    per_channel,
    table_of,
)
from cuda_host_bn_lif import (
    BF16,
    EVEN,
    F16,
    F32,
    F64,
    FIRST,
    LAST,
    LONG,
    NEURONS,
    PAIRS,
    SETUPS,
    Setup,
    from_fixed_statistics,
    installed,
)
from cuda_host_lif import guarded, poisoned
from seal_fast.kernels.bn_lif import cupy as room
from seal_fast.kernels.launch import cupy as launcher
from seal_fast.kernels.surrogate.reference import SURROGATES

pytestmark = pytest.mark.skipif(bool(cuda_host.missing()), reason=cuda_host.missing())

STATISTICS = [(shape, layout, dtype) for shape in (*SHAPES, LONG) for layout in LAYOUTS for dtype in (F32, BF16)]
STATISTICS += [(EVEN, layout, dtype) for layout in LAYOUTS for dtype in (F16, F64)]
STATISTICS += [((4, 200, 3, 3), LAST, BF16)]  # a block has more channels than threads


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """All that are needed here, compiled at once."""

    def launch_all():
        for setup in SETUPS.values():
            setup.launch()
        for shape, layout, dtype in STATISTICS:
            y = normal(shape, dtype, 1, layout)
            room.statistics(y)
            for other in (y, None):
                room.normalised_gradient(y, other, per_channel(shape[1], 3, dtype, 1), in_place=True)

    with installed(launch_all):
        yield


@pytest.mark.parametrize("name", SETUPS)
def test_forward_and_backward_equal_torch(name):
    SETUPS[name].check()


def test_setups_reach_every_surrogate_reset_and_charge():
    options = [*NEURONS.values(), PUBLISHED]
    assert {each.surrogate.name for each in options} == set(SURROGATES)
    # "leak_multiply" differs from "leak_divide" in the product that "filter_multiply" has
    assert {each.charge_kind for each in options} == {"decay", "leak_divide", "filter_divide", "filter_multiply"}
    assert {(each.v_reset is None, each.detach_reset) for each in options} == {(a, b) for a in (0, 1) for b in (0, 1)}


@pytest.mark.parametrize(("shape", "layout", "dtype"), STATISTICS)
def test_mean_and_variance(shape, layout, dtype):
    for y in (guarded(normal(shape, dtype, 1, layout)), guarded(normal(shape, dtype, 2, layout)[1:])):
        with poisoned():
            if y.numel():
                compare_statistics(room, y)


@pytest.mark.parametrize(("shape", "layout", "dtype"), STATISTICS)
def test_table_and_running_statistics(shape, layout, dtype):
    y = guarded(normal(shape, dtype, 1, layout))
    for options in ({}, {"affine": False}, {"batch": False}, {"affine": False, "batch": False}):
        with poisoned():
            compare_table(room, y, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [EVEN, LONG])
def test_a_large_mean_costs_the_variance_nothing(shape, layout):
    y = 1000 + normal(shape, F32, 1, layout)
    compare_statistics(room, y)
    y.select(1, 0)[0] += 1e4  # the number from which others are taken lies far away
    compare_statistics(room, y)


@pytest.mark.parametrize(("shape", "layout", "dtype"), STATISTICS)
def test_normalised_gradient(shape, layout, dtype):
    for seed, y in enumerate((normal(shape, dtype, 2, layout), None, normal(shape, dtype, 3))):
        with poisoned():
            compare_normalised_gradient(room, guarded(normal(shape, dtype, seed, layout)), y)


def test_same_inputs_give_the_same_bits():
    y = normal(LONG, F32, 1, LAST)
    assert all(torch.equal(*pair) for pair in zip(room.statistics(y), room.statistics(y), strict=True))


def test_layouts_are_read_in_place_or_copied():
    """Rows that lie apart, residuals and gradients in another layout than y."""
    setup = Setup(EVEN)
    y, residual, scales, _ = setup.given()
    far = guarded(y.repeat_interleave(2, 0))[::2]
    compare_forward(room, far, residual.contiguous(), scales, PUBLISHED, 4)
    compare_backward(room, y, residual.contiguous(), scales, PUBLISHED, 4)


def test_only_what_is_asked_for():
    y, residual, scales, _ = SETUPS["many, channels last"].given()
    table = table_of(scales, F32)
    call = {"counts": (37, 41), "time_steps": 4, "static": False, "parameters": False}
    grad = guarded(normal(y.shape, F32, 3, LAST))
    results = []
    for steps, total in ((True, True), (True, False), (False, True)):
        with poisoned():
            asked = {"steps": steps, "total": total}
            results.append(room.backward(grad, grad, y, residual, table, PUBLISHED, **call, **asked))
        assert [each is not None for each in results[-1]] == [steps, total, False, False, True, True, True]
    (all_steps, total, *_), (steps_alone, *_), (_, total_alone, *_) = results
    assert torch.equal(steps_alone, all_steps)
    assert torch.equal(total_alone, total)
    for by_channel in zip(*(each[4:] for each in results), strict=True):
        assert all(torch.equal(each, by_channel[0]) for each in by_channel)


def test_no_numbers_need_no_kernel(monkeypatch):
    monkeypatch.setattr(launcher, "start", None)
    y = torch.zeros(2, 5, 0, 3)
    assert all(each.shape == (5,) and each.isnan().all() for each in room.statistics(y))
    assert room.normalised_gradient(y, y, torch.ones(3, 5), in_place=False).shape == y.shape


VARYING, STATIC = replace(SETUPS["many, contiguous"]), replace(SETUPS["T=33, static"], shape=(2, 2, 20, 20))


def statistics():
    for shape, layout in ((LONG, FIRST), (LONG, LAST), (PAIRS, LAST)):
        with contextlib.suppress(AssertionError) if cuda_host._planned is not None else contextlib.nullcontext():
            compare_statistics(room, guarded(normal(shape, F32, 1, layout)))
    for batch in (True, False):
        with contextlib.suppress(AssertionError) if cuda_host._planned is not None else contextlib.nullcontext():
            compare_table(room, guarded(normal(PAIRS, F32, 1, FIRST)), batch=batch)


def fixed():
    got, expected = from_fixed_statistics(Setup(EVEN), affine=True)
    assert cuda_host._planned is not None or all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


BREAKS = {
    "nothing": (VARYING, "", ""),
    "rows of a static y N apart": (STATIC, "input = {y, residual, y_stride", "input = {y, residual, N"),
    "rows of a static m N apart": (STATIC, "currents + (first + t) * currents_stride", "currents + (t + 1) * N"),
    "its gradient at each step": (STATIC, "GRAD_M && (m_stride || t == 0)", "GRAD_M"),
    "another chunk's checkpoint": (STATIC, "checkpoints + (chunk - 1) * N", "checkpoints + chunk * N"),
    "products without the mean": (VARYING, "load(step.y.at[i]) - mean.row[0].at[i % SETS]", "load(step.y.at[i])"),
    "the other mean": (VARYING, "mean.row[LAST - 1]", "mean.row[0]"),
    "no scale of the residual": (VARYING, "other * scales.row[LAST - 1].at[i % SETS]", "other"),
    "the last position left out": (
        VARYING,
        "walk.inside && walk.position < positions; walk.next()",
        "walk.inside && walk.position + 1 < positions; walk.next()",
    ),
    "no barrier between threads": (VARYING, "    __syncthreads();\n", ""),
    "rows of threads left out": (statistics, "row + half < left", "row + half + 1 < left"),
    "stretches that do not end": (statistics, "n += to_next;", ""),
    "all slices in the place of the first": (statistics, "(place.slice * SIZE + i)", "i"),
    "the last slice left out": (statistics, "min(most, static_cast<int>(slices) - team * most)", "1"),
    "the channels of the first tile": (VARYING, "first = tile * columns * SETS;", "first = 0;"),
    "counters that are not set back": (VARYING, "if (last) *counter = 0;", ""),
    "one counter for all tiles": (VARYING, "counters + place.tile * (teams + 1)", "counters"),
    "every block merges": (statistics, "atomicAdd(counter, 1) == blocks - 1", "atomicAdd(counter, 1) >= 0"),
    "numbers ahead that are not there": (statistics, "if (i / EACH < there) squares =", "squares ="),
    "the first norm's scale": (statistics, "column[2 * index * channels]", "column[0]"),
    "the first norm's mean": (statistics, "(2 * norms + index)", "(2 * norms)"),
    "a biased running variance": (statistics, "variance * correction", "variance"),
    "a batch for each channel": (statistics, "if (channel == 0) ++*batches", "++*batches"),
    "a batch without statistics": (statistics, "if (channel == 0) ++*batches", ""),
    "eps left out": (statistics, "variance + eps", "variance"),
    "the other formula of lerp": (statistics, "to - way * (1 - weight)", "to - way * weight"),
    "fixed statistics that are not": (statistics, "rows.old_mean, rows.old_variance", "Real(0), Real(1)"),
    "another norm's count": (VARYING, "i ? residual_count : count", "count"),
    "another norm's deviation": (VARYING, "norms[(3 * NORMS + i)", "norms[(3 * NORMS)"),
    "another norm's fixed statistics": (fixed, "norms[row / 2].of", "norms[0].of"),
    "the first channel's fixed statistics": (fixed, ".of(channel + set)", ".of(channel)"),
    "means that do not move": (statistics, "at[1] += distance * weight;\n    at[2]", "at[2]"),
}


@pytest.fixture(scope="module")
def broken():
    """The kernels that each break needs, compiled two at a time."""
    texts = {line: launcher.source(room.SOURCE) for line in BREAKS}
    assert all(BREAKS[line][1] in text for line, text in texts.items())
    kernels = {line: cuda_host.Kernels(text.replace(*BREAKS[line][1:])) for line, text in texts.items()}
    started = {}
    for check in (VARYING, STATIC, statistics, fixed):
        with pytest.MonkeyPatch.context() as patch, cuda_host.planning():
            patch.setattr(cuda_host, "kernels", lambda path: next(iter(kernels.values())))
            check() if callable(check) else check.launch()
            started[check] = {expression for _, expression in cuda_host._planned}
            cuda_host._planned.clear()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda line: kernels[line].compile(started[BREAKS[line][0]]), kernels))
    return kernels


@pytest.mark.parametrize("line", BREAKS)
def test_a_broken_line_is_noticed(line, broken, monkeypatch):
    check = BREAKS[line][0]
    monkeypatch.setattr(cuda_host, "kernels", lambda path: broken[line])
    with contextlib.nullcontext() if line == "nothing" else pytest.raises(AssertionError):
        check() if callable(check) else check.check()
