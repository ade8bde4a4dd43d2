"""Values of the Triton kernels of the distillation loss: on the GPU, or in the interpreter where TRITON_INTERPRET=1.

They are compared with the reference in float64, with samples in registers and in chunks of few classes.
"""

import itertools
import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip(
        "torch finds no GPU; test_seal_loss_triton.py runs this file in the interpreter", allow_module_level=True
    )

import seal_fast
from golden import CASES, arrays, tensor
from seal_fast.kernels.seal_loss import reference
from seal_fast.kernels.seal_loss import triton as kernel

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
OBJECTIVES = ("seal", "kd", "tdkd")
PUBLISHED = {"alpha": 0.6, "beta": 0.15, "temperature": 3.0, "objective": "seal"}
PARTS = ("loss", "ce", "ela", "sta")
VALUE = 5e-6  # relative, or absolute; measured 9e-7
# Of the largest entry. Measured 6e-7; a 16-bit gradient is rounded by half a unit in its last place, 4e-3 or 5e-4.
GRADIENT = {torch.float32: 3e-6, torch.bfloat16: 2.0**-8 + 3e-6, torch.float16: 2.0**-10}
WEIGHT = 1e-6  # measured 2e-7


def inputs(T, B, K, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits, teacher_logits = (torch.randn(*shape, K, generator=generator) * scale for shape in ((T, B), (B,)))
    labels = torch.randint(0, K, (B,), generator=generator)
    logits[0, 0, labels[0]] = 4 * scale  # a correct time step
    return logits, teacher_logits, labels


def run(logits, teacher_logits, labels, **options):
    """The parts and the gradient on the CPU. Outputs are poisoned: what is not written is NaN."""

    def poisoned(make):
        def run(*arguments, **given):
            made = make(*arguments, **given)
            return made.fill_(math.nan) if made.is_floating_point() else made

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
        patch.setattr(torch, "empty_like", poisoned(torch.empty_like))
        parts, gradient = kernel.forward(
            logits.to(DEVICE), teacher_logits.to(DEVICE), labels.to(DEVICE), gradient=True, **PUBLISHED | options
        )
    assert parts.dtype == torch.float32
    assert parts.shape == (4,)
    assert gradient.dtype == reference.gradient_dtype(logits.dtype)
    assert gradient.shape == logits.shape
    assert gradient.is_contiguous()
    return parts.cpu(), gradient.cpu()


def expected_of(logits, teacher_logits, labels, **options):
    leaf = logits.double().requires_grad_()
    parts = reference.seal_loss(leaf, teacher_logits.to(logits.dtype).double(), labels, **PUBLISHED | options)
    (gradient,) = torch.autograd.grad(parts[0], leaf)
    return torch.stack([part.detach() for part in parts]), gradient


def check(logits, teacher_logits, labels, **options):
    expected, expected_gradient = expected_of(logits, teacher_logits, labels, **options)
    parts, gradient = run(logits, teacher_logits, labels, **options)
    for name, got, right in zip(PARTS, parts.tolist(), expected.tolist(), strict=True):
        assert got == pytest.approx(right, rel=VALUE, abs=VALUE, nan_ok=True), name
    assert gradient.isfinite().all()
    # A softmax less 1 rounds as the softmax does.
    size = (
        expected_gradient.abs().max().clamp_min(0.1 / max(1, len(logits) * (labels != reference.IGNORED).sum().item()))
    )
    error = ((gradient.double() - expected_gradient).abs().max() / size).item()
    assert error <= GRADIENT[logits.dtype]


def in_chunks_of(monkeypatch, classes, T):
    monkeypatch.setattr(kernel, "TILE", 4 * classes * kernel.triton.next_power_of_2(T))


SIZES = [*itertools.product((1, 2, 4, 10, 33), (2, 3, 10)), (1, 100), (4, 100), (10, 100), (4, 1000)]
ANCESTORS = [(*size, objective) for size, objective in zip(SIZES[::2], itertools.cycle(("kd", "tdkd")), strict=False)]


@pytest.mark.parametrize(("T", "K", "objective"), [*((*size, "seal") for size in SIZES), *ANCESTORS])
def test_samples_that_stay_in_registers(T, K, objective):
    check(*inputs(T, 2, K), objective=objective)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("T", "K", "classes"), [(1, 10, 4), (2, 3, 2), (4, 10, 2), (4, 100, 16), (10, 33, 8)])
