"""The wide residual networks of Zagoruyko and Komodakis (2016): 6n + 4 layers, three groups of n pre-activation blocks.

Without dropout, convolutions without bias, the stride in the first convolution of a block. (The code released with FDG
has biases, and the stride in the second.)
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from fdg_jax.layers import BatchNorm, Conv, relu
from fdg_jax.models.parts import Head, kernel_init

STEM_CHANNELS = 16


def wrn(
    depth: int = 28,
    *,
    rngs: nnx.Rngs,
    width: int = 10,
    num_classes: int = 10,
    in_shape: Sequence[int] = (32, 32, 3),
    dtype: Dtype = jnp.float32,
    init: str = "he",
) -> list[nnx.Module]:
    """Stem, (depth - 4) / 2 blocks and head: images (N, *in_shape) -> logits (N, num_classes).

    Args:
        depth: 28 in WRN-28-10; 10 is a tiny one.
        rngs: of the initialisation.
        width: the widening factor, 10 in WRN-28-10: the groups have 16, 32 and 64 times as many channels.
        num_classes: width of the logits.
        in_shape: (H, W, C) of an image; of these only C fixes a parameter's shape.
        dtype: of the computation, the head's linear layer at least float32; parameters are float32.
        init: "he" (He normal) or "torch" (PyTorch's default).

    Raises:
        ValueError: the depth is not 6n + 4, or there is no such init.
    """
    n, rest = divmod(depth - 4, 6)
    if rest or n < 1:
        nearest = 6 * max(1, round((depth - 4) / 6)) + 4
        raise ValueError(f"a WRN has 6n + 4 layers, n >= 1; got depth={depth}; did you mean {nearest}?")
    layers: list[nnx.Module] = [
        Conv(in_shape[-1], STEM_CHANNELS, rngs=rngs, dtype=dtype, kernel_init=kernel_init(init))
    ]
    channels = STEM_CHANNELS
    for group in range(3):
        for block in range(n):
            strides = 2 if group > 0 and block == 0 else 1
            wider = STEM_CHANNELS * width * 2**group
            layers.append(WideBlock(channels, wider, strides, rngs=rngs, dtype=dtype, init=init))
            channels = wider
    layers.append(NormHead(channels, num_classes, rngs=rngs, dtype=dtype, init=init))
    return layers


class WideBlock(nnx.Module):
    """Normalisation and ReLU before each of two convolutions 3x3: F(x) + shortcut.

    Where the shape changes, the shortcut is a convolution 1x1 of what the first ReLU gives; else it is x.
    """

    def __init__(
        self, in_channels: int, channels: int, strides: int, *, rngs: nnx.Rngs, dtype: Dtype, init: str = "he"
    ):
        conv = partial(Conv, rngs=rngs, dtype=dtype, kernel_init=kernel_init(init))
        around = ((1, 1), (1, 1))
        self.norm1 = BatchNorm(in_channels, rngs=rngs, dtype=dtype)
        self.conv1 = conv(in_channels, channels, strides=strides, padding=around)
        self.norm2 = BatchNorm(channels, rngs=rngs, dtype=dtype)
        self.conv2 = conv(channels, channels, padding=around)
        reshapes = strides > 1 or in_channels != channels
        self.projection = conv(in_channels, channels, (1, 1), strides=strides, padding="VALID") if reshapes else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = relu(self.norm1(x))
        shortcut = self.projection(y) if self.projection else x
        return self.conv2(relu(self.norm2(self.conv1(y)))) + shortcut


class NormHead(nnx.Module):
    """Normalisation, ReLU, and the head."""

    def __init__(self, channels: int, num_classes: int, *, rngs: nnx.Rngs, dtype: Dtype, init: str = "he"):
        self.norm = BatchNorm(channels, rngs=rngs, dtype=dtype)
        self.head = Head(channels, num_classes, rngs=rngs, dtype=dtype, init=init)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(relu(self.norm(x)))
