"""What launchers ask about a device."""

import functools

import torch

# What torch.cuda.current_stream(device).cuda_stream is made of: one call in place of an object.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU. Of another device, where Triton interprets, as many as an H100 or H200 has."""
    return 132 if device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count


def is_current(device: torch.device) -> bool:
    """Whether this thread's kernels start on the GPU `device` as it is."""
    return device.index == torch.cuda.current_device()


def current_stream(device: torch.device) -> int:
    """The address of torch's current stream of the GPU `device`."""
    if _raw_stream is None or device.index is None:
        return torch.cuda.current_stream(device).cuda_stream
    return _raw_stream(device.index)
