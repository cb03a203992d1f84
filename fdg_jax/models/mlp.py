"""A multilayer perceptron: the smallest network with stages to cut."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from fdg_jax.layers import at_least_float32, relu
from fdg_jax.models.parts import make_linear


def mlp(
    depth: int,
    *,
    rngs: nnx.Rngs,
    width: int = 64,
    num_classes: int = 10,
    in_shape: Sequence[int] = (32, 32, 3),
    dtype: Dtype = jnp.float32,
    init: str = "he",
) -> list[Callable]:
    """`depth` hidden layers and a head: (N, *in_shape) -> logits (N, num_classes).

    Args:
        depth: hidden layers, at least 1.
        rngs: of the initialisation.
        width: units of a hidden layer.
        num_classes: width of the logits.
        in_shape: of one input.
        dtype: of the computation, the head's at least float32; parameters are float32.
        init: "he" (He normal, biases zero) or "torch" (PyTorch's default).

    Raises:
        ValueError: the depth is not positive, or there is no such init.
    """
    if depth < 1:
        raise ValueError(f"an mlp needs at least one hidden layer; got depth={depth}")
    widths = [math.prod(in_shape), *[width] * depth]
    hidden = [Hidden(a, b, rngs=rngs, dtype=dtype, init=init) for a, b in pairwise(widths)]
    head = make_linear(width, num_classes, rngs=rngs, dtype=at_least_float32(dtype), init=init)
    return [flatten, *hidden, head]


def flatten(x: jax.Array) -> jax.Array:
    """(N, ...) -> (N, D)."""
    return x.reshape(x.shape[0], -1)


class Hidden(nnx.Module):
    """A linear layer and ReLU."""

    def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs, dtype: Dtype, init: str = "he"):
        self.linear = make_linear(in_features, out_features, rngs=rngs, dtype=dtype, init=init)

    def __call__(self, x: jax.Array) -> jax.Array:
        return relu(self.linear(x))
