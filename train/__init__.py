"""Trainers: `teacher.py` trains an ANN, `distill.py` distils a spiking student from it, `demo.py` does both on digits.

Plain functions around one training loop (`engine.py`). Each trainer's objective is a task that returns its losses by
name. `evaluate.py` tells how good a trained network is, and `load` brings it into a program.
"""

from seal_fast.train.networks import load

__all__ = ["load"]
