"""The multi-step leaky integrate-and-fire neuron."""
