"""Finding batch norm → (sum) → neuron in the forward of a module, and letting the neuron take the batch norm along.

The forward of a container is traced with its children as leaves. Where nothing but a neuron uses a batch norm's output,
or its sum with a residual, one call of the two takes the place of both in the traced code.
"""

from __future__ import annotations

import operator
from collections import Counter
from typing import NamedTuple

import torch
from torch import fx, nn

from ..ops._normalise import has_hooks
from .layer import normalises_rows, normalises_steps, run_layer, run_rows
from .neuron import BaseNode

_ADD = (operator.add, torch.add)
_SHAPES = ("reshape", "view", "unflatten", "contiguous")  # methods that keep the order of the numbers
_OPERATORS = ("inv", "invert", "index", "indexOf", "is_", "is_not", "itemgetter")  # begin with i, and change nothing
_Inlined = tuple[str, tuple[str, ...]]  # name of a sequence, and those of its children


class Chain(NamedTuple):
    """Names, within the container, of modules that run as one."""

    neuron: str
    norm: str
    residual: bool = False
    residual_norm: str | None = None

    def __str__(self):
        return ", ".join([self.norm, *(["a sum"] if self.residual else []), *filter(None, [self.residual_norm])])


class CannotFuse(Exception):  # noqa: N818
    """Why a container's forward stays as it is."""


class _Proxy(fx.Proxy):
    """Records x += y as what writes to x, where torch.fx takes it for x = x + y."""


def _record(operation):
    return lambda self, other: self.tracer.create_proxy("call_function", operation, (self, other), {})


for _name in (
    "add",
    "and",
    "floordiv",
    "lshift",
    "matmul",
    "mod",
    "mul",
    "or",
    "pow",
    "rshift",
    "sub",
    "truediv",
    "xor",
):
    setattr(_Proxy, f"__i{_name}__", _record(getattr(operator, f"__i{_name}__")))


class _Children(fx.Tracer):
    """Traces a container's own code: its children are leaves, but for sequences that end in a batch norm."""

    def __init__(self):
        super().__init__()
        self.inlined: list[_Inlined] = []

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        if "." in name or not ends_in_norm(module):
            return True
        self.inlined.append((name, tuple(module._modules)))
        return False


def ends_in_norm(module: nn.Module) -> bool:
    """Whether the module is a plain sequence without neurons whose last one is a batch norm."""
    return (
        type(module) is nn.Sequential
        and len(module) > 0
        and (normalises_steps(module[-1]) or normalises_rows(module[-1]))
        and not has_hooks(module)
        and "forward" not in vars(module)
        and not any(isinstance(child, BaseNode) for child in module.modules())
    )


def traced(container: nn.Module, excluded: frozenset[str]) -> tuple[object, list[Chain], list[_Inlined]]:
    """Code of the container's forward with its chains fused, those chains, and the sequences that it goes through.

    Raises:
        CannotFuse: There is no such code.
    """
    if "forward" in vars(container):
        raise CannotFuse("its forward was replaced")
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
        found = _summed(node.args[0], once) or _reshaped(node.args[0], once)
        if found is None:
            continue
        read = {found.norm.args[0], found.residual}
        others = [write for write in writes if write not in found.between]
        start = min(order[part] for part in (found.norm, found.residual_norm) if part is not None)
        if any(start < order[write] < order[node] or not read.isdisjoint(write.args) for write in others):
            continue
        chains.append(_rewrite(graph, node, found))
    return chains


class _Found(NamedTuple):
    """What stands before a neuron."""

    norm: fx.Node
    between: tuple[fx.Node, ...] = ()  # from the batch norm to the neuron
    residual: fx.Node | None = None
    residual_norm: fx.Node | None = None


def _summed(source, once: dict) -> _Found | None:
    """A batch norm, or its sum with something that may have passed another one."""
    if _is_norm(source, once, normalises_steps):
        return _Found(source)
    if not _is_used_once(source):
        return None
    norm, residual = _addends(source, once)
    if norm is None:
        return None
    if _is_norm(residual, once, normalises_steps):
        return _Found(norm, (source,), residual.args[0], residual)
    return _Found(norm, (source,), residual)


def _reshaped(source, once: dict) -> _Found | None:
    """A batch norm of rows [T·B, C, ...] whose output is given the shape [T, B, C, ...]."""
    between = []
    while _is_used_once(source) and source.op == "call_method" and source.target in _SHAPES:
        between.insert(0, source)
        source = source.args[0]
    return _Found(source, tuple(between)) if between and _is_norm(source, once, normalises_rows) else None


def _rewrite(graph: fx.Graph, node: fx.Node, found: _Found) -> Chain:
    norm, between, residual, residual_norm = found
    with graph.inserting_before(node):
        modules = graph.get_attr(node.target), graph.get_attr(norm.target)
        if between and between[0].target in _SHAPES:
            steps = norm.args[0]
            for part in between:
                if part.target != "contiguous":
                    steps = graph.call_method(part.target, (steps, *part.args[1:]), dict(part.kwargs))
            contiguous = between[-1].target == "contiguous"
            call = graph.call_function(run_rows, (*modules, norm.args[0], steps, contiguous))
        else:
            of_residual = None if residual_norm is None else graph.get_attr(residual_norm.target)
            call = graph.call_function(run_layer, (*modules, norm.args[0], residual, of_residual))
    node.replace_all_uses_with(call)
    for part in (node, *reversed(between), norm, residual_norm):
        if part is not None:
            graph.erase_node(part)
    return Chain(node.target, norm.target, residual is not None, residual_norm and residual_norm.target)


def _is_used_once(node) -> bool:
    return isinstance(node, fx.Node) and len(node.users) == 1


def _is_norm(node, once: dict, kind) -> bool:
    plain = _is_used_once(node) and len(node.args) == 1 and not node.kwargs
    return plain and node in once and kind(once[node])


def _addends(node: fx.Node, once: dict) -> tuple[fx.Node | None, fx.Node | None]:
    """The batch norm and the other of two nodes that `node` adds, or twice None."""
    in_place = node.target is operator.iadd or (node.op == "call_method" and node.target == "add_")
    adds = node.target in _ADD or (node.op == "call_method" and node.target == "add")
    if not (adds or in_place) or node.kwargs or len(node.args) != 2:
        return None, None
    first, second = node.args
    if _is_norm(first, once, normalises_steps) and isinstance(second, fx.Node) and second is not first:
        return first, second
    if (
        _is_norm(second, once, normalises_steps) and isinstance(first, fx.Node) and not in_place
    ):  # else it would write to the residual
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
