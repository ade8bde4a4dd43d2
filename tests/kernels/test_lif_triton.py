"""The Triton kernels of the LIF neuron in Triton's interpreter, so without a GPU."""

import pytest

from triton_process import interpret

pytest.importorskip("triton", reason="Triton is not installed")

SHARED = ["kernels/test_lif_forward.py", "kernels/test_lif_gradients.py", "seal_fast/test_golden_lif.py"]


def test_shared_tests_of_the_operator(tmp_path):
    # That one test has 40,000 neurons for 64 steps, which take the interpreter a minute.
    interpret(tmp_path, SHARED, "-k", "triton and not keeps_a_float32_state", at_least=200)


def test_values(tmp_path):
    interpret(tmp_path, ["kernels/test_lif_triton_values.py"], at_least=160)


def test_repeated_launches(tmp_path):
    interpret(tmp_path, ["kernels/test_repeated_launches.py"], at_least=4)


@pytest.mark.long
def test_values_of_more_runs(tmp_path):
    interpret(tmp_path, ["kernels/test_lif_triton_values.py"], "-m", "long", at_least=1, timeout=3600)
