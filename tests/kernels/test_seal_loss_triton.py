"""The Triton kernels of the distillation loss in Triton's interpreter, so without a GPU."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from triton_process import interpret


def test_values(tmp_path):
    interpret(tmp_path, ["kernels/test_seal_loss_triton_values.py"], at_least=170)
