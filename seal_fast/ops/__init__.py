"""The public operators: they check the arguments, choose the backend, and nothing else."""

from ._packed import packed_spikes
from .bn_lif import bn_lif
from .lif import lif
from .seal_loss import LossParts, seal_loss, selective_alignment_weights

__all__ = ["LossParts", "bn_lif", "lif", "packed_spikes", "seal_loss", "selective_alignment_weights"]
