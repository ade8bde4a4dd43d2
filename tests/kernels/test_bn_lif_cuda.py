"""The CUDA kernels of batch norm, residual and LIF, run by their CuPy launcher on the CPU, against torch."""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest
import torch

import bn_lif_kernels
import cuda_host
from bn_lif_kernels import (
    CASES,
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
    tensors_of,
)
from cuda_host_lif import guarded, poisoned
from seal_fast.kernels.bn_lif import cupy as room
from seal_fast.kernels.bn_lif import norms
from seal_fast.kernels.bn_lif.norms import Norm
from seal_fast.kernels.bn_lif.tensors import BackwardOutputs
from seal_fast.kernels.launch import cupy as launcher
from seal_fast.kernels.neuron.options import Options
from seal_fast.kernels.surrogate.reference import SURROGATES, Surrogate

pytestmark = pytest.mark.skipif(bool(cuda_host.missing()), reason=cuda_host.missing())

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
EVEN, ODD, PAIRS, LONG = (2, 64, 4, 4), (5, 48, 3, 3), (3, 130, 2, 2), (8, 2, 20, 20)


@dataclass(frozen=True)
class Setup:
    """One call of forward and backward."""

    shape: tuple[int, ...]
    kind: str = "normalised residual"
    layout: str = "channels_last"
    dtype: torch.dtype = F32
    T: int = 4
    options: Options = PUBLISHED
    with_m: bool = False
    shift: int = 0  # of y, in numbers, from an aligned address

    def given(self):
        y, residual, scales, static = tensors_of(self.shape, self.T, self.kind, self.dtype, self.layout)
        return guarded(y, self.shift), None if residual is None else guarded(residual), scales, static

    def launch(self):
        """All that `check` starts."""
        y, residual, scales, static = self.given()
        call = {"time_steps": self.T, "static": static}
        room.forward(y, residual, scales, self.options, **call, keep_m=False, pack=False)
        spikes, m, _ = room.forward(y, residual, scales, self.options, **call, keep_m=True, pack=True)
        table, counts = table_of(scales, self.dtype), (1,) * (len(scales) // 2)
        asked = {"counts": counts, "steps": True, "total": True, "parameters": self.options.in_tensors}
        grad_m = m if self.with_m else None
        room.backward(spikes, grad_m, y, residual, table, self.options, **call, **asked)

    def check(self):
        with poisoned():
            y, residual, scales, static = self.given()
            rate = compare_forward(room, y, residual, scales, self.options, self.T, static=static)
            asked = {"with_m": self.with_m, "parameters": self.options.in_tensors}
            compare_backward(room, y, residual, scales, self.options, self.T, static=static, **asked)
        assert 0.02 < rate < 0.9 or y.numel() < 100


def neuron(surrogate, tau=2.0, decay_input=False, threshold=1.0, v_reset=0.0, detach=False):
    return Options(tau, decay_input, threshold, v_reset, Surrogate(surrogate), detach)


def by_channel(first, last, C, dtype=F32):
    return torch.linspace(first, last, C, dtype=dtype)


NEURONS = {
    "soft": neuron("atan", 1.7, v_reset=None),
    "soft, detached": neuron("piecewise_quadratic", decay_input=True, v_reset=None, detach=True),
    "detached": neuron("piecewise_exp", detach=True),
    "another reset": neuron("soft_sign", 1.7, v_reset=-0.3),
    "input decays": neuron("super_spike", 1.7, decay_input=True, v_reset=-0.3),
    "input decays, power of two": neuron("erf", 4.0, decay_input=True, threshold=0.5),
    "scalars": neuron("triangle", torch.tensor(1.7), threshold=torch.tensor(0.75, dtype=F64), v_reset=None),
    "tau by channel": neuron("rectangle", by_channel(1.7, 3.3, 64, F64), decay_input=True, v_reset=-0.3),
    "both by channel": neuron("sigmoid", by_channel(1.7, 3.3, 130), True, by_channel(0.5, 1.3, 130)),
    "threshold by channel": neuron("sigmoid", 2.0, threshold=by_channel(0.5, 1.3, 2), v_reset=None),
}
LAST, FIRST = "channels_last", "contiguous"
SETUPS = {
    **{f"{case[0]}, {case[1]}, {case[2]}": Setup(*case, with_m=i % 2 > 0) for i, case in enumerate(CASES)},
    **{
        f"{dtype}, {kind}, {layout}": Setup(EVEN, kind, layout, dtype, with_m=with_m)
        for dtype in (F64, F16, BF16)
        for kind, layout, with_m in (("normalised residual", LAST, True), ("residual", FIRST, False))
    },
    **{f"bfloat16, {layout}, odd": Setup(ODD, "static residual", layout, BF16) for layout in LAYOUTS},
    **{f"T={T}": Setup(EVEN, T=T, with_m=T > 2) for T in (1, 2, 10, 17)},
    **{f"T={T}, static": Setup(LONG, "all static", FIRST, T=T, with_m=True) for T in (2, 10, 33)},
    "T=17, bfloat16": Setup(EVEN, "static y", FIRST, BF16, 17),
    "T=10, bfloat16": Setup(PAIRS, "residual", LAST, BF16, 10),
    **{name: Setup(EVEN, layout=LAST, options=NEURONS[name]) for name in NEURONS if "by channel" not in name},
    "tau by channel": Setup(EVEN, "residual", FIRST, options=NEURONS["tau by channel"], T=17),
    "both by channel": Setup(PAIRS, options=NEURONS["both by channel"], with_m=True),
    "threshold by channel": Setup(LONG, "residual", LAST, options=NEURONS["threshold by channel"]),
    "many, channels last": Setup(LONG, with_m=True),
    "many, contiguous": Setup(LONG, layout=FIRST, with_m=True),
    "one channel": Setup((3, 1, 4, 3), "residual", FIRST),
    "three axes": Setup((3, 6, 8), "normalised residual", FIRST),
    "not aligned": Setup(EVEN, shift=1),
}
STATISTICS = [(shape, layout, dtype) for shape in (*SHAPES, LONG) for layout in LAYOUTS for dtype in (F32, BF16)]
STATISTICS += [(EVEN, layout, dtype) for layout in LAYOUTS for dtype in (F16, F64)]


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """All that are needed here, compiled at once; whatever is made for them lies in the midst of NaN."""
    with pytest.MonkeyPatch.context() as patch:
        cuda_host.install(patch, room)
        patch.setattr(bn_lif_kernels, "normal", lambda *arguments: guarded(normal(*arguments)))
        with cuda_host.planning():
            for setup in SETUPS.values():
                setup.launch()
            for shape, layout, dtype in STATISTICS:
                y = normal(shape, dtype, 1, layout)
                room.statistics(y)
                for other in (y, None):
                    room.normalised_gradient(y, other, per_channel(shape[1], 3, dtype, 1), in_place=True)
        yield


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels that were started."""
    names, start = [], launcher.start

    def noted(path, expression, *arguments):
        names.append(expression.split("<")[0])
        start(path, expression, *arguments)

    monkeypatch.setattr(launcher, "start", noted)
    return names


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


def test_a_norm_without_running_statistics_leaves_them_alone(launches):
    y = normal(PAIRS, F32, 1)
    weight, running_mean, running_var = per_channel(130, 3, F32, 2).unbind()
    kept = running_mean.clone(), running_var.clone()
    tables = torch.zeros(2, 4, 130)
    for table, running in zip(tables, ((running_mean, running_var), (None, None)), strict=True):
        room.fill_table(table, 0, y, Norm(weight, None, *running, None, 0.1, 1e-5, y.numel() // 130, 1))
    assert torch.equal(*tables)
    assert all(torch.equal(*pair) for pair in zip(kept, (running_mean, running_var), strict=True))
    mean, variance = room.statistics(y)
    assert torch.equal(tables[0, 2], mean)
    assert torch.equal(tables[0, 3], 1 / (variance + 1e-5).double().sqrt().float())  # torch.sqrt of float32 may be off
    assert torch.equal(tables[0, 0], tables[0, 3] * weight)
    assert torch.equal(tables[0, 1], -mean * tables[0, 0])
    assert launches == ["moments", "fill_table"] * 3


def test_fixed_statistics_take_one_launch(launches):
    y, table = normal(PAIRS, F32, 1), torch.zeros(4, 130)
    weight, bias, mean, variance = per_channel(130, 4, F32, 2).abs().unbind()
    room.fill_table(table, 0, y, Norm(weight, bias, mean, variance, None, 0.1, 1e-5, 0, 1))
    assert launches == ["fill_table"]
    assert torch.equal(table[1], bias - mean * table[0])


@pytest.mark.parametrize("counts", [(37, 41), (0, 41), (37, 0)])
def test_what_follows_from_the_sums_equals_torch_bit_for_bit(counts, launches):
    setup = SETUPS["many, channels last"]
    y, residual, scales, _ = setup.given()
    table = table_of(scales, F32)
    call = {"time_steps": 4, "static": False, "parameters": False, "steps": True, "total": True}
    grad = normal(y.shape, F32, 3, LAST)
    with poisoned():
        outputs = room.backward(grad, grad, y, residual, table, PUBLISHED, counts=counts, **call)
    assert launches == ["bn_lif_backward", "add_slices"]
    assert torch.equal(outputs.coefficients, norms.coefficients_of(table, outputs.sums, counts))
    total, *centred = outputs.sums
    of_weights = norms.inverse_stds(table) * torch.stack(centred)
    assert torch.equal(outputs.grad_norms, torch.stack([of_weights[0], total, of_weights[1], total]))


def test_sums_of_nothing_are_zero():
    outputs = BackwardOutputs(*(None,) * 4, *(torch.full((rows, 2), torch.nan) for rows in (3, 6, 4)))
    table, counts = table_of(SETUPS["many, channels last"].given()[2], F32), (37, 41)
    assert room._add_slices(None, table, counts, outputs) is outputs
    assert not outputs.sums.any()
    assert not outputs.grad_norms.any()
    assert torch.equal(outputs.coefficients, norms.coefficients_of(table, outputs.sums, counts))


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


def test_more_slices_than_a_block_has_threads(monkeypatch):
    monkeypatch.setattr(room, "POSITIONS", (1, 1))
    setup = Setup((200, 96, 2, 2), T=1)
    y, *_ = setup.given()
    assert room._tiling(y.numel(), 96, 1, 4).slices > room.THREADS
    compare_statistics(room, y)
    setup.check()


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


BREAKS = {
    "nothing": (VARYING, "", ""),
    "rows of a static y N apart": (STATIC, "(first + t) * y_stride + n", "(first + t) * N + n"),
    "rows of a static m N apart": (STATIC, "write<true>(m + (first + t) * m_stride", "write<true>(m + (t + 1) * N"),
    "its gradient at each step": (STATIC, "GRAD_M && (m_stride || first + t == 0)", "GRAD_M"),
    "another chunk's checkpoint": (STATIC, "checkpoints + (chunk - 1) * N", "checkpoints + chunk * N"),
    "products without the mean": (VARYING, "dm, current - mean.row[0].at[set]", "dm, current"),
    "the other mean": (VARYING, "mean.row[SUMS<RESIDUAL> - 2]", "mean.row[0]"),
    "no scale of the residual": (VARYING, "residual * scales.row[LAST - 1].at[set]", "residual"),
    "the last position left out": (
        VARYING,
        "walk.inside && walk.position < positions; walk.next()",
        "walk.inside && walk.position + 1 < positions; walk.next()",
    ),
    "no barrier between threads": (VARYING, "    __syncthreads();\n", ""),
    "rows of threads left out": (statistics, "walk.row + half < left", "walk.row + half + 1 < left"),
    "stretches that do not end": (statistics, "n += to_next;", ""),
    "all slices in the place of the first": (statistics, "* slices + walk.slice]", "* slices]"),
    "numbers ahead that are not there": (statistics, "if (i / EACH < there) squares =", "squares ="),
    "no barrier between warps": (statistics, "= all;\n  __syncthreads();\n", "= all;\n"),
    "the first norm's scale": (statistics, "column[2 * index * channels]", "column[0]"),
    "the first norm's mean": (statistics, "(2 * norms + index)", "(2 * norms)"),
    "a biased running variance": (statistics, "variance * correction", "variance"),
    "a batch for each channel": (statistics, "if (channel == 0) ++*batches", "++*batches"),
    "a batch without statistics": (statistics, "if (channel == 0) ++*batches", ""),
    "eps left out": (statistics, "variance + eps", "variance"),
    "the other formula of lerp": (statistics, "to - way * (1 - weight)", "to - way * weight"),
    "fixed statistics that are not": (statistics, "mean = old_mean, variance = old_variance", "mean = 0, variance = 1"),
    "another norm's count": (VARYING, "i ? residual_count : count", "count"),
    "another norm's deviation": (VARYING, "norms[(3 * NORMS + i)", "norms[(3 * NORMS)"),
    "means that do not move": (statistics, "at[1] += distance * weight;\n    at[2]", "at[2]"),
}


@pytest.fixture(scope="module")
def broken():
    """The kernels that each break needs, compiled two at a time."""
    texts = {line: launcher.source(room.SOURCE) for line in BREAKS}
    assert all(BREAKS[line][1] in text for line, text in texts.items())
    kernels = {line: cuda_host.Kernels(text.replace(*BREAKS[line][1:])) for line, text in texts.items()}
    started = {}
    for check in (VARYING, STATIC, statistics):
        with pytest.MonkeyPatch.context() as patch, cuda_host.planning():
            patch.setattr(cuda_host, "kernels", lambda path: next(iter(kernels.values())))
            check() if check is statistics else check.launch()
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
        check() if check is statistics else check.check()
