"""Train a network of SpikingJelly's model zoo as it is and converted, and print both speeds.

    python examples/convert_spikingjelly.py --steps 10

Both train in turns, one step each, on the same synthetic images with the same weights at first.
"""

import argparse
import copy
import statistics
import time

import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, neuron, surrogate
from spikingjelly.activation_based.model import sew_resnet, spiking_resnet, spiking_vgg

import seal_fast

ZOO = {
    "sew_resnet18": lambda **options: sew_resnet.sew_resnet18(pretrained=False, cnf="ADD", **options),
    "spiking_resnet18": lambda **options: spiking_resnet.spiking_resnet18(pretrained=False, **options),
    "spiking_vgg11_bn": lambda **options: spiking_vgg.spiking_vgg11_bn(pretrained=False, **options),
}


def main(arguments=None):
    """Print the conversion's report, and milliseconds and images per second of a training step of either network."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=ZOO, default="sew_resnet18")
    parser.add_argument("--steps", type=int, default=10, help="timed training steps of each network (default: 10)")
    parser.add_argument("--time_steps", type=int, default=4, help="T (default: 4)")
    parser.add_argument("--batch", type=int, default=16, help="images in a step (default: 16)")
    parser.add_argument("--size", type=int, default=32, help="height and width of an image (default: 32)")
    args = parser.parse_args(arguments)
    if min(args.steps, args.time_steps, args.batch, args.size) < 1:
        parser.error("steps, time_steps, batch and size must be at least 1")

    torch.manual_seed(0)
    seal_fast.reuse_freed_memory()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {"tau": 2.0, "surrogate_function": surrogate.ATan(), "detach_reset": True}
    original = ZOO[args.model](num_classes=10, spiking_neuron=neuron.LIFNode, **options).to(device)
    functional.set_step_mode(original, "m")
    converted = copy.deepcopy(original)
    print(seal_fast.convert(converted), end="\n\n")

    images = torch.rand(args.batch, 3, args.size, args.size, device=device).expand(args.time_steps, -1, -1, -1, -1)
    labels = torch.randint(10, (args.batch,), device=device)
    networks = {"SpikingJelly": original, "converted": converted}
    optimizers = {name: torch.optim.SGD(network.parameters(), lr=0.1) for name, network in networks.items()}
    seconds = {name: [] for name in networks}
    for step in range(-2, args.steps):  # the first two are not counted
        for name, network in networks.items():
            start = time.perf_counter()
            loss = train_step(network, optimizers[name], images, labels)
            if step >= 0:
                seconds[name].append(time.perf_counter() - start)
            if step in (-2, args.steps - 1):
                print(f"{name}: loss {loss:.4f} of step {step + 3}")

    print(f"\n{args.model}, T = {args.time_steps}, batch {args.batch}, {args.size}x{args.size}, {device}")
    for name, times in seconds.items():
        best, median = min(times), statistics.median(times)
        rate = args.batch / median
        print(f"{name:>12}: best {1000 * best:7.1f} ms, median {1000 * median:7.1f} ms, {rate:6.1f} images/s")
    of_both = [(min(times), statistics.median(times)) for times in seconds.values()]
    best, median = (before / after for before, after in zip(*of_both, strict=True))
    print(f"     speedup: best {best:.2f}, median {median:.2f}")


def train_step(network, optimizer, images, labels) -> float:
    """One step on images [T, B, C, H, W] and labels [B]; returns the loss."""
    optimizer.zero_grad()
    loss = F.cross_entropy(network(images).mean(0), labels)
    loss.backward()
    optimizer.step()
    functional.reset_net(network)
    return loss.item()  # waits for the device


if __name__ == "__main__":
    main()