def test_samples_in_chunks(T, K, classes, objective, monkeypatch):
    in_chunks_of(monkeypatch, classes, T)
    check(*inputs(T, 2, K), objective=objective)


@pytest.mark.parametrize(("T", "K", "objective"), [(1, 4100, "kd"), (4, 4100, "seal"), (33, 100, "tdkd")])
def test_samples_that_do_not_fit_into_registers(T, K, objective):
    check(*inputs(T, 2, K), objective=objective)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("classes", [None, 4])
def test_sixty_four_time_steps(objective, classes, monkeypatch):
    if classes:
        in_chunks_of(monkeypatch, classes, 64)
    check(*inputs(64, 1, 7), objective=objective)


@pytest.mark.parametrize("T", [65, 100, 256])
def test_more_time_steps_are_refused(T):
    more = [tensor.to(DEVICE) for tensor in inputs(T, 1, 7)]
    sentence = rf"it takes up to 64 time steps, and these are {T}; .*torch can"
    for objective in OBJECTIVES:
        with pytest.raises(ValueError, match=sentence):
            seal_fast.seal_loss(*more, alpha=0.6, beta=0.15, objective=objective, backend="triton")
    with pytest.raises(ValueError, match=sentence):
        seal_fast.selective_alignment_weights(more[0], backend="triton")


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("K", [10, 16])
def test_16_bit_logits(K, dtype, objective):
    logits, teacher_logits, labels = inputs(4, 2, K)
    check(logits.to(dtype), teacher_logits.to(dtype), labels, objective=objective)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_teacher_logits_of_another_dtype(dtype):
    logits, teacher_logits, labels = inputs(4, 2, 12)
    check(logits, teacher_logits.to(dtype), labels)


