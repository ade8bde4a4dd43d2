"""`make gpu`: what a machine with an NVIDIA GPU is asked in one run, with kernels that can be compiled beforehand."""
