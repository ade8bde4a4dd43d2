"""Batch norm → (add) → neuron within a module's own forward, found by torch.fx and run as one operator.

The forward of a container is traced with its children as leaves. Where nothing but a neuron uses a batch norm's output,
or its sum with a residual, the neuron's call in the traced code takes the batch norm along. The container becomes an
instance of a subclass of its class that runs this code, and the original forward wherever what it was traced with has
changed. Each neuron decides at its call whether it runs in one operator with its batch norm, or after it: it does the
latter where anybody could tell the difference.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from .. import ops
from ..kernels.bn_lif.reference import has_step_modes
from ..ops._normalise import can_fuse, has_hooks
from .neuron import BaseNode

_DIMENSIONS = {"BatchNorm1d": (3, 4), "BatchNorm2d": (5,), "BatchNorm3d": (6,)}  # of inputs in step mode "m"
_ADD = (operator.add, torch.add)
_ADD_IN_PLACE = (operator.iadd,)


class Chain(NamedTuple):
    """Names, within the container, of modules that run as one."""

    neuron: str
    norm: str
    residual: bool
    residual_norm: str | None

    def __str__(self):
        parts = [self.norm, *(["a sum"] if self.residual else []), *filter(None, [self.residual_norm])]
        return ", ".join(parts)


class CannotFuse(Exception):  # noqa: N818
    """Why a container's forward stays as it is."""


def run_layer(
    neuron: nn.Module,
    bn: nn.Module,
    y: Tensor,  # [T, B, C, ...]
    residual: Tensor | None,
    residual_bn: nn.Module | None,
) -> Tensor:
    """neuron(bn(y) + residual_bn(residual)), in one operator where nobody could tell."""
    norms = (bn,) if residual_bn is None else (bn, residual_bn)
    alike = residual is None or (isinstance(residual, Tensor) and residual.shape == y.shape)
    if not alike or not _can_run(neuron) or not all(_normalises(norm, y) for norm in norms):
        m = bn(y)
        if residual is not None:
            m = m + (residual if residual_bn is None else residual_bn(residual))
        return neuron(m)
    T = y.shape[0]
    if residual is not None:
        residual = residual.flatten(0, 1)
    spikes = ops.bn_lif(y.flatten(0, 1), bn, neuron, time_steps=T, residual=residual, residual_bn=residual_bn)
    neuron.mark_unknown()
    return spikes.unflatten(0, (T, -1))


def _can_run(neuron: nn.Module) -> bool:
    return (
        isinstance(neuron, BaseNode)
        and neuron.step_mode == "m"
        and not neuron.store_v_seq
        and neuron.at_rest
        and not has_hooks(neuron)
        and not _global_hooks()
    )


def _normalises(bn: nn.Module, y: Tensor) -> bool:
    return has_step_modes(bn) and bn.step_mode == "m" and can_fuse(bn) and y.dim() in _DIMENSIONS[type(bn).__name__]


def _global_hooks() -> bool:
    of_all = nn.modules.module
    return bool(of_all._global_forward_hooks or of_all._global_forward_pre_hooks or of_all._global_backward_hooks)


class _Children(fx.Tracer):
    """Traces a container's own code: its children are leaves, but for sequences that end in a batch norm."""

    def __init__(self):
        super().__init__()
        self.inlined: list[str] = []

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        if not ends_in_norm(module):
            return True
        self.inlined.append(name)
        return False


def ends_in_norm(module: nn.Module) -> bool:
    """Whether the module is a plain sequence without neurons whose last one is a batch norm."""
    return (
        type(module) is nn.Sequential
        and len(module) > 0
        and has_step_modes(module[-1])
        and not has_hooks(module)
        and "forward" not in vars(module)
        and not any(isinstance(child, BaseNode) for child in module.modules())
    )


