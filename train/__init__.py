"""Trainers: `teacher.py` trains an ANN, `distill.py` distils a spiking student from it, `demo.py` does both on digits.

Plain functions around one training loop (`engine.py`). Each trainer's objective is a task that returns its losses by
name.
"""
