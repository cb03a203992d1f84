import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_trees_close

from fdg_jax import layers
from fdg_jax.backward import lighten

# image size, kernel size, strides; the images are two pixels less wide than high
CONVOLUTIONS = [(9, 3, 1), (9, 3, 2), (8, 3, 2), (9, 1, 1), (9, 1, 2), (8, 1, 2), (11, 7, 1), (11, 7, 2), (12, 7, 2)]


def value_and_gradients(module, x):
    """Outputs, gradients of parameters and inputs, and statistics, for a fixed cotangent."""
    graph, params, state = nnx.split(module, nnx.Param, ...)

    @jax.jit
    def run(params, x):
        def apply(params, x):
            copy = nnx.merge(graph, params, state, copy=True)
            y = copy(x)
            return y, nnx.to_pure_dict(nnx.state(copy, nnx.BatchStat))

        y, vjp, statistics = jax.vjp(apply, params, x, has_aux=True)
        dparams, dx = vjp(jax.random.normal(jax.random.key(3), y.shape).astype(y.dtype))
        return y, nnx.to_pure_dict(dparams), dx, statistics

    return run(params, x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("size", "kernel", "strides"), CONVOLUTIONS)
def test_conv_equals_flax(size, kernel, strides, dtype):
    x = jax.random.normal(jax.random.key(0), (4, size, size - 2, 5))
    own = layers.Conv(5, 6, (kernel, kernel), strides=strides, dtype=dtype, rngs=nnx.Rngs(0))
    flax = nnx.Conv(5, 6, (kernel, kernel), strides=strides, use_bias=False, dtype=dtype, rngs=nnx.Rngs(0))
    flax.kernel[...] = own.kernel[...]
    (y, dparams, dx, _), (y_flax, dparams_flax, dx_flax, _) = value_and_gradients(own, x), value_and_gradients(flax, x)
    assert y.dtype == dtype
    assert_trees_close(y, y_flax)
    # Gradients sum over pixels in another order, in bfloat16 with its rounding.
    rounding = 1e-6 if dtype == "float32" else 2**-8
    assert_trees_close((dparams, dx), (dparams_flax, dx_flax), rounding)


@pytest.mark.parametrize("padding", ["VALID", ((1, 2), (0, 3))])
def test_conv_with_other_paddings_equals_flax(padding):
    x = jax.random.normal(jax.random.key(0), (4, 9, 8, 5))
    own = layers.Conv(5, 6, (3, 3), strides=2, padding=padding, rngs=nnx.Rngs(0))
    flax = nnx.Conv(5, 6, (3, 3), strides=2, padding=padding, use_bias=False, rngs=nnx.Rngs(0))
    flax.kernel[...] = own.kernel[...]
    assert_trees_close(value_and_gradients(own, x), value_and_gradients(flax, x))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear_equals_flax(dtype):
    x = jax.random.normal(jax.random.key(0), (4, 3, 5))
    own, flax = (
        layers.Linear(5, 6, dtype=dtype, rngs=nnx.Rngs(0)),
        nnx.Linear(5, 6, dtype=dtype, rngs=nnx.Rngs(0)),
    )
    flax.kernel[...] = own.kernel[...]
    (y, *gradients), (y_flax, *gradients_flax) = value_and_gradients(own, x), value_and_gradients(flax, x)
    assert_trees_close(y, y_flax)
    assert_trees_close(gradients, gradients_flax, 1e-6 if dtype == "float32" else 2**-8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(16, 5), (6, 7, 3, 5)])
def test_batch_norm_equals_flax(shape, dtype):
    x = (2 * jax.random.normal(jax.random.key(0), shape) + 0.5).astype(dtype)
    own = layers.BatchNorm(5, dtype=dtype, rngs=nnx.Rngs(0))
    flax = nnx.BatchNorm(5, momentum=0.9, dtype=dtype, rngs=nnx.Rngs(0))
    for module in (own, flax):
        module.scale[...], module.bias[...] = jnp.linspace(0.3, 2.0, 5), jnp.linspace(-1.0, 1.0, 5)
    (y, dparams, dx, stats), (y_flax, dparams_flax, dx_flax, stats_flax) = (
        value_and_gradients(own, x),
        value_and_gradients(flax, x),
    )
    assert_trees_close((y, stats), (y_flax, stats_flax))
    assert_trees_close((dparams, dx), (dparams_flax, dx_flax), 1e-6 if dtype == "float32" else 2**-6)
    own.eval()
    flax.eval()
    assert_trees_close(own(x), flax(x))


