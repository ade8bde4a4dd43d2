"""The Triton kernels of batch norm + residual + LIF in Triton's interpreter, so without a GPU."""

import pytest

from triton_process import interpret

pytest.importorskip("triton", reason="Triton is not installed")


def test_values(tmp_path):
    interpret(tmp_path, ["kernels/test_bn_lif_triton_values.py"], at_least=150)


def test_launches(tmp_path):
    interpret(tmp_path, ["kernels/test_bn_lif_triton_launches.py"], at_least=80)
