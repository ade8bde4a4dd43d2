"""The public operators: they check the arguments, choose the backend, and nothing else."""

from ._packed import packed_spikes
from ._spike_tensor import SpikeTensor
from .bn_lif import bn_lif
from .lif import lif
from .seal_loss import LossParts, seal_loss, selective_alignment_weights
from .spike_conv import dense_convolutions, spike_conv2d, spike_linear

__all__ = [
    "LossParts",
    "SpikeTensor",
    "bn_lif",
    "dense_convolutions",
    "lif",
    "packed_spikes",
    "seal_loss",
    "selective_alignment_weights",
    "spike_conv2d",
    "spike_linear",
]
