"""Fused spiking neurons and selective-alignment distillation for PyTorch.

Operators: `lif`, `bn_lif`, `seal_loss`, `selective_alignment_weights`. Modules are in `seal_fast.nn`, networks in
`seal_fast.models`, trainers in `seal_fast.train`. `backends()` says what can run here.
"""

from . import models, nn
from .backends import backends
from .memory import reuse_freed_memory
from .nn import convert, revert
from .ops import (
    SpikeTensor,
    bn_lif,
    dense_convolutions,
    lif,
    packed_spikes,
    seal_loss,
    selective_alignment_weights,
    spike_conv2d,
    spike_linear,
)
from .version import __version__

__all__ = [
    "SpikeTensor",
    "__version__",
    "backends",
    "bn_lif",
    "convert",
    "dense_convolutions",
    "lif",
    "models",
    "nn",
    "packed_spikes",
    "reuse_freed_memory",
    "revert",
    "seal_loss",
    "selective_alignment_weights",
    "spike_conv2d",
    "spike_linear",
]
