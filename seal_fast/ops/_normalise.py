"""What a batch-norm module is to the fused operator: numbers by channel, and the gradient that passes them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ..kernels.bn_lif import ranks
from ..kernels.bn_lif.reference import has_step_modes, update_running_statistics

_PLAIN = (nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward)


class Norm(NamedTuple):
    """y scale + shift, with scale = weight · inverse_std and shift = bias - mean · scale; all [C], in one dtype."""

    mean: Tensor
    inverse_std: Tensor
    count: int | Tensor  # numbers that each mean was taken of; 0 where it is a constant
    group: ProcessGroup | None = None  # ranks whose numbers they were, where they are several

    @property
    def constant(self) -> bool:
        """Whether the mean is none of these numbers'."""
        return isinstance(self.count, int) and self.count == 0

    def scales(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scale and shift."""
        scale = self.inverse_std if weight is None else self.inverse_std * weight
        return scale, -self.mean * scale if bias is None else torch.addcmul(bias, self.mean, scale, value=-1)

    def coefficients(self, scale: Tensor, total: Tensor, centred: Tensor) -> Tensor:
        """[3, C] of y's gradient c0 dm + c1 y + c2, or c0 dm where the mean is constant.

        From Σ dm and Σ dm (y - mean), over all numbers that the mean was taken of.
        """
        if self.constant:
            return scale.expand(3, -1).contiguous()
        c1 = scale * self.inverse_std * self.inverse_std * centred / -self.count
        c2 = scale * total / -self.count - c1 * self.mean
        return torch.stack((scale, c1, c2))


NO_NORM = Norm(None, None, 0)


def can_fuse(bn: nn.Module) -> bool:
    """Whether nothing but torch's own computation would run if the module were called."""
    return (type(bn).forward in _PLAIN or has_step_modes(bn)) and not has_hooks(bn)


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module would run anything besides its forward and what autograd recorded of it."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks)


def norm_of(bn: nn.Module, y: Tensor, repeats: int, statistics) -> Norm:
    """What `bn` makes of y [N, C, ...], each row of which occurs `repeats` times; updates its running statistics.

    Raises:
        ValueError: There is one number for each channel, which has no variance.
    """
    trains = bn.training or bn.running_mean is None
    if not trains:
        return Norm(bn.running_mean, torch.rsqrt(bn.running_var + bn.eps), 0)
    count: int | Tensor = y.numel() // y.shape[1]
    group = ranks.synchronised(bn)
    if count * repeats == 1 and group is None:
        raise ValueError(f"y must have more than one number for each channel to train batch norm; got {list(y.shape)}.")
    with torch.no_grad():
        mean, variance = statistics(y.detach())
        if group is not None:
            mean, variance, count = ranks.merged(mean, variance, count, group)
        if bn.training and bn.track_running_stats:
            update_running_statistics(bn, mean, variance, count * repeats)
        return Norm(mean, torch.rsqrt(variance + bn.eps), count, group)
