"""What a program of triton.py does with a chunk of its sample: BLOCK of the K classes, at all T time steps.

t [T] and k [BLOCK] are the indices of its rows and columns. Both sizes are powers of two, so that there are rows from T
on, which hold 0, and columns from K on, which hold -inf: no part of a softmax or of a maximum.

Targets are mixed of rows less their maxima m [T]: this only shifts them, and rounds less where logits are far from 0.
"""

import triton
import triton.language as tl

_UNROLLED = tl.constexpr(8)  # up to so many time steps, the loop over them is unrolled


@triton.jit
def load_chunk(tile, logits, t, k, T, K, stride_t, stride_k):
    """Logits [T, BLOCK] in float32; tile, if there is one, has them already."""
    if tile is None:
        inside = (t < T)[:, None] & (k < K)[None, :]
        z = tl.load(logits + t[:, None] * stride_t + k[None, :] * stride_k, inside, other=0.0).to(tl.float32)
        z = tl.where((k < K)[None, :], z, float("-inf"))
    else:
        z = tile
    return z


@triton.jit
def load_row(logits, k, K, stride_k, FILL: tl.constexpr):
    """One row [BLOCK] of logits in float32, FILL from K on."""
    return tl.load(logits + k * stride_k, k < K, other=FILL).to(tl.float32)


@triton.jit
def linear(z, k, K):
    """For sums, z [T, BLOCK] with 0 in the columns from K on."""
    return tl.where((k < K)[None, :], z, 0.0)


@triton.jit
def replace(z, q, k, w, y, z_y, agreed):
    """The error-aware s and q' [T, BLOCK] for z and the teacher's q [BLOCK].

    w and y [T] are -1 in steps where nothing is replaced, else the prediction and the label; z_y [T] are the label's
    logits; agreed [T] is the smaller one of the teacher's logits at w and y.
    """
    at_w = k[None, :] == w[:, None]
    at_y = k[None, :] == y[:, None]
    return tl.where(at_w, z_y[:, None], z), tl.where(at_w | at_y, agreed[:, None], q[None, :])


@triton.jit
def divergence_sums(target, target_max, z, z_max, soften):
    """Row sums of e = exp((target - target_max)/κ) and of e · ((target - target_max) - (z - z_max))."""
    shifted = target - target_max[:, None]
    e = tl.exp2(shifted * soften)
    # A class of target probability 0 adds nothing, also where z is -inf.
    terms = tl.where(target == float("-inf"), 0.0, e * (shifted - (z - z_max[:, None])))
    return tl.sum(e, 1), tl.sum(terms, 1)


@triton.jit
def weighed(weight, term):
    """The product; 0 where the weight is 0, as 0 · inf would be NaN."""
    return tl.where(weight != 0, weight * term, 0.0)


@triton.jit
def label_gradient(
    ready,  # the result, if it is known already
    z,
    q,  # [BLOCK]
    k,
    label,
    w,  # this and the next three as in replace
    y,
    z_y,
    agreed,
    m,  # maxima and sums [T] as in triton.py
    z_1,
    s_max,
    z_s,
    q_max,
    z_q,
    soften,
    weight,
):
    """The gradient [T, BLOCK] of CE_t + weight/κ · ELA_t."""
    if ready is None:
        g = tl.exp(z - m[:, None]) * (1.0 / z_1)[:, None] - (k == label)[None, :].to(tl.float32)
        s, q = replace(z, q, k, w, y, z_y, agreed)
        e = tl.exp2((s - s_max[:, None]) * soften) * (1.0 / z_s)[:, None]
        e -= tl.exp2((q - q_max[:, None]) * soften) * (1.0 / z_q)[:, None]
        e = tl.where(k[None, :] == w[:, None], 0.0, tl.where(k[None, :] == y[:, None], 2.0 * e, e))
        g += weighed(weight, e)
    else:
        g = ready
    return g


@triton.jit
def _at(values, t, j):
    """Entry j of values [T]."""
    return tl.sum(tl.where(t == j, values, 0.0), 0)


