"""SpikingJelly networks on this library's neurons, in place."""

from __future__ import annotations

import sys
from collections import Counter
from typing import NamedTuple

from torch import nn

from ..backends import check_name
from ..ops._arguments import NEURON_OPTIONS, as_surrogate, neuron_options
from .fuse import Fused, unfuse
from .fuse import fuse as fuse_container
from .layer import normalises_rows, normalises_steps
from .neuron import BaseNode, IFNode, LIFNode, ParametricLIFNode
from .state import related
from .trace import ends_in_norm

_NEURONS = {cls.__name__: cls for cls in (IFNode, LIFNode, ParametricLIFNode)}


class Entry(NamedTuple):
    """What `convert` did with a module.

    Attributes:
        name: Its name within the model; "" for the model itself.
        was: Name of its class.
        became: What it is now; "" where it was left as it is.
        reason: Why it was left; else "".
    """

    name: str
    was: str
    became: str
    reason: str

    def __str__(self):
        what = f"{self.was} -> {self.became}" if self.became else f"{self.was} left: {self.reason}"
        return f"{self.name or 'the model'}: {what}"


class Report(list[Entry]):
    """What `convert` did, one entry for each neuron, and for each module whose batch norms were not fused."""

    @property
    def converted(self) -> list[Entry]:
        """The entries of modules that were replaced."""
        return [entry for entry in self if entry.became]

    @property
    def fused(self) -> list[Entry]:
        """Those of neurons that run in one operator with the batch norm before them."""
        return [entry for entry in self if " with " in entry.became]

    @property
    def left(self) -> list[Entry]:
        """Those of modules that were left as they are."""
        return [entry for entry in self if entry.reason]

    def __str__(self):
        total = f"{len(self.converted)} converted, {len(self.fused)} of them fused; {len(self.left)} left"
        return "\n".join([*map(str, self), total])


def convert(model: nn.Module, *, fuse: bool = True, backend: str = "auto") -> Report:
    """Let SpikingJelly's IFNode, LIFNode and ParametricLIFNode in `model` run on this library's kernels, in place.

    Each neuron stays the object that it is, with its parameters, hooks, memories, name and settings, and becomes an
    instance of this library's class as well as of its own. What is not known to behave equally is left as it is.

    Args:
        model: Any network. A second call converts what has been added since.
        fuse: Whether batch norm → (sum) → neuron runs in one operator where torch.fx proves the way from one to the
            other. Such a neuron does not keep its last potential: it has to be reset before it is called again. While
            it or its batch norm has a hook, or it records its potentials, they run one after the other.
        backend: Of the neurons: "auto", "triton", "cupy", "cpu" or "torch".

    Returns:
        What was converted and what was left, and why; its text is a table.

    Raises:
        TypeError: model is not a module, or fuse not a bool.
        ValueError: backend is unknown.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}.")
    if not isinstance(fuse, bool):
        raise TypeError(f"fuse must be True or False; got {fuse!r}.")
    check_name(backend)
    entries: dict[str, Entry] = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseNode) or not _is_neuron(module):
            continue
        was, reason = type(module).__name__, _why_left(module)
        if not reason:
            _adopt(module, backend)
        entries[name] = Entry(name, was, "" if reason else f"seal_fast.nn.{was}", reason)
    if fuse:
        _fuse_containers(model, entries)
    return Report(entries.values())


def revert(model: nn.Module) -> None:
    """Undo `convert`: every module of `model` is again what it was, in place, with its present parameters and memories.

    A potential that a fused neuron did not keep starts at rest.
    """
    for module in model.modules():
        if isinstance(module, Fused):
            unfuse(module)
        elif isinstance(module, BaseNode) and module._original is not None:
            module.release()


def _is_neuron(module: nn.Module) -> bool:
    return any(parent.__module__.startswith(_HOMES) for parent in type(module).__mro__)


_HOMES = ("spikingjelly.activation_based.neuron", "snntorch._neurons")


def _why_left(module: nn.Module) -> str:
    """Why the neuron cannot be replaced by one of equal behaviour; "" where it can."""
    kind = type(module)
    if not kind.__module__.startswith(_HOMES[0]):
        known = next((parent for parent in kind.__mro__ if parent.__module__.startswith(_HOMES)), kind)
        if known.__module__.startswith(_HOMES[1]):
            return (
                "snnTorch's neurons are called once for each time step by the network's own loop, which hands their "
                "potential on and resets it one step late"
            )
        return f"a class derived from {known.__name__} may compute something else"
    if kind is not getattr(sys.modules[_HOMES[0]], kind.__name__, None) or kind.__name__ not in _NEURONS:
        return "seal-fast has no neuron of this type"
    methods = [name for name, value in vars(module).items() if callable(value) and callable(getattr(kind, name, None))]
    if methods:
        return f"its method {methods[0]!r} was replaced"
    memories = [name for name in module._memories if name not in ("v", "v_seq")]
    if memories:
        return f"it has a memory of its own, {memories[0]!r}"
    if getattr(module, "_neuron_precision", None) is not None:
        return "it computes in a precision of its own"
    if getattr(module, "backend", "torch") not in ("torch", "cupy"):
        return f"it runs on {module.backend!r}"
    options = {name: getattr(module, name, None) for name in NEURON_OPTIONS if name not in ("tau", "surrogate")}
    options |= {"tau": getattr(module, "tau", 2.0), "decay_input": getattr(module, "decay_input", True)}
    try:
        as_surrogate(module.surrogate_function)
        neuron_options(**options, surrogate="sigmoid")
    except (TypeError, ValueError) as error:
        return str(error).rstrip(".")
    return ""


def _adopt(module: nn.Module, backend: str) -> None:
    """Let the neuron be one of ours, which has its attributes under the same names."""
    original = type(module)
    object.__setattr__(module, "__class__", related(_NEURONS[original.__name__], original))
    module._original = original
    module.backend = backend


def _fuse_containers(model: nn.Module, entries: dict[str, Entry]) -> None:
    registered = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for path, container in [*model.named_modules()]:
        children = [child for child in container._modules.values() if child is not None]
        norms = any(normalises_steps(child) or normalises_rows(child) or ends_in_norm(child) for child in children)
        if not norms or not any(isinstance(child, BaseNode) for child in children) or isinstance(container, Fused):
            continue
        excluded = frozenset(
            name
            for name, module in container.named_modules(remove_duplicate=False)
            if isinstance(module, BaseNode) and registered[id(module)] > 1
        )
        was = type(container).__name__
        plan = fuse_container(container, excluded)
        if isinstance(plan, str):
            entries[path] = Entry(path, was, "", f"{plan}; its neurons run unfused")
            continue
        for chain in plan.chains:
            name = f"{path}.{chain.neuron}" if path else chain.neuron
            kind = type(container.get_submodule(chain.neuron)).__name__
            entries[name] = Entry(name, kind, f"seal_fast.nn.{kind} with {chain}", "")
