"""Modules: the operators as layers."""

from ..kernels.surrogate.reference import Surrogate
from .convert import Entry, Report, convert, revert
from .loss import SealLoss
from .neuron import IFNode, LIFNode, ParametricLIFNode
from .state import detach_net, reset_net

__all__ = [
    "Entry",
    "IFNode",
    "LIFNode",
    "ParametricLIFNode",
    "Report",
    "SealLoss",
    "Surrogate",
    "convert",
    "detach_net",
    "reset_net",
    "revert",
]
