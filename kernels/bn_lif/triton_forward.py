"""The forward pass of batch norm + residual + LIF in Triton. Layouts are those of tensors.py.

m = (y scale + shift) + residual is made in registers, and the neuron runs on it. A program takes BLOCK numbers in the
order of memory through all time steps: y and residual are read once, the spikes are written. Scale and shift of each
channel are given, or, where the statistics are fixed, made of them in registers, each rounded as those in the table.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from ..launch.launches import remembered
from ..launch.triton import ACCESS, Launch, number, size
from ..lif.reference import state_dtype
from ..neuron.options import Options
from ..neuron.triton import constants_of
from ..neuron.triton_steps import BY_VALUE, chunk_of, launch_of, run_forward
from .norms import Norm
from .tensors import Inputs, forward_outputs, inputs
from .triton_merge import scale_and_shift

THREADS = 128  # of a program
KEPT = 288  # bytes of inputs that a thread keeps in registers, at most; with 320 the kernel takes 193 registers


@triton.jit
def _channel(begin, C, channel_stride, LAST: tl.constexpr, TOGETHER: tl.constexpr, BLOCK: tl.constexpr):
    """Channels of the program's numbers: of each, where channels are innermost, else of each TOGETHER of them."""
    if LAST:
        channel = ((begin % C).to(tl.int32) + tl.arange(0, BLOCK)) % C.to(tl.int32)
        channel = tl.max_contiguous(tl.multiple_of(channel, TOGETHER), TOGETHER)
    else:  # as in constants_of
        first = (begin // channel_stride % C).to(tl.int32)
        width = tl.minimum(channel_stride, BLOCK).to(tl.int32)
        before = width - tl.minimum(channel_stride - begin % channel_stride, BLOCK).to(tl.int32)
        channel = (first + (before + tl.arange(0, BLOCK // TOGETHER) * TOGETHER) // width) % C.to(tl.int32)
    return channel


@triton.jit
def _fixed_scales(weight, bias, running_mean, running_var, eps, channel, STATE: tl.constexpr):
    """Scale and shift of a norm whose statistics are fixed."""
    of_weight, of_bias = None, None
    if weight is not None:
        of_weight = tl.load(weight + channel)
    if bias is not None:
        of_bias = tl.load(bias + channel)
    mean, variance = tl.load(running_mean + channel), tl.load(running_var + channel)
    _, scale, shift = scale_and_shift(mean, variance, of_weight, of_bias, number(eps, STATE))
    return scale, shift


@triton.jit
def _by_channel(values, LAST: tl.constexpr, TOGETHER: tl.constexpr, BLOCK: tl.constexpr):
    """The numbers of _channel's channels for each of BLOCK."""
    if not LAST:
        values = tl.reshape(tl.broadcast_to(values[:, None], [BLOCK // TOGETHER, TOGETHER]), [BLOCK])
    return values


@triton.jit(do_not_specialize=[*BY_VALUE, "residual_stride", "eps", "residual_eps", "C", "channel_stride"])
def _forward(
    y,  # [T, N], rows x_stride apart: 0 where one row stands for all
    residual,  # [T, N], rows residual_stride apart; or None
    scales,  # [2, C] or [4, C] in the state's dtype: scale, shift, residual_scale, residual_shift; None: as follows
    weight,  # [C], this and what follows as in Norm, or None
    bias,
    running_mean,
    running_var,
    residual_weight,
    residual_bias,
    residual_running_mean,
    residual_running_var,
    spikes,  # [T, N]
    m,  # [T, N], [N] with ONCE, or None
    packed,  # [T, ceil(N / 8)] uint8, or None
    constants,  # this and what follows as in constants_of
    tau,
    inverse_tau,
    decay,
    threshold,
    reset,
    eps,
    residual_eps,
    N,
    x_stride,
    residual_stride,
    chunks,  # this and the next three as in run_forward
    C,
    channel_stride,
    STEPS: tl.constexpr,
    CHUNK: tl.constexpr,
    LONG: tl.constexpr,
    STATE: tl.constexpr,  # dtype of the potential
    CHARGE: tl.constexpr,
    SOFT: tl.constexpr,
    PER_CHANNEL: tl.constexpr,  # whether constants are [4, C], else [4, 1]
    NORMALISED: tl.constexpr,  # whether the residual has a batch norm of its own
    ONCE: tl.constexpr,
    LAST: tl.constexpr,  # whether channels are innermost
    TOGETHER: tl.constexpr,  # divides C where channels are innermost, else channel_stride
    ALIGNED: tl.constexpr,  # divides N
    BLOCK: tl.constexpr,
):
    N, x_stride, residual_stride = size(N, ALIGNED), size(x_stride, ALIGNED), size(residual_stride, ALIGNED)
    C, channel_stride = size(C, TOGETHER if LAST else 1), size(channel_stride, 1 if LAST else TOGETHER)
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    n = begin + tl.arange(0, BLOCK)
    mask = n < N
    reset = number(reset, STATE)
    tau, inverse_tau, decay, threshold = constants_of(
        constants, tau, inverse_tau, decay, threshold, begin, C, channel_stride, STATE, PER_CHANNEL, BLOCK
    )
    channel = _channel(begin, C, channel_stride, LAST, TOGETHER, BLOCK)
    residual_scale, residual_shift = None, None
    if scales is None:
        scale, shift = _fixed_scales(weight, bias, running_mean, running_var, eps, channel, STATE)
        if NORMALISED:
            residual_scale, residual_shift = _fixed_scales(
                residual_weight, residual_bias, residual_running_mean, residual_running_var, residual_eps, channel,
                STATE,
            )  # fmt: skip
    else:
        scale, shift = tl.load(scales + channel), tl.load(scales + C + channel)
        if NORMALISED:
            residual_scale, residual_shift = tl.load(scales + 2 * C + channel), tl.load(scales + 3 * C + channel)
    scale, shift = _by_channel(scale, LAST, TOGETHER, BLOCK), _by_channel(shift, LAST, TOGETHER, BLOCK)
    if NORMALISED:
        residual_scale = _by_channel(residual_scale, LAST, TOGETHER, BLOCK)
        residual_shift = _by_channel(residual_shift, LAST, TOGETHER, BLOCK)
    bits = begin // 8 + tl.arange(0, BLOCK // 8)
    run_forward(
        tl.full([BLOCK], reset, STATE), y, residual, spikes, m, packed, n, bits, mask, x_stride, residual_stride, N,
        scale, shift, residual_scale, residual_shift, tau, inverse_tau, decay, threshold, reset,
        chunks, STEPS, CHUNK, LONG, CHARGE, SOFT, ONCE,
    )  # fmt: skip


def of_inputs(given: Inputs) -> dict:
    """What `launch_of` is told of the layer's inputs."""
    return {
        "device": given.y.device,
        "state": state_dtype(given.y.dtype),
        "steps": given.T,
        "N": given.N,
        "strides": (given.y_stride, given.residual_stride),
        "ONCE": given.y_stride == given.residual_stride == 0,
        "maxnreg": 255,  # without a limit, ptxas may spill some to have only 128
    }


def forward(
    y: Tensor,  # [T·B, C, ...], or [B, C, ...] where static
    residual: Tensor | None,  # [T·B, C, ...], or [B, C, ...]: the same at each time step
    scales: Tensor | None,  # [2, C] or [4, C] in the state's dtype; None: they are those of `norms`
    options: Options,
    *,
    time_steps: int,
    static: bool,
    keep_m: bool,
    pack: bool,
    norms: tuple[Norm, ...] = (),  # of y, and of the residual if it has one; their statistics are fixed
    launches: dict | None = None,  # those of a plan
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Spikes [T·B, C, ...]; m [T·B, C, ...], or [B, C, ...] where nothing in it varies in time; the spikes as bits."""
    given = inputs(y, residual, time_steps, static=static)
    out = forward_outputs(given, keep_m=keep_m, pack=pack)
    of_norms = [*norms[0][:4], *(norms[1][:4] if len(norms) == 2 else [None] * 4)] if scales is None else [None] * 8
    constants = options.passed(y.device, state_dtype(y.dtype))

    def make() -> Launch:
        last = given.C > 1 and given.channel_stride == 1
        inner = given.channel_stride if given.C > 1 else given.N
        together = ACCESS // y.dtype.itemsize
        return launch_of(
            _forward,
            -(-given.N // (THREADS * together)),
            options,
            constants,
            **of_inputs(given),
            chunk=chunk_of(time_steps, ACCESS * (1 + (residual is not None)), KEPT),
            threads=THREADS,
            sizes=(given.C, inner),
            numbers=(norms[0].eps, norms[-1].eps) if scales is None else (0.0, 0.0),
            NORMALISED=len(norms) == 2 if scales is None else len(scales) == 4,
            LAST=last,
            TOGETHER=math.gcd(given.C if last else inner, together),
            ALIGNED=math.gcd(given.N, together),
            BLOCK=THREADS * together,
        )

    remembered(launches, ("forward", scales is None), make)(*given[:2], scales, *of_norms, *out, constants)
    return tuple(out)
