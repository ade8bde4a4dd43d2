"""Batch norm, residual and LIF in one operator."""
