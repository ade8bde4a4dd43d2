"""What launchers ask about a device."""

import functools

import torch


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU. Of another device, where Triton interprets, as many as an H100 or H200 has."""
    return 132 if device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count
