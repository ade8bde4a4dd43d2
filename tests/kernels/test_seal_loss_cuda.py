"""The CUDA kernels of the distillation loss, run by their CuPy launcher on the CPU, against the float64 reference."""

import contextlib

import numpy as np
import pytest
import torch

import cuda_host
from cuda_host_seal_loss import (
    BF16,
    F16,
    F32,
    F64,
    LAYOUTS,
    OBJECTIVES,
    PUBLISHED,
    Setup,
    errors,
    expected,
    given,
    guarded,
    run,
    setups,
)
from golden import CASES, arrays, tensor
from seal_fast.kernels.launch import cupy as launcher
from seal_fast.kernels.seal_loss import cupy as room
from seal_fast.kernels.seal_loss import reference
from small_gradients import FACTOR, check, inputs

pytestmark = pytest.mark.skipif(bool(cuda_host.missing()), reason=cuda_host.missing())

SETUPS = setups()
VALUE = 4e-6  # relative, or absolute below 1; measured 1.9e-6
GRADIENT = 1e-6  # of the largest entry, besides the rounding to 16 bits; measured 2.8e-7
WEIGHTS = 5e-7  # measured 1.5e-7
SAME = [setup for setup in SETUPS if setup.objective == "seal" and setup.K in (4101, 100)][:2]
SCALED = [(F32, 1000), (F32, 1003), (BF16, 1000), (F16, 1000), (F16, 77)]
SMALL = [(classes, objective) for classes in (37, 16) for objective in ("seal", "kd")]


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """All that are needed here, compiled at once."""
    with pytest.MonkeyPatch.context() as patch:
        cuda_host.install(patch, room)
        with cuda_host.planning():
            for setup in SETUPS:
                options = {**PUBLISHED, "objective": setup.objective, "keep": setup.keep}
                room.forward(*given(setup), gradient=True, **options)
                if setup.objective == "seal":
                    room.weights(given(setup)[0], keep=setup.keep)
            for case in CASES["loss"]:
                for objective in OBJECTIVES:
                    golden_run(case, objective, 0.6, 0.15)
            for setup in SAME:
                each_way(setup)
            for dtype, size in SCALED:
                room.scaled(torch.zeros(size, dtype=reference.gradient_dtype(dtype)), torch.ones(()), dtype)
            for classes, objective in SMALL:
                scaled_gradient(inputs(K=classes), objective)
        yield


def golden_run(case, objective, alpha, beta):
    z, q, y = (tensor("loss", f"{case['j']}_{name}", F32) for name in "zqy")
    return room.forward(
        z, q, y.long(), alpha=alpha, beta=beta, temperature=case["temperature"], objective=objective, gradient=True
    )


@pytest.mark.parametrize("case", CASES["loss"], ids=lambda case: f"case{case['j']}")
def test_published_parts_and_gradients(case):
    values, golden, j = case["values"]["f64"], arrays("loss"), case["j"]
    parts, gradient = golden_run(case, "seal", case["alpha"], case["beta"])
    kd, _ = golden_run(case, "kd", 1.0, 0.0)
    tdkd, tdkd_gradient = golden_run(case, "tdkd", 0.2, 0.5)
    for name, got in zip(("loss", "ce", "ela", "sta"), parts.tolist(), strict=True):
        assert got == pytest.approx(values[name], rel=1e-5, abs=1e-6), name  # measured 5e-7
    assert kd[2].item() == pytest.approx(values["kd"], rel=1e-5)  # measured 4e-7
    assert tdkd[0].item() == pytest.approx(values["tdkd_loss"], rel=1e-5)  # measured 2e-7
    for name, got in (("g_loss", gradient), ("g_tdkd_loss", tdkd_gradient)):
        right = golden[f"{j}_{name}_f64"]
        assert np.abs(got.numpy() - right).max() <= 1e-5 * np.abs(right).max()  # measured 2e-7


def test_setups_reach_every_template_argument():
    for objective in OBJECTIVES:
        assert {setup.keep for setup in SETUPS if setup.objective == objective} == {None, "table"}
    assert {setup.dtype for setup in SETUPS if setup.objective == "seal"} == {F32, BF16, F16}
    assert {setup.teacher_dtype for setup in SETUPS} == {F32, BF16, F16, F64}
    assert {setup.layout for setup in SETUPS} == set(LAYOUTS)
    assert len({(setup.label_dtype, setup.keep) for setup in SETUPS}) == 4
    assert len({(setup.layout, setup.keep) for setup in SETUPS}) == 2 * len(LAYOUTS)


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_loss_and_gradient_equal_the_reference(setup):
    for seed in range(2):
        tensors = given(setup, B=3 + seed, seed=seed)
        options = {**PUBLISHED, "objective": setup.objective}
        value, gradient = errors(run(*tensors, keep=setup.keep, **options), expected(*tensors, **options))
        assert value <= VALUE
        assert gradient <= GRADIENT


@pytest.mark.parametrize("setup", [setup for setup in SETUPS if setup.objective == "seal"], ids=str)
def test_weights_and_confidence_equal_the_reference(setup):
    logits = given(setup)[0]
    got = guarded(room.weights, logits, keep=setup.keep)
    for left, right in zip(got, reference.selective_alignment_weights(logits.double()), strict=True):
        assert left.shape == right.shape
        assert (left - right).abs().amax() <= WEIGHTS
    assert (got[0].diagonal(dim1=1, dim2=2) == 0).all()


def test_chip_and_memory_give_the_same_bits():
    for setup in SAME:
        on_chip, *others = each_way(setup)
        for parts, gradient in others:
            assert torch.equal(parts, on_chip[0])
            assert torch.equal(gradient, on_chip[1])


