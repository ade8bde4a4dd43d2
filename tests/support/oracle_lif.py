"""One run of the operator lif beside the oracle, by seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

import oracle
from oracle_cases import BF16, F16, F32, F64, Draw, array, off, require, state_of
from seal_fast import lif
from seal_fast.nn import Surrogate

NEURONS = [
    *((0,), (1,), (7,), (8,), (511,), (513,), (2, 0, 3), (0, 4), (1, 1), (2, 3), (3, 5, 7), (2, 7, 3, 3)),
    *((1, 8, 4, 4), (1, 1, 513), (2, 511), (3, 16, 2), (2, 3, 1, 2, 2)),
]
STEPS = [1, 2, 3, 4, 16, 17, 33]


def shown(value) -> str:
    """A tensor of few elements, or shape and dtype of others; anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return str(value)
    numbers = f" {value.tolist()}" if value.numel() <= 4 else ""
    return f"{list(value.shape)} {str(value.dtype)[6:]}{numbers}"


@dataclass
class Case:
    """The arguments of one call, and what flows back into it."""

    x: torch.Tensor  # [T, ...]
    options: dict
    v_init: torch.Tensor | None  # [...]
    grad_spikes: torch.Tensor  # [T, ...]
    grad_v_last: torch.Tensor | None  # [...]

    def __str__(self):
        options = {name: shown(value) for name, value in self.options.items()}
        return f"x {shown(self.x)} {self.x.stride()}, {options}, v_init {shown(self.v_init)}"


def case_of(seed: int, steps=STEPS, neurons=NEURONS, dtypes=(F32, F32, F32, F64, F16, BF16)) -> Case:
    draw = Draw(seed)
    dtype, T, shape = draw.of(dtypes), draw.of(steps), draw.of(neurons)
    state = state_of(dtype)

    def parameter(numbers, low, high):
        form = draw.of(["float", "float", "scalar", "channels"] if len(shape) > 1 else ["float", "float", "scalar"])
        if form == "float":
            return draw.of(numbers)
        values = draw.random.uniform(low, high, (shape[1],) if form == "channels" else ())
        return torch.from_numpy(np.asarray(values)).to(draw.of([F32, F32, F64, F16, BF16])).requires_grad_()

    decay_input = draw.chance(0.5)
    name = draw.of(list(oracle.SURROGATES))
    options = {
        "tau": parameter([1.0, 1.001, 1.7, 2.0, 2.0, 3.0, 20.0, 1e6, 2.0 if decay_input else np.inf], 1.0, 20.0),
        "v_threshold": parameter([1.0, 1.0, 0.5, 0.0, 1e-30, -0.5, 0.1], 0.25, 1.5),
        "v_reset": draw.of([0.0, 0.0, None, None, 0.25, -0.5, 0.1]),
        "decay_input": decay_input,
        "detach_reset": draw.chance(0.5),
        "surrogate": draw.of([name, Surrogate(name, draw.of([0.7, 2.0, 5.0]))]),
    }
    x = draw.laid_out(draw.numbers((T, *shape), dtype))
    v_init = draw.numbers(shape, state).requires_grad_() if draw.chance(0.5) else None
    grad_v_last = draw.normal(shape, state) if draw.chance(0.7) else None
    return Case(x, options, v_init, draw.laid_out(draw.normal((T, *shape), dtype)), grad_v_last)


def neuron_of(options: dict, *, cancels: bool) -> oracle.Neuron:
    surrogate = options["surrogate"]
    name, alpha = (surrogate, None) if isinstance(surrogate, str) else (surrogate.name, surrogate.alpha)
    numbers = [
        array(value) if isinstance(value, torch.Tensor) else value for value in (options["tau"], options["v_threshold"])
    ]
    rest = options["decay_input"], options["v_reset"], name, oracle.SURROGATES[name][0] if alpha is None else alpha
    return oracle.Neuron(*numbers, *rest, options["detach_reset"], cancels)


def packed_bits(spikes: torch.Tensor) -> np.ndarray:
    """uint8 [T, ceil(N/8)]: the spikes in the order in which a step lies in memory, from the lowest bit on."""
    order = sorted(range(1, spikes.dim()), key=lambda axis: -spikes.stride(axis))
    rows = array(spikes.permute(0, *order)).reshape(len(spikes), -1)
    return np.packbits(rows.astype(bool), axis=1, bitorder="little")


def run(case: Case, backend: str):
    """The operator's spikes, v_last, packed spikes and gradients by name."""
    leaf, options = case.x.detach().requires_grad_(), case.options
    spikes, v_last, packed = lif(leaf, v_init=case.v_init, return_packed=True, backend=backend, **options)
    leaves = {"x": leaf, "v_init": case.v_init, "tau": options["tau"], "threshold": options["v_threshold"]}
    leaves = {name: value for name, value in leaves.items() if isinstance(value, torch.Tensor)}
    pairs = [(spikes, case.grad_spikes), (v_last, case.grad_v_last)]
    outputs, upstream = zip(*[pair for pair in pairs if pair[1] is not None], strict=True)
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    return spikes, v_last, packed, dict(zip(leaves, gradients, strict=True))


def check(case: Case, backend: str, limit: float, worst: dict | None = None) -> None:
    """Spikes, v_last and packed spikes bit for bit; gradients off by at most `limit` times what roundoff explains."""
    x, state, size = case.x, state_of(case.x.dtype), case.x.numel()
    spikes, v_last, packed, gradients = run(case, backend)
    given, neuron = array(x, state), neuron_of(case.options, cancels=backend == "torch")
    right = oracle.forward(given, neuron, None if case.v_init is None else array(case.v_init, state))

    require(spikes.dtype == x.dtype and v_last.dtype == state, "dtypes differ", case, size)
    require(np.array_equal(array(spikes), right.spikes), "spikes differ", case, size)
    require(np.array_equal(array(v_last), right.v_last, equal_nan=True), "v_last differs", case, size)
    require(np.array_equal(packed.numpy(), packed_bits(spikes)), "packed spikes differ", case, size)

    dtype = given.dtype.type
    if oracle.near_edge(right.h, 0.0, neuron, dtype).any():
        return
    grad_v_last = None if case.grad_v_last is None else array(case.grad_v_last)
    expected = oracle.backward(given, right, neuron, array(case.grad_spikes), grad_v_last, dtype)
    parameters = {"tau": case.options["tau"], "threshold": case.options["v_threshold"]}
    for name, got in gradients.items():
        gradient = expected[name]
        if name in parameters:
            gradient = oracle.summed_like(gradient, array(parameters[name]))
        of = {"x": x, "v_init": case.v_init, **parameters}[name]
        require(got.dtype == of.dtype, f"dtype of {name}'s gradient differs", case, size)
        # Kernels' gradients of tau are divided by its square in tau's own dtype.
        ratio = off(got, gradient, state, roundings=3 if name == "tau" and backend != "torch" else 1)
        if worst is not None and ratio > worst.get(name, (0.0,))[0]:
            worst[name] = ratio, str(case)
        require(ratio <= limit, f"{name}'s gradient is off by {ratio:.3g} roundoffs", case, size)
