r"""The selective-alignment distillation loss in torch: the meaning that every kernel reproduces.

Logits z [T,B,K], teacher q [B,K], labels y [B], temperature κ. All means run over t and over the samples that are not
ignored (label -100).

    L = CE + α·ELA + β·STA

ELA, error-aware logit alignment: κ²·KL(softmax(q'/κ) ‖ softmax(s/κ)). With w the first index of the largest logit, s
is z with s[w] := z[y], and q' is q with q'[w] = q'[y] := min(q[w], q[y]). Where w = y both replacements change
nothing.

STA, selective temporal alignment: κ²·KL(softmax(ẑ/κ) ‖ softmax(z/κ)) against ẑ_i = Σ_j A[i,j] z_j, detached, where
A[i,·] is the softmax over j ≠ i of confidence_j · cos(z_i, z_j), and confidence = 1 - entropy/ln K. 0 where T = 1.

Ancestors: kd is κ²·KL(softmax(q/κ) ‖ softmax(z/κ)); tdkd (arXiv 2501.15925) adds the same against the detached mean
of the logits of the sample's correct time steps, zeros where none is correct.
"""

from __future__ import annotations

import contextlib
import math

import torch

IGNORED = -100  # the label that cross-entropy ignores
_LOG_EPS = 1e-8  # inside the logarithm of the confidence
_NORM_EPS = 1e-12  # smallest norm in the cosine similarity
# Types of devices that have autocast; found out at import, as torch.compile of torch 2.11 cannot ask.
_AUTOCAST = tuple(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "xpu", "mps", "hpu", "xla")))


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which a kernel's forward pass leaves the loss's gradient to logits of `dtype`.

    It is theirs, but float32 for float16, where entries below 3e-8 would be 0 before a GradScaler's factor, which comes
    in the backward pass, could make them larger.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def require_classes(labels: torch.Tensor, K: int) -> None:
    """Raise ValueError for labels on the CPU that are none of K classes and not to be ignored."""
    low, high = (int(bound) for bound in torch.aminmax(labels))
    outside = labels[((labels < 0) | (labels >= K)) & (labels != IGNORED)] if low < 0 or high >= K else ()
    if len(outside):
        raise ValueError(f"labels must be in [0, {K}) or {IGNORED} to be ignored; got {int(outside[0])}.")


def seal_loss(
    logits: torch.Tensor,  # [T, B, K]
    teacher_logits: torch.Tensor,  # [B, K]
    labels: torch.Tensor,  # [B]
    *,
    alpha: float,
    beta: float,
    temperature: float,
    objective: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return loss, ce, ela, sta; for kd and tdkd the last two are the terms that alpha and beta weigh."""
    z = _compute(logits)
    q = _compute(teacher_logits).detach().to(z.dtype)
    labels = labels.long()
    valid = labels != IGNORED
    y = torch.where(valid, labels, 0)
    # What is ignored may be NaN, and 0 · NaN in its gradient would be, too.
    z, q = (torch.where(valid.unsqueeze(-1), values, 0.0) for values in (z, q))

    def mean(values: torch.Tensor) -> torch.Tensor:  # [T, B]
        return torch.where(valid, values, 0.0).sum() / (valid.sum() * values.shape[0])

    ce = mean(-_at(torch.log_softmax(z, -1), y).squeeze(-1))
    if objective == "seal":
        ela = mean(_error_aware(z, q, y, temperature))
        sta = mean(_divergence(_temporal_target(z), z, temperature)) if z.shape[0] > 1 else torch.zeros_like(ce)
    else:
        ela = mean(_divergence(q, z, temperature))
        sta = mean(_divergence(_correct_mean(z, y), z, temperature)) if objective == "tdkd" else torch.zeros_like(ce)
    loss = ce
    for weight, term in ((alpha, ela), (beta, sta)):
        if weight != 0:  # 0 · inf would be NaN
            loss = loss + weight * term
    return loss, ce.detach(), ela.detach(), sta.detach()


def selective_alignment_weights(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights A [B,T,T] (zero diagonal; all zero where T = 1) and confidence [T,B], both detached."""
    z = _compute(logits).detach()
    probability = torch.softmax(z, -1)
    log_k = math.log(z.shape[-1])
    confidence = (log_k + (probability * torch.log(probability + _LOG_EPS)).sum(-1)) / log_k

    unit = z / z.norm(dim=-1, keepdim=True).clamp_min(_NORM_EPS)
    unit = unit.transpose(0, 1)  # [B, T, K]
    with _full_precision(z):
        similarity = unit @ unit.transpose(1, 2)
    scores = confidence.t().unsqueeze(1) * similarity  # scores[b, i, j] = c[j, b]·S[b, i, j]
    self_step = torch.eye(z.shape[0], dtype=torch.bool, device=z.device)
    # An empty softmax is NaN; where T = 1 there is no other step to weigh.
    weights = (
        torch.softmax(scores.masked_fill(self_step, -math.inf), -1) if z.shape[0] > 1 else torch.zeros_like(scores)
    )
    return weights, confidence


def _compute(logits: torch.Tensor) -> torch.Tensor:
    """16-bit logits in float32; float32 and float64 as they are."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _full_precision(z: torch.Tensor):
    """Keeps autocast from lowering the precision of matrix products."""
    kind = z.device.type
    return torch.autocast(kind, enabled=False) if kind in _AUTOCAST else contextlib.nullcontext()


def _at(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Entries values[..., index] of [T,B,K] or [B,K] values as [..., 1]; index [B], or [T,B]."""
    return values.gather(-1, index.expand(values.shape[:-1]).unsqueeze(-1))


def _divergence(target: torch.Tensor, z: torch.Tensor, temperature: float) -> torch.Tensor:
    """κ²·KL(softmax(target/κ) ‖ softmax(z/κ)) over the last axis; a class of target probability 0 adds nothing."""
    log_target = torch.log_softmax(target / temperature, -1)
    log_z = torch.log_softmax(z / temperature, -1)
    terms = torch.where(log_target == -math.inf, 0.0, log_target.exp() * (log_target - log_z))
    return temperature * temperature * terms.sum(-1)


def _error_aware(z: torch.Tensor, q: torch.Tensor, y: torch.Tensor, temperature: float) -> torch.Tensor:
    w = z.argmax(-1)  # [T, B]
    student = z.scatter(-1, w.unsqueeze(-1), _at(z, y))
    teacher = q.expand_as(z)
    agreed = torch.minimum(_at(teacher, y), _at(teacher, w))
    teacher = teacher.scatter(-1, w.unsqueeze(-1), agreed)
    teacher = teacher.scatter(-1, y.expand_as(w).unsqueeze(-1), agreed)
    return _divergence(teacher, student, temperature)


def _temporal_target(z: torch.Tensor) -> torch.Tensor:
    weights, _ = selective_alignment_weights(z)
    with _full_precision(z):
        return (weights @ z.detach().transpose(0, 1)).transpose(0, 1)


def _correct_mean(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean logits over the sample's correct time steps, [B, K]; zeros where none is correct."""
    correct = (z.argmax(-1) == y).unsqueeze(-1)
    total = torch.where(correct, z.detach(), 0.0).sum(0)
    return total / correct.sum(0).clamp_min(1)