def each_way(setup):
    options = {**PUBLISHED, "objective": setup.objective}
    return [room.forward(*given(setup), gradient=True, keep=keep, **options) for keep in ("sample", "table", "nothing")]


@pytest.mark.parametrize(("dtype", "size"), SCALED)
def test_gradients_are_scaled_in_place_or_from_float32_to_float16(dtype, size):
    for factor in (2.5, 0.0, 1.0, -1.0, 1e-6, float("nan")):
        grad = torch.randn(size).to(reference.gradient_dtype(dtype))
        before = grad.clone()
        scaled = room.scaled(grad, torch.tensor(factor), dtype)
        torch.testing.assert_close(scaled, (before.float() * factor).to(dtype), rtol=0, atol=0, equal_nan=True)
        if dtype == F16:
            assert torch.equal(grad, before)
        else:
            assert scaled is grad


@pytest.mark.parametrize(("classes", "objective"), SMALL)
def test_what_float16_cannot_hold_before_it_is_scaled_is_kept(classes, objective):
    tensors = inputs(K=classes)
    check(scaled_gradient(tensors, objective), tensors, objective)


def scaled_gradient(tensors, objective):
    _, grad = room.forward(*tensors, **PUBLISHED, objective=objective, gradient=True)
    return room.scaled(grad, torch.tensor(FACTOR), F16)


def test_a_factor_of_one_writes_nothing():
    """Multiplication would make this NaN a quiet one."""
    grad = torch.full((1000,), 0x7F81, dtype=torch.int16).view(BF16)
    room.scaled(grad, torch.ones(()), BF16)
    assert (grad.view(torch.int16) == 0x7F81).all()
    room.scaled(grad, torch.tensor(2.0), BF16)
    assert (grad.view(torch.int16) == 0x7FC1).all()


BREAKS = {
    "nothing": ("", ""),
    "not the first of equals": ("!(top > other.top) && other.at < at", "!(top > other.top) && other.at > at"),
    "a thread's largest forgotten": ("add_other(loser, 1.0f, 1.0f, rate);", ""),
    "sums not scaled": ("__fmaf_rn(higher ? soft_sum : soft_more, soft_scale,", "__fmaf_rn(soft_more, 1.0f,"),
    "excess not moved": ("__fmaf_rn(-low.sum, fabsf(distance), low.excess)", "low.excess"),
    "the student's prediction kept": ("predicted ? of_label : z.at[i]", "z.at[i]"),
    "the larger of the teacher's logits": ("right < predicted ||", "right > predicted ||"),
    "the teacher's logit of the label kept": ("right ? step.agreed : q.at[i]", "q.at[i]"),
    "the gradient of the prediction kept": ("step.at ? 0.0f : right ?", "step.at ? 1.0f : right ?"),
    "the step itself in its target": ("j != t ? score : -infinity()", "score"),
    "steps beyond a warp's lanes forgotten": (
        "j < T; j += 32) {\n        weight[j] = S",
        "j < 32; j += 32) {\n        weight[j] = S",
    ),
    "no barrier before the weights": ("of[t] = step;\n  }\n  __syncthreads();", "of[t] = step;\n  }"),
    "ignored samples counted": ("label_stride] != IGNORED", "label_stride] != 12345"),
    "no gradient for ignored samples": ("if (GRADIENT && ignored)", "if (GRADIENT && ignored && T < 0)"),
    "rows one after another": ("ON_CHIP ? chip_stride : step_stride;", "ON_CHIP ? chip_stride : B * K;"),
    "counter left": ("*counter = 0;", ""),
    "the last sample's parts left out": ("i = threadIdx.x; i < B;", "i = threadIdx.x; i < B - 1;"),
}


@pytest.mark.parametrize("line", BREAKS)
def test_a_broken_line_is_noticed(line, monkeypatch):
    text = launcher.source(room.SOURCE)
    assert BREAKS[line][0] in text
    broken = cuda_host.Kernels(text.replace(*BREAKS[line]))
    monkeypatch.setattr(cuda_host, "kernels", lambda path: broken)
    counter = torch.zeros(1, dtype=torch.int32)
    monkeypatch.setattr(room, "counters", lambda device, number: counter)
    checked = [
        Setup(4, 10, "seal", None, F32, F32, torch.int64, "contiguous"),
        Setup(33, 6, "tdkd", "table", F32, F32, torch.int32, "classes outermost"),
    ]

    def results():
        for setup in checked:
            tensors = given(setup, B=5)
            tensors[0].round_()  # to ties
            options = {**PUBLISHED, "objective": setup.objective}
            got = run(*tensors, keep=setup.keep, **options)
            yield counter.clone(), got, expected(*tensors, **options)

    with cuda_host.planning():
        list(results())
    with contextlib.nullcontext() if line == "nothing" else pytest.raises(AssertionError):
        for count, got, right in results():
            value, gradient = errors(got, right)
            assert count == 0
            assert value <= VALUE
            assert gradient <= GRADIENT


def test_memory_beyond_what_is_asked_for_is_not_written(monkeypatch):
    text = launcher.source(room.SOURCE)
    wider = cuda_host.Kernels(text.replace("(of + T); ", "(of + T + 1); "))
    monkeypatch.setattr(cuda_host, "kernels", lambda path: wider)
    setup = Setup(4, 10, "seal", None, F32, F32, torch.int64, "contiguous")
    with pytest.raises(RuntimeError, match="shared memory is written behind the launch's"):
        run(*given(setup), objective="seal", **PUBLISHED)
