"""Modules: the operators as layers."""

from ..kernels.surrogate.reference import Surrogate
from .neuron import LIFNode

__all__ = ["LIFNode", "Surrogate"]
