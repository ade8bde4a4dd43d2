"""Triton finds a kernel that another process has compiled, whatever that one had started before."""

import subprocess
import sys

import pytest

CODE = """
import importlib, sys
from seal_fast.kernels.launch.triton import settle


def function(name):
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(f"seal_fast.kernels.{module}"), attribute)

for name in sys.argv[1:]:
    settle(function(name))
for name in sorted(sys.argv[1:]):
    print(name, function(name).cache_key)
"""
KERNELS = (
    *("lif.triton._forward", "lif.triton._backward", "bn_lif.triton_forward._forward", "bn_lif.triton._backward"),
    *("bn_lif.triton_statistics._statistics", "seal_loss.triton._seal_loss", "packing.triton._unpack"),
)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton runs on Linux")
def test_keys_do_not_depend_on_what_was_started_before():
    outputs = []
    for order in (KERNELS, KERNELS[::-1], KERNELS[3:] + KERNELS[:3]):
        command = [sys.executable, "-c", CODE, *order]
        outputs.append(subprocess.run(command, capture_output=True, text=True, timeout=200, check=True).stdout)
    assert outputs[0] == outputs[1] == outputs[2]
    assert len(set(outputs[0].split())) == 2 * len(KERNELS)
