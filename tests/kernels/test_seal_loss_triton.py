"""The Triton kernels of the distillation loss in Triton's interpreter, so without a GPU."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from triton_process import interpret


def test_values(tmp_path):
    files = [f"kernels/test_seal_loss_triton_{name}.py" for name in ("values", "gradients")]
    interpret(tmp_path, files, at_least=170)