@triton.jit
def _add_step(mixed, total, z, m, confidence, inverse_norm, t, j, T):
    """Add step j to Σ_j exp(score_ij) (z_j - m_j) [T, K] and to Σ_j exp(score_ij) [T]."""
    row = tl.sum(tl.where((t == j)[:, None], z, 0.0), 0)
    unit = row * _at(inverse_norm, t, j)
    similarity = tl.sum(z * unit[None, :], 1) * inverse_norm
    other = (t != j) & (tl.zeros_like(t) + j < T)
    weight = tl.where(other, tl.exp(_at(confidence, t, j) * similarity), 0.0)
    return mixed + weight[:, None] * (row - _at(m, t, j))[None, :], total + weight


@triton.jit
def _mix_resident(z, m, confidence, inverse_norm, t, T):
    """The target [T, K] for z [T, K] of a whole sample."""
    mixed = tl.zeros_like(z)
    total = tl.zeros_like(confidence)
    if z.shape[0] <= _UNROLLED:
        for j in tl.static_range(z.shape[0]):
            mixed, total = _add_step(mixed, total, z, m, confidence, inverse_norm, t, j, T)
    else:
        for j in range(T):
            mixed, total = _add_step(mixed, total, z, m, confidence, inverse_norm, t, j, T)
    return mixed * (1.0 / total)[:, None]


@triton.jit
def add_similarities(similarity, z, inverse_norm, logits, t, k, T, K, stride_t, stride_k):
    """Add the chunk's part of Σ_k z_ik z_jk / |z_j| to similarity [T, T]."""
    steps = tl.arange(0, similarity.shape[1])
    for j in range(T):
        unit = load_row(logits + j * stride_t, k, K, stride_k, 0.0) * _at(inverse_norm, t, j)
        column = tl.sum(z * unit[None, :], 1)
        similarity += tl.where((steps == j)[None, :], column[:, None], 0.0)
    return similarity


@triton.jit
def alignment(similarity, confidence, inverse_norm, t, T):
    """The weights A [T, T] from the sums of add_similarities."""
    j = tl.arange(0, similarity.shape[1])
    scores = confidence[None, :] * (similarity * inverse_norm[:, None])
    weights = tl.where((t[:, None] != j[None, :]) & (j < T)[None, :], tl.exp(scores), 0.0)
    if similarity.shape[1] > 1:
        weights = weights / tl.sum(weights, 1)[:, None]
    return weights


@triton.jit
def _mix(weights, z, m, logits, t, k, T, K, stride_t, stride_k):
    """A chunk of A (z - m) for weights A [T, T]; z gives only its shape."""
    steps = tl.arange(0, weights.shape[1])
    mixed = tl.zeros_like(z)
    for j in range(T):
        column = tl.sum(tl.where((steps == j)[None, :], weights, 0.0), 1)
        row = load_row(logits + j * stride_t, k, K, stride_k, 0.0) - _at(m, t, j)
        mixed += column[:, None] * row[None, :]
    return mixed


@triton.jit
def _correct_mean(z, m, correct):
    """The mean of the correct rows of z - m, in every row; correct is [T]."""
    total = tl.sum(tl.where(correct[:, None], z - m[:, None], 0.0), 0)
    mean = total / tl.maximum(tl.sum(correct.to(tl.float32), 0), 1.0)
    return tl.zeros_like(z) + mean[None, :]


@triton.jit
def temporal_target(
    ready,  # the result, if it is known already
    z,
    m,  # [T]
    weights,  # A [T, T]; None where z is a whole sample
    confidence,  # [T]
    inverse_norm,  # [T]
    correct,  # [T]
    logits,
    t,
    k,
    T,
    K,
    stride_t,
    stride_k,
    OBJECTIVE: tl.constexpr,
):
    """A chunk [T, BLOCK] of ẑ but for a shift of each row: what the third part of the loss aligns z with."""
    if ready is None:
        if OBJECTIVE == "tdkd":
            target = _correct_mean(linear(z, k, K), m, correct)
        elif weights is None:
            target = _mix_resident(linear(z, k, K), m, confidence, inverse_norm, t, T)
        else:
            target = _mix(weights, z, m, logits, t, k, T, K, stride_t, stride_k)
        target = tl.where((k < K)[None, :], target, float("-inf"))
    else:
        target = ready
    return target
