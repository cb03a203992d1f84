"""The residual networks for CIFAR of He et al. (2015), section 4.2: 6n + 2 layers in three groups of n basic blocks.

Shortcuts are free of parameters (option A): where the map is halved and the width doubled, the identity is subsampled
and padded with zero channels.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from fdg_jax.layers import BatchNorm, Conv, Linear, at_least_float32, pad_channels, relu


def resnet_cifar(
    depth: int,
    *,
    rngs: nnx.Rngs,
    width: int = 16,
    num_classes: int = 10,
    in_shape: Sequence[int] = (32, 32, 3),
    dtype: Dtype = jnp.float32,
) -> list[nnx.Module]:
    """Stem, (depth - 2) / 2 basic blocks and head: images (N, *in_shape) -> logits (N, num_classes).

    Args:
        depth: 20, 32, 44, 56, 110 and 1202 in the paper; 8 is a tiny one.
        rngs: of the initialisation, He normal.
        width: channels of the first group; the paper's is 16.
        num_classes: width of the logits.
        in_shape: (H, W, C) of an image; of these only C fixes a parameter's shape.
        dtype: of the computation, the head's at least float32; parameters are float32.

    Raises:
        ValueError: the depth is not 6n + 2.
    """
    n, rest = divmod(depth - 2, 6)
    if rest or n < 1:
        nearest = 6 * max(1, round((depth - 2) / 6)) + 2
        raise ValueError(f"a CIFAR ResNet has 6n + 2 layers, n >= 1; got depth={depth}; did you mean {nearest}?")
    layers: list[nnx.Module] = [Stem(in_shape[-1], width, rngs=rngs, dtype=dtype)]
    channels = width
    for group in range(3):
        for block in range(n):
            strides = 2 if group > 0 and block == 0 else 1
            layers.append(BasicBlock(channels, width * 2**group, strides, rngs=rngs, dtype=dtype))
            channels = width * 2**group
    layers.append(Head(channels, num_classes, rngs=rngs, dtype=at_least_float32(dtype)))
    return layers


class Stem(nnx.Module):
    """Convolution 3x3, normalisation, ReLU."""

    def __init__(self, in_channels: int, channels: int, *, rngs: nnx.Rngs, dtype: Dtype):
        self.conv = Conv(in_channels, channels, rngs=rngs, dtype=dtype)
        self.norm = BatchNorm(channels, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return relu(self.norm(self.conv(x)))


class BasicBlock(nnx.Module):
    """Two convolutions 3x3 with normalisation around a parameter-free shortcut: relu(F(x) + shortcut(x))."""

    def __init__(self, in_channels: int, channels: int, strides: int, *, rngs: nnx.Rngs, dtype: Dtype):
        self.strides, self.new_channels = strides, channels - in_channels
        self.conv1 = Conv(in_channels, channels, strides=strides, rngs=rngs, dtype=dtype)
        self.norm1 = BatchNorm(channels, rngs=rngs, dtype=dtype)
        self.conv2 = Conv(channels, channels, rngs=rngs, dtype=dtype)
        self.norm2 = BatchNorm(channels, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = relu(self.norm1(self.conv1(x)))
        return relu(self.norm2(self.conv2(y)) + self._shortcut(x))

    def _shortcut(self, x: jax.Array) -> jax.Array:
        if self.strides == 1 and self.new_channels == 0:
            return x
        before = self.new_channels // 2
        return pad_channels(x[:, :: self.strides, :: self.strides], before, self.new_channels - before)


class Head(nnx.Module):
    """Mean over the map, then a linear layer."""

    def __init__(self, channels: int, num_classes: int, *, rngs: nnx.Rngs, dtype: Dtype):
        self.linear = Linear(channels, num_classes, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(jnp.mean(x.astype(self.linear.dtype), axis=(1, 2)))
