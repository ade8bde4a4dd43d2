"""Modules: the operators as layers."""

from ..kernels.surrogate.reference import Surrogate
from .loss import SealLoss
from .neuron import LIFNode, detach_net, reset_net

__all__ = ["LIFNode", "SealLoss", "Surrogate", "detach_net", "reset_net"]
