"""The first stage: what is installed, whether the kernels that were compiled beforehand fit, and the copy bandwidth."""

from __future__ import annotations

import subprocess

import torch

import measure
from gpu import clock, prebuilt, record

COPIED = 1 << 30  # bytes


def main() -> None:
    """Write two lines: the versions, and the bandwidth."""
    with record.attempt(stage="machine") as entry:
        capability = torch.cuda.get_device_capability()
        entry.update(measure.machine(), commit=prebuilt.commit(), keys=prebuilt.keys(capability))
        properties = torch.cuda.get_device_properties(0)
        entry["multiprocessors"], entry["l2_bytes"] = properties.multi_processor_count, properties.L2_cache_size
    with record.attempt(stage="machine") as entry:
        query = ["nvidia-smi", "--query-gpu=driver_version,memory.total,clocks.sm,clocks.mem", "--format=csv,noheader"]
        entry["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    with record.attempt(stage="machine") as entry:
        entry["copy_TB_s"] = copy_bandwidth()


def copy_bandwidth() -> float:
    """Terabytes a second that a large copy reads and writes."""
    source = torch.ones(1 if record.rehearsing() else COPIED, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / clock.operator(lambda: target.copy_(source))["ms"] / 1e9


if __name__ == "__main__":
    main()
