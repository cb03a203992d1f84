"""Convolution, linear, batch normalisation and ReLU with their own vjp: lean memos, exact refresh, safe in loops.

JAX's automatic residuals are right but not what a delayed gradient wants. These layers differ in three ways:

* *Lean memos.* A layer saves its input (and batch statistics) and nothing else; ReLU reads its mask off its output,
  which the next layer saves anyway. A basic residual block keeps four activations where automatic residuals keep nine.
* *Exact refresh.* Weights are saved verbatim, never as a cast or broadcast copy, so that the `current` policy can put
  today's weights in their place, in bfloat16 compute too.
* *Safe in loops.* XLA:CPU runs JAX's transposed convolutions up to 80 times slower inside `scan`; here both gradients
  are ordinary convolutions of transposed operands. Elsewhere JAX's own transposes are kept, because XLA:GPU recognises
  cuDNN's backward kernels from them.

Images are NHWC, kernels HWIO. Values equal Flax's own layers. The functions are pure; the modules are Flax NNX.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jax import lax

Padding = tuple[tuple[int, int], ...]
_LAYOUT = ("NHWC", "HWIO", "NHWC")
_HE_NORMAL = nnx.initializers.he_normal()


def at_least_float32(dtype: Dtype) -> Dtype:
    """The dtype for sums over many numbers: half precision is widened."""
    return jnp.promote_types(dtype, jnp.float32)


@jax.custom_vjp
def relu(x: jax.Array) -> jax.Array:
    """max(x, 0). The residual is the output, whose sign is the mask."""
    return jnp.maximum(x, 0)


def _relu_fwd(x):
    y = relu(x)
    return y, y


def _relu_bwd(y, g):
    return (jnp.where(y > 0, g, 0),)


relu.defvjp(_relu_fwd, _relu_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def pad_channels(x: jax.Array, before: int, after: int) -> jax.Array:
    """x (..., C) with zero channels around it. No residuals, where JAX's padding saves the value that it pads with."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(before, after)])


def _pad_channels_fwd(x, before, after):
    return pad_channels(x, before, after), None


def _pad_channels_bwd(before, after, _, g):
    return (g[..., before : g.shape[-1] - after],)


pad_channels.defvjp(_pad_channels_fwd, _pad_channels_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x: jax.Array, kernel: jax.Array, dtype: Dtype) -> jax.Array:
    """x @ kernel, computed in `dtype`; x (..., I), kernel (I, O). Residuals: both arguments as they came."""
    return jnp.matmul(x.astype(dtype), kernel.astype(dtype))


def _linear_fwd(x, kernel, dtype):
    return jnp.matmul(x.astype(dtype), kernel.astype(dtype)), (x, kernel)  # not behind a vjp of its own, for `remat`


def _linear_bwd(dtype, residuals, g):
    x, kernel = residuals
    dx = jnp.matmul(g, kernel.astype(dtype).T)
    dkernel = jnp.einsum("...i,...o->io", x.astype(dtype), g)
    return dx.astype(x.dtype), dkernel.astype(kernel.dtype)


linear.defvjp(_linear_fwd, _linear_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def conv(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Padding, dtype: Dtype) -> jax.Array:
    """2-D convolution computed in `dtype`. Residuals: both arguments as they came.

    Args:
        x: (N, H, W, I).
        kernel: (h, w, I, O).
        strides: of the two spatial dimensions.
        padding: (before, after) of the two spatial dimensions.
        dtype: of the computation and of the output.
    """
    return _plain_conv(x.astype(dtype), kernel.astype(dtype), strides, padding)


def _plain_conv(x, kernel, strides, padding):
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=_LAYOUT)


def _conv_fwd(x, kernel, strides, padding, dtype):
    return _plain_conv(x.astype(dtype), kernel.astype(dtype), strides, padding), (x, kernel)


def _conv_bwd(strides, padding, dtype, residuals, g):
    x, kernel = residuals
    x_cast, kernel_cast = x.astype(dtype), kernel.astype(dtype)
    plain = partial(_plain_conv, strides=strides, padding=padding)

    # One choice a gradient, so that XLA can drop the one that nobody reads (the first stage needs no dx).
    dx = lax.platform_dependent(
        x_cast,
        kernel_cast,
        g,
        cpu=partial(_conv_dx, strides=strides, padding=padding),
        default=lambda x, kernel, g: jax.vjp(lambda x: plain(x, kernel), x)[1](g)[0],
    )
    dkernel = lax.platform_dependent(
        x_cast,
        kernel_cast,
        g,
        cpu=partial(_conv_dkernel, strides=strides, padding=padding),
        default=lambda x, kernel, g: jax.vjp(lambda kernel: plain(x, kernel), kernel)[1](g)[0],
    )
    return dx.astype(x.dtype), dkernel.astype(kernel.dtype)


conv.defvjp(_conv_fwd, _conv_bwd)


def _conv_dx(x, kernel, g, strides, padding):
    """dx[n, u] = sum over t of g[n, t] kernel[u + p - s t]: stuffed g against the flipped kernel, I and O swapped."""
    g = _stuff(g, strides)
    pads = [
        (h - 1 - before, size + before - length)
        for h, size, length, (before, _) in zip(kernel.shape[:2], x.shape[1:3], g.shape[1:3], padding, strict=True)
    ]
    return _plain_conv(g, kernel[::-1, ::-1].swapaxes(2, 3), (1, 1), pads)


def _conv_dkernel(x, kernel, g, strides, padding):
    """dkernel[v] = sum over n, t of x[n, s t + v - p] g[n, t]: x against the stuffed g, the batch contracted."""
    g = _stuff(g, strides)
    pads = [
        (before, length + h - 1 - before - size)
        for h, size, length, (before, _) in zip(kernel.shape[:2], x.shape[1:3], g.shape[1:3], padding, strict=True)
    ]
    return _plain_conv(x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3), (1, 1), pads).transpose(1, 2, 0, 3)


