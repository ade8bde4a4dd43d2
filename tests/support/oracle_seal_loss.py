"""The selective-alignment loss in NumPy and float64, from its formulas, gradients by hand, with a bound of rounding.

Beside each number goes its roundoff in units of the eps of the dtype that a kernel computes in. It starts from that of
logits z/κ - max z/κ, to which their own size adds, and those of targets that are means of logits.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

IGNORED = -100
# Of a probability, in units of float32's eps: exponentials of less than 2^-125 may be 0, and kernels keep them for a
# distribution without its largest logit where their sum is above 1e-20. Measured 4e-14.
LEAST = 2e-11


class Softmax(NamedTuple):
    """Over the last axis; `off` is the roundoff of the logarithm, absolute, and so that of p, relative."""

    p: np.ndarray
    log: np.ndarray
    off: np.ndarray


class Loss(NamedTuple):
    """Loss, CE, ELA and STA with their roundoffs [4], and the gradient with its own [T, B, K]."""

    parts: np.ndarray
    parts_off: np.ndarray
    gradient: np.ndarray
    gradient_off: np.ndarray


def softmax(z: np.ndarray, off: np.ndarray | float, kappa: float) -> Softmax:
    """Of z/κ, where z is off by `off`."""
    shifted = (z - z.max(-1, keepdims=True)) / kappa
    e = np.exp(shifted)
    total = e.sum(-1, keepdims=True)
    p, log = e / total, shifted - np.log(total)
    of_logit = off / kappa + 2 * np.abs(np.where(np.isinf(shifted), 0, shifted)) + 2
    together = (p * of_logit).sum(-1, keepdims=True)
    return Softmax(p, log, of_logit + together + np.log(total) + 2)


def divergence(target: Softmax, student: Softmax):
    """KL(target ‖ student) and its roundoff; a class of target probability 0 adds nothing."""
    apart = np.where(target.p == 0, 0.0, target.log - student.log)
    sizes = np.where(target.p == 0, 0.0, np.abs(target.log) + np.abs(student.log))
    terms = np.where(target.p == 0, 0.0, target.p * apart)
    either = np.where(target.p == 0, 0.0, target.off + student.off)
    # A target that moves along itself changes no divergence but by the other's distance.
    off = target.p * (either + sizes) + np.abs(terms) * np.where(target.p == 0, 0.0, target.off + 4)
    return terms.sum(-1), off.sum(-1)


def weights(z: np.ndarray):
    """A [B, T, T] and confidence [T, B], and their roundoffs."""
    T, _, K = z.shape
    of_step = softmax(z, 0.0, 1.0)
    logarithms = np.log(of_step.p + 1e-8)
    confidence = 1 + (of_step.p * logarithms).sum(-1) / np.log(K)
    confidence_off = 4 + (of_step.p * (of_step.off * (1 + np.abs(logarithms)) + np.abs(logarithms))).sum(-1) / np.log(K)
    largest = np.abs(z).max(-1, keepdims=True)  # so that no square underflows or overflows
    unit = z / np.where(largest > 0, largest, 1.0)
    norm = np.sqrt((unit**2).sum(-1, keepdims=True))
    unit = unit / np.maximum(norm, np.divide(1e-12, largest, out=np.full_like(largest, np.inf), where=largest > 0))
    batch = np.swapaxes(unit, 0, 1)
    similarity = batch @ np.swapaxes(batch, 1, 2)
    scores = confidence.T[:, None, :] * similarity
    scores_off = confidence_off.T[:, None, :] * np.abs(similarity) + 8 * np.abs(confidence.T[:, None, :])
    if T == 1:
        return np.zeros((z.shape[1], 1, 1)), confidence, np.zeros((z.shape[1], 1, 1)), confidence_off
    others = ~np.eye(T, dtype=bool)
    e = np.where(others, np.exp(scores), 0.0)
    A = e / e.sum(-1, keepdims=True)
    off = A * (scores_off + (A * scores_off).sum(-1, keepdims=True) + 4)
    return A, confidence, off, confidence_off


def error_aware(z, q, y):
    """Student s and teacher q' [T, B, K] of ELA, and the predictions w [T, B]: the first of the largest."""
    T, B, _ = z.shape
    w = z.argmax(-1)
    t, b = np.indices((T, B))
    s, agreed = z.copy(), np.broadcast_to(q, z.shape).copy()
    s[t, b, w] = z[t, b, y[b]]
    least = np.minimum(agreed[t, b, w], agreed[t, b, y[b]])
    agreed[t, b, w] = agreed[t, b, y[b]] = least
    return s, agreed, w


