"""Modules whose forward runs batch norm → (sum) → neuron as one operator.

The container becomes an instance of a subclass of its class that runs the code that `trace.py` made of its forward, and
the original forward wherever what it was traced with has changed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import nn

from ..ops._normalise import has_hooks
from .trace import CannotFuse, traced


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
        code, self.chains, self.inlined = traced(container, excluded)
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
            and all(_is_same_sequence(container._modules[name], names) for name, names in self.inlined)
        )


def _is_same_sequence(module: nn.Module, names: tuple[str, ...]) -> bool:
    return type(module) is nn.Sequential and tuple(module._modules) == names and not has_hooks(module)


def _values(container: nn.Module) -> list[tuple[str, object]]:
    """Attributes by which a forward could choose its way; the trace covers both values of `training`."""
    plain, own = (bool, int, float, str, type(None)), ("training", "_plan")
    return [(name, value) for name, value in vars(container).items() if type(value) in plain and name not in own]


def _children(container: nn.Module) -> list[tuple[str, str | None]]:
    """The children by name, with the step modes of those that have one; None for a child that is None."""
    return [
        (name, None if child is None else getattr(child, "step_mode", "")) for name, child in container._modules.items()
    ]


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
            object.__setattr__(self, "__class__", type(self)._stands_for)
            fuse(self, excluded)


def fuse(container: nn.Module, excluded: frozenset[str]) -> Plan | str:
    """Let the container run fused, in place; the plan, or why there is none. Arguments are those of `Plan`."""
    try:
        plan = Plan(container, excluded)
    except CannotFuse as error:
        return str(error)
    object.__setattr__(container, "__class__", fused_class(type(container)))
    container._plan = plan
    return plan


def unfuse(container: Fused) -> None:
    """Let the container be an instance of its own class alone."""
    container.__dict__.pop("_plan", None)
    object.__setattr__(container, "__class__", type(container)._stands_for)


@functools.cache
def fused_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `cls` whose instances run fused."""
    named = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls.__name__, (Fused, cls), {**named, "_stands_for": cls})


def _blank(cls: type[nn.Module]) -> nn.Module:
    return object.__new__(fused_class(cls))