def _stuff(g, strides):
    """Puts stride - 1 zeros between the pixels of g."""
    if strides == (1, 1):
        return g
    return lax.pad(g, jnp.zeros((), g.dtype), ((0, 0, 0), *((0, 0, s - 1) for s in strides), (0, 0, 0)))


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def batch_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, dtype: Dtype
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalises by the statistics of the batch: (x - mean) * scale / sqrt(var + epsilon) + bias.

    As in Flax, the arguments are rounded to `dtype`, and the statistics are then computed in float32 or better over
    every axis but the last, var as E[x^2] - E[x]^2. Residuals: x and scale as they came, mean and 1 / sqrt(var +
    epsilon).

    Args:
        x: (..., C).
        scale, bias: (C,).
        epsilon: added to the variance.
        dtype: of the output.

    Returns:
        The output, and the batch's mean and biased variance (C,), through which no gradient flows.
    """
    y, _, mean, var = _normalise(x, scale, bias, epsilon, dtype)
    return y, mean, var


def _normalise(x, scale, bias, epsilon, dtype):
    x = x.astype(dtype).astype(at_least_float32(dtype))
    axes = tuple(range(x.ndim - 1))
    mean = jnp.mean(x, axes)
    var = jnp.maximum(jnp.mean(jnp.square(x), axes) - jnp.square(mean), 0)
    inverse = lax.rsqrt(var + epsilon)
    y = (x - mean) * (inverse * scale.astype(dtype)) + bias.astype(dtype)
    return y.astype(dtype), inverse, mean, var


def _batch_norm_fwd(x, scale, bias, epsilon, dtype):
    y, inverse, mean, var = _normalise(x, scale, bias, epsilon, dtype)
    return (y, mean, var), (x, scale, mean, inverse)


def _batch_norm_bwd(epsilon, dtype, residuals, cotangents):
    """With x^ = (x - mean) / sigma: dx = scale / sigma * (g - E[g] - x^ E[g x^])."""
    del epsilon
    x, scale, mean, inverse = residuals
    g = cotangents[0].astype(mean.dtype)
    axes = tuple(range(x.ndim - 1))
    normal = (x.astype(dtype).astype(mean.dtype) - mean) * inverse
    dbias = jnp.sum(g, axes)
    dscale = jnp.sum(g * normal, axes)
    count = x.size // x.shape[-1]
    dx = (scale.astype(dtype) * inverse) * (g - dbias / count - normal * (dscale / count))
    return dx.astype(x.dtype), dscale.astype(scale.dtype), dbias.astype(scale.dtype)


batch_norm.defvjp(_batch_norm_fwd, _batch_norm_bwd)


class Linear(nnx.Module):
    """`linear` with a kernel (in_features, out_features) and a bias; parameters float32, computation in `dtype`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rngs: nnx.Rngs,
        dtype: Dtype = jnp.float32,
        kernel_init: Initializer = _HE_NORMAL,
    ):
        self.dtype = jnp.dtype(dtype)
        self.kernel = nnx.Param(kernel_init(rngs.params(), (in_features, out_features), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(out_features))

    def __call__(self, x: jax.Array) -> jax.Array:
        return linear(x, self.kernel[...], self.dtype) + self.bias[...].astype(self.dtype)


class Conv(nnx.Module):
    """`conv` with a kernel and no bias (a normalisation layer follows); padding "SAME", "VALID" or pairs."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Sequence[int] = (3, 3),
        *,
        rngs: nnx.Rngs,
        strides: int = 1,
        padding: str | Padding = "SAME",
        dtype: Dtype = jnp.float32,
        kernel_init: Initializer = _HE_NORMAL,
    ):
        self.strides = (strides, strides)
        self.padding = padding
        self.dtype = jnp.dtype(dtype)
        self.kernel = nnx.Param(kernel_init(rngs.params(), (*kernel_size, in_features, out_features), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel, padding = self.kernel[...], self.padding
        if isinstance(padding, str):
            padding = tuple(lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], self.strides, padding))
        return conv(x, kernel, self.strides, padding, self.dtype)


class BatchNorm(nnx.Module):
    """`batch_norm` in training, running statistics in evaluation: `train()` and `eval()` switch, as in Flax.

    In training the running statistics move towards the batch's: running = momentum * running + (1 - momentum) * batch.
    """

    def __init__(
        self,
        num_features: int,
        *,
        rngs: nnx.Rngs,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        dtype: Dtype = jnp.float32,
    ):
        del rngs  # every Flax layer takes it
        self.momentum, self.epsilon, self.dtype = momentum, epsilon, jnp.dtype(dtype)
        self.use_running_average = False
        self.scale = nnx.Param(jnp.ones(num_features))
        self.bias = nnx.Param(jnp.zeros(num_features))
        self.mean = nnx.BatchStat(jnp.zeros(num_features))
        self.var = nnx.BatchStat(jnp.ones(num_features))

    def __call__(self, x: jax.Array) -> jax.Array:
        scale, bias = self.scale[...], self.bias[...]
        if self.use_running_average:
            x, mean, var, scale, bias = (a.astype(self.dtype) for a in (x, self.mean[...], self.var[...], scale, bias))
            return (x - mean) * (lax.rsqrt(var + self.epsilon) * scale) + bias
        y, mean, var = batch_norm(x, scale, bias, self.epsilon, self.dtype)
        self.mean[...] = self.momentum * self.mean[...] + (1 - self.momentum) * mean
        self.var[...] = self.momentum * self.var[...] + (1 - self.momentum) * var
        return y
