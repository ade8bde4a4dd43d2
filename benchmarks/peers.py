"""Contestants: functions of the same meaning, ours and those of others, by name."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable

import torch
from torch import nn

import published_loss
import seal_fast
from seal_fast.backends import resolve
from seal_fast.kernels.lif import reference
from seal_fast.nn import Surrogate


def lif(device: torch.device, options: dict) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Name -> function from x [T, B, C, H, W] to spikes, each with a fresh state; ours first."""
    found = {}
    for name in ("triton", "cupy", "cpu"):
        if _runs("lif", name, device):
            found[f"seal-fast {name}"] = functools.partial(_ours, name, options)
    found["torch loop"] = functools.partial(loop, options)
    found["torch.compile of the loop"] = torch.compile(found["torch loop"], dynamic=False)
    found.update(_spikingjelly(device, options))
    return found


def bn_lif(
    device: torch.device, options: dict, channels: int, time_steps: int
) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Name -> function from y [T·B, C, H, W] to spikes of the same shape, in training; ours first."""
    found = {}
    for name in ("triton", "cupy", "cpu"):
        if _runs("bn_lif", name, device):
            bn, node = nn.BatchNorm2d(channels, device=device), seal_fast.nn.LIFNode(backend=name, **options)
            found[f"seal-fast {name}"] = functools.partial(seal_fast.bn_lif, bn=bn, lif=node, time_steps=time_steps)
    neurons = {"torch loop": functools.partial(loop, options), **_spikingjelly(device, options)}
    for name, run in neurons.items():
        layer = nn.Sequential(nn.BatchNorm2d(channels, device=device), _Rows(run, time_steps, False))
        found[f"torch batch norm + {name}"] = layer
    found["torch.compile of batch norm and loop"] = torch.compile(found["torch batch norm + torch loop"], dynamic=False)
    return found


def seal_loss(device: torch.device, weights: dict) -> dict[str, Callable[..., torch.Tensor]]:
    """Name -> function from logits, teacher logits and labels to the loss; ours first."""
    found = {}
    for name in ("triton", "cupy", "cpu"):
        if _runs("seal_loss", name, device):
            found[f"seal-fast {name}"] = functools.partial(_our_loss, name, weights)
    published = functools.partial(published_loss.seal_loss, **weights)
    found["published, eager"] = published
    found["published, torch.compile"] = torch.compile(published, dynamic=False)
    found["seal-fast reference"] = functools.partial(_our_loss, "torch", weights)
    return found


def _our_loss(backend, weights, logits, teacher_logits, labels):
    return seal_fast.seal_loss(logits, teacher_logits, labels, backend=backend, **weights).loss


def _runs(operator: str, backend: str, device: torch.device) -> bool:
    try:
        return resolve(backend, operator, device) == backend
    except ValueError:
        return False


def _ours(backend, options, x):
    return seal_fast.lif(x, backend=backend, return_v_last=False, **options)[0]


def loop(options: dict, x: torch.Tensor) -> torch.Tensor:
    """The neuron as its users write it: a loop over T in the precision of the input."""
    v = torch.zeros_like(x[0])
    spikes = []
    tau, threshold = options["tau"], options["v_threshold"]
    surrogate = Surrogate(options["surrogate"])
    for x_t in x.unbind(0):
        h = v + (x_t - v) / tau if options["decay_input"] else v * (1 - 1 / tau) + x_t
        s = reference.fire(h - threshold, surrogate)
        v = (1 - s) * h
        spikes.append(s)
    return torch.stack(spikes)


def has_spikingjelly() -> bool:
    """Whether it is installed."""
    return importlib.util.find_spec("spikingjelly") is not None


def _spikingjelly(device, options, float32_state=False):
    """SpikingJelly's LIFNode as installed: 2.0.0 chooses its kernel itself, 2.0.0rc1 takes a backend.

    The potential has the input's dtype unless `float32_state` asks for another, which only 2.0.0 can keep.
    """
    if not has_spikingjelly():
        return {}
    version = importlib.metadata.version("spikingjelly")
    try:
        from spikingjelly.activation_based import functional, neuron, surrogate
    except Exception as error:  # here it would be raised for all contestants
        return {f"SpikingJelly {version}": functools.partial(_fails, error)}
    names = {"sigmoid": surrogate.Sigmoid, "atan": surrogate.ATan}
    arguments = {**options, "surrogate_function": names[options["surrogate"]](), "step_mode": "m"}
    del arguments["surrogate"]
    backends = [{}]
    if "backend" in inspect.signature(neuron.LIFNode.__init__).parameters:
        if float32_state:
            return {}
        if device.type == "cuda":
            backends = [{"backend": "torch"}, {"backend": "cupy"}, {"backend": "triton"}]

    def contestant(backend):
        @functools.cache
        def made():
            return neuron.LIFNode(**arguments, **backend).to(device)

        def run(x):
            node = made()  # not before: one that cannot be made would raise for all contestants
            functional.reset_net(node)
            if float32_state:
                node.v = torch.zeros(x.shape[1:], device=x.device)
            return node(x)

        return run

    return {" ".join(["SpikingJelly", version, *backend.values()]): contestant(backend) for backend in backends}


def _fails(error: Exception, x: torch.Tensor):
    """A contestant that could not be imported."""
    raise error


class _Rows(nn.Module):
    """Neurons as a layer: rows [T·B, ...] -> spikes [T·B, ...], in float32 inside where `float32` is True."""

    def __init__(self, run, time_steps: int, float32: bool):
        super().__init__()
        self.run, self.time_steps, self.float32 = run, time_steps, float32

    def forward(self, rows):
        x = rows.unflatten(0, (self.time_steps, -1))
        if self.float32:
            with torch.autocast(rows.device.type, enabled=False):
                return self.run(x.float()).to(rows.dtype).flatten(0, 1)
        return self.run(x).flatten(0, 1)


def spikingjelly_layers(device: torch.device, tau: float, time_steps: int) -> dict[str, Callable[[], nn.Module]]:
    """Ways to run SpikingJelly's neurons on 16-bit rows [T·B, ...]: name -> a function that makes a layer of them."""
    options = {"tau": tau, "decay_input": False, "v_threshold": 1.0, "v_reset": 0.0, "surrogate": "sigmoid"}
    found = {}
    for name, run in _spikingjelly(device, options).items():
        found[name] = functools.partial(_Rows, run, time_steps, False)
        found[f"{name} in float32"] = functools.partial(_Rows, run, time_steps, True)
    for name, run in _spikingjelly(device, options, float32_state=True).items():
        found[f"{name} with a float32 state"] = functools.partial(_Rows, run, time_steps, False)
    return found
