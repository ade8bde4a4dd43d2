"""Spiking neurons as modules."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import ops
from ..backends import available, check_name, shown, shown_spikes
from ..kernels.lif.reference import state_dtype
from ..kernels.surrogate.reference import Surrogate
from ..ops._arguments import NEURON_OPTIONS, as_surrogate, neuron_options, require_float_tensor, require_number
from ..ops._dispatch import is_exporting, left_by_vmap
from .calls import Calls, Record, is_backward, refuse_compiling_in_backward
from .state import MemoryModule


class _Unknown:
    """Stands for a potential that was not kept; the class itself is the value."""


class BaseNode(MemoryModule):
    """What the neurons share: the potential between calls, and the way of an input through the operator `lif`.

    Attributes:
        v: Membrane potential after the last call, or before the first the number that it starts from.
        v_seq: With `store_v_seq`, the potentials after each step [T, ...] of the last call, or in step mode "s" of all
            steps since the last reset; else None.
        surrogate: The surrogate gradient in this library's terms.
    """

    def __init__(
        self, v_threshold, v_reset, surrogate_function, detach_reset, step_mode, backend, store_v_seq, surrogate
    ):
        super().__init__(step_mode)
        if isinstance(backend, bool):  # SpikingJelly 2 has no backend, and store_v_seq in its place
            backend, store_v_seq = "auto", backend
        if surrogate is not None:
            if surrogate_function is not None:
                raise TypeError("surrogate and surrogate_function are two names of one argument; got both.")
            surrogate_function = surrogate
        if surrogate_function is None or isinstance(surrogate_function, str):
            surrogate_function = as_surrogate(surrogate_function or "sigmoid")
        # What does not depend on the kind of neuron; the options as a whole are checked where they are complete.
        self.v_reset = neuron_options(2.0, True, v_threshold, v_reset, surrogate_function, detach_reset)["v_reset"]
        self.v_threshold = v_threshold
        self.surrogate_function = surrogate_function
        self.detach_reset = detach_reset
        self.backend = backend
        self.store_v_seq = store_v_seq
        self._memories["v"] = self._rest
        self.set_reset_value("v", self._rest)

    @property
    def _rest(self) -> float:
        return 0.0 if self.v_reset is None else self.v_reset

    @property
    def v(self) -> float | Tensor:  # noqa: D102
        record = self._repeating()
        v = self._memories["v"] if record is None else record.v
        if v is _Unknown:
            raise RuntimeError(_NOT_KEPT)
        return v

    @property
    def v_seq(self) -> Tensor | None:  # noqa: D102
        return self._memories.get("v_seq", self.__dict__.get("_v_seq"))

    @v_seq.setter
    def v_seq(self, value: Tensor | None) -> None:
        if "v_seq" in self._memories:
            self._memories["v_seq"] = value
        else:
            self.__dict__["_v_seq"] = value

    @property
    def store_v_seq(self) -> bool:  # noqa: D102
        return self._store_v_seq

    @store_v_seq.setter
    def store_v_seq(self, value: bool) -> None:
        self._store_v_seq = value
        self.v_seq = None

    @property
    def surrogate(self) -> Surrogate:  # noqa: D102
        return as_surrogate(self.surrogate_function)

    @surrogate.setter
    def surrogate(self, value: str | Surrogate) -> None:
        surrogate = as_surrogate(value)
        self._modules.pop("surrogate_function", None)  # SpikingJelly's, which only a module could follow
        self.surrogate_function = surrogate

    @property
    def backend(self) -> str:  # noqa: D102
        return self._chosen_backend

    @backend.setter
    def backend(self, value: str) -> None:
        self._chosen_backend = check_name(value)

    @property
    def supported_backends(self) -> tuple[str, ...]:
        """The values of `backend` that can run here."""
        return ("auto", *available("lif"))

    @property
    def options(self) -> dict:
        """The neuron's options as keyword arguments of the operator `lif`."""
        return {name: getattr(self, name) for name in (*NEURON_OPTIONS, "backend")}

    def forward(self, x: Tensor) -> Tensor:
        """Spikes for x: [T, ...] where step_mode is "m", one time step [...] where it is "s"."""
        return self.single_step_forward(x) if self.step_mode == "s" else self.multi_step_forward(x)

    def single_step_forward(self, x: Tensor) -> Tensor:
        """Spikes for one time step x [...]."""
        require_float_tensor("x", x, "[...]")
        steps = x.unsqueeze(0)
        spikes, v = ops.lif(steps, v_init=self._start(steps), **self.options)
        self._keep(v)
        if self.store_v_seq and not self._is_function and self._repeating() is None:
            v_seq = self.v_seq
            self.v_seq = v.unsqueeze(0) if v_seq is None else torch.cat((v_seq, v.unsqueeze(0)))
        return spikes.squeeze(0)

    def multi_step_forward(self, x: Tensor) -> Tensor:
        """Spikes for x [T, ...]."""
        require_float_tensor("x", x, "[T, ...]")
        v = self._start(x)
        if not self.store_v_seq:
            spikes, v = ops.lif(x, v_init=v, **self.options)
            self._keep(v)
            return spikes
        steps, potentials = [], []
        for x_t in x.unbind(0):
            spikes, v = ops.lif(x_t.unsqueeze(0), v_init=v, **self.options)
            steps.append(spikes)
            potentials.append(v)
        self._keep(v)
        if not self._is_function:
            self.v_seq = torch.stack(potentials)
        return torch.cat(steps)

    @property
    def at_rest(self) -> bool:
        """Whether the next call starts from the potential that `reset` gives."""
        v = self._before_call()
        return isinstance(v, float) and v == self._rest

    def _start(self, x: Tensor) -> Tensor | None:
        """The potential before the call with x [T, ...], for the operator."""
        v = self._before_call()
        if isinstance(v, type):  # _Unknown, with which Dynamo of torch 2.6 cannot compare a float
            raise RuntimeError(_NOT_KEPT)
        if not isinstance(v, Tensor):
            return None if v == self._rest else x.new_full(x.shape[1:], v, dtype=state_dtype(x.dtype))
        if torch.compiler.is_compiling() and not self._is_function:
            refuse_compiling_in_backward()
        if left_by_vmap(v):
            raise RuntimeError("v was left by a call within torch.func.vmap, which has ended: call reset_net(network).")
        if v.shape != x.shape[1:]:
            raise ValueError(
                f"x must have time steps of shape {list(v.shape)}, as the potential v that the last call left; got "
                f"{list(x.shape[1:])}. reset_net(network) before another batch lets neurons start at rest."
            )
        return v

    def _before_call(self) -> float | Tensor | type[_Unknown]:
        v = self._memories["v"]
        return Calls.of(self).start(v) if self._is_recorded() and is_backward() else v

    def _is_recorded(self) -> bool:
        """Whether a call now is one that changes the potential, in eager mode."""
        return not torch.compiler.is_compiling() and not self._is_function

    def _repeating(self) -> Record | None:
        """The record of the checkpoint that is repeating calls, which holds the potential meanwhile."""
        return Calls.of(self).repeating() if self._is_recorded() and is_backward() else None

    def _keep(self, v: Tensor | type[_Unknown]) -> None:
        """Let the next call start from v."""
        if is_exporting():
            return
        if self._is_recorded():
            if not is_backward():
                Calls.of(self).add(self._memories["v"])
            elif Calls.of(self).repeat(self._before_call(), v):
                return
        self._memories["v"] = v

    def mark_unknown(self) -> None:
        """Record a call within a fused operator, which does not keep its last potential."""
        self._keep(_Unknown)

    def __setattr__(self, name: str, value) -> None:
        if name == "v":
            record = self._repeating()
            if record is not None:
                record.v = value
                return
            Calls.end(self)
        MemoryModule.__setattr__(self, name, value)

    def release(self) -> None:
        """Be an instance of the class that `convert` found, and of no other."""
        if self._memories["v"] is _Unknown:
            self._memories["v"] = self._memories_rv["v"]
        for name in ("_chosen_backend", "_recorded", "_v_seq"):
            self.__dict__.pop(name, None)
        object.__setattr__(self, "__class__", self.__dict__.pop("_original"))

    def reset(self) -> None:
        """Forget the membrane potential: the next call starts at rest."""
        record = self._repeating()
        if record is not None:
            record.v = self._memories_rv["v"]
            return
        super().reset()
        if self.v_seq is not None:  # not always: Dynamo of torch 2.6 cannot trace it
            self.v_seq = None
        Calls.end(self)

    def detach(self) -> None:
        """Keep the potential, but cut its graph: for backpropagation through time in parts."""
        record = self._repeating()
        if record is not None:
            record.v = record.v.detach() if isinstance(record.v, Tensor) else record.v
            return
        super().detach()
        if self.v_seq is not None:
            self.v_seq = self.v_seq.detach()
        Calls.end(self)

    def _replicate_for_data_parallel(self):
        replica = super()._replicate_for_data_parallel()
        replica.__dict__.pop("_recorded", None)
        return replica

    def __getstate__(self) -> dict:
        """Copies and pickles keep the potential, but not the graph that made it."""
        state = super().__getstate__()
        state.pop("_recorded", None)
        if isinstance(state.get("_v_seq"), Tensor):
            state["_v_seq"] = state["_v_seq"].detach()
        return state

    def extra_repr(self) -> str:  # noqa: D102
        surrogate = f"{self.surrogate.name}(alpha={self.surrogate.alpha:g})"
        return (
            f"v_threshold={self.v_threshold}, v_reset={self.v_reset}, surrogate={surrogate}, "
            f"detach_reset={self.detach_reset}, step_mode={self.step_mode}, "
            f"spikes={shown_spikes(self.backend)}, backend={shown(self.backend, 'lif')}"
        )


