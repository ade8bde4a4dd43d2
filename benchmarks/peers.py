"""Contestants: functions of the same meaning, ours and those of others, by name."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable

import torch

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
    loop = functools.partial(_loop, options)
    found["torch loop"] = loop
    found["torch.compile of it"] = torch.compile(loop, dynamic=False)
    found.update(_spikingjelly(device, options))
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


def _loop(options, x):
    """The neuron as its users write it: a loop over T in the precision of the input."""
    v = torch.zeros_like(x[0])
    spikes = []
    tau, threshold = options["tau"], options["v_threshold"]
    surrogate = Surrogate(options["surrogate"])
    for x_t in x.unbind(0):
        h = v + (x_t - v) / tau if options["decay_input"] else v * (1 - 1 / tau) + x_t
        s = reference.Fire.apply(h - threshold, surrogate)
        v = (1 - s) * h
        spikes.append(s)
    return torch.stack(spikes)


def _spikingjelly(device, options):
    """SpikingJelly's LIFNode as installed: 2.0.0 chooses its kernel itself, 2.0.0rc1 takes a backend."""
    if importlib.util.find_spec("spikingjelly") is None:
        return {}
    from spikingjelly.activation_based import functional, neuron, surrogate

    version = importlib.metadata.version("spikingjelly")
    names = {"sigmoid": surrogate.Sigmoid, "atan": surrogate.ATan}
    arguments = {**options, "surrogate_function": names[options["surrogate"]](), "step_mode": "m"}
    del arguments["surrogate"]
    backends = [{}]
    if "backend" in inspect.signature(neuron.LIFNode.__init__).parameters and device.type == "cuda":
        backends = [{"backend": "torch"}, {"backend": "cupy"}, {"backend": "triton"}]

    def contestant(backend):
        node = neuron.LIFNode(**arguments, **backend).to(device)

        def run(x):
            functional.reset_net(node)
            return node(x)

        return run

    return {" ".join(["SpikingJelly", version, *backend.values()]): contestant(backend) for backend in backends}
