"""Surrogate gradients of the spike function, once per language."""
