"""What the networks share: two initialisations, the linear layer that follows them, the head."""

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer

from fdg_jax.layers import Linear, at_least_float32
from fdg_jax.names import check_name

# PyTorch's default, its "Kaiming uniform" with a = sqrt 5: uniform in +-1 / sqrt(fan in), a variance of 1 / (3 fan in).
KERNEL_INITS: dict[str, Initializer] = {
    "he": nnx.initializers.he_normal(),
    "torch": nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
}


def kernel_init(init: str) -> Initializer:
    """The initialiser of kernels: "he", He normal with variance 2 / fan in; "torch", what PyTorch does if not told.

    Raises:
        ValueError: it is called neither.
    """
    check_name("init", init, KERNEL_INITS)
    return partial(_as_matrix, KERNEL_INITS[init])


def _as_matrix(initializer: Initializer, key: jax.Array, shape: Sequence[int], dtype: Dtype) -> jax.Array:
    """The same numbers, drawn as (fan in, channels): five times faster to compile for a CPU than (h, w, I, O)."""
    return initializer(key, (math.prod(shape[:-1]), shape[-1]), dtype).reshape(shape)


def make_linear(in_features: int, out_features: int, *, rngs: nnx.Rngs, dtype: Dtype, init: str) -> Linear:
    """A linear layer, whose bias is zero for "he" and for "torch" uniform in +-1 / sqrt(in_features)."""
    linear = Linear(in_features, out_features, rngs=rngs, dtype=dtype, kernel_init=kernel_init(init))
    if init == "torch":
        limit = in_features**-0.5
        linear.bias[...] = jax.random.uniform(rngs.params(), (out_features,), minval=-limit, maxval=limit)
    return linear


class Head(nnx.Module):
    """Mean over the map, then a linear layer, at least in float32: (N, H, W, channels) -> logits (N, num_classes).

    The mean is over the upper left `window` x `window` pixels alone where that is not 0.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        rngs: nnx.Rngs,
        dtype: Dtype,
        init: str = "he",
        window: int = 0,
    ):
        self.window = window
        self.linear = make_linear(channels, num_classes, rngs=rngs, dtype=at_least_float32(dtype), init=init)

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.window:
            x = x[:, : self.window, : self.window]
        return self.linear(jnp.mean(x.astype(self.linear.dtype), axis=(1, 2)))
