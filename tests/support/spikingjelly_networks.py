"""Networks of SpikingJelly's parts, for tests that convert them."""

import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from spikingjelly.activation_based.model import sew_resnet, spiking_resnet, spiking_vgg
from torch import nn

# builder, neurons, and how many of them follow a batch norm
ZOO = {
    "sew_resnet18": (lambda **options: sew_resnet.sew_resnet18(pretrained=False, cnf="ADD", **options), 20, 20),
    "spiking_resnet18": (lambda **options: spiking_resnet.spiking_resnet18(pretrained=False, **options), 17, 17),
    "spiking_vgg11_bn": (lambda **options: spiking_vgg.spiking_vgg11_bn(pretrained=False, **options), 10, 8),
}


def zoo_network(name, kind=neuron.LIFNode, seed=0, **options):
    """A network of the model zoo in step mode "m", whose neurons all fire; that of VGG with a narrower classifier."""
    torch.manual_seed(seed)
    options = {"tau": 2.0, "surrogate_function": surrogate.ATan()} | options
    network = ZOO[name][0](num_classes=5, spiking_neuron=kind, **options)
    if name == "spiking_vgg11_bn":
        for position, shape in ((0, (512 * 7 * 7, 48)), (3, (48, 48)), (6, (48, 5))):
            network.classifier[position] = layer.Linear(*shape)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 1.5, 3.0)
            nn.init.uniform_(module.bias, 0.0, 0.5)
            module.momentum = 1.0  # running statistics are those of the last batch
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, 4.0 / module.in_features**0.5)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    functional.set_step_mode(network, "m")
    return network


class Conv(nn.Conv2d):
    """A convolution of [T, B, C, H, W] that torch.compile can trace, as SpikingJelly 0.0.0.0.14's is not."""

    def forward(self, x):
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class Block(nn.Module):
    """Two chains of batch norm and neuron, the second with a residual that has a batch norm of its own."""

    def __init__(self, kind=neuron.LIFNode, channels=6, **options):
        super().__init__()
        self.conv1, self.bn1, self.sn1 = Conv(3, channels, 3, padding=1), layer.BatchNorm2d(channels), kind(**options)
        self.conv2, self.bn2, self.sn2 = Conv(channels, channels, 3), layer.BatchNorm2d(channels), kind(**options)
        self.down = nn.Sequential(Conv(3, channels, 3), layer.BatchNorm2d(channels))

    def forward(self, x):
        out = self.sn1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.down(x)
        return self.sn2(out)


def block(seed=0, step_mode="m", **options):
    torch.manual_seed(seed)
    network = Block(**options)
    functional.set_step_mode(network, step_mode)
    return network


def frames(*shape, seed=0, dtype=torch.float32):
    """Input current [T, B, C, H, W]."""
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)) * 2
