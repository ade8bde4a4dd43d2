"""What the distillation loss promises besides its values: ties, ignored samples, dtypes, layouts and gradients."""

import math

import pytest
import torch
import torch.nn.functional as F

from seal_fast import seal_loss, selective_alignment_weights

pytestmark = pytest.mark.usefixtures("each_loss_backend")

OBJECTIVES = ("seal", "kd", "tdkd")


def inputs(T=4, B=6, K=10, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(T, B, K, dtype=torch.float64, generator=generator) * 2
    teacher_logits = torch.randn(B, K, dtype=torch.float64, generator=generator) * 2
    labels = torch.randint(0, K, (B,), generator=generator)
    logits[0, 0, labels[0]] = 9.0  # a correct time step
    return logits.to(dtype), teacher_logits.to(dtype), labels


def run(logits, teacher_logits, labels, alpha=0.6, beta=0.15, **options):
    leaf = logits.detach().requires_grad_()
    parts = seal_loss(leaf, teacher_logits, labels, alpha=alpha, beta=beta, **options)
    (gradient,) = torch.autograd.grad(parts.loss, leaf)
    return parts, gradient


def assert_same(got, expected, **tolerance):
    for name, left, right in zip(got[0]._fields, got[0], expected[0], strict=True):
        torch.testing.assert_close(left, right, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(got[1], expected[1], **tolerance)


def test_of_equal_logits_the_first_is_the_prediction():
    """Labelled with the first of two largest, a step is right: no logit is replaced. With the second, it is wrong."""
    logits = torch.tensor([[[0.5, 2.0, 2.0, -1.0]]], dtype=torch.float64)
    teacher_logits = torch.tensor([[0.1, 1.0, 3.0, 0.2]], dtype=torch.float64)

    def divergence(target):
        log_z, p = torch.log_softmax(logits[0, 0] / 3, -1), torch.softmax(target / 3, -1)
        return (9 * (p * (p.log() - log_z)).sum()).item()

    right, _ = run(logits, teacher_logits, torch.tensor([1]))
    wrong, gradient = run(logits, teacher_logits, torch.tensor([2]), alpha=1.0, beta=0.0)
    agreed = torch.tensor([0.1, 1.0, 1.0, 0.2], dtype=torch.float64)
    assert right.ela.item() == pytest.approx(divergence(teacher_logits[0]), rel=1e-12)
    assert wrong.ela.item() == pytest.approx(divergence(agreed), rel=1e-12)
    cross_entropy = torch.softmax(logits[0, 0], -1) - torch.tensor([0.0, 0.0, 1.0, 0.0])
    assert gradient[0, 0, 1].item() == pytest.approx(cross_entropy[1].item(), rel=1e-12)  # nothing from ela


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_ignored_samples_count_as_if_they_were_not_there(objective):
    logits, teacher_logits, labels = inputs()
    kept = [0, 2, 5]
    expected, expected_gradient = run(logits[:, kept], teacher_logits[kept], labels[kept], objective=objective)
    labels[[1, 3, 4]] = -100
    got, gradient = run(logits, teacher_logits, labels, objective=objective)
    assert_same((got, gradient[:, kept]), (expected, expected_gradient), rtol=1e-12, atol=1e-14)  # measured 9e-16
    assert (gradient[:, [1, 3, 4]] == 0).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_is_nan_where_all_samples_are_ignored_as_in_cross_entropy(objective):
    logits, teacher_logits, labels = inputs()
    labels[:] = -100
    assert F.cross_entropy(logits[0], labels).isnan()
    parts = seal_loss(logits, teacher_logits, labels, alpha=0.6, beta=0.15, objective=objective)
    assert parts.loss.isnan()
    assert parts.ce.isnan()


def test_cross_entropy_is_torchs():
    logits, teacher_logits, labels = inputs()
    labels[2] = -100
    parts, gradient = run(logits, teacher_logits, labels, alpha=0.0, beta=0.0)
    leaf = logits.clone().requires_grad_()
    expected = F.cross_entropy(leaf.flatten(0, 1), labels.repeat(len(logits)))
    expected.backward()
    torch.testing.assert_close(parts.ce, expected.detach(), rtol=1e-13, atol=0)  # measured 5e-16
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-12, atol=1e-16)  # measured 5e-16
    assert torch.equal(parts.loss, parts.ce)


def test_int32_labels_equal_int64_labels():
    logits, teacher_logits, labels = inputs()
    labels[1] = -100
    assert_same(run(logits, teacher_logits, labels.int()), run(logits, teacher_logits, labels), rtol=0, atol=0)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_logits_are_computed_in_float32(dtype, objective):
    logits, teacher_logits, labels = inputs(dtype=dtype)
    got, gradient = run(logits, teacher_logits, labels, objective=objective)
    expected, expected_gradient = run(logits.float(), teacher_logits.float(), labels, objective=objective)
    assert got.loss.dtype == torch.float32
    assert gradient.dtype == dtype
    assert_same((got, gradient), (expected, expected_gradient.to(dtype)), rtol=0, atol=0)


def test_teacher_logits_of_another_dtype_are_taken_to_the_logits():
    logits, teacher_logits, labels = inputs(dtype=torch.float32)
    half = teacher_logits.bfloat16()
    assert_same(run(logits, half, labels), run(logits, half.float(), labels), rtol=0, atol=0)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_changes_nothing(dtype, objective):
    logits, teacher_logits, labels = inputs(dtype=dtype)
    expected = run(logits, teacher_logits, labels, objective=objective)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(logits, teacher_logits, labels, objective=objective)
        weights, confidence = selective_alignment_weights(logits)
    assert_same(got, expected, rtol=0, atol=0)
    assert weights.dtype == confidence.dtype == torch.float32


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("order", [(1, 0, 2), (2, 1, 0), (0, 2, 1)])
def test_logits_of_any_strides_give_the_result_of_contiguous_ones(order, objective):
    logits, teacher_logits, labels = inputs()
    inverse = [order.index(axis) for axis in range(3)]
    strided = logits.permute(order).contiguous().permute(inverse)
    assert not strided.is_contiguous()
    expected = run(logits, teacher_logits, labels, objective=objective)
    got = run(strided, teacher_logits.t().contiguous().t(), labels, objective=objective)
    assert_same(got, expected, rtol=1e-12, atol=1e-14)  # measured 6e-16


def test_one_time_step_has_nothing_to_align_with():
    logits, teacher_logits, labels = inputs(T=1)
    parts, gradient = run(logits, teacher_logits, labels, beta=5.0)
    assert parts.sta == 0
    assert_same((parts, gradient), run(logits, teacher_logits, labels, beta=0.0), rtol=0, atol=0)
    weights, confidence = selective_alignment_weights(logits)
    assert weights.shape == (6, 1, 1)
    assert weights.abs().max() == 0
    assert confidence.shape == (1, 6)


@pytest.mark.parametrize(("objective", "T", "targets"), [("seal", 3, True), ("seal", 1, False), ("kd", 3, False)])
def test_where_every_sample_is_ignored_only_what_has_a_target_is_nan(objective, T, targets):
    logits, teacher_logits, labels = inputs(T=T)
    parts, gradient = run(logits, teacher_logits, torch.full_like(labels, -100), objective=objective)
    assert [part.isnan().item() for part in parts] == [True, True, True, targets]
    assert targets or parts.sta == 0
    assert not gradient.any()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_ignored_may_be_anything(value, objective):
    logits, teacher_logits, labels = inputs()
    labels[2] = -100
    expected = run(logits, teacher_logits, labels, objective=objective)
    logits[:, 2], teacher_logits[2] = value, value
    assert_same(run(logits, teacher_logits, labels, objective=objective), expected, rtol=0, atol=0)


def test_cross_entropy_of_large_logits_loses_no_digits():
    """The logarithm of a sum of exponentials less the label's logit would be 0."""
    logits = torch.full((1, 1, 2), 1e8, dtype=torch.float32)
    parts, gradient = run(logits, torch.zeros(1, 2), torch.tensor([1]), alpha=0.0, beta=0.0)
    assert parts.ce.item() == pytest.approx(math.log(2), rel=1e-6)
    torch.testing.assert_close(gradient, torch.tensor([[[0.5, -0.5]]]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_time_step_has_weights_of_zero_whatever_its_logits(value):
    weights, _ = selective_alignment_weights(torch.full((1, 2, 3), value, dtype=torch.float64))
    assert torch.equal(weights, torch.zeros(2, 1, 1, dtype=torch.float64))


def test_weights_of_zero_leave_the_cross_entropy():
    logits, teacher_logits, labels = inputs()
    parts, gradient = run(logits, teacher_logits, labels, alpha=0.0, beta=0.0)
    assert torch.equal(parts.loss, parts.ce)
    assert parts.ela > 0
    assert parts.sta > 0
    expected = torch.softmax(logits, -1) - F.one_hot(labels, 10)
    torch.testing.assert_close(gradient, expected / 24, rtol=1e-12, atol=1e-16)  # measured 5e-16


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_only_the_loss_carries_a_gradient_and_only_to_the_logits(objective):
    logits, teacher_logits, labels = inputs()
    logits.requires_grad_()
    teacher_logits.requires_grad_()
    parts = seal_loss(logits, teacher_logits, labels, alpha=0.6, beta=0.15, objective=objective)
    assert [part.requires_grad for part in parts] == [True, False, False, False]
    parts.loss.backward()
    assert logits.grad.abs().max() > 0
    assert teacher_logits.grad is None


def test_weights_and_confidence_carry_no_gradient():
    logits, _, _ = inputs()
    weights, confidence = selective_alignment_weights(logits.requires_grad_())
    assert not weights.requires_grad
    assert not confidence.requires_grad


@pytest.mark.parametrize("scale", [0.0, 0.1, 3.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rows_of_the_weights_sum_to_one_without_the_step_itself(dtype, scale):
    logits, _, _ = inputs(T=5, dtype=dtype)
    weights, confidence = selective_alignment_weights(logits * scale)
    rounding = torch.finfo(weights.dtype).eps
    assert weights.shape == (6, 5, 5)
    assert (weights >= 0).all()
    assert (weights.diagonal(dim1=1, dim2=2) == 0).all()
    torch.testing.assert_close(
        weights.sum(-1), torch.ones_like(weights[0, 0, 0]).expand(6, 5), rtol=0, atol=4 * rounding
    )
    # The 1e-8 in its logarithm and rounding take the confidence out of [0, 1]; measured by 4e-9 in float64, else by 0.
    slack = 1e-8 + 4 * rounding
    assert confidence.min() >= -slack
    assert confidence.max() <= 1 + slack


def test_a_confident_similar_step_weighs_more():
    step = torch.tensor([4.0, 0.0, 0.0])
    logits = torch.stack([step, 2 * step, 0.1 * step, step.roll(1)]).unsqueeze(1)  # sure, surer, unsure, other class
    weights, confidence = selective_alignment_weights(logits)
    assert confidence[1, 0] > confidence[0, 0] > confidence[2, 0]
    assert weights[0, 0, 1] > weights[0, 0, 2] > weights[0, 0, 3]


@pytest.mark.parametrize("where", ["logits", "teacher_logits"])
def test_nan_in_one_sample_is_not_hidden(where):
    logits, teacher_logits, labels = inputs()
    {"logits": logits[:, 2], "teacher_logits": teacher_logits[2]}[where].detach()[..., 1] = math.nan
    assert seal_loss(logits.detach(), teacher_logits, labels, alpha=0.6, beta=0.15).loss.isnan()


def test_a_term_of_weight_zero_cannot_spoil_the_loss():
    logits, teacher_logits, labels = inputs()
    logits = logits.detach()
    logits[:, :, 0] = -math.inf  # a class that the student masks and the teacher does not: ELA is infinite
    parts = seal_loss(logits, teacher_logits, labels.clamp_min(1), alpha=0.0, beta=0.0)
    assert parts.ela.isinf() or parts.ela.isnan()
    assert parts.loss.isfinite()
