"""What local losses add to a stage: auxiliary heads (DGL) and synthesisers of error gradients (DNI).

Both are small networks on a stage's outputs, images (N, H, W, C) or flat features (N, F), and are built for one shape.
They train beside the stage and have no part in evaluation.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import ceil
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jax import lax

from fdg_jax.layers import BatchNorm, Conv, Linear, at_least_float32, relu
from fdg_jax.models.mlp import flatten
from fdg_jax.models.parts import Head, make_linear
from fdg_jax.names import check_name

HEADS = ("mlp_sr", "linear")
SYNTHESISERS = ("deep", "linear")


def make_head(
    kind: str, features: Sequence[int], num_classes: int, *, key: jax.Array, dtype: Dtype = jnp.float32
) -> nnx.Module:
    """An auxiliary network (N, *features) -> logits (N, num_classes), the last layer at least in float32.

    "mlp_sr", as Belilovsky et al. (2020) release it: means over a grid of ceil(H/4) x ceil(W/4), three 1x1 convolutions
    with normalisation and ReLU, means over 2 x 2, three linear layers of width 4C with normalisation and ReLU, a linear
    layer. On flat features there is no space to reduce: three layers of width F and the last.
    "linear": the mean over the map, and a linear layer.

    Args:
        kind: "mlp_sr" or "linear".
        features: (H, W, C) or (F,), the shape of one example's outputs.
        num_classes: width of the logits.
        key: of the initialisation, He normal.
        dtype: of the computation; parameters are float32.

    Raises:
        ValueError: there is no such kind, or the features are of another rank.
    """
    check_name("head", kind, HEADS)
    *grid, channels = check_features(features)
    rngs, exact = nnx.Rngs(key), at_least_float32(dtype)
    if kind == "linear" and grid:
        return Head(channels, num_classes, rngs=rngs, dtype=exact)
    if kind == "linear":
        return make_linear(channels, num_classes, rngs=rngs, dtype=exact, init="he")
    layers: list[Callable] = []
    if grid:
        coarse = partial(pool, sizes=tuple(ceil(size / 4) for size in grid))
        pointwise = [Conv(channels, channels, (1, 1), rngs=rngs, dtype=dtype) for _ in range(3)]
        layers = [coarse, *(Normed(conv, channels, rngs=rngs, dtype=dtype) for conv in pointwise)]
        layers += [partial(pool, sizes=(2, 2)), flatten]
        channels *= 4
    wide = [Linear(channels, channels, rngs=rngs, dtype=dtype) for _ in range(3)]
    layers += [Normed(linear, channels, rngs=rngs, dtype=dtype) for linear in wide]
    return nnx.Sequential(*layers, make_linear(channels, num_classes, rngs=rngs, dtype=exact, init="he"))


def make_synthesiser(
    kind: str,
    features: Sequence[int],
    num_classes: int | None,
    *,
    key: jax.Array,
    dtype: Dtype = jnp.float32,
    width: int = 128,
) -> nnx.Module:
    """A network (outputs (N, *features), targets) -> estimate of the error gradient (N, *features), zero at first.

    "deep": two hidden layers with normalisation and ReLU, and a last one that is zero. On images all are 5x5
    convolutions without bias, as Belilovsky et al. (2020) rebuild the synthesiser of Jaderberg et al. (2017); on flat
    features they are linear. "linear": one linear layer, on images for every pixel alike.

    Args:
        kind: "deep" or "linear".
        features: (H, W, C) or (F,).
        num_classes: C of the label context: a linear layer of the targets, integers (N,) as one-hot or floating point
            (N, C) as they are, is added to what the first layer makes of the outputs. None for no context.
        key: of the initialisation, He normal.
        dtype: of the computation; the estimate has that of the outputs.
        width: channels of the hidden layers.

    Raises:
        ValueError: there is no such kind, or the features are of another rank.
    """
    check_name("synthesiser", kind, SYNTHESISERS)
    features, rngs = check_features(features), nnx.Rngs(key)
    if kind == "linear":
        return LinearSynthesiser(features[-1], num_classes, rngs=rngs, dtype=dtype)
    return DeepSynthesiser(features, num_classes, width, rngs=rngs, dtype=dtype)


def check_features(features: Sequence[int]) -> tuple[int, ...]:
    """(H, W, C) or (F,) as a tuple.

    Raises:
        ValueError: it is neither.
    """
    if len(features) not in (1, 3):
        raise ValueError(
            "a local loss reads outputs (N, F) or (N, H, W, C); "
            f"got (N, {', '.join(map(str, features))}): cut the network elsewhere"
        )
    return tuple(features)


def pool(x: jax.Array, sizes: Sequence[int]) -> jax.Array:
    """Means over a grid of rectangles: (N, H, W, C) -> (N, *sizes, C), for two sizes; summed in float32 or better.

    Rectangle i of s covers the pixels floor(i n / s) .. ceil((i + 1) n / s) - 1 of n: neighbours overlap where n is no
    multiple of s, and a map smaller than the grid is repeated.
    """
    exact = x.astype(at_least_float32(x.dtype))
    for axis, size in zip((1, 2), sizes, strict=True):
        length = exact.shape[axis]
        bounds = [(i * length // size, -(-(i + 1) * length // size)) for i in range(size)]
        means = [jnp.mean(lax.slice_in_dim(exact, *bound, axis=axis), axis) for bound in bounds]
        exact = jnp.stack(means, axis)
    return exact.astype(x.dtype)


class Normed(nnx.Module):
    """A layer, normalisation, ReLU."""

    def __init__(self, layer: nnx.Module, channels: int, *, rngs: nnx.Rngs, dtype: Dtype):
        self.layer = layer
        self.norm = BatchNorm(channels, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return relu(self.norm(self.layer(x)))


class Context(nnx.Module):
    """A linear layer of the labels, shaped to be added to features: targets -> (N, ..., features)."""

    def __init__(self, num_classes: int, features: int, *, rngs: nnx.Rngs, dtype: Dtype, zero: bool = False):
        self.num_classes = num_classes
        start = nnx.initializers.zeros if zero else nnx.initializers.he_normal()
        self.linear = Linear(num_classes, features, rngs=rngs, dtype=dtype, kernel_init=start)

    def __call__(self, targets: jax.Array, like: jax.Array) -> jax.Array:
        if jnp.issubdtype(targets.dtype, jnp.integer):
            targets = jax.nn.one_hot(targets, self.num_classes)
        context = self.linear(targets)
        return context.reshape(context.shape[0], *(1,) * (like.ndim - 2), -1)


class LinearSynthesiser(nnx.Module):
    """outputs @ W + b, and targets @ V + c with label context: the exact form where later stages are linear."""

    def __init__(self, features: int, num_classes: int | None, *, rngs: nnx.Rngs, dtype: Dtype):
        self.last = Linear(features, features, rngs=rngs, dtype=dtype, kernel_init=nnx.initializers.zeros)
        self.context = Context(num_classes, features, rngs=rngs, dtype=dtype, zero=True) if num_classes else None

    def __call__(self, inputs: tuple[jax.Array, Any]) -> jax.Array:
        outputs, targets = inputs
        estimate = self.last(outputs)
        if self.context is not None:
            estimate = estimate + self.context(targets, like=outputs)
        return estimate.astype(outputs.dtype)


class DeepSynthesiser(nnx.Module):
    """Layer, plus context, normalisation, ReLU; layer, normalisation, ReLU; a layer of zeros."""

    def __init__(self, features: tuple[int, ...], num_classes: int | None, width: int, *, rngs: nnx.Rngs, dtype: Dtype):
        channels, zeros = features[-1], nnx.initializers.zeros
        layer = partial(Conv, kernel_size=(5, 5)) if len(features) == 3 else Linear
        self.first = layer(channels, width, rngs=rngs, dtype=dtype)
        self.context = Context(num_classes, width, rngs=rngs, dtype=dtype) if num_classes else None
        self.norm = BatchNorm(width, rngs=rngs, dtype=dtype)
        self.second = Normed(layer(width, width, rngs=rngs, dtype=dtype), width, rngs=rngs, dtype=dtype)
        self.last = layer(width, channels, rngs=rngs, dtype=dtype, kernel_init=zeros)

    def __call__(self, inputs: tuple[jax.Array, Any]) -> jax.Array:
        outputs, targets = inputs
        x = self.first(outputs)
        if self.context is not None:
            x = x + self.context(targets, like=x)
        return self.last(self.second(relu(self.norm(x)))).astype(outputs.dtype)
