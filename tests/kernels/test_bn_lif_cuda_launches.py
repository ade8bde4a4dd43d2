"""How many launches of CUDA kernels a layer takes, and what their last blocks make of the sums of all."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

import cuda_host
from bn_lif_kernels import KINDS, PUBLISHED, compare_statistics, compare_table, normal, per_channel, table_of
from cuda_host_bn_lif import (
    BF16,
    EVEN,
    F32,
    F64,
    FIRST,
    LAST,
    NEURONS,
    PAIRS,
    SETUPS,
    Setup,
    from_fixed_statistics,
    installed,
)
from cuda_host_lif import poisoned
from seal_fast.kernels.bn_lif import cupy as room
from seal_fast.kernels.bn_lif import norms
from seal_fast.kernels.bn_lif.norms import Norm
from seal_fast.kernels.launch import cupy as launcher

pytestmark = pytest.mark.skipif(bool(cuda_host.missing()), reason=cuda_host.missing())

MANY = Setup((200, 96, 2, 2), T=1)
MERGED = {
    **{name: SETUPS[name] for name in ("many, channels last", "many, contiguous", "one channel", "tau by channel")},
    "three tiles": Setup(PAIRS, "residual", LAST, BF16),
    "many slices": MANY,
}
FIXED = {
    **{
        f"{kind}, {dtype}": replace(SETUPS["many, contiguous"], shape=PAIRS, kind=kind, dtype=dtype)
        for kind in KINDS
        for dtype in (F32, BF16)
    },
    "channels last": Setup(EVEN, layout=LAST, dtype=BF16, options=NEURONS["soft"]),
    "no residual, channels last": Setup(EVEN, "no residual", LAST, BF16),
    "float64": Setup(EVEN, dtype=F64),
    "T=17": Setup(EVEN, "residual", FIRST, T=17),
}


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """All that are needed here, compiled at once."""

    def launch_all():
        for setup in MERGED.values():
            setup.launch()
            room.statistics(setup.given()[0])
        for setup in FIXED.values():
            from_fixed_statistics(setup, affine=True)

    with installed(launch_all):
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
    assert launches == ["moments"] * 3


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", FIXED)
def test_forward_from_fixed_statistics_equals_that_from_their_table(name, affine, launches):
    with poisoned():
        got, expected = from_fixed_statistics(FIXED[name], affine=affine)
    assert launches == ["fill_table"] * (len(launches) - 2) + ["bn_lif_forward"] * 2
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
    assert 0.02 < got[0].double().mean() < 0.98


@pytest.mark.parametrize("kind", ["no residual", "residual", "normalised residual"])
def test_a_step_of_a_layer_takes_four_launches_and_a_norm_of_the_residual_two_more(kind, launches):
    y, residual, scales, static = replace(SETUPS["many, channels last"], kind=kind).given()
    norms_of = [y, residual][: len(scales) // 2]
    table = torch.zeros(2 * len(scales), y.shape[1])
    count, call = y.numel() // y.shape[1], {"time_steps": 4, "static": static}
    for i, rows in enumerate(norms_of):
        room.fill_table(table, i, rows, Norm(None, None, None, None, None, 0.1, 1e-5, count, 1))
    scales = norms.scales(table)
    spikes, *_ = room.forward(y, residual, scales, PUBLISHED, **call, keep_m=False, pack=False)
    asked = {"counts": (count,) * len(norms_of), "steps": True, "total": False, "parameters": False}
    outputs = room.backward(spikes, None, y, residual, table, PUBLISHED, **call, **asked)
    for i, rows in enumerate(norms_of):
        room.normalised_gradient(outputs.grad_steps, rows, outputs.coefficients[3 * i : 3 * i + 3], in_place=False)
    expected = {"moments": len(norms_of), "bn_lif_forward": 1, "bn_lif_backward": 1}
    assert Counter(launches) == expected | {"normalised_gradient": len(norms_of)}


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
    assert launches == ["bn_lif_backward"]
    assert torch.equal(outputs.coefficients, norms.coefficients_of(table, outputs.sums, counts))
    total, *centred = outputs.sums
    of_weights = norms.inverse_stds(table) * torch.stack(centred)
    assert torch.equal(outputs.grad_norms, torch.stack([of_weights[0], total, of_weights[1], total]))


def test_more_slices_than_a_block_has_threads(monkeypatch):
    monkeypatch.setattr(room, "POSITIONS", (1, 1))
    y, *_ = MANY.given()
    tiling = room._tiling(y.numel(), 96, 1, 4)
    assert tiling.slices > room.THREADS
    assert tiling.teams > 1
    assert tiling.slices % tiling.team  # the last one has fewer
    compare_statistics(room, y)
    MANY.check()


@pytest.mark.parametrize("merged", [0, 1000])
@pytest.mark.parametrize("name", ["many, channels last", "many slices"])
def test_whichever_block_is_the_last_the_bits_are_the_same(name, merged, monkeypatch):
    monkeypatch.setattr(room, "MERGED", merged)
    monkeypatch.setattr(room, "POSITIONS", (1, 1))
    setup, found = MERGED[name], []
    y, residual, scales, static = setup.given()
    call = {"time_steps": setup.T, "static": static, "steps": False, "total": True, "parameters": False}
    for backwards in (False, True):
        monkeypatch.setattr(cuda_host, "BACKWARDS", backwards)
        with poisoned():
            *_, sums, coefficients, gradients = room.backward(
                y, None, y, residual, table_of(scales, F32), PUBLISHED, counts=(37, 41), **call
            )
            found.append([*room.statistics(y), sums, coefficients, gradients])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert found[0][0].isfinite().all()


@pytest.mark.parametrize("merged", [0, 1000])
@pytest.mark.parametrize("name", MERGED)
def test_blocks_are_merged_in_one_step_or_two(name, merged, monkeypatch):
    """Several slices of several tiles of channels, in teams or all at once."""
    monkeypatch.setattr(room, "MERGED", merged)
    monkeypatch.setattr(room, "POSITIONS", (1, 256))
    y, *_ = MERGED[name].given()
    compare_statistics(room, y)
    compare_table(room, y)
    MERGED[name].check()
