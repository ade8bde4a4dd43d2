"""The Triton kernels against formulas in NumPy, in Triton's interpreter, so without a GPU."""

import pytest

from triton_process import interpret

pytest.importorskip("triton", reason="Triton is not installed")

FILES = [f"kernels/test_oracle_{operator}.py" for operator in ("lif", "bn_lif", "seal_loss")]


def test_few_cases(tmp_path):
    interpret(tmp_path, FILES, at_least=3)


@pytest.mark.long
@pytest.mark.parametrize("file", FILES)
def test_many_cases(tmp_path, file):
    interpret(tmp_path, [file], "-m", "long", at_least=1, timeout=1800)