def correct_mean(z, y):
    """Mean logits [B, K] over the time steps that predict the label, and their size; zeros where there are none."""
    correct = (z.argmax(-1) == y)[..., None]
    count = np.maximum(correct.sum(0), 1)
    return np.where(correct, z, 0).sum(0) / count, np.where(correct, np.abs(z), 0).sum(0) / count


def seal_loss(z, q, labels, *, alpha, beta, temperature, objective, cancels=False) -> Loss:
    """Of float64 logits [T, B, K], teacher logits [B, K] and labels [B].

    `cancels`: whether CE is computed as logsumexp(z) - z[y], and its gradient from exp(z - logsumexp(z)), which lose
    digits where logits are large.
    """
    with np.errstate(all="ignore"):
        return _seal_loss(z, q, labels, alpha, beta, temperature, objective, cancels)


def _seal_loss(z, q, labels, alpha, beta, kappa, objective, cancels) -> Loss:
    T, B, K = z.shape
    valid = labels != IGNORED
    y = np.where(valid, labels, 0)
    steps = valid.sum() * T
    t, b = np.indices((T, B))

    def mean(values):
        return np.where(valid, values, 0.0).sum() / steps if steps else np.nan

    hard, soft = softmax(z, cancels * np.abs(z).max(-1, keepdims=True), 1.0), softmax(z, 0.0, kappa)
    one_hot = np.arange(K) == y[:, None]
    ce = -hard.log[t, b, y[b]]
    ce_off = hard.off[t, b, y[b]] + 2 * np.abs(ce)
    parts, parts_off = [mean(ce)], [mean(ce_off)]
    gradient, off = hard.p - one_hot, hard.p * hard.off + np.abs(hard.p - one_hot) + LEAST

    def pull(target: Softmax, student: Softmax):
        """Value and gradient of κ² KL, and their roundoffs."""
        value, value_off = divergence(target, student)
        apart = student.p - target.p
        apart_off = student.p * (student.off + 2) + target.p * (target.off + 2) + LEAST
        return kappa**2 * value, kappa**2 * value_off, kappa * apart, kappa * apart_off

    terms = []
    if objective == "seal":
        s, agreed, w = error_aware(z, q, y)
        value, value_off, e, e_off = pull(softmax(agreed, 0.0, kappa), softmax(s, 0.0, kappa))
        wrong = w != y
        # The logit that stands for the largest is the label's; what moves there is rounded where it is taken away, too.
        moved, moved_off = (np.where(wrong, each[t, b, w], 0.0) for each in (e, e_off))
        e[t, b, w] -= moved
        e[t, b, y[b]] += moved
        for place in (w, np.broadcast_to(y, w.shape)):
            e_off[t, b, place] += moved_off + np.abs(moved)
        terms.append((alpha, value, value_off, e, e_off))
        if T > 1:
            A, _, A_off, _ = weights(z)
            target, target_off = (
                np.swapaxes(weight @ np.swapaxes(each, 0, 1), 0, 1) for weight, each in ((A, z), (A + A_off, np.abs(z)))
            )
            terms.append((beta, *pull(softmax(target, 2 * target_off, kappa), soft)))
    else:
        terms.append((alpha, *pull(softmax(np.broadcast_to(q, z.shape), 0.0, kappa), soft)))
        if objective == "tdkd":
            target, size = correct_mean(z, y)
            wide = (np.broadcast_to(each, z.shape) for each in (target, 2 * size))
            terms.append((beta, *pull(softmax(*wide, kappa), soft)))
    loss, loss_off = parts[0], parts_off[0]
    for weight, value, value_off, e, e_off in terms:
        parts.append(mean(value))
        parts_off.append(mean(value_off))
        if weight:  # what is not asked for cannot spoil the loss
            loss, loss_off = loss + weight * parts[-1], loss_off + weight * (parts_off[-1] + np.abs(parts[-1]))
            gradient, off = gradient + weight * e, off + weight * (e_off + np.abs(e))
    while len(parts) < 3:
        parts.append(0.0)
        parts_off.append(0.0)
    mask = valid[:, None] & np.ones((T, 1, 1), bool)
    scaled = (np.where(mask, each, 0.0) / max(steps, 1) for each in (gradient, off + 4 * np.abs(gradient)))
    return Loss(np.array([loss, *parts]), np.array([loss_off + np.abs(loss), *parts_off]), *scaled)
