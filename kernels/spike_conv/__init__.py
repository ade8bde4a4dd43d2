"""Convolutions of spikes, which skip what did not fire."""
