"""The selective-alignment loss as its publication states it (arXiv 2605.14252): a loop over time steps.

Erroneous samples are picked out by their indices, which waits for the device, and each part of each step is a chain of
small operations. Written from the equations; the benchmarks compare with it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def _softened(target: torch.Tensor, z: torch.Tensor, temperature: float) -> torch.Tensor:
    p, log_q = F.softmax(target / temperature, -1), F.log_softmax(z / temperature, -1)
    return F.kl_div(log_q, p, reduction="batchmean") * temperature**2


def seal_loss(
    logits: torch.Tensor,  # [T, B, K]
    teacher_logits: torch.Tensor,  # [B, K]
    labels: torch.Tensor,  # [B]
    *,
    alpha: float,
    beta: float,
    temperature: float = 3.0,
) -> torch.Tensor:
    """CE + alpha·ELA + beta·STA, each summed up over the time steps."""
    T, _, K = logits.shape
    ce = ela = sta = 0.0
    confidences = []
    for z in logits:
        p = F.softmax(z.detach(), -1)
        confidences.append((math.log(K) + (p * torch.log(p + 1e-8)).sum(-1)) / math.log(K))
    for t, z in enumerate(logits):
        ce = ce + F.cross_entropy(z, labels)
        student, teacher = z.clone(), teacher_logits.clone()
        top = z.argmax(-1)
        wrong = torch.nonzero(top != labels).squeeze(-1)
        if len(wrong):
            label, largest = labels[wrong], top[wrong]
            student[wrong, largest] = z[wrong, label]
            agreed = torch.minimum(teacher[wrong, label], teacher[wrong, largest])
            teacher[wrong, label] = agreed
            teacher[wrong, largest] = agreed
        ela = ela + _softened(teacher, student, temperature)
        others = [j for j in range(T) if j != t]
        if others:
            scores = [confidences[j] * F.cosine_similarity(z.detach(), logits[j].detach(), dim=-1) for j in others]
            weights = F.softmax(torch.stack(scores, -1), -1)
            target = sum(weights[:, i : i + 1] * logits[j].detach() for i, j in enumerate(others))
            sta = sta + _softened(target, z, temperature)
    return (ce + alpha * ela + beta * sta) / T
