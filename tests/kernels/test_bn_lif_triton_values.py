"""Values of the Triton kernels of bn_lif: on the GPU, or in Triton's interpreter where TRITON_INTERPRET=1."""

import os
from dataclasses import replace
from itertools import product

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    # The interpreter needs TRITON_INTERPRET=1 before the first import, so another process runs these tests.
    pytest.skip("torch finds no GPU; test_bn_lif_triton.py runs this file in the interpreter", allow_module_level=True)

import bn_lif_kernels as expected
from bn_lif_kernels import CASES, KINDS, LAYOUTS, PUBLISHED
from seal_fast.kernels.bn_lif import triton as kernel
from seal_fast.kernels.bn_lif import triton_merge, triton_statistics, triton_tiles
from seal_fast.kernels.surrogate.reference import SURROGATES, Surrogate

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
STEPS = [4, 1, 10, 2]
# The interpreter runs the programs one after the other, and each channel of a contiguous tensor has one.
FEW_PROGRAMS = [
    (shape, kind, layout)
    for shape, kind, layout in CASES
    if not INTERPRETED or shape[1] < 48 or (layout == "channels_last" and shape[1] != 64)
]
NEURONS = [
    PUBLISHED,
    replace(PUBLISHED, tau=1.25, v_reset=None),
    replace(PUBLISHED, tau=3.7, decay_input=True, v_threshold=0.6, detach_reset=True),
    replace(PUBLISHED, tau=1.7, v_reset=-0.3, surrogate=Surrogate("atan")),
]


def check(shape, kind, layout, dtype, T, options=PUBLISHED, *, with_m=False, parameters=False):
    """Both passes against the reference; returns the firing rate."""
    y, residual, scales, static = expected.tensors_of(shape, T, kind, dtype, layout, DEVICE)
    rate = expected.compare_forward(kernel, y, residual, scales, options, T, static=static)
    expected.compare_backward(
        kernel, y, residual, scales, options, T, static=static, with_m=with_m, parameters=parameters
    )
    return rate


@pytest.mark.parametrize("index", range(len(FEW_PROGRAMS)), ids=lambda i: "-".join(map(str, FEW_PROGRAMS[i])))
def test_every_kind_of_call(index):
    """Dtypes, numbers of steps and neurons in turn: they go round at different speeds."""
    turn = index + index // 12  # else layouts would always meet the same dtypes
    rate = check(
        *FEW_PROGRAMS[index],
        DTYPES[turn % 4],
        STEPS[turn // 3 % 4],
        NEURONS[turn // 5 % 4],
        with_m=turn % 3 != 0,
        parameters=turn % 7 == 0,
    )
    assert rate < 0.95


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "T"), [("static y", 17), ("normalised residual", 35), ("all static", 17)])
def test_long_runs_keep_potentials_between_chunks(kind, T, dtype):
    layout = "channels_last" if dtype == torch.bfloat16 else "contiguous"
    assert check((2, 3, 2, 1), kind, layout, dtype, T, with_m=True, parameters=dtype == torch.float32) > 0.05


@pytest.mark.parametrize("kind", KINDS[:3])
def test_many_channels_that_are_not_innermost(kind):
    assert check((1, 19, 3, 1), kind, "contiguous", torch.float32, 2, with_m=True) > 0.05


@pytest.mark.parametrize("detach_reset", [False, True], ids=["attached", "detached"])
@pytest.mark.parametrize("decay_input", [False, True], ids=["whole input", "decayed input"])
@pytest.mark.parametrize("v_reset", [0.0, -0.3, None], ids=["hard", "hard to -0.3", "soft"])
@pytest.mark.parametrize("tau", [2.0, 3.7])
def test_any_neuron(tau, v_reset, decay_input, detach_reset):
    options = replace(PUBLISHED, tau=tau, v_reset=v_reset, decay_input=decay_input, detach_reset=detach_reset)
    options = replace(options, v_threshold=0.6)
    layout = "contiguous" if detach_reset else "channels_last"
    rate = check((3, 4, 2, 2), "normalised residual", layout, torch.float32, 4, options, with_m=True, parameters=True)
    assert 0.05 < rate < 0.95


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_any_surrogate(surrogate):
    options = replace(PUBLISHED, surrogate=Surrogate(surrogate, 1.3), v_threshold=0.7)
    check((2, 3, 2, 2), "residual", "contiguous", torch.float64, 3, options, with_m=True)


