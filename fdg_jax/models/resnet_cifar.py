"""The residual networks for CIFAR of He et al. (2015), section 4.2: 6n + 2 layers in three groups of n basic blocks.

Shortcuts are free of parameters (option A): where the map is halved and the width doubled, the identity is subsampled
and padded with zero channels.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from fdg_jax.layers import BatchNorm, Conv, pad_channels, relu
from fdg_jax.models.parts import Head, kernel_init


def resnet_cifar(
    depth: int,
    *,
    rngs: nnx.Rngs,
    width: int = 16,
    num_classes: int = 10,
    in_shape: Sequence[int] = (32, 32, 3),
    dtype: Dtype = jnp.float32,
    init: str = "he",
    pool_window: int = 0,
) -> list[nnx.Module]:
    """Stem, (depth - 2) / 2 basic blocks and head: images (N, *in_shape) -> logits (N, num_classes).

    Args:
        depth: 20, 32, 44, 56, 110 and 1202 in the paper; 8 is a tiny one.
        rngs: of the initialisation.
        width: channels of the first group; the paper's is 16.
        num_classes: width of the logits.
        in_shape: (H, W, C) of an image; of these only C fixes a parameter's shape.
        dtype: of the computation, the head's at least float32; parameters are float32.
        init: "he" (He normal) or "torch" (PyTorch's default, which the code released with FDG leaves in place).
        pool_window: side of the window in the upper left corner of the last map whose mean the head takes, 0 for the
            whole map as in the paper. The code released with FDG pools 6 x 6 of the 8 x 8 pixels.

    Raises:
        ValueError: the depth is not 6n + 2, there is no such init, or the window is larger than the last map.
    """
    n, rest = divmod(depth - 2, 6)
    if rest or n < 1:
        nearest = 6 * max(1, round((depth - 2) / 6)) + 2
        raise ValueError(f"a CIFAR ResNet has 6n + 2 layers, n >= 1; got depth={depth}; did you mean {nearest}?")
    _check_window(pool_window, in_shape)
    layers: list[nnx.Module] = [Stem(in_shape[-1], width, rngs=rngs, dtype=dtype, init=init)]
    channels = width
    for group in range(3):
        for block in range(n):
            strides = 2 if group > 0 and block == 0 else 1
            layers.append(BasicBlock(channels, width * 2**group, strides, rngs=rngs, dtype=dtype, init=init))
            channels = width * 2**group
    layers.append(Head(channels, num_classes, rngs=rngs, dtype=dtype, init=init, window=pool_window))
    return layers


def _check_window(window: int, in_shape: Sequence[int]) -> None:
    height, width = (-(-size // 4) for size in in_shape[:2])  # halved twice, rounded up
    if window and not 1 <= window <= min(height, width):
        raise ValueError(
            f"pool_window must lie in 1..{min(height, width)}, for the last map is {height} x {width}; got {window}; "
            "0 pools all of it"
        )


class Stem(nnx.Module):
    """Convolution 3x3, normalisation, ReLU."""

    def __init__(self, in_channels: int, channels: int, *, rngs: nnx.Rngs, dtype: Dtype, init: str = "he"):
        self.conv = Conv(in_channels, channels, rngs=rngs, dtype=dtype, kernel_init=kernel_init(init))
        self.norm = BatchNorm(channels, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return relu(self.norm(self.conv(x)))


class BasicBlock(nnx.Module):
    """Two convolutions 3x3 with normalisation around a parameter-free shortcut: relu(F(x) + shortcut(x))."""

    def __init__(
        self, in_channels: int, channels: int, strides: int, *, rngs: nnx.Rngs, dtype: Dtype, init: str = "he"
    ):
        conv = partial(Conv, rngs=rngs, dtype=dtype, kernel_init=kernel_init(init))
        self.strides, self.new_channels = strides, channels - in_channels
        # "SAME" would centre a strided kernel off the pixels that the shortcut takes, on maps of even size.
        self.conv1 = conv(in_channels, channels, strides=strides, padding=((1, 1), (1, 1)))
        self.norm1 = BatchNorm(channels, rngs=rngs, dtype=dtype)
        self.conv2 = conv(channels, channels)
        self.norm2 = BatchNorm(channels, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = relu(self.norm1(self.conv1(x)))
        return relu(self.norm2(self.conv2(y)) + self._shortcut(x))

    def _shortcut(self, x: jax.Array) -> jax.Array:
        if self.strides == 1 and self.new_channels == 0:
            return x
        before = self.new_channels // 2
        return pad_channels(x[:, :: self.strides, :: self.strides], before, self.new_channels - before)
