"""Modules: the operators as layers."""

from ..kernels.surrogate.reference import Surrogate
from .neuron import LIFNode, detach_net, reset_net

__all__ = ["LIFNode", "Surrogate", "detach_net", "reset_net"]