class Plan:
    """The traced forward of a container, and what it was traced with.

    Args:
        container: The module.
        excluded: Names of neurons in it that are called from elsewhere, too.

    Raises:
        CannotFuse: Its forward stays as it is.
    """

    def __init__(self, container: nn.Module, excluded: frozenset[str]):
        self.excluded = excluded
        code, self.chains, self.inlined = _traced(container, excluded)
        space = dict(code.globals)
        exec(compile(code.src, f"<fused {type(container).__name__}>", "exec"), space)
        self.forward: Callable = space["forward"]
        self.values = _values(container)
        self.children = _children(container)

    def holds(self, container: nn.Module) -> bool:
        """Whether the container's own forward would do now what it did when it was traced."""
        return (
            all(getattr(container, name, None) == value for name, value in self.values)
            and self.children == _children(container)
            and all(ends_in_norm(container.get_submodule(name)) for name in self.inlined)
        )


def _values(container: nn.Module) -> list[tuple[str, object]]:
    """Attributes by which a forward could choose its way; the trace covers both values of `training`."""
    plain, own = (bool, int, float, str, type(None)), ("training", "_plan")
    return [(name, value) for name, value in vars(container).items() if type(value) in plain and name not in own]


def _children(container: nn.Module) -> list[tuple[str, str | None]]:
    """The children by name, with the step modes of those that have one; None for a child that is None."""
    return [
        (name, None if child is None else getattr(child, "step_mode", "")) for name, child in container._modules.items()
    ]


def _traced(container: nn.Module, excluded: frozenset[str]) -> tuple[object, list[Chain], list[str]]:
    found = []
    before, training = _contents(container), container.training
    for container.training in (True, False):
        tracer = _Children()
        try:
            graph = tracer.trace(container)
        except Exception as error:  # whatever the forward of somebody else's module raises for a proxy
            reason = str(error).strip().partition("\n")[0]
            raise CannotFuse(f"its forward cannot be traced: {type(error).__name__}: {reason}") from None
        finally:
            container.training = training
            changed = _restore(container, before)
        if changed:
            raise CannotFuse(f"its forward changes its attribute {changed!r}")
        chains = _fuse(graph, container, excluded)
        found.append((graph.python_code("self"), chains, tracer.inlined))
    if found[0][0].src != found[1][0].src:
        raise CannotFuse("its forward is another one in training than in evaluation")
    if not found[0][1]:
        raise CannotFuse("no batch norm in it is used by one neuron alone")
    return found[0]


def _contents(container: nn.Module) -> dict:
    """The attributes, and copies of those that a forward could change in place."""
    return {name: (value, _parts(value)) for name, value in vars(container).items()}


def _parts(value) -> list | None:
    if isinstance(value, dict):
        return list(value.items())
    return list(value) if isinstance(value, (list, set)) else None


def _restore(container: nn.Module, before: dict) -> str | None:
    """Undo what a trace changed; the name of an attribute that it changed, if it did."""
    changed = None
    for name in [*vars(container)]:
        if name not in before:
            del container.__dict__[name]
            changed = name
    for name, (value, parts) in before.items():
        now = _parts(value)
        same = now is parts or (len(now) == len(parts) and all(_same(a, b) for a, b in zip(now, parts, strict=True)))
        if container.__dict__.get(name, ...) is value and same:
            continue
        changed = name
        if not same:
            value.clear()
            value.extend(parts) if isinstance(value, list) else value.update(parts)
        container.__dict__[name] = value
    return changed


def _same(a, b) -> bool:
    return a is b or (type(a) is tuple and all(x is y for x, y in zip(a, b, strict=True)))


