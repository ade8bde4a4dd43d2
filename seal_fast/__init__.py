"""Fused spiking neurons and selective-alignment distillation for PyTorch.

Operators: `lif`, `bn_lif`, `seal_loss`, `selective_alignment_weights`. Modules are in `seal_fast.nn`, networks in
`seal_fast.models`, trainers in `seal_fast.train`. `backends()` says what can run here.
"""

from . import models, nn
from .backends import backends
from .memory import reuse_freed_memory
from .nn import convert, revert
from .ops import bn_lif, lif, packed_spikes, seal_loss, selective_alignment_weights
from .version import __version__

__all__ = [
    "__version__",
    "backends",
    "bn_lif",
    "convert",
    "lif",
    "models",
    "nn",
    "packed_spikes",
    "reuse_freed_memory",
    "revert",
    "seal_loss",
    "selective_alignment_weights",
]
