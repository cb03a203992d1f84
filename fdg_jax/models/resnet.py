"""The residual networks for ImageNet of He et al. (2015), section 4.1: four groups of basic or bottleneck blocks.

Where a block changes the shape, its shortcut is a convolution 1x1 with normalisation (option B); a bottleneck has its
stride in the convolution 3x3. Paddings are symmetric, so that with the ImageNet stem these are torchvision's networks,
parameter by parameter. The CIFAR stem, a single convolution 3x3, is for images of 32 x 32 pixels.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jax import lax

from fdg_jax.layers import BatchNorm, Conv, relu
from fdg_jax.models.parts import Head, kernel_init
from fdg_jax.names import check_name

STEMS = ("cifar", "imagenet")


def resnet(
    depth: int,
    *,
    rngs: nnx.Rngs,
    stem: str = "cifar",
    width: int = 64,
    num_classes: int = 10,
    in_shape: Sequence[int] = (32, 32, 3),
    dtype: Dtype = jnp.float32,
    init: str = "he",
) -> list[nnx.Module]:
    """Stem, 8 to 33 residual blocks and head: images (N, *in_shape) -> logits (N, num_classes).

    Args:
        depth: 18 or 34, of basic blocks; 50 or 101, of bottlenecks.
        rngs: of the initialisation.
        stem: "cifar", a convolution 3x3; or "imagenet", 7x7 with stride 2 and max pooling 3x3 with stride 2.
        width: channels of the first group, a quarter of what leaves its bottlenecks; the paper's is 64.
        num_classes: width of the logits.
        in_shape: (H, W, C) of an image; of these only C fixes a parameter's shape.
        dtype: of the computation, the head's at least float32; parameters are float32.
        init: "he" (He normal) or "torch" (PyTorch's default).

    Raises:
        ValueError: there is no such depth, stem or init.
    """
    check_name("stem", stem, STEMS)
    if depth not in NETWORKS:
        nearest = min(NETWORKS, key=lambda known: abs(known - depth))
        every = ", ".join(map(str, NETWORKS))
        raise ValueError(f"a ResNet has one of {every} layers; got depth={depth}; did you mean {nearest}?")
    block, counts = NETWORKS[depth]
    layers: list[nnx.Module] = [Stem(in_shape[-1], width, stem == "imagenet", rngs=rngs, dtype=dtype, init=init)]
    channels = width
    for group, count in enumerate(counts):
        for number in range(count):
            strides = 2 if group > 0 and number == 0 else 1
            layers.append(block(channels, width * 2**group, strides, rngs=rngs, dtype=dtype, init=init))
            channels = width * 2**group * block.expansion
    layers.append(Head(channels, num_classes, rngs=rngs, dtype=dtype, init=init))
    return layers


class ConvNorm(nnx.Module):
    """A convolution, padded on every side by half its kernel, and normalisation."""

    def __init__(
        self, in_channels: int, channels: int, size: int, strides: int = 1, *, rngs: nnx.Rngs, dtype: Dtype, init: str
    ):
        self.conv = Conv(
            in_channels,
            channels,
            (size, size),
            strides=strides,
            padding=((size // 2, size // 2),) * 2,
            rngs=rngs,
            dtype=dtype,
            kernel_init=kernel_init(init),
        )
        self.norm = BatchNorm(channels, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.conv(x))


class Stem(nnx.Module):
    """Convolution, normalisation, ReLU; the large one strides by 2 and pools by 2: a quarter of height and width."""

    def __init__(self, in_channels: int, channels: int, large: bool, *, rngs: nnx.Rngs, dtype: Dtype, init: str = "he"):
        self.large = large
        size, strides = (7, 2) if large else (3, 1)
        self.conv = ConvNorm(in_channels, channels, size, strides, rngs=rngs, dtype=dtype, init=init)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = relu(self.conv(x))
        return _max_pool(x) if self.large else x


def _max_pool(x: jax.Array) -> jax.Array:
    """The largest of 3x3 pixels, with stride 2 and padding 1: (N, H, W, C) -> (N, ceil(H / 2), ceil(W / 2), C)."""
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0)))


class BasicBlock(nnx.Module):
    """Two convolutions 3x3 around the shortcut: relu(F(x) + shortcut(x))."""

    expansion = 1

    def __init__(
        self, in_channels: int, channels: int, strides: int, *, rngs: nnx.Rngs, dtype: Dtype, init: str = "he"
    ):
        self.conv1 = ConvNorm(in_channels, channels, 3, strides, rngs=rngs, dtype=dtype, init=init)
        self.conv2 = ConvNorm(channels, channels, 3, rngs=rngs, dtype=dtype, init=init)
        self.projection = _projection(in_channels, channels, strides, rngs=rngs, dtype=dtype, init=init)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv2(relu(self.conv1(x)))
        return relu(y + (self.projection(x) if self.projection else x))


class Bottleneck(nnx.Module):
    """Convolutions 1x1, 3x3 and 1x1 around the shortcut; the last has four times as many channels."""

    expansion = 4

    def __init__(
        self, in_channels: int, channels: int, strides: int, *, rngs: nnx.Rngs, dtype: Dtype, init: str = "he"
    ):
        out_channels = channels * self.expansion
        self.conv1 = ConvNorm(in_channels, channels, 1, rngs=rngs, dtype=dtype, init=init)
        self.conv2 = ConvNorm(channels, channels, 3, strides, rngs=rngs, dtype=dtype, init=init)
        self.conv3 = ConvNorm(channels, out_channels, 1, rngs=rngs, dtype=dtype, init=init)
        self.projection = _projection(in_channels, out_channels, strides, rngs=rngs, dtype=dtype, init=init)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv3(relu(self.conv2(relu(self.conv1(x)))))
        return relu(y + (self.projection(x) if self.projection else x))


def _projection(
    in_channels: int, channels: int, strides: int, *, rngs: nnx.Rngs, dtype: Dtype, init: str
) -> ConvNorm | None:
    """What brings a block's input to the shape of its output; None where that is its shape already."""
    if strides == 1 and in_channels == channels:
        return None
    return ConvNorm(in_channels, channels, 1, strides, rngs=rngs, dtype=dtype, init=init)


# depth: kind of block, blocks in each group (He et al., table 1)
NETWORKS: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
}