CONSTANTS = {
    "a tensor and a float": lambda C: {"tau": torch.tensor(1.7), "v_threshold": 0.8},
    "a float and channels": lambda C: {"tau": 2.0, "v_threshold": torch.linspace(0.3, 1.2, C)},
    "channels and a tensor": lambda C: {"tau": torch.linspace(1.0, 4.0, C), "v_threshold": torch.tensor(0.8)},
    "channels": lambda C: {"tau": torch.linspace(1.0, 4.0, C), "v_threshold": torch.linspace(0.3, 1.2, C)},
}


@pytest.mark.parametrize("constants", CONSTANTS)
@pytest.mark.parametrize(
    ("shape", "layout", "v_reset"),
    [((3, 5, 2, 3), "contiguous", 0.2), ((2, 6, 1, 3), "channels_last", None), ((2, 70), "contiguous", 0.0)],
    ids=str,
)
def test_learned_constants(constants, shape, layout, v_reset):
    learned = {
        name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value
        for name, value in CONSTANTS[constants](shape[1]).items()
    }
    options = replace(PUBLISHED, **learned, v_reset=v_reset, decay_input=v_reset is None)
    kind = "static residual" if v_reset else "residual"
    check(shape, kind, layout, torch.float32, 3, options, with_m=True, parameters=True)


# Runs of 99 and of 1,500 numbers of a channel, shorter and longer than a tile; and rows of 6 channels.
MANY_TILES = [((37, 2, 9, 11), "contiguous"), ((3, 2, 30, 50), "contiguous"), ((23, 6, 9, 8), "channels_last")]


@pytest.mark.parametrize(("shape", "layout"), MANY_TILES, ids=str)
@pytest.mark.parametrize(("programs", "turns"), [(1, 64), (1, 2), (1000, 64)])
def test_programs_share_tiles(shape, layout, programs, turns, monkeypatch):
    """One program for each channel or some, which takes many tiles; and many programs, merged by turns."""
    for room, names in ((kernel, ("few", "many")), (triton_statistics, ("statistics", "gradient"))):
        monkeypatch.setattr(room, "PROGRAMS", dict.fromkeys(names, programs))
    monkeypatch.setattr(triton_tiles, "multiprocessors", lambda device: 1)
    monkeypatch.setattr(triton_tiles, "MOST_TURNS", turns)
    for name, value in {"AT_ONCE": 4, "ACCESSES": 1}.items():
        monkeypatch.setattr(triton_statistics, name, value)
    monkeypatch.setattr(triton_merge, "MOST_ROWS", 2)
    made = []
    for room in (kernel, triton_statistics):
        monkeypatch.setattr(room, "tiling", lambda *arguments: made.append(triton_tiles.tiling(*arguments)) or made[-1])
    check(shape, "normalised residual", layout, torch.float32, 1, with_m=True)
    y = expected.normal(shape, torch.float32, 1, layout, DEVICE)
    expected.compare_statistics(kernel, y)
    expected.compare_statistics(kernel, y + 1000)
    expected.compare_table(kernel, y)
    expected.compare_normalised_gradient(kernel, y, y + 1)
    for tiles in made:
        assert (tiles.sizes[3] > 1) == (programs == 1)  # tiles of a program
        assert (tiles.splits > 2) == (turns < 64 or programs > 1)  # more than a run has


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "layout"), sorted({(case[0], case[2]) for case in FEW_PROGRAMS}), ids=str)
def test_batch_norm_alone(shape, layout, dtype):
    y = expected.normal(shape, dtype, 1, layout, DEVICE)
    grad = expected.normal(shape, dtype, 2, layout, DEVICE)
    expected.compare_statistics(kernel, y)
    for affine, batch in ((True, True), (False, True), (True, False)):
        expected.compare_table(kernel, y, affine=affine, batch=batch)
    expected.compare_normalised_gradient(kernel, grad, y)
    expected.compare_normalised_gradient(kernel, grad, None)


def test_more_splits_than_are_merged_at_once(monkeypatch):
    monkeypatch.setattr(triton_tiles, "MOST_TURNS", 1)
    monkeypatch.setattr(triton_statistics, "AT_ONCE", 1)
    y = expected.normal((70_000, 2), torch.float32, 1, "contiguous", DEVICE) * 3
    y += torch.linspace(-50, 50, len(y), device=DEVICE)[:, None]  # no two programs have the same mean
    assert y.numel() // (128 * 1) > 2 * triton_merge.MOST_ROWS
    expected.compare_statistics(kernel, y)