class LIFNode(BaseNode):
    """Leaky integrate-and-fire neurons that keep their membrane potential between calls until `reset`.

    Arguments, attributes and methods are those of SpikingJelly's LIFNode, but for three things: step_mode is "m" unless
    said otherwise, 16-bit inputs keep a float32 potential, and another batch size needs a reset.

    Args:
        tau: Membrane time constant in time steps, at least 1; a float, or a tensor as in the operator `lif`.
        decay_input: Whether the input is divided by tau as well.
        v_threshold: Firing threshold; a float or a tensor.
        v_reset: Potential after a spike; None for soft reset.
        surrogate_function: Name of the surrogate gradient, a `Surrogate`, or one of SpikingJelly's; None stands for
            "sigmoid".
        detach_reset: Whether the reset passes no gradient to the spike.
        step_mode: "m" for inputs [T, ...], "s" for the input of one time step.
        backend: "auto", "triton", "cupy", "cpu" or "torch". The text of the module says what "auto" stands for here.
        store_v_seq: Whether the potential after each time step is kept, as `v_seq`; slow, for looking at it.
        surrogate: Another name of surrogate_function.

    Raises:
        TypeError, ValueError: As the operator `lif`; also where an input does not have the shape of the kept potential.
    """

    def __init__(
        self,
        tau: float | Tensor = 2.0,
        decay_input: bool = True,
        v_threshold: float | Tensor = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: str | Surrogate | nn.Module | None = None,
        detach_reset: bool = False,
        step_mode: str = "m",
        backend: str = "auto",
        store_v_seq: bool = False,
        *,
        surrogate: str | Surrogate | nn.Module | None = None,
    ):
        super().__init__(
            v_threshold, v_reset, surrogate_function, detach_reset, step_mode, backend, store_v_seq, surrogate
        )
        self.tau, self.decay_input = tau, decay_input
        neuron_options(**{name: getattr(self, name) for name in NEURON_OPTIONS})

    def extra_repr(self) -> str:  # noqa: D102
        return f"tau={self.tau}, decay_input={self.decay_input}, {super().extra_repr()}"


