"""Convolutions of spikes in torch: their meaning.

Spikes [P, C, H, W] are zeros and ones. A convolution of them is a sum of weights, and the gradient of its weights a sum
of the outputs' gradients; kernels add in another order than torch's convolution does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(spikes: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation) -> Tensor:
    """[P, C, H, W], [O, C, KH, KW], [O] -> [P, O, OH, OW]."""
    return F.conv2d(spikes, weight, bias, stride, padding, dilation)


def weight_gradient(spikes: Tensor, grad_out: Tensor, weight: Tensor, stride, padding, dilation) -> Tensor:
    """[P, C, H, W], [P, O, OH, OW] -> [O, C, KH, KW], as `weight`, of which no element is read."""
    arguments = (None, stride, padding, dilation, False, (0, 0), 1, (False, True, False))
    return torch.ops.aten.convolution_backward(grad_out, spikes, weight, *arguments)[1]
