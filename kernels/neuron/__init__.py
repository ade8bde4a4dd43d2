"""One LIF neuron and what describes it, for every operator that runs neurons, once per language."""
