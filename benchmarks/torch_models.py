"""The same networks in PyTorch, trained as PyTorch users do: channels last, bfloat16 autocast, `torch.compile`.

Layer by layer those of `fdg_jax.models`: as many parameters, which `benchmarks.gpu` checks. The data set lives on the
device; a batch is chosen and normalised there.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.plain import NETWORKS


def conv(channels_in: int, channels: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    """Without bias, padded by half its kernel."""
    return nn.Conv2d(channels_in, channels, size, stride, padding=size // 2, bias=False)


class BasicBlock(nn.Module):
    """As `fdg_jax.models.resnet_cifar.BasicBlock`: a shortcut without parameters."""

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.stride, self.new_channels = stride, channels - channels_in
        self.conv1, self.norm1 = conv(channels_in, channels, stride=stride), nn.BatchNorm2d(channels)
        self.conv2, self.norm2 = conv(channels, channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norm1(self.conv1(x)))
        if self.stride > 1 or self.new_channels:
            before = self.new_channels // 2
            around = (0, 0, 0, 0, before, self.new_channels - before)
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], around)
        return functional.relu(self.norm2(self.conv2(y)) + x)


class WideBlock(nn.Module):
    """As `fdg_jax.models.wrn.WideBlock`."""

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(channels_in), conv(channels_in, channels, stride=stride)
        self.norm2, self.conv2 = nn.BatchNorm2d(channels), conv(channels, channels)
        reshapes = stride > 1 or channels_in != channels
        self.projection = conv(channels_in, channels, 1, stride) if reshapes else None

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norm1(x))
        shortcut = self.projection(y) if self.projection else x
        return self.conv2(functional.relu(self.norm2(self.conv1(y)))) + shortcut


class MeanHead(nn.Module):
    """Mean over the map, then a linear layer."""

    def __init__(self, channels: int):
        super().__init__()
        self.linear = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean((2, 3)))


def build(network: str) -> nn.Sequential:
    """A network of `plain.NETWORKS` for 10 classes of images (N, 3, H, W)."""
    name, depth, width = NETWORKS[network]
    wide = name == "wrn"
    channels, first = 16 if wide else width, 16 * width if wide else width
    layers: list[nn.Module] = [conv(3, channels)]
    if not wide:
        layers += [nn.BatchNorm2d(channels), nn.ReLU()]
    for group in range(3):
        for number in range((depth - 4 if wide else depth - 2) // 6):
            block = WideBlock if wide else BasicBlock
            layers.append(block(channels, first * 2**group, 2 if group > 0 and number == 0 else 1))
            channels = first * 2**group
    if wide:
        layers += [nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*layers, MeanHead(channels))


class Loop:
    """A training loop over random images that live on the device.

    Args:
        network: of `plain.NETWORKS`.
        images: uint8 (N, H, W, 3).
        labels: (N,) whole numbers.
        batch_size: images a batch.
        mode: of `torch.compile`; "" leaves it out.
    """

    def __init__(self, network: str, images: np.ndarray, labels: np.ndarray, batch_size: int, mode: str):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.images, self.labels = torch.from_numpy(images).to(self.device), torch.from_numpy(labels).to(self.device)
        self.mean, self.std = (
            torch.tensor(f(images, (0, 1, 2)), dtype=torch.float32, device=self.device) for f in (np.mean, np.std)
        )
        model = build(network).to(self.device, memory_format=torch.channels_last)
        self.num_params = sum(parameter.numel() for parameter in model.parameters())
        self.model = torch.compile(model, mode=mode) if mode else model
        fused = self.device.type == "cuda"
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=fused)
        self.batch_size, self.order, self.next = batch_size, torch.empty(0), 0

    def run(self, num_batches: int) -> None:
        """Trains on so many batches, and waits for them."""
        for _ in range(num_batches):
            self._step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _step(self) -> None:
        start = self.next % (len(self.images) // self.batch_size) * self.batch_size
        if start == 0:
            self.order = torch.randperm(len(self.images), device=self.device)
        chosen = self.order[start : start + self.batch_size]
        pixels = (self.images[chosen].float() - self.mean) / self.std
        with torch.autocast(self.device.type, torch.bfloat16):
            outputs = self.model(pixels.permute(0, 3, 1, 2))  # channels are last in memory already
        loss = functional.cross_entropy(outputs.float(), self.labels[chosen])
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.next += 1