def test_a_constant_beyond_the_square_root_of_the_largest_number_has_no_variance():
    y = torch.full((70, 3, 5), 3e19, device=DEVICE)
    mean, variance = kernel.statistics(y)
    assert torch.equal(mean, y[0, :, 0])
    assert variance.count_nonzero() == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_survive_hard_numbers(layout):
    y = expected.normal((40, 6, 5, 4), torch.float64, 1, layout, DEVICE)
    y[:, 0] = y[:, 0] + 1000
    y[:, 1] = 7.3
    y[:, 2] = y[:, 2] * 1e-3 - 5
    y[0, 3, 0, 0] = 1000  # the first number is an outlier
    expected.compare_statistics(kernel, y.float())
    y[5, 4, 2, 2] = torch.nan
    mean, variance = kernel.statistics(y.float())
    assert mean.isnan().tolist() == variance.isnan().tolist() == [False] * 4 + [True, False]
    assert variance[1] == 0


def rearranged(y, how):
    if how == "transposed":  # H and W
        return y.transpose(-1, -2).contiguous().transpose(-1, -2)
    if how == "channels between":  # H, C, W
        return y.transpose(1, 2).contiguous().transpose(1, 2)
    room = torch.zeros(*y.shape[:-1], y.shape[-1] + 1, dtype=y.dtype, device=y.device)
    room[..., :-1] = y
    return room[..., :-1]


@pytest.mark.parametrize("how", ["transposed", "channels between", "with gaps"])
@pytest.mark.parametrize("of", ["y", "residual", "both"])
def test_any_layout(how, of):
    T = 3
    y, residual, scales, _ = expected.tensors_of((2, 3, 4, 5), T, "normalised residual", torch.float32, "contiguous")
    moved = [rearranged(x, how) if of in (name, "both") else x for name, x in (("y", y), ("residual", residual))]
    moved = [x.to(DEVICE) for x in moved]
    expected.compare_forward(kernel, *moved, scales.to(DEVICE), PUBLISHED, T)
    expected.compare_backward(kernel, *moved, scales.to(DEVICE), PUBLISHED, T, with_m=True)
    expected.compare_statistics(kernel, moved[0])
    for in_place in (False, True):
        coefficients = expected.per_channel(3, 3, torch.float32, 5, DEVICE)
        rows = [expected.broadcast(row, y) for row in coefficients]
        grad = moved[0].clone() if how != "with gaps" else rearranged(moved[0], how)
        after = rows[0] * grad + (rows[1] * moved[1] + rows[2])
        got = kernel.normalised_gradient(grad, moved[1], coefficients, in_place=in_place)
        assert torch.allclose(got, after, rtol=1e-6, atol=1e-6)
        assert (got.data_ptr() == grad.data_ptr()) == in_place


def test_gradients_are_only_made_where_they_are_asked_for():
    for steps, total in product([False, True], repeat=2):
        y, residual, scales, _ = expected.tensors_of((2, 3, 2, 2), 2, "residual", torch.float32, "contiguous", DEVICE)
        arguments = (y, None, y, residual, expected.table_of(scales, y.dtype), PUBLISHED)
        options = {"counts": (16,), "time_steps": 2, "static": False, "parameters": False}
        both = kernel.backward(*arguments, **options, steps=True, total=True)
        got = kernel.backward(*arguments, **options, steps=steps, total=total)
        for asked, one, other in zip((steps, total, False, False, *[True] * 3), got, both, strict=True):
            assert (one is not None) == asked
            assert one is None or torch.equal(one, other)


def test_gradients_come_in_any_layout():
    """An upstream gradient that is one number for all, and one in another layout than y."""
    y, _, scales, _ = expected.tensors_of((2, 3, 2, 2), 2, "no residual", torch.float32, "channels_last", DEVICE)
    options = {"counts": (16,), "time_steps": 2, "static": False, "steps": True, "total": True, "parameters": False}
    table = expected.table_of(scales, y.dtype)
    ones = torch.ones((), device=DEVICE).expand_as(y)
    plain = kernel.backward(torch.ones_like(y), torch.ones_like(y), y, None, table, PUBLISHED, **options)
    for grads in ((ones, ones), (ones.contiguous(), ones.contiguous()), (ones.double(), ones)):
        got = kernel.backward(*grads, y, None, table, PUBLISHED, **options)
        assert all(torch.equal(*pair) for pair in zip((*got[:2], *got[4:]), (*plain[:2], *plain[4:]), strict=True))
