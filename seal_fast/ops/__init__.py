"""The public operators: they check the arguments, choose the backend, and nothing else."""

from .bn_lif import bn_lif
from .lif import lif
from .seal_loss import LossParts, seal_loss, selective_alignment_weights

__all__ = ["LossParts", "bn_lif", "lif", "seal_loss", "selective_alignment_weights"]
