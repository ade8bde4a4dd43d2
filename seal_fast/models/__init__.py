"""Networks of the SeAl-KD paper: spiking students and their teachers, with the published state-dict names."""

from .ann import TEACHERS, folded, teacher
from .snn import STUDENTS, student

__all__ = ["STUDENTS", "TEACHERS", "folded", "student", "teacher"]