LAYOUTS = {  # each holds the numbers of a contiguous tensor in other places
    "batch first": lambda x: x.transpose(0, -2).contiguous().transpose(0, -2),
    "classes outermost": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "every other class": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "rows apart": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "one row for all": lambda x: x.flatten(0, -2)[0].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", [None, 4])
def test_any_strides(layout, classes, monkeypatch):
    if classes:
        in_chunks_of(monkeypatch, classes, 4)
    logits, teacher_logits, labels = inputs(4, 2, 12)
    view = LAYOUTS[layout]
    check(view(logits), teacher_logits, labels)
    check(logits, view(teacher_logits), labels.repeat_interleave(2)[::2])


def test_int32_labels_equal_int64_labels():
    logits, teacher_logits, labels = inputs(4, 5, 10)
    labels[1] = -100
    for left, right in zip(run(logits, teacher_logits, labels.int()), run(logits, teacher_logits, labels), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("kept", [[0, 3], [2], []], ids=["two", "one", "none"])
def test_ignored_samples(kept, objective):
    logits, teacher_logits, labels = inputs(4, 4, 10)
    ignored = [b for b in range(4) if b not in kept]
    labels[ignored] = -100
    parts, gradient = run(logits, teacher_logits, labels, objective=objective)
    assert (gradient[:, ignored] == 0).all()
    if kept:
        check(logits, teacher_logits, labels, objective=objective)
        logits[:, ignored], teacher_logits[ignored] = math.nan, -math.inf
        logits[:, ignored, 0] = math.inf
        assert torch.equal(run(logits, teacher_logits, labels, objective=objective)[0], parts)
    else:
        assert parts[:2].isnan().all()
        assert (parts[3] == 0) == (objective == "kd")


def test_more_samples_than_programs(monkeypatch):
    expected = run(*inputs(2, 9, 5))
    monkeypatch.setattr(kernel, "MOST_PROGRAMS", 4)
    check(*inputs(2, 9, 5))
    torch.testing.assert_close(run(*inputs(2, 9, 5)), expected, rtol=1e-6, atol=1e-7)  # measured 2e-7: another order
    monkeypatch.setattr(kernel, "LABELS", 1)
    logits, teacher_logits, labels = inputs(1, 40, 2)  # more labels, and programs, than are read at once
    labels[::3] = -100
    monkeypatch.setattr(kernel, "MOST_PROGRAMS", 35)
    check(logits, teacher_logits, labels, objective="kd")


def test_the_counter_is_set_back(monkeypatch):
    counter = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    monkeypatch.setattr(kernel, "counters", lambda device, number: counter)
    first = run(*inputs(3, 5, 4))
    assert counter == 0
    for left, right in zip(run(*inputs(3, 5, 4)), first, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_ties_go_to_the_first(objective, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-1, 2, (4, 4, 9), generator=generator).float()
    teacher_logits = torch.randint(-1, 2, (4, 9), generator=generator).float()
    labels = logits[1].argmax(-1)
    labels[2:] = 8 - logits[2, 2:].flip(-1).argmax(-1)  # the last of equals
    check(logits, teacher_logits, labels, objective=objective)
    in_chunks_of(monkeypatch, 2, 4)
    check(logits, teacher_logits, labels, objective=objective)


EXTREMES = {
    "large": lambda random, T: random.choice([-1e4, 1e4], (T, 3, 5)),
    "large and small": lambda random, T: random.standard_normal((T, 3, 5)) * random.choice([1e-4, 1e4], (T, 3, 1)),
    "squares overflow": lambda random, T: random.standard_normal((T, 3, 5)) * 1e25,
    "below the smallest norm": lambda random, T: random.standard_normal((T, 3, 5)) * 1e-14,
    "far from 0": lambda random, T: 1e4 + np.round(random.standard_normal((T, 3, 5)), 2),
    "all equal": lambda random, T: np.full((T, 3, 5), 2.5),
    "all zero": lambda random, T: np.zeros((T, 3, 5)),
    "one-hot": lambda random, T: np.eye(5)[random.randint(0, 5, (T, 3))],
    "certain": lambda random, T: np.eye(5)[random.randint(0, 5, (T, 3))] * 1e4,
}


@pytest.mark.parametrize(("T", "objective"), [(1, "seal"), (4, "seal"), (4, "tdkd")])
@pytest.mark.parametrize("extreme", EXTREMES)
def test_extreme_logits(extreme, T, objective, monkeypatch):
    random = np.random.RandomState(0)
    logits = torch.tensor(EXTREMES[extreme](random, T), dtype=torch.float32)
    teacher_logits = torch.tensor(EXTREMES[extreme](random, 1)[0], dtype=torch.float32)
    labels = torch.tensor([0, 2, 4])
    assert expected_of(logits, teacher_logits, labels, objective=objective)[0].isfinite().all()
    check(logits, teacher_logits, labels, objective=objective)
    if objective == "seal" and T > 1:
        in_chunks_of(monkeypatch, 2, T)
        check(logits, teacher_logits, labels)


@pytest.mark.parametrize(
    ("T", "options"),
    [(1, {}), (1, {"objective": "kd"}), (4, {"objective": "kd"}), (4, {"beta": 0.0}), (4, {"objective": "tdkd"})],
    ids=str,
)
def test_masked_classes_add_nothing(T, options, monkeypatch):
    logits, teacher_logits, labels = inputs(T, 3, 6)
    labels %= 4
    logits[0, torch.arange(3), labels] = 9.0
    logits[:, :, 4:], teacher_logits[:, 4:] = -math.inf, -math.inf
    kept = run(logits[:, :, :4], teacher_logits[:, :4], labels, **options)
    for classes in (None, 2):
        if classes:
            in_chunks_of(monkeypatch, classes, T)
        parts, gradient = run(logits, teacher_logits, labels, **options)
        finite = 3 if options.get("beta") == 0 else 4  # sta is not defined for similarities of -inf
        torch.testing.assert_close(parts[:finite], kept[0][:finite], rtol=1e-6, atol=1e-7)  # measured 2e-7
        torch.testing.assert_close(gradient[:, :, :4], kept[1], rtol=1e-6, atol=1e-8)  # measured 1e-7
        assert (gradient[:, :, 4:] == 0).all()


def test_a_term_of_weight_zero_cannot_spoil_the_loss():
    logits, teacher_logits, labels = inputs(3, 4, 5)
    logits[:, :, 0] = -math.inf  # a class that the student masks and the teacher does not
    parts, gradient = run(logits, teacher_logits, labels.clamp_min(1), alpha=0.0, beta=0.0)
    assert parts[0] == parts[1]
    assert parts[:2].isfinite().all()
    assert not parts[2].isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("where", ["logits", "teacher_logits"])
def test_nan_in_one_sample_is_not_hidden(where, objective):
    logits, teacher_logits, labels = inputs(3, 4, 5)
    {"logits": logits[:, 2], "teacher_logits": teacher_logits[2]}[where][..., labels[2]] = math.nan
    assert run(logits, teacher_logits, labels, objective=objective)[0][0].isnan()


@pytest.mark.parametrize("label", [5, 2**31 - 1, -1, -(2**31), 2**32 + 1, 2**32 - 100])
def test_a_label_out_of_range_is_no_address(label):
    logits, teacher_logits, labels = inputs(3, 4, 5)
    labels[1] = label
    assert run(logits, teacher_logits, labels)[0][0].isnan()


@pytest.mark.parametrize("options", [{"alpha": 0.0}, {"beta": 0.0}, {"temperature": 0.7}, {"alpha": 3.0, "beta": 2.0}])
def test_any_weights_and_temperature(options):
    for objective in OBJECTIVES:
        check(*inputs(3, 4, 7), **options, objective=objective)


def test_without_the_gradient():
    logits, teacher_logits, labels = (given.to(DEVICE) for given in inputs(4, 3, 10))
    parts, gradient = kernel.forward(logits, teacher_logits, labels, **PUBLISHED, gradient=False)
    assert gradient is None
    assert torch.equal(parts.cpu(), run(*inputs(4, 3, 10))[0])


@pytest.mark.parametrize("case", CASES["loss"], ids=lambda case: f"case{case['j']}")
def test_golden_values_and_gradients(case):
    j, expected, golden = case["j"], case["values"]["f64"], arrays("loss")
    z, q = tensor("loss", f"{j}_z", torch.float32), tensor("loss", f"{j}_q", torch.float32)
    y = tensor("loss", f"{j}_y", torch.int64)
    options = {name: case[name] for name in ("alpha", "beta", "temperature")}
    parts, gradient = run(z, q, y, **options)
    for name, value in zip(PARTS, parts.tolist(), strict=True):
        assert value == pytest.approx(expected[name], rel=VALUE, abs=VALUE), name  # measured 2e-7
    largest = np.abs(golden[f"{j}_g_loss_f64"]).max()
    assert np.abs(gradient.numpy() - golden[f"{j}_g_loss_f64"]).max() <= 1e-5 * largest  # measured 2e-7
    _, gradient = run(z, q, y, alpha=0.2, beta=0.5, temperature=case["temperature"], objective="tdkd")
    largest = np.abs(golden[f"{j}_g_tdkd_loss_f64"]).max()
    assert np.abs(gradient.numpy() - golden[f"{j}_g_tdkd_loss_f64"]).max() <= 1e-5 * largest  # measured 2e-7


@st.composite
def losses(draw):
    T, B, K = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(2, 12))
    logits, teacher_logits, labels = inputs(
        T, B, K, draw(st.integers(0, 2**31)), draw(st.sampled_from([0.1, 2.0, 30.0]))
    )
    if draw(st.booleans()):
        logits, teacher_logits = logits.round(), teacher_logits.round()
    for b in range(1, B):
        if draw(st.integers(0, 3)) == 0:
            labels[b] = -100
    options = {
        "alpha": draw(st.floats(0, 2)),
        "beta": draw(st.floats(0, 2)),
        "temperature": draw(st.floats(0.5, 8)),
        "objective": draw(st.sampled_from(["seal", "seal", "kd", "tdkd"])),
    }
    return (logits, teacher_logits, labels), options, draw(st.sampled_from([None, 2, 4]))


def test_a_sweep_of_losses():
    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(losses())
    def sweep(loss):
        tensors, options, classes = loss
        with pytest.MonkeyPatch.context() as patch:
            if classes:
                in_chunks_of(patch, classes, len(tensors[0]))
            check(*tensors, **options)

    sweep()


@pytest.mark.parametrize(
    ("T", "K", "classes"), [(1, 4, None), (2, 2, None), (4, 100, 8), (10, 10, None), (33, 3, 2), (64, 7, None)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_and_confidence(T, K, classes, dtype, monkeypatch):
    if classes:
        in_chunks_of(monkeypatch, classes, T)
    logits = inputs(T, 2, K)[0].to(dtype)
    check_weights(logits)
    check_weights(LAYOUTS["classes outermost"](logits))


@pytest.mark.parametrize("extreme", EXTREMES)
def test_weights_of_extreme_logits(extreme):
    check_weights(torch.tensor(EXTREMES[extreme](np.random.RandomState(0), 4), dtype=torch.float32))


def check_weights(logits):
    expected = reference.selective_alignment_weights(logits.double())
    for got, right in zip(kernel.weights(logits.to(DEVICE)), expected, strict=True):
        assert got.dtype == torch.float32
        assert got.shape == right.shape
        assert (got.cpu() - right).abs().max() <= WEIGHT