def _fuse(graph: fx.Graph, container: nn.Module, excluded: frozenset[str]) -> list[Chain]:
    """Rewrite the calls of neurons that can take a batch norm along."""
    modules = {node: container.get_submodule(node.target) for node in graph.nodes if node.op == "call_module"}
    calls = Counter(id(module) for module in modules.values())
    once = {node: module for node, module in modules.items() if calls[id(module)] == 1}
    order = {node: position for position, node in enumerate(graph.nodes)}
    writes = [node for node in graph.nodes if _writes(node, modules.get(node))]
    chains = []
    for node, neuron in once.items():
        if not isinstance(neuron, BaseNode) or node.target in excluded or len(node.args) != 1 or node.kwargs:
            continue
        (source,) = node.args
        if not _is_used_once(source):
            continue
        norm, add, residual, residual_norm = source, None, None, None
        if not _is_norm(source, once):
            add = source
            norm, residual = _addends(add, once)
            if norm is None:
                continue
            if _is_norm(residual, once):
                residual_norm, residual = residual, residual.args[0]
        start = min(order[part] for part in (norm, residual_norm) if part is not None)
        read = norm.args[0], residual
        others = [write for write in writes if write is not add]
        if any(start < order[write] < order[node] or not {*read}.isdisjoint(write.args) for write in others):
            continue
        taken = [part.target for part in (node, norm, residual_norm) if part is not None]
        with graph.inserting_before(node):
            attributes = [graph.get_attr(name) for name in taken]
            arguments = (*attributes[:2], norm.args[0], residual, attributes[2] if residual_norm else None)
            node.replace_all_uses_with(graph.call_function(run_layer, arguments))
        for part in (node, add, norm, residual_norm):
            if part is not None:
                graph.erase_node(part)
        chains.append(Chain(node.target, norm.target, add is not None, residual_norm and residual_norm.target))
    return chains


def _is_used_once(node) -> bool:
    return isinstance(node, fx.Node) and len(node.users) == 1


def _is_norm(node, once: dict) -> bool:
    plain = _is_used_once(node) and len(node.args) == 1 and not node.kwargs
    return plain and node in once and has_step_modes(once[node])


def _addends(node: fx.Node, once: dict) -> tuple[fx.Node | None, fx.Node | None]:
    """The batch norm and the other of two nodes that `node` adds, or twice None."""
    in_place = node.target in _ADD_IN_PLACE or (node.op == "call_method" and node.target == "add_")
    adds = node.target in _ADD or (node.op == "call_method" and node.target == "add")
    if not (adds or in_place) or node.kwargs or len(node.args) != 2:
        return None, None
    first, second = node.args
    if _is_norm(first, once) and isinstance(second, fx.Node) and second is not first:
        return first, second
    if _is_norm(second, once) and isinstance(first, fx.Node) and not in_place:  # else it would write to the residual
        return second, first
    return None, None


def _writes(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether the call may change a tensor that it was given."""
    if node.op == "call_module":
        return getattr(module, "inplace", False)
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = getattr(operator, name, None) is node.target and name.startswith("i") and name not in _OPERATORS
    written = name.endswith("_") and not name.endswith("__")
    return in_place or written or name == "setitem" or bool(node.kwargs.get("inplace")) or "out" in node.kwargs


_OPERATORS = ("inv", "invert", "index", "indexOf", "is_", "is_not", "itemgetter")  # begin with i, and change nothing


class Fused:
    """Mixed into the class of a container by `fused_class`."""

    _plan: Plan | None = None

    def forward(self, *args, **kwargs):  # noqa: D102
        plan = self._plan
        if plan is not None and plan.holds(self):
            return plan.forward(self, *args, **kwargs)
        return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol):
        # The traced code stays behind: a copy is traced anew.
        return _blank, (type(self)._stands_for,), {**self.__dict__, "_plan": self._plan and self._plan.excluded}

    def __setstate__(self, state):
        state = dict(state)
        excluded = state.pop("_plan")
        super().__setstate__(state)
        if excluded is not None:
            with contextlib.suppress(CannotFuse):
                self._plan = Plan(self, excluded)


@functools.cache
def fused_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `cls` whose instances run fused."""
    named = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls.__name__, (Fused, cls), {**named, "_stands_for": cls})


def _blank(cls: type[nn.Module]) -> nn.Module:
    return object.__new__(fused_class(cls))