class IFNode(BaseNode):
    """Integrate-and-fire neurons: those of `LIFNode` without a leak, h = v + x.

    Args:
        v_threshold: This and the others as in `LIFNode`.
        v_reset: Potential after a spike; None for soft reset.
        surrogate_function: The surrogate gradient.
        detach_reset: Whether the reset passes no gradient to the spike.
        step_mode: "m" or "s".
        backend: The kernel.
        store_v_seq: Whether the potential after each time step is kept.
        surrogate: Another name of surrogate_function.
    """

    tau, decay_input = math.inf, False

    def __init__(
        self,
        v_threshold: float | Tensor = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: str | Surrogate | nn.Module | None = None,
        detach_reset: bool = False,
        step_mode: str = "m",
        backend: str = "auto",
        store_v_seq: bool = False,
        *,
        surrogate: str | Surrogate | nn.Module | None = None,
    ):
        super().__init__(
            v_threshold, v_reset, surrogate_function, detach_reset, step_mode, backend, store_v_seq, surrogate
        )


class ParametricLIFNode(BaseNode):
    """LIF neurons that learn their time constant: tau = 1/sigmoid(w), one w for the layer (arXiv 2007.05785).

    The operator divides by tau where SpikingJelly multiplies by sigmoid(w), so the last bit of a potential may differ.

    Args:
        init_tau: Time constant at first, above 1.
        decay_input: This and the others as in `LIFNode`.
        v_threshold: Firing threshold.
        v_reset: Potential after a spike; None for soft reset.
        surrogate_function: The surrogate gradient.
        detach_reset: Whether the reset passes no gradient to the spike.
        step_mode: "m" or "s".
        backend: The kernel.
        store_v_seq: Whether the potential after each time step is kept.
        surrogate: Another name of surrogate_function.

    Attributes:
        w: The learnable parameter, a scalar.
        tau: The time constant, a tensor through which w gets its gradient.
    """

    def __init__(
        self,
        init_tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: float | Tensor = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: str | Surrogate | nn.Module | None = None,
        detach_reset: bool = False,
        step_mode: str = "m",
        backend: str = "auto",
        store_v_seq: bool = False,
        *,
        surrogate: str | Surrogate | nn.Module | None = None,
    ):
        super().__init__(
            v_threshold, v_reset, surrogate_function, detach_reset, step_mode, backend, store_v_seq, surrogate
        )
        init_tau = require_number("init_tau", init_tau, above=1.0)
        self.decay_input = decay_input
        self.w = nn.Parameter(torch.tensor(-math.log(init_tau - 1.0)))
        neuron_options(**{name: getattr(self, name) for name in NEURON_OPTIONS})

    @property
    def tau(self) -> Tensor:  # noqa: D102
        return 1.0 / self.w.double().sigmoid()  # float32 would round it twice

    def extra_repr(self) -> str:  # noqa: D102
        tau = "unknown" if self.w.is_meta else f"{self.tau.item():g}"
        return f"tau={tau}, decay_input={self.decay_input}, {super().extra_repr()}"


_NOT_KEPT = (
    "v was not kept, because this neuron ran in one operator with the batch norm before it: call reset_net(network) "
    "before the next input, or use convert(network, fuse=False) where potentials are read or carried on."
)