def test_relu_is_relu():
    x = jnp.array([-1.0, 0.0, 2.0, -0.0])
    y, vjp = jax.vjp(layers.relu, x)
    np.testing.assert_array_equal(y, [0, 0, 2, 0])
    np.testing.assert_array_equal(vjp(jnp.full(4, 3.0))[0], [0, 0, 3, 0])


@pytest.mark.parametrize("size_kernel_strides", CONVOLUTIONS)
def test_gradients_inside_a_loop_are_those_outside(size_kernel_strides):
    size, kernel, strides = size_kernel_strides
    x = jax.random.normal(jax.random.key(0), (2, size, size, 3))
    weights = jax.random.normal(jax.random.key(1), (2, kernel, kernel, 3, 4))
    padding = tuple(jax.lax.padtype_to_pads((size, size), (kernel, kernel), (strides, strides), "SAME"))

    def loss(w):
        return jnp.sum(jnp.sin(layers.conv(x, w, (strides, strides), padding, jnp.float32)))

    inside = jax.jit(lambda ws: jax.lax.scan(lambda _, w: (None, jax.grad(loss)(w)), None, ws)[1])(weights)
    outside = jnp.stack([jax.jit(jax.grad(loss))(w) for w in weights])
    assert_trees_close(inside, outside)


def convolutions(hlo: str) -> list[str]:
    return [line for line in hlo.splitlines() if " convolution(" in line]


def test_gradients_on_the_cpu_are_ordinary_convolutions():
    """What makes them fast in loops: no permuted dimension numbers, which XLA:CPU straightens out only elsewhere."""
    x, w = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 4))
    conv = lambda x, w: layers.conv(x, w, (2, 2), ((0, 1), (0, 1)), jnp.float32).sum()  # noqa: E731
    lines = convolutions(jax.jit(jax.grad(conv, (0, 1))).lower(x, w).as_text("hlo"))
    assert lines
    assert all("dim_labels=b01f_01io->b01f" in line for line in lines)


def residuals(function, *args):
    """Shapes of what a vjp saves beside the arguments, each once, and which arguments it saves."""
    found = []

    def trace(*args):
        y, vjp = jax.vjp(function, *args)
        light = lighten(vjp, **{str(i): arg for i, arg in enumerate(args)}, y=y)
        found.append(([leaf.shape for leaf in light.saved], {s.tree for s in light.sources if s.tree != "saved"}))
        return y

    jax.eval_shape(trace, *args)
    return found[0]


def test_residuals_are_the_arguments_verbatim():
    """In bfloat16 too: the kernel is saved before its cast, and BatchNorm's scale before its broadcast."""
    x, w = jnp.ones((2, 4, 4, 3)), jnp.ones((3, 3, 3, 5))
    scale, bias = jnp.ones(3), jnp.ones(3)
    padding = ((1, 1), (1, 1))
    assert residuals(lambda x, w: layers.conv(x, w, (1, 1), padding, jnp.bfloat16), x, w) == ([], {"0", "1"})
    assert residuals(lambda x, w: layers.linear(x, w, jnp.bfloat16), jnp.ones((2, 3)), jnp.ones((3, 4))) == (
        [],
        {"0", "1"},
    )
    norm = lambda x, s, b: layers.batch_norm(x, s, b, 1e-5, jnp.bfloat16)[0]  # noqa: E731
    assert residuals(norm, x, scale, bias) == ([(3,), (3,)], {"0", "1"})  # mean and deviation; input and scale
    assert residuals(layers.relu, x) == ([], {"y"})
