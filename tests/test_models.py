import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fdg_jax import models
from fdg_jax.models.resnet_cifar import BasicBlock


def count(layers):
    modules = [layer for layer in layers if isinstance(layer, nnx.Module)]
    return sum(leaf.size for module in modules for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


def outputs(layers, x):
    for layer in layers:
        x = layer(x)
    return x


@pytest.mark.parametrize(
    ("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)], ids=lambda v: str(v)
)
def test_resnet_cifar_has_the_papers_parameters(depth, millions):
    """Exactly: convolutions 3x3 without bias, scale and bias of every normalisation, the linear head; no shortcuts."""
    layers = models.resnet_cifar(depth, rngs=nnx.Rngs(0))
    n = (depth - 2) // 6
    convolutions = 9 * (3 * 16 + 2 * n * 16**2 + 16 * 32 + (2 * n - 1) * 32**2 + 32 * 64 + (2 * n - 1) * 64**2)
    norms = 2 * (16 + 2 * n * (16 + 32 + 64))
    assert count(layers) == convolutions + norms + 65 * 10
    assert round(count(layers) / 1e6, 2 if depth < 110 else 1) == millions
    assert len(layers) == 3 * n + 2


def test_resnet_cifar_has_depth_layers_with_weights():
    kernels = [
        leaf
        for layer in models.resnet_cifar(20, rngs=nnx.Rngs(0), width=2)
        for path, leaf in jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(layer, nnx.Param)))
        if "kernel" in jax.tree_util.keystr(path)
    ]
    assert len(kernels) == 20


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shapes_and_dtypes(dtype):
    x = jnp.ones((2, 32, 32, 3))
    layers = models.resnet_cifar(8, rngs=nnx.Rngs(0), width=4, num_classes=7, dtype=dtype)
    maps = []
    for layer in layers[:-1]:
        x = layer(x)
        maps.append(x.shape)
        assert x.dtype == dtype
    assert maps == [(2, 32, 32, 4), (2, 32, 32, 4), (2, 16, 16, 8), (2, 8, 8, 16)]
    assert layers[-1](x).shape == (2, 7)
    assert layers[-1](x).dtype == jnp.float32
    network = models.mlp(2, rngs=nnx.Rngs(0), width=5, num_classes=7, in_shape=(4, 4, 1), dtype=dtype)
    assert outputs(network, jnp.ones((3, 4, 4, 1))).shape == (3, 7)
    assert outputs(network, jnp.ones((3, 4, 4, 1))).dtype == jnp.float32


@pytest.mark.parametrize("size", [8, 7])
def test_the_shortcut_is_the_identity_subsampled_between_zero_channels(size):
    block = BasicBlock(4, 8, 2, rngs=nnx.Rngs(0), dtype=jnp.float32)
    block.norm2.scale[...] = jnp.zeros(8)  # the residual branch gives nothing
    x = jax.random.normal(jax.random.key(0), (2, size, size, 4))
    expected = np.zeros((2, -(-size // 2), -(-size // 2), 8), np.float32)
    expected[..., 2:6] = np.maximum(x[:, ::2, ::2], 0)
    np.testing.assert_array_equal(block(x), expected)


def test_the_shortcut_without_a_change_of_shape_is_the_identity():
    block = BasicBlock(4, 4, 1, rngs=nnx.Rngs(0), dtype=jnp.float32)
    block.norm2.scale[...] = jnp.zeros(4)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
    np.testing.assert_array_equal(block(x), np.maximum(x, 0))


def test_initialisation_is_he_normal():
    """Standard deviation sqrt(2 / fan in), fan in 9 C for a convolution 3x3."""
    stem, block = models.resnet_cifar(8, rngs=nnx.Rngs(0), width=64)[:2]
    for kernel, fan_in in ((stem.conv.kernel[...], 27), (block.conv1.kernel[...], 9 * 64)):
        assert float(kernel.std()) == pytest.approx((2 / fan_in) ** 0.5, rel=0.03)


@pytest.mark.parametrize(("depth", "nearest"), [(21, 20), (19, 20), (2, 8), (-5, 8)])
def test_a_depth_that_does_not_exist_is_refused(depth, nearest):
    with pytest.raises(ValueError, match=rf"6n \+ 2 layers, n >= 1; got depth={depth}; did you mean {nearest}\?"):
        models.resnet_cifar(depth, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="at least one hidden layer; got depth=0"):
        models.mlp(0, rngs=nnx.Rngs(0))


def test_models_by_name():
    size = {"depth": 8, "width": 2, "num_classes": 3, "in_shape": (8, 8, 1), "dtype": "float32"}
    by_name = models.build("resnet_cifar", seed=5, **size)
    direct = models.resnet_cifar(rngs=nnx.Rngs(5), **size)
    x = jnp.ones((2, 8, 8, 1))
    np.testing.assert_array_equal(outputs(by_name, x), outputs(direct, x))
    with pytest.raises(ValueError, match="unknown model 'resnet'; did you mean 'resnet_cifar'"):
        models.build("resnet", seed=0, **size)
