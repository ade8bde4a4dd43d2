"""Triton kernels of batch norm + residual + LIF. Layouts are those of tensors.py, the neuron that of lif/triton.py.

Forward makes m = (y scale + shift) + residual in registers and runs the neuron on it. A program takes BLOCK numbers in
the order of memory through all time steps: y and residual are read once, the spikes are written.

Backward makes m and h again, keeps h in registers for a chunk of steps, and runs back; between chunks the potential
goes through memory. It takes tiles by channel, see triton_tiles.py: with dm_t = ∂L/∂m_t, each thread adds Σ dm,
Σ dm (y - mean) and Σ dm (residual - mean) up over time and over its tiles. The sums of all threads of a program, and
then those of all programs, are added in a fixed order.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch.triton import ACCESS, argument, number, size, start
from ..lif.reference import state_dtype
from ..neuron.options import Options
from ..neuron.triton import constants_of
from .tensors import BackwardOutputs, Inputs, alike, backward_outputs, forward_outputs, inputs
from .triton_statistics import SIZES, fill_table, finish, normalised_gradient, statistics
from .triton_steps import steps_backward, steps_forward
from .triton_tiles import enter, next_tile, tile_at, tiling

__all__ = ["backward", "fill_table", "forward", "normalised_gradient", "statistics"]

THREADS = 128  # of a program
CHUNK = 16  # most time steps that are in registers at once; half of them where a thread keeps too much of each
KEPT = 352  # bytes that a thread keeps in registers, at most: beyond it, few threads run, or registers spill
KEPT_RUNS = 280  # where tiles are of one channel: the ends of its runs in memory take registers too
KEPT_LONG = 192  # where chunks follow each other, whose offsets take registers too
KEPT_FORWARD = 288  # of inputs by _forward, which takes 193 registers where they are 320 bytes
# Neighbouring neurons that a thread of _backward takes, at most, in 16 bits: 4 or 8. With 8, a thread executes a tenth
# fewer instructions for each element, and 8 warps run on a multiprocessor instead of 12. On an H200, at T = 4, 4 took
# 2 to 4 % longer for [4, 256, 64, 32, 32], each with 16 programs for each multiprocessor.
NEIGHBOURS_16_BIT = 8
# Triton's num_stages of _backward's loop: STAGES - 1 tiles are in shared memory. With 1, ptxas loads the elements of
# each step just before their use, and a thread waits for memory three to five times for each tile. On an H200, in
# bfloat16 at T = 4, 2 took 20 to 27 % longer than 3 for 64 channels of 32 x 32, and 4 as long.
STAGES = 3
# Programs of _backward for each multiprocessor: of kernels of many registers, two run at once. On an H200, at T = 4 in
# bfloat16, 2 took 10 % less time than 16 for 64 channels of 32 x 32, and half of it for 256 of 8 x 8; 3 took 23 % more.
# Elsewhere two to four run at once, whose multiple 12 is.
PROGRAMS = {"few": 2, "many": 12}

_NUMBERS = ["tau", "inverse_tau", "decay", "threshold", "reset"]
_STRIDES = ["N", "y_stride", "residual_stride"]
_BY_VALUE = [*_NUMBERS, *_STRIDES, "chunks"]  # see lif/triton.py


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
def _by_channel(row, channel, LAST: tl.constexpr, TOGETHER: tl.constexpr, BLOCK: tl.constexpr):
    """A number [BLOCK] of each channel."""
    values = tl.load(row + channel)
    if not LAST:
        values = tl.reshape(tl.broadcast_to(values[:, None], [BLOCK // TOGETHER, TOGETHER]), [BLOCK])
    return values


@triton.jit(do_not_specialize=[*_BY_VALUE, "C", "channel_stride"])
def _forward(
    y,  # [T, N], rows y_stride apart: 0 where one row stands for all
    residual,  # [T, N], rows residual_stride apart; or None
    scales,  # [2, C] or [4, C] in the state's dtype: scale, shift, residual_scale, residual_shift
    spikes,  # [T, N]
    m,  # [T, N], [N] with ONCE, or None
    packed,  # [T, ceil(N / 8)] uint8, or None
    constants,  # this and what follows as in constants_of
    tau,
    inverse_tau,
    decay,
    threshold,
    reset,
    N,
    y_stride,
    residual_stride,
    chunks,  # after the first chunk
    C,
    channel_stride,
    STEPS: tl.constexpr,  # of the first chunk
    CHUNK: tl.constexpr,  # steps of the others
    LONG: tl.constexpr,  # whether there are more chunks
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
    N, y_stride, residual_stride = size(N, ALIGNED), size(y_stride, ALIGNED), size(residual_stride, ALIGNED)
    C, channel_stride = size(C, TOGETHER if LAST else 1), size(channel_stride, 1 if LAST else TOGETHER)
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    n = begin + tl.arange(0, BLOCK)
    mask = n < N
    reset = number(reset, STATE)
    tau, inverse_tau, decay, threshold = constants_of(
        constants, tau, inverse_tau, decay, threshold, begin,
        C if PER_CHANNEL else size(1, 1), channel_stride, STATE, PER_CHANNEL, BLOCK,
    )  # fmt: skip
    channel = _channel(begin, C, channel_stride, LAST, TOGETHER, BLOCK)
    scale = _by_channel(scales, channel, LAST, TOGETHER, BLOCK)
    shift = _by_channel(scales + C, channel, LAST, TOGETHER, BLOCK)
    residual_scale, residual_shift = None, None
    if NORMALISED:
        residual_scale = _by_channel(scales + 2 * C, channel, LAST, TOGETHER, BLOCK)
        residual_shift = _by_channel(scales + 3 * C, channel, LAST, TOGETHER, BLOCK)
    bits = begin // 8 + tl.arange(0, BLOCK // 8)
    v = tl.full([BLOCK], reset, STATE)
    v = steps_forward(
        steps_forward, STEPS, 0, v, y, residual, spikes, m, packed, n, bits, mask, y_stride, residual_stride, N,
        scale, shift, residual_scale, residual_shift, tau, inverse_tau, decay, threshold, reset, CHARGE, SOFT, ONCE,
    )  # fmt: skip
    if LONG:
        for chunk in range(chunks):
            t = STEPS + tl.cast(chunk, tl.int64) * CHUNK
            v = steps_forward(
                steps_forward, CHUNK, t, v, y, residual, spikes, m, packed, n, bits, mask,
                y_stride, residual_stride, N, scale, shift, residual_scale, residual_shift,
                tau, inverse_tau, decay, threshold, reset, CHARGE, SOFT, ONCE,
            )  # fmt: skip


@triton.jit(do_not_specialize=[*_BY_VALUE, "alpha", *SIZES])
def _backward(
    y,  # this and what follows as in _forward
    residual,
    table,  # [4, C] or, with NORMALISED, [8, C] in the state's dtype: see norms.py
    grad_spikes,  # [T, N]
    grad_m,  # [T, N], [N] with ONCE, or None
    grad_steps,  # [T, N], or None
    grad_total,  # [N], or None
    grad_threshold,  # [N] in the state's dtype, or None: sum over T of each neuron's part
    grad_inverse_tau,  # [N] likewise
    partials,  # [splits, 2 or 3, C] in the state's dtype
    checkpoints,  # [chunks, N] in the state's dtype: room for the potential before each chunk but the first
    constants,
    tau,
    inverse_tau,
    decay,
    threshold,
    reset,
    alpha,
    N,
    y_stride,
    residual_stride,
    chunks,
    C,  # this and what follows as in Tiling.sizes
    inner,
    positions,
    turns,
    blocks,
    STEPS: tl.constexpr,
    CHUNK: tl.constexpr,
    LONG: tl.constexpr,
    STATE: tl.constexpr,
    CHARGE: tl.constexpr,
    SOFT: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    NORMALISED: tl.constexpr,
    ONCE: tl.constexpr,
    DETACH: tl.constexpr,
    SURROGATE: tl.constexpr,
    LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ALIGNED: tl.constexpr,
    STAGES: tl.constexpr,  # of the pipeline
):
    N, y_stride, residual_stride = size(N, ALIGNED), size(y_stride, ALIGNED), size(residual_stride, ALIGNED)
    C, inner = size(C, ALIGNED if LAST else 1), size(inner, 1 if LAST else ALIGNED)
    split, c, position, offset, inside, tiles = enter(C, inner, positions, turns, blocks, LAST, ROWS, COLS)
    exists = c < C
    reset, alpha = number(reset, STATE), number(alpha, STATE)
    if PER_CHANNEL:
        tau, inverse_tau = tl.load(constants + c, exists, other=1.0), tl.load(constants + C + c, exists, other=1.0)
        decay = tl.load(constants + 2 * C + c, exists, other=0.0)
        threshold = tl.load(constants + 3 * C + c, exists, other=1.0)
    else:
        tau, inverse_tau, decay, threshold = constants_of(
            constants, tau, inverse_tau, decay, threshold, split, size(1, 1), inner, STATE, False, 1
        )
    scale = tl.load(table + c, exists, other=0.0)
    shift = tl.load(table + C + c, exists, other=0.0)
    mean = tl.load(table + (4 if NORMALISED else 2) * C + c, exists, other=0.0)
    residual_scale, residual_shift, residual_mean, sum_residual = None, None, None, None
    if NORMALISED:
        residual_scale = tl.load(table + 2 * C + c, exists, other=0.0)
        residual_shift = tl.load(table + 3 * C + c, exists, other=0.0)
        residual_mean = tl.load(table + 5 * C + c, exists, other=0.0)
        sum_residual = tl.zeros([ROWS, COLS], STATE)
    PARAMETERS: tl.constexpr = grad_threshold is not None
    sum_m = tl.zeros([ROWS, COLS], STATE)
    sum_y = sum_m
    for _ in tl.range(tiles, num_stages=STAGES):
        n, mask = tile_at(position, offset, inside, c, C, inner, positions, LAST, ROWS, COLS, ALIGNED)
        zero = tl.zeros([ROWS, COLS], STATE)
        v = tl.full([ROWS, COLS], reset, STATE)
        dv, total, total_y, total_residual, total_threshold, total_inverse_tau = zero, zero, zero, zero, zero, zero
        if LONG:
            # Forwards through all chunks but the last, then back through all chunks but the first.
            later = steps_forward(
                steps_forward, STEPS, 0, v, y, residual, None, None, None, n, None, mask, y_stride, residual_stride, N,
                scale, shift, residual_scale, residual_shift, tau, inverse_tau, decay, threshold, reset,
                CHARGE, SOFT, ONCE,
            )  # fmt: skip
            tl.store(checkpoints + n, later, mask)
            for i in range(chunks - 1):
                chunk = tl.cast(i, tl.int64)
                later = steps_forward(
                    steps_forward, CHUNK, STEPS + chunk * CHUNK, later, y, residual, None, None, None, n, None, mask,
                    y_stride, residual_stride, N, scale, shift, residual_scale, residual_shift,
                    tau, inverse_tau, decay, threshold, reset, CHARGE, SOFT, ONCE,
                )  # fmt: skip
                tl.store(checkpoints + (chunk + 1) * N + n, later, mask)
            tl.debug_barrier()  # Triton may have a thread read what another one wrote
            for i in range(chunks):
                chunk = tl.cast(chunks - 1 - i, tl.int64)
                later = tl.load(checkpoints + chunk * N + n, mask, other=0.0)
                dv, total, total_y, total_residual, total_threshold, total_inverse_tau = steps_backward(
                    steps_backward, CHUNK, STEPS + chunk * CHUNK, later,
                    dv, total, total_y, total_residual, total_threshold, total_inverse_tau,
                    y, residual, grad_spikes, grad_m, grad_steps, n, mask, y_stride, residual_stride, N,
                    scale, shift, residual_scale, residual_shift, mean, residual_mean,
                    tau, inverse_tau, decay, threshold, reset, alpha, CHARGE, SOFT, ONCE, DETACH, SURROGATE, PARAMETERS,
                )  # fmt: skip
        dv, total, total_y, total_residual, total_threshold, total_inverse_tau = steps_backward(
            steps_backward, STEPS, 0, v, dv, total, total_y, total_residual, total_threshold, total_inverse_tau,
            y, residual, grad_spikes, grad_m, grad_steps, n, mask, y_stride, residual_stride, N,
            scale, shift, residual_scale, residual_shift, mean, residual_mean,
            tau, inverse_tau, decay, threshold, reset, alpha, CHARGE, SOFT, ONCE, DETACH, SURROGATE, PARAMETERS,
        )  # fmt: skip
        if grad_total is not None:
            tl.store(grad_total + n, total.to(grad_total.dtype.element_ty), mask)
        if PARAMETERS:
            tl.store(grad_threshold + n, total_threshold, mask)
            tl.store(grad_inverse_tau + n, total_inverse_tau, mask)
        sum_m += total
        sum_y += total_y
        if NORMALISED:
            sum_residual += total_residual
        position, offset, inside = next_tile(position, offset, inside, C, inner, LAST, ROWS, COLS)
    AXIS: tl.constexpr = 0 if LAST else 1
    row = partials + split * ((3 if NORMALISED else 2) * C) + c
    tl.store(row, tl.sum(sum_m, AXIS, keep_dims=True), exists)
    tl.store(row + C, tl.sum(sum_y, AXIS, keep_dims=True), exists)
    if NORMALISED:
        tl.store(row + 2 * C, tl.sum(sum_residual, AXIS, keep_dims=True), exists)


def forward(
    y: Tensor,  # [T·B, C, ...], or [B, C, ...] where static
    residual: Tensor | None,  # [T·B, C, ...], or [B, C, ...]: the same at each time step
    scales: Tensor,  # [2, C] or [4, C] in the state's dtype
    options: Options,
    *,
    time_steps: int,
    static: bool,
    keep_m: bool,
    pack: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Spikes [T·B, C, ...]; m [T·B, C, ...], or [B, C, ...] where nothing in it varies in time; the spikes as bits."""
    given = inputs(y, residual, time_steps, static=static)
    out = forward_outputs(given, keep_m=keep_m, pack=pack)
    last = given.C > 1 and given.channel_stride == 1
    inner = given.channel_stride if given.C > 1 else given.N
    together = ACCESS // y.dtype.itemsize
    _launch(
        _forward,
        -(-given.N // (THREADS * together)),
        (*given[:2], scales, *out),
        given,
        options,
        chunk=_chunk(time_steps, ACCESS * (1 + (residual is not None)), KEPT_FORWARD),
        sizes=(given.C, inner),
        NORMALISED=len(scales) == 4,
        LAST=last,
        TOGETHER=math.gcd(given.C if last else inner, together),
        ALIGNED=math.gcd(given.N, together),
        BLOCK=THREADS * together,
    )
    return tuple(out)


def backward(
    grad_spikes: Tensor,  # [T·B, C, ...]
    grad_m: Tensor | None,  # as forward's m
    y: Tensor,  # this and what follows as in forward
    residual: Tensor | None,
    table: Tensor,  # [4k, C] in the state's dtype, of the norm of y, and of that of residual if it has one
    options: Options,
    *,
    counts: tuple[int, ...],  # of the k norms
    time_steps: int,
    static: bool,
    steps: bool,
    total: bool,
    parameters: bool,
) -> BackwardOutputs:
    """Gradients of the membrane input, of θ and 1/τ, and of the norms."""
    given = inputs(y, residual, time_steps, static=static)
    out = backward_outputs(given, len(counts), steps=steps, total=total, parameters=parameters)
    y, dtype, state = given.y, y.dtype, table.dtype
    grad_spikes = alike(grad_spikes.to(dtype), y)
    grad_m = None if grad_m is None else alike(grad_m.to(dtype), y)
    count = 1 + len(counts)
    # Of each step y, a and h; residual and the gradient of m; x and v. Where neighbours have channels of their own,
    # also scales, shifts and means, and the neuron's constants.
    kept = dtype.itemsize * (2 + (count == 3) + (grad_m is not None) + parameters) + state.itemsize * (1 + parameters)
    most = KEPT if given.channel_stride == 1 and given.C > 1 else KEPT_RUNS
    chunk = _chunk(time_steps, kept, most)
    always = (3 * (count - 1) + 4 * options.in_tensors) * state.itemsize if given.channel_stride == 1 else 0
    together = min(ACCESS // dtype.itemsize, NEIGHBOURS_16_BIT)
    while together > 1 and together * (min(time_steps, chunk) * kept + always) > (
        KEPT_LONG if time_steps > chunk else most
    ):
        together //= 2
    # Two run at once where a thread takes 8 neighbours through 3 steps or more: see docs/cost.md.
    programs = PROGRAMS["few" if together == 8 and min(time_steps, chunk) > 2 else "many"]
    tiles = tiling(given.N, given.C, given.channel_stride, dtype, THREADS * together, y.device, programs)
    partials = torch.empty((tiles.splits, count, given.C), dtype=state, device=y.device)
    later = (time_steps - 1) // chunk
    checkpoints = torch.empty((later, given.N), dtype=state, device=y.device) if later else None
    _launch(
        _backward,
        tiles.programs,
        (*given[:2], table, grad_spikes, grad_m, *out[:4], partials, checkpoints),
        given,
        options,
        chunk=chunk,
        numbers=(options.surrogate.alpha,),
        sizes=tiles.sizes,
        NORMALISED=count == 3,
        DETACH=options.detach_reset,
        SURROGATE=options.surrogate.name,
        STAGES=STAGES if time_steps <= chunk else 1,
        **tiles.constants,
    )
    finish(partials, table, out, counts)
    return out


def _chunk(time_steps: int, kept: int, most: int) -> int:
    """How many steps are in registers at once, where a thread keeps `kept` bytes of each and `most` of all, at most."""
    return CHUNK if min(time_steps, CHUNK) * kept <= most else CHUNK // 2


def _launch(kernel, programs, tensors, given: Inputs, options: Options, *, chunk, sizes, numbers=(), **flags):
    state = state_dtype(given.y.dtype)
    constants, values = options.passed(given.y.device, state)
    start(
        kernel,
        programs,
        *tensors,
        constants,
        *(argument(value, state) for value in (*values, options.v_reset or 0.0, *numbers)),
        given.N,
        given.y_stride,
        given.residual_stride,
        (given.T - 1) // chunk,
        *sizes,
        device=given.y.device,
        num_warps=THREADS // 32,
        maxnreg=255,  # without a limit, ptxas may spill some to have only 128
        STEPS=(given.T - 1) % chunk + 1,
        CHUNK=chunk,
        LONG=chunk < given.T,
        STATE=tl.float64 if state == torch.float64 else tl.float32,
        CHARGE=options.charge_kind,
        SOFT=options.v_reset is None,
        PER_CHANNEL=constants is not None and constants.shape[1] > 1,
        ONCE=given.y_stride == given.residual_stride == 0,
        **flags,
    )
