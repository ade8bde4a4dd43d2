"""Convolutions of spikes by native code, which adds weights where spikes are and skips the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from ..launch.cpu import DTYPES, run, structure

_Arguments, _WordsArguments = structure("SpikeConvArguments"), structure("SpikeWordsArguments")
_WORD = 64  # channels

Pair = tuple[int, int]  # of the vertical and the horizontal axis


def words(packed: Tensor, size: tuple[int, int, int, int], *, channels_last: bool) -> Tensor:
    """Spikes as the words that the kernels read.

    Args:
        packed: Bits of spikes [P, C, H, W] in the order in which these lie in memory: contiguous uint8.
        size: P, C, H, W.
        channels_last: Whether that order is P, H, W, C; else it is P, C, H, W.

    Returns:
        int64 [P, H·W, ceil(C/64)]: bit c % 64 of word c // 64 is channel c. It shares memory with `packed` where that
        is the same.
    """
    P, C, H, W = size
    columns = -(-C // _WORD)
    if channels_last and C % _WORD == 0:
        return packed.view(torch.int64).view(P, H * W, columns)
    made = torch.empty(P, H * W, columns, dtype=torch.int64, device=packed.device)
    arguments = _WordsArguments(
        packed=packed.data_ptr(),
        words=made.data_ptr(),
        P=P,
        pixels=H * W,
        C=C,
        channels_last=channels_last,
        threads=torch.get_num_threads(),
    )
    run("seal_spike_words", arguments)
    return made


def output_size(size: Pair, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Pair:
    """Height and width of a convolution's outputs."""
    return tuple(
        (n + 2 * pad - apart * (k - 1) - 1) // step + 1
        for n, k, step, pad, apart in zip(size, kernel, stride, padding, dilation, strict=True)
    )


def forward(
    spikes: Tensor,  # the words
    size: tuple[int, int, int, int],  # P, C, H, W
    weight: Tensor,  # [O, C, KH, KW], float32 or bfloat16
    bias: Tensor | None,  # [O]
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    *,
    channels_last: bool = True,  # whether the output is; else it is contiguous
) -> Tensor:
    """[P, O, OH, OW] in the weight's dtype; sums are in float32."""
    out_size = output_size(size[2:], tuple(weight.shape[2:]), stride, padding, dilation)
    lying = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty(size[0], len(weight), *out_size, dtype=weight.dtype, device=weight.device, memory_format=lying)
    if bias is not None:
        bias = bias.contiguous()
    tensors = {"weight": weight, "bias": bias, "out": out}
    _run("seal_spike_conv", spikes, size, weight, out, (stride, padding, dilation), tensors)
    return out


def weight_gradient(
    spikes: Tensor,
    size: tuple[int, int, int, int],
    grad_out: Tensor,  # [P, O, OH, OW], float32 or bfloat16
    grad: Tensor,  # [O, C, KH, KW], of the same dtype
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    """Write the weight's gradient to `grad`, which is returned; sums are in float32."""
    grad_out = grad_out.contiguous(memory_format=torch.channels_last)
    tensors = {"grad_out": grad_out, "grad_weight": grad}
    _run("seal_spike_conv_weight_gradient", spikes, size, grad, grad_out, (stride, padding, dilation), tensors)
    return grad


def _run(name: str, spikes: Tensor, size, weight: Tensor, out: Tensor, geometry, tensors: dict) -> None:
    """Call native code on tensors, for weights that lie as `weight` and outputs of the shape of `out`."""
    P, C, H, W = size
    numbers = dict(zip(("weight_o", "weight_c", "weight_h", "weight_w"), weight.stride(), strict=True))
    for axis, own in (("h", 0), ("w", 1)):
        for kind, pair in zip(("stride", "padding", "dilation"), geometry, strict=True):
            numbers[f"{kind}_{axis}"] = pair[own]
    arguments = _Arguments(
        words=spikes.data_ptr(),
        **{key: tensor.data_ptr() for key, tensor in tensors.items() if tensor is not None},
        **numbers,
        P=P,
        H=H,
        W=W,
        C=C,
        O=len(weight),
        OH=out.shape[2],
        OW=out.shape[3],
        KH=weight.shape[2],
        KW=weight.shape[3],
        dtype=DTYPES[weight.dtype],
        planes=not out.is_contiguous(memory_format=torch.channels_last),
        threads=torch.get_num_threads(),
    )
    run(name, arguments)
