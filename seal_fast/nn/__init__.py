"""Modules: the operators as layers."""

from ..kernels.surrogate.reference import Surrogate
from .loss import SealLoss
from .neuron import IFNode, LIFNode, ParametricLIFNode
from .state import detach_net, reset_net

__all__ = ["IFNode", "LIFNode", "ParametricLIFNode", "SealLoss", "Surrogate", "detach_net", "reset_net"]
