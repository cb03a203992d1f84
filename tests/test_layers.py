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


ROUNDING = {"float32": 1e-6, "bfloat16": 2**-6}  # of gradients, which are sums in another order
RNG = np.random.default_rng(0)
ZEROS = nnx.initializers.zeros  # compiles at once; tests set the weights themselves


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def value_and_gradients(module, x):
    """Outputs, gradients of parameters and inputs, and statistics, for a fixed cotangent."""
    graph, params, state = nnx.split(module, nnx.Param, ...)

    def apply(params, x):
        copy = nnx.merge(graph, params, state, copy=True)
        y = copy(x)
        return y, nnx.to_pure_dict(nnx.state(copy, nnx.BatchStat))

    @jax.jit
    def run(params, x, cotangent):
        y, vjp, statistics = jax.vjp(apply, params, x, has_aux=True)
        dparams, dx = vjp(cotangent)
        return y, nnx.to_pure_dict(dparams), dx, statistics

    y, _ = jax.eval_shape(apply, params, x)
    return run(params, x, jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(y.dtype))


@pytest.mark.parametrize(
    ("size", "kernel", "strides", "dtype"),
    [(*case, "float32") for case in CONVOLUTIONS] + [(*case, "bfloat16") for case in CONVOLUTIONS if case[0] == 9],
)
def test_conv_equals_flax(size, kernel, strides, dtype):
    x = normal(4, size, size - 2, 5)
    same = {"strides": strides, "dtype": dtype, "kernel_init": ZEROS, "rngs": nnx.Rngs(0)}
    own = layers.Conv(5, 6, (kernel, kernel), **same)
    flax = nnx.Conv(5, 6, (kernel, kernel), use_bias=False, **same)
    own.kernel[...] = flax.kernel[...] = normal(kernel, kernel, 5, 6)
    (y, dparams, dx, _), (y_flax, dparams_flax, dx_flax, _) = value_and_gradients(own, x), value_and_gradients(flax, x)
    assert y.dtype == dtype
    assert_trees_close(y, y_flax)
    assert_trees_close((dparams, dx), (dparams_flax, dx_flax), ROUNDING[dtype])


@pytest.mark.parametrize("padding", ["VALID", ((1, 2), (0, 3))])
def test_conv_with_other_paddings_equals_flax(padding):
    x = normal(4, 9, 8, 5)
    same = {"strides": 2, "padding": padding, "kernel_init": ZEROS, "rngs": nnx.Rngs(0)}
    own = layers.Conv(5, 6, (3, 3), **same)
    flax = nnx.Conv(5, 6, (3, 3), use_bias=False, **same)
    own.kernel[...] = flax.kernel[...] = normal(3, 3, 5, 6)
    assert_trees_close(value_and_gradients(own, x), value_and_gradients(flax, x))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear_equals_flax(dtype):
    x = normal(4, 3, 5)
    own, flax = (kind(5, 6, dtype=dtype, kernel_init=ZEROS, rngs=nnx.Rngs(0)) for kind in (layers.Linear, nnx.Linear))
    own.kernel[...] = flax.kernel[...] = normal(5, 6)
    assert_trees_close(own(x), flax(x))
    # Compiled, XLA rounds to bfloat16 now between sums and now after them.
    assert_trees_close(value_and_gradients(own, x), value_and_gradients(flax, x), ROUNDING[dtype])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(16, 5), (6, 7, 3, 5)])
def test_batch_norm_equals_flax(shape, dtype):
    x = (2 * normal(*shape) + 0.5).astype(dtype)
    own = layers.BatchNorm(5, dtype=dtype, rngs=nnx.Rngs(0))
    flax = nnx.BatchNorm(5, momentum=0.9, dtype=dtype, rngs=nnx.Rngs(0))
    for module in (own, flax):
        module.scale[...], module.bias[...] = jnp.linspace(0.3, 2.0, 5), jnp.linspace(-1.0, 1.0, 5)
    (y, dparams, dx, stats), (y_flax, dparams_flax, dx_flax, stats_flax) = (
        value_and_gradients(own, x),
        value_and_gradients(flax, x),
    )
    assert_trees_close((y, stats), (y_flax, stats_flax))
    assert_trees_close((dparams, dx), (dparams_flax, dx_flax), ROUNDING[dtype])
    own.eval()
    flax.eval()
    assert_trees_close(own(x), flax(x))


def test_relu_is_relu():
    x = jnp.array([-1.0, 0.0, 2.0, -0.0])
    y, vjp = jax.vjp(layers.relu, x)
    np.testing.assert_array_equal(y, [0, 0, 2, 0])
    np.testing.assert_array_equal(vjp(jnp.full(4, 3.0))[0], [0, 0, 3, 0])


@pytest.mark.parametrize(("size", "kernel", "strides"), [(9, 3, 1), (8, 3, 2), (9, 1, 2)])
def test_gradients_inside_a_loop_are_those_outside(size, kernel, strides):
    x, weights = normal(2, size, size, 3), normal(2, kernel, kernel, 3, 4)
    padding = tuple(jax.lax.padtype_to_pads((size, size), (kernel, kernel), (strides, strides), "SAME"))

    def loss(w):
        return jnp.sum(jnp.sin(layers.conv(x, w, (strides, strides), padding, jnp.float32)))

    inside = jax.jit(lambda ws: jax.lax.scan(lambda _, w: (None, jax.grad(loss)(w)), None, ws)[1])(weights)
    outside = jnp.stack([*map(jax.jit(jax.grad(loss)), weights)])
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


def test_batch_norm_rounds_what_it_normalises_as_flax_does():
    """Statistics and gradients of a float32 input far from zero in a bfloat16 layer: rounded first, summed wide."""
    x = 2 * normal(64, 5) + 300
    own = layers.BatchNorm(5, dtype="bfloat16", rngs=nnx.Rngs(0))
    flax = nnx.BatchNorm(5, momentum=0.9, dtype="bfloat16", rngs=nnx.Rngs(0))
    (_, dparams, _, statistics), (_, dparams_flax, _, statistics_flax) = (
        value_and_gradients(module, x) for module in (own, flax)
    )
    assert_trees_close(statistics, statistics_flax)
    assert_trees_close(dparams, dparams_flax, ROUNDING["bfloat16"])


@pytest.mark.parametrize("value", [77.77, 333.3, 1e4 / 3])
def test_a_constant_channel_has_no_negative_variance(value):
    y, _, var = layers.batch_norm(jnp.full((7, 3), value), jnp.ones(3), jnp.zeros(3), 1e-5, jnp.float32)
    assert float(var.min()) >= 0
    assert jnp.isfinite(y).all()
