"""The distillation loss and its gradient against a naive loop over samples and time steps in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seal_fast import seal_loss, selective_alignment_weights

pytestmark = pytest.mark.usefixtures("each_loss_backend")

IGNORED = -100
VALUE = 1e-11  # relative; measured 8e-13
GRADIENT = 1e-12  # of the largest entry; measured 6e-15


def softmax(values):
    exponentials = np.exp(values - values.max())
    return exponentials / exponentials.sum()


def divergence(target, z, kappa):
    """κ²·KL of the softened distributions; a class of probability 0 adds nothing."""
    total = 0.0
    for p, log_ratio in zip(softmax(target / kappa), log_softmax(target / kappa) - log_softmax(z / kappa), strict=True):
        total += p * log_ratio if p > 0 else 0.0
    return kappa**2 * total


def log_softmax(values):
    shifted = values - values.max()
    return shifted - math.log(np.exp(shifted).sum())


def first_largest(values):
    best = 0
    for k in range(len(values)):
        if values[k] > values[best]:
            best = k
    return best


def confidence(z):
    p = softmax(z)
    return (math.log(len(z)) + sum(p_k * math.log(p_k + 1e-8) for p_k in p)) / math.log(len(z))


def cosine(left, right):
    return left @ right / (max(np.sqrt(left @ left), 1e-12) * max(np.sqrt(right @ right), 1e-12))


def naive_weights(z):
    """[B, T, T] weights of the other time steps, for z [T, B, K]."""
    T, B, _ = z.shape
    weights = np.zeros((B, T, T))
    for b in range(B):
        for i in range(T):
            others = [j for j in range(T) if j != i]
            if others:
                scores = np.array([confidence(z[j, b]) * cosine(z[i, b], z[j, b]) for j in others])
                weights[b, i, others] = softmax(scores)
    return weights


def naive_loss(z, q, y, *, alpha, beta, kappa, objective):
    """(loss, ce, ela, sta) and the gradient to z."""
    T, B, _ = z.shape
    samples = [b for b in range(B) if y[b] != IGNORED]
    steps = T * len(samples)
    ce = ela = sta = 0.0
    grad = np.zeros_like(z)
    weights = naive_weights(z)
    for b in samples:
        label = y[b]
        correct = [z[t, b] for t in range(T) if first_largest(z[t, b]) == label]
        for t in range(T):
            p = softmax(z[t, b])
            ce -= log_softmax(z[t, b])[label] / steps
            p[label] -= 1
            grad[t, b] += p / steps

            student, teacher, w = z[t, b].copy(), q[b].copy(), first_largest(z[t, b])
            if objective == "seal" and w != label:
                student[w] = z[t, b, label]
                teacher[label] = teacher[w] = min(q[b, label], q[b, w])
            ela += divergence(teacher, student, kappa) / steps
            e = kappa / steps * (softmax(student / kappa) - softmax(teacher / kappa))
            if objective == "seal" and w != label:
                e[label], e[w] = e[label] + e[w], 0.0
            grad[t, b] += alpha * e

            if objective == "seal" and T > 1:
                target = sum(weights[b, t, j] * z[j, b] for j in range(T))
            elif objective == "tdkd":
                target = sum(correct) / len(correct) if correct else np.zeros_like(q[b])
            else:
                continue
            sta += divergence(target, z[t, b], kappa) / steps
            grad[t, b] += beta * kappa / steps * (softmax(z[t, b] / kappa) - softmax(target / kappa))
    return (ce + alpha * ela + beta * sta, ce, ela, sta), grad


@st.composite
def loss_inputs(draw):
    T, B, K = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(2, 12))
    random = np.random.RandomState(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.1, 2.0, 30.0]))
    z, q = random.standard_normal((T, B, K)) * scale, random.standard_normal((B, K)) * scale
    y = random.randint(0, K, B)
    if draw(st.booleans()):
        z, q = np.round(z), np.round(q)  # ties
    if draw(st.booleans()):
        z[0, 0, y[0]] = z.max() + 1  # a correct time step
    for b in range(1, B):
        if draw(st.integers(0, 3)) == 0:
            y[b] = IGNORED
    options = {
        "alpha": draw(st.sampled_from([0.0, 0.6]) | st.floats(0, 2)),
        "beta": draw(st.sampled_from([0.0, 0.15]) | st.floats(0, 2)),
        "objective": draw(st.sampled_from(["seal", "seal", "kd", "tdkd"])),
    }
    return z, q, y, draw(st.sampled_from([3.0]) | st.floats(0.5, 8)), options, draw(st.sampled_from(["i4", "i8"]))


def test_loss_and_gradient_equal_a_naive_float64_loop():
    erroneous = correct = 0

    @settings(max_examples=120, deadline=None, derandomize=True)
    @given(loss_inputs())
    def sweep(inputs):
        nonlocal erroneous, correct
        z, q, y, kappa, options, integer = inputs
        expected, expected_grad = naive_loss(z, q, y, kappa=kappa, **options)
        logits = torch.tensor(z).requires_grad_()
        labels = torch.tensor(y.astype(integer))
        parts = seal_loss(logits, torch.tensor(q), labels, temperature=kappa, **options)
        parts.loss.backward()
        for name, got, right in zip(parts._fields, parts, expected, strict=True):
            assert got.item() == pytest.approx(right, rel=VALUE, abs=VALUE), name
        assert np.abs(logits.grad.numpy() - expected_grad).max() <= GRADIENT * max(np.abs(expected_grad).max(), 1e-3)
        wrong = z.argmax(-1) != y
        erroneous += wrong.sum()
        correct += (~wrong).sum()

    sweep()
    assert erroneous > 100
    assert correct > 100


def test_weights_and_confidence_equal_a_naive_float64_loop():
    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(loss_inputs())
    def sweep(inputs):
        z = inputs[0]
        weights, certain = selective_alignment_weights(torch.tensor(z))
        np.testing.assert_allclose(weights.numpy(), naive_weights(z), rtol=0, atol=1e-13)  # measured 2e-16
        expected = np.array([[confidence(z_tb) for z_tb in z_t] for z_t in z])
        np.testing.assert_allclose(certain.numpy(), expected, rtol=0, atol=1e-13)  # measured 2e-16

    sweep()


EXTREMES = {
    "large": lambda random, T: random.choice([-1e4, 1e4], (T, 3, 5)),
    "large and small": lambda random, T: random.standard_normal((T, 3, 5)) * random.choice([1e-4, 1e4], (T, 3, 1)),
    "all equal": lambda random, T: np.full((T, 3, 5), 2.5),
    "all zero": lambda random, T: np.zeros((T, 3, 5)),
    "one-hot": lambda random, T: np.eye(5)[random.randint(0, 5, (T, 3))],
    "certain": lambda random, T: np.eye(5)[random.randint(0, 5, (T, 3))] * 1e4,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("extreme", EXTREMES)
def test_extreme_logits_stay_finite_and_right(extreme, T, dtype):
    random = np.random.RandomState(0)
    z = EXTREMES[extreme](random, T).astype("f4").astype("f8")
    q, y = EXTREMES[extreme](random, 1)[0].astype("f4").astype("f8"), np.array([0, 2, 4])
    expected, expected_grad = naive_loss(z, q, y, alpha=0.6, beta=0.15, kappa=3.0, objective="seal")
    assert np.isfinite(expected).all()
    logits = torch.tensor(z, dtype=dtype, requires_grad=True)
    parts = seal_loss(logits, torch.tensor(q, dtype=dtype), torch.tensor(y), alpha=0.6, beta=0.15)
    parts.loss.backward()
    # Measured 3e-15 in float64; in float32 3e-7, and 6e-7 where a part is nearly 0.
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for name, got, right in zip(parts._fields, parts, expected, strict=True):
        assert got.item() == pytest.approx(right, rel=tolerance, abs=tolerance), name
    # The rounding of a logit becomes the relative error of its exponential; measured 4e-5 in float32 for logits of 1e4,
    # else 3e-8; 5e-14 in float64.
    tolerance = 1e-12 if dtype == torch.float64 else max(1e-6, 1e-8 * np.abs(z).max())
    np.testing.assert_allclose(logits.grad.numpy(), expected_grad, rtol=0, atol=tolerance)


@pytest.mark.parametrize("objective", ["seal", "kd"])
def test_masked_classes_add_nothing(objective):
    """Classes masked with -inf by student and teacher alike, none of them a label, in one time step."""
    random = np.random.RandomState(0)
    z, q, y = random.standard_normal((1, 3, 6)), random.standard_normal((3, 6)), np.array([0, 1, 2])
    kept = seal_loss(
        torch.tensor(z[:, :, :4]), torch.tensor(q[:, :4]), torch.tensor(y), alpha=1.0, beta=1.0, objective=objective
    )
    z[:, :, 4:], q[:, 4:] = -np.inf, -np.inf
    logits = torch.tensor(z, requires_grad=True)
    parts = seal_loss(logits, torch.tensor(q), torch.tensor(y), alpha=1.0, beta=1.0, objective=objective)
    parts.loss.backward()
    assert [part.item() for part in parts] == pytest.approx([part.item() for part in kept], rel=1e-14)  # measured 0
    assert logits.grad.isfinite().all()
    assert (logits.grad[:, :, 4:] == 0).all()


def test_masked_classes_leave_cross_entropy_and_ela_finite_over_time():
    """The similarity of two steps with -inf in them is not defined, so neither is sta."""
    random = np.random.RandomState(0)
    z, q, y = random.standard_normal((3, 2, 6)), random.standard_normal((2, 6)), np.array([0, 1])
    z[:, :, 5], q[:, 5] = -np.inf, -np.inf
    parts = seal_loss(torch.tensor(z), torch.tensor(q), torch.tensor(y), alpha=1.0, beta=0.0)
    assert parts.ce.isfinite()
    assert parts.ela.isfinite()
