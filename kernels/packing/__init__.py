"""Spikes as bits, eight to a byte."""
