"""Triton kernels of batch norm + residual + LIF: the backward pass, and where to find the others.

Layouts are those of tensors.py, the loop over time that of neuron/triton_steps.py. Backward takes tiles by channel, see
triton_tiles.py: with dm_t = ∂L/∂m_t, each thread adds Σ dm, Σ dm (y - mean) and Σ dm (residual - mean) up over time
and over its tiles. The sums of all threads of a program, and then those of all programs, are added in a fixed order,
and the last program of its channels makes what follows from them; see triton_merge.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch.counters import counters
from ..launch.launches import remembered
from ..launch.triton import ACCESS, Launch, number, size
from ..neuron.options import Options
from ..neuron.triton import constants_of
from ..neuron.triton_steps import BY_VALUE, chunk_of, launch_of, run_backward
from .tensors import BackwardOutputs, alike, backward_outputs, inputs
from .triton_forward import forward, of_inputs
from .triton_merge import Merge, merge_sums, merging, write_gradients
from .triton_statistics import SIZES, fill_table, normalised_gradient, statistics
from .triton_tiles import enter, next_tile, tile_at, tiling

__all__ = ["backward", "fill_table", "forward", "normalised_gradient", "statistics"]

THREADS = 128  # of a program
KEPT = 352  # bytes that a thread keeps in registers, at most: beyond it, few threads run, or registers spill
KEPT_RUNS = 280  # where tiles are of one channel: the ends of its runs in memory take registers too
KEPT_LONG = 192  # where chunks follow each other, whose offsets take registers too
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


@triton.jit(do_not_specialize=[*BY_VALUE, "residual_stride", "alpha", "count", "residual_count", *SIZES])
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
    sums,  # this and the next two as in BackwardOutputs
    coefficients,
    grad_norms,
    partials,  # this and the next as in merge_sums
    counters,
    checkpoints,  # [chunks, N] in the state's dtype: room for the potential before each chunk but the first
    constants,
    tau,
    inverse_tau,
    decay,
    threshold,
    reset,
    alpha,
    count,  # of the norm of y, as Norm has it, and of that of the residual
    residual_count,
    N,
    x_stride,
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
    RUN: tl.constexpr,  # as in merge_sums
):
    N, x_stride, residual_stride = size(N, ALIGNED), size(x_stride, ALIGNED), size(residual_stride, ALIGNED)
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
            constants, tau, inverse_tau, decay, threshold, split, C, inner, STATE, False, 1
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
        _dv, total, total_y, total_residual, total_threshold, total_inverse_tau = run_backward(
            tl.full([ROWS, COLS], reset, STATE), tl.zeros([ROWS, COLS], STATE), y, residual, grad_spikes, grad_m,
            grad_steps, checkpoints, n, mask, x_stride, residual_stride, N, N,
            scale, shift, residual_scale, residual_shift, mean, residual_mean,
            tau, inverse_tau, decay, threshold, reset, alpha,
            chunks, STEPS, CHUNK, LONG, CHARGE, SOFT, ONCE, DETACH, SURROGATE, PARAMETERS,
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
    of_m, of_y = tl.sum(sum_m, AXIS, keep_dims=True), tl.sum(sum_y, AXIS, keep_dims=True)
    of_residual = of_m  # of which nothing is made without NORMALISED
    if NORMALISED:
        of_residual = tl.sum(sum_residual, AXIS, keep_dims=True)
    last, of_m, of_y, of_residual = merge_sums(
        of_m, of_y, of_residual, partials, counters, blocks, NORMALISED, COLS if LAST else 1, RUN
    )
    NORMS: tl.constexpr = 2 if NORMALISED else 1
    if last:
        tl.store(sums + c, of_m, exists)
        write_gradients(of_m, of_y, count, table, sums, coefficients, grad_norms, c, C, 0, NORMS)
        if NORMALISED:
            write_gradients(of_m, of_residual, residual_count, table, sums, coefficients, grad_norms, c, C, 1, NORMS)


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
    launches: dict | None = None,  # those of a plan
) -> BackwardOutputs:
    """Gradients of the membrane input, of θ and 1/τ, and of the norms."""
    given = inputs(y, residual, time_steps, static=static)
    out = backward_outputs(given, len(counts), steps=steps, total=total, parameters=parameters)
    y, dtype, state = given.y, y.dtype, table.dtype
    grad_spikes = alike(grad_spikes.to(dtype), y)
    grad_m = None if grad_m is None else alike(grad_m.to(dtype), y)
    constants = options.passed(y.device, state)

    def make() -> tuple[Launch, Merge, int]:
        count = 1 + len(counts)
        # Of each step y, a and h; residual and the gradient of m; x and v. Where neighbours have channels of their own,
        # also scales, shifts and means, and the neuron's constants.
        kept = dtype.itemsize * (2 + (count == 3) + (grad_m is not None) + parameters)
        kept += state.itemsize * (1 + parameters)
        most = KEPT if given.channel_stride == 1 and given.C > 1 else KEPT_RUNS
        chunk = chunk_of(time_steps, kept, most)
        always = (3 * (count - 1) + 4 * options.in_tensors) * state.itemsize if given.channel_stride == 1 else 0
        together = min(ACCESS // dtype.itemsize, NEIGHBOURS_16_BIT)
        while together > 1 and together * (min(time_steps, chunk) * kept + always) > (
            KEPT_LONG if time_steps > chunk else most
        ):
            together //= 2
        # Two run at once where a thread takes 8 neighbours through 3 steps or more: see docs/cost.md.
        programs = PROGRAMS["few" if together == 8 and min(time_steps, chunk) > 2 else "many"]
        tiles = tiling(given.N, given.C, given.channel_stride, dtype, THREADS * together, y.device, programs)
        merge = merging(tiles, "sums", state)
        launch = launch_of(
            _backward,
            tiles.programs,
            options,
            constants,
            **of_inputs(given),
            chunk=chunk,
            threads=THREADS,
            sizes=tiles.sizes,
            numbers=(options.surrogate.alpha, counts[0], counts[-1]),
            NORMALISED=count == 3,
            DETACH=options.detach_reset,
            SURROGATE=options.surrogate.name,
            STAGES=STAGES if time_steps <= chunk else 1,
            RUN=merge.run,
            **tiles.constants,
        )
        return launch, merge, (time_steps - 1) // chunk

    launch, merge, later = remembered(launches, ("backward", grad_m is None), make)
    partials = torch.empty((1 + len(counts)) * merge.numbers, dtype=state, device=y.device)
    checkpoints = torch.empty((later, given.N), dtype=state, device=y.device) if later else None
    tensors = (*given[:2], table, grad_spikes, grad_m, *out, partials, counters(y.device, merge.counters), checkpoints)
    launch(*tensors, constants)
    return out
