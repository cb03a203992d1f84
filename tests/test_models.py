import re
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import make_pipeline, tiny_batches

from fdg_jax import layers, methods, models
from fdg_jax.models import parts
from fdg_jax.models.parts import KERNEL_INITS, Head, kernel_init
from fdg_jax.models.resnet import BasicBlock as ProjectionBlock
from fdg_jax.models.resnet import Bottleneck, Stem
from fdg_jax.models.resnet_cifar import BasicBlock
from fdg_jax.models.wrn import WideBlock
from fdg_jax.stage import as_layers, init_layers

DOCS = (Path(__file__).parents[1] / "docs" / "networks.md").read_text()
TINY = {  # name: arguments of a network that is as small as it can be
    "mlp": {"depth": 2, "width": 5, "in_shape": (4, 4, 1)},
    "resnet_cifar": {"depth": 8, "width": 4, "in_shape": (8, 8, 1), "pool_window": 1},
    "resnet": {"depth": 18, "width": 2, "in_shape": (8, 8, 1)},
    "resnet bottleneck": {"depth": 50, "width": 2, "in_shape": (8, 8, 1), "stem": "imagenet"},
    "wrn": {"depth": 10, "width": 1, "in_shape": (8, 8, 1)},
}
FEWER = {"resnet": (0, 1, 2, 3, 5, 7, 9), "resnet bottleneck": (0, 1, 2, 4, 8, 14, 17)}  # two blocks, then one a group


def tiny(name, num_classes=3, **kwargs):
    network = models.MODELS[name.split()[0]](rngs=nnx.Rngs(1), num_classes=num_classes, **TINY[name], **kwargs)
    return [network[i] for i in FEWER.get(name, range(len(network)))]


def wrong(key, shape, dtype):
    raise AssertionError("this is not the initialiser that was asked for")


@pytest.fixture(autouse=True)
def _kernels_without_compilation(monkeypatch):
    """Drawing kernels of a new shape takes XLA a second: NumPy does it here, but for the test of the numbers drawn."""
    monkeypatch.setattr(parts, "KERNEL_INITS", dict.fromkeys(KERNEL_INITS, drawn_by_numpy))


def drawn_by_numpy(key, shape, dtype):
    if isinstance(key, jax.core.Tracer):
        return jnp.zeros(shape, dtype)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    return jnp.asarray(rng.normal(size=shape).astype(dtype))


def trace(name, depth, **kwargs):
    """Shapes of the parameters of every layer; the network is traced and not built."""
    one_key = SimpleNamespace(params=lambda: jax.random.key(0))  # to trace how nnx.Rngs counts would take a minute

    def build():
        network = models.MODELS[name](depth, rngs=one_key, **kwargs)
        return [nnx.to_pure_dict(nnx.state(layer, nnx.Param)) for layer in network]

    return jax.eval_shape(build)


@cache
def count(name, depth, **kwargs):
    """Parameters and layers."""
    shapes = trace(name, depth, **kwargs)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes)), len(shapes)


def outputs(network, x):
    for layer in network:
        x = layer(x)
    return x


def normal(*shape):
    return jax.random.normal(jax.random.key(0), shape)


@pytest.mark.parametrize(
    ("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7), (1202, 19.4)], ids=str
)
def test_resnet_cifar_has_the_papers_parameters(depth, millions):
    """Exactly: convolutions 3x3 without bias, scale and bias of every normalisation, the linear head; no shortcuts."""
    n = (depth - 2) // 6
    convolutions = 9 * (3 * 16 + 2 * n * 16**2 + 16 * 32 + (2 * n - 1) * 32**2 + 32 * 64 + (2 * n - 1) * 64**2)
    norms = 2 * (16 + 2 * n * (16 + 32 + 64))
    parameters, num_layers = count("resnet_cifar", depth, num_classes=10)
    assert parameters == convolutions + norms + 65 * 10
    assert round(parameters / 1e6, 2 if depth < 110 else 1) == millions
    assert num_layers == 3 * n + 2


@pytest.mark.parametrize(
    ("depth", "published", "features", "blocks"),
    [(18, 11_689_512, 512, 8), (34, 21_797_672, 512, 16), (50, 25_557_032, 2048, 16), (101, 44_549_160, 2048, 33)],
)
def test_resnet_has_torchvisions_parameters(depth, published, features, blocks):
    """Its published counts are for ImageNet; the CIFAR stem has 40 weights less in each of its 3 x 64 kernels."""
    assert count("resnet", depth, stem="imagenet", num_classes=1000) == (published, blocks + 2)
    fewer = 40 * 3 * 64 + (1000 - 10) * (features + 1)
    assert count("resnet", depth, stem="cifar", num_classes=10) == (published - fewer, blocks + 2)


@pytest.mark.parametrize(("depth", "width"), [(28, 10), (16, 4), (10, 1)])
def test_wrn_has_the_papers_parameters(depth, width):
    """Layer by layer: kernels without bias, scale and bias of the normalisation before each, a shortcut 1x1 a group."""
    n = (depth - 4) // 6
    expected, channels = 9 * 3 * 16, 16
    for wide in (16 * width, 32 * width, 64 * width):
        expected += 2 * channels + 9 * channels * wide + 2 * wide + 9 * wide**2  # the first block
        expected += channels * wide if channels != wide else 0
        expected += (n - 1) * 2 * (2 * wide + 9 * wide**2)
        channels = wide
    expected += 2 * channels + (channels + 1) * 10
    assert count("wrn", depth, width=width, num_classes=10) == (expected, 3 * n + 2)
    if (depth, width) == (28, 10):
        assert round(expected / 1e6, 1) == 36.5


def test_the_documented_tables_are_right():
    rows = re.findall(r"^\| (\S+) \| `(\w+)` \| (\d+) \| (\d+) \| (\d+) \| (.+) \| (.+) \|$", DOCS, re.MULTILINE)
    assert len(rows) == 15
    for _, name, depth, width, num_layers, counts, stages in rows:
        size = {"depth": int(depth), "width": int(width)}
        counts = [int(number.replace(",", "")) for number in counts.split(" | ")]
        classes, stem = ((10, 100), "cifar") if len(counts) == 2 else ((1000,), "imagenet")
        for number, num_classes in zip(counts, classes, strict=True):
            option = {"resnet": {"stem": stem}, "wrn": {"width": 10}}.get(name, {})
            if (depth, num_classes) == ("1202", 100):  # slow to trace
                assert number == counts[0] + 90 * 65
            else:
                assert count(name, int(depth), **option, num_classes=num_classes) == (number, int(num_layers))
        published = []
        for num_stages in range(2, 10):
            with suppress(ValueError):
                published.append(len(models.published_cuts(name, **size, num_stages=num_stages)) + 1)
        assert stages == (", ".join(map(str, published)) or "none")


def test_depth_counts_the_layers_with_weights():
    """He et al. count convolutions and the linear layer, without shortcuts; Zagoruyko and Komodakis convolutions."""

    def kernels(name, depth):
        shapes = trace(name, depth, width=2)
        names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(shapes)]
        return [path for path in names if "kernel" in path]

    assert len(kernels("resnet_cifar", 20)) == 20
    assert len([path for path in kernels("resnet", 50) if "projection" not in path]) == 50
    assert len([path for path in kernels("wrn", 16) if "linear" not in path]) == 16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", TINY)
def test_current_refreshes_every_parameter(name, dtype):
    """Stem, blocks and head as stages: no backward reads a copy of a parameter. One step goes through."""
    network = tiny(name, dtype=dtype)
    cuts = (len(network) - 2, len(network) - 1) if name == "mlp" else (1, len(network) - 1)
    pipe = make_pipeline(network, method=methods.fdg(0.5, "current"), num_stages=None, cuts=cuts)
    (batch,) = tiny_batches(1, TINY[name]["in_shape"], size=2)
    state, metrics = pipe.step(pipe.init(jax.random.key(0), batch[0]), batch)
    assert metrics is None
    assert state.fed == 1
    assert [pipe._engine.workers[k].trace.hidden_params() for k in range(3)] == [[], [], []]


def shapes_between(network, images):
    inputs = jax.ShapeDtypeStruct(images, jnp.float32)
    return [(s.shape[1:], s.dtype) for s in init_layers(as_layers(network), jax.random.key(0), inputs)[2][1:]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shapes_and_dtypes(dtype):
    """Maps in the dtype of the computation, logits in float32 at least."""

    def check(network, images, maps):
        *between, logits = shapes_between(network, images)
        assert list(dict.fromkeys(between)) == [(shape, jnp.dtype(dtype)) for shape in maps]
        assert logits == ((3,), jnp.float32)

    check(tiny("mlp", dtype=dtype)[1:], (2, 16), [(5,)])
    check(tiny("resnet_cifar", dtype=dtype), (2, 32, 32, 1), [(32, 32, 4), (16, 16, 8), (8, 8, 16)])
    check(tiny("resnet", dtype=dtype), (2, 32, 32, 1), [(32, 32, 2), (16, 16, 4), (8, 8, 8), (4, 4, 16)])
    maps = [(56, 56, 2), (56, 56, 8), (28, 28, 16), (14, 14, 32), (7, 7, 64)]
    check(tiny("resnet bottleneck", dtype=dtype), (2, 224, 224, 1), maps)
    check(tiny("wrn", dtype=dtype), (2, 32, 32, 1), [(32, 32, 16), (16, 16, 32), (8, 8, 64)])


@pytest.mark.parametrize("size", [8, 7])
def test_the_shortcut_is_the_identity_subsampled_between_zero_channels(size):
    block = BasicBlock(4, 8, 2, rngs=nnx.Rngs(0), dtype=jnp.float32)
    block.norm2.scale[...] = jnp.zeros(8)  # the residual branch gives nothing
    x = normal(2, size, size, 4)
    expected = np.zeros((2, -(-size // 2), -(-size // 2), 8), np.float32)
    expected[..., 2:6] = np.maximum(x[:, ::2, ::2], 0)
    np.testing.assert_array_equal(block(x), expected)


def test_the_shortcut_without_a_change_of_shape_is_the_identity():
    x = normal(2, 8, 8, 4)
    block = BasicBlock(4, 4, 1, rngs=nnx.Rngs(0), dtype=jnp.float32)
    block.norm2.scale[...] = jnp.zeros(4)
    np.testing.assert_array_equal(block(x), np.maximum(x, 0))
    block = Bottleneck(4, 1, 1, rngs=nnx.Rngs(0), dtype=jnp.float32)
    block.conv3.norm.scale[...] = jnp.zeros(4)
    np.testing.assert_array_equal(block(x), np.maximum(x, 0))
    block = WideBlock(4, 4, 1, rngs=nnx.Rngs(0), dtype=jnp.float32)
    block.conv2.kernel[...] = jnp.zeros((3, 3, 4, 4))
    np.testing.assert_array_equal(block(x), x)  # and nothing after the sum


def normalised(x):
    return (x - x.mean((0, 1, 2))) / (x.var((0, 1, 2)) + 1e-5) ** 0.5


@pytest.mark.parametrize(
    ("kind", "strides", "channels"), [(ProjectionBlock, 2, 8), (Bottleneck, 2, 2), (Bottleneck, 1, 2)]
)
def test_a_projection_is_normalised_and_strided_like_its_block(kind, strides, channels):
    block = kind(4, channels, strides, rngs=nnx.Rngs(0), dtype=jnp.float32)
    last = block.conv3 if kind is Bottleneck else block.conv2
    last.norm.scale[...] = jnp.zeros(8)
    x, kernel = normal(2, 8, 8, 4), np.asarray(block.projection.conv.kernel[...])[0, 0]
    expected = np.maximum(normalised(np.asarray(x)[:, ::strides, ::strides] @ kernel), 0)
    np.testing.assert_allclose(block(x), expected, atol=1e-5)


def test_blocks_are_the_papers_formulas():
    """Figures 2 and 5 of He et al., figure 1 (b) of Zagoruyko and Komodakis, written out with nothing of `layers`."""

    def conv(module, x):
        kernel = module.kernel[...]
        around = [(kernel.shape[0] // 2,) * 2] * 2
        return jax.lax.conv_general_dilated(
            x, kernel, module.strides, around, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def both(part, x):
        return normalised(conv(part.conv, x))

    x = normal(2, 8, 8, 4)
    basic, bottleneck, wide = (
        kind(4, channels, 2, rngs=nnx.Rngs(0), dtype=jnp.float32)
        for kind, channels in ((ProjectionBlock, 8), (Bottleneck, 2), (WideBlock, 8))
    )
    expected = jax.nn.relu(both(basic.conv2, jax.nn.relu(both(basic.conv1, x))) + both(basic.projection, x))
    np.testing.assert_allclose(basic(x), expected, atol=1e-5)
    y = jax.nn.relu(both(bottleneck.conv2, jax.nn.relu(both(bottleneck.conv1, x))))
    expected = jax.nn.relu(both(bottleneck.conv3, y) + both(bottleneck.projection, x))
    np.testing.assert_allclose(bottleneck(x), expected, atol=1e-5)
    y = jax.nn.relu(normalised(x))
    expected = conv(wide.conv2, jax.nn.relu(normalised(conv(wide.conv1, y)))) + conv(wide.projection, y)
    np.testing.assert_allclose(wide(x), expected, rtol=1e-5, atol=1e-4)  # sums of 72 numbers, not normalised


def test_a_bottleneck_strides_in_its_convolution_3x3():
    block = Bottleneck(4, 2, 2, rngs=nnx.Rngs(0), dtype=jnp.float32)
    convolutions = [part.conv for part in (block.conv1, block.conv2, block.conv3, block.projection)]
    assert [conv.kernel[...].shape[:2] for conv in convolutions] == [(1, 1), (3, 3), (1, 1), (1, 1)]
    assert [conv.strides[0] for conv in convolutions] == [1, 2, 1, 2]


def test_a_wide_block_projects_what_its_first_relu_gives():
    """A stride of 2 in the first convolution, whose window is centred on the pixels that the shortcut takes."""
    block = WideBlock(4, 8, 2, rngs=nnx.Rngs(0), dtype=jnp.float32)
    assert (block.conv1.strides, block.conv2.strides) == ((2, 2), (1, 1))
    block.conv2.kernel[...] = jnp.zeros((3, 3, 8, 8))
    x, kernel = normal(2, 8, 8, 4), np.asarray(block.projection.kernel[...])[0, 0]
    active = np.maximum(normalised(np.asarray(x)), 0)
    np.testing.assert_allclose(block(x), active[:, ::2, ::2] @ kernel, atol=1e-5)
    centre = jnp.zeros((3, 3, 4, 8)).at[1, 1].set(kernel)
    block.conv1.kernel[...] = centre
    np.testing.assert_allclose(block.conv1(jnp.asarray(active)), active[:, ::2, ::2] @ kernel, atol=1e-5)


def test_the_imagenet_stem_pools_the_largest_of_3x3():
    stem = Stem(1, 2, large=True, rngs=nnx.Rngs(0), dtype=jnp.float32)
    stem.conv.conv.kernel[...] = jnp.zeros((7, 7, 1, 2)).at[3, 3, 0].set(jnp.array([1.0, -1.0]))
    x = normal(2, 15, 12, 1)
    before = np.maximum(normalised(np.asarray(x)[:, ::2, ::2] * np.array([1.0, -1.0])), 0)
    assert before.shape == (2, 8, 6, 2)
    around = np.pad(before, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    expected = [[around[:, i : i + 3, j : j + 3].max((1, 2)) for j in range(0, 6, 2)] for i in range(0, 8, 2)]
    np.testing.assert_allclose(stem(x), np.transpose(expected, (2, 0, 1, 3)), atol=1e-5)


def test_kernels_are_he_normal_or_uniform_as_in_torch(monkeypatch):
    """Of standard deviation sqrt(2 / fan in); or in +-1 / sqrt(fan in). The fan in is k k C of a convolution."""
    monkeypatch.setattr(parts, "KERNEL_INITS", KERNEL_INITS)
    shape, fan_in = (3, 3, 32, 16), 288
    kernels = {init: kernel_init(init)(jax.random.key(0), shape, jnp.float32) * fan_in**0.5 for init in KERNEL_INITS}
    assert float(kernels["he"].std()) == pytest.approx(2**0.5, rel=0.03)
    assert float(jnp.abs(kernels["he"]).max()) > 2 * 2**0.5  # further out than anything uniform
    assert float(kernels["torch"].std()) == pytest.approx(3**-0.5, rel=0.03)
    assert 0.99 < float(jnp.abs(kernels["torch"]).max()) <= 1 + 1e-6


@pytest.mark.parametrize("init", KERNEL_INITS)
@pytest.mark.parametrize("name", TINY)
def test_every_kernel_is_initialised_as_asked(name, init, monkeypatch):
    """Every bias of a linear layer, too: zero, or uniform in +-1 / sqrt(fan in)."""
    sevens = lambda key, shape, dtype: jnp.asarray(np.full(shape, 7, dtype))  # noqa: E731
    monkeypatch.setattr(parts, "KERNEL_INITS", {**dict.fromkeys(KERNEL_INITS, wrong), init: sevens})
    biases = []
    for layer in tiny(name, init=init, num_classes=64):
        for _, module in nnx.iter_modules(layer) if isinstance(layer, nnx.Module) else ():
            if isinstance(module, layers.Conv | layers.Linear):
                assert np.all(np.asarray(module.kernel[...]) == 7)
            if isinstance(module, layers.Linear):
                biases.append(np.asarray(module.bias[...]) * module.kernel[...].shape[0] ** 0.5)
    assert len(biases) == (3 if name == "mlp" else 1)
    if init == "he":
        assert not any(map(np.any, biases))
    else:
        assert 0.9 < np.abs(biases[-1]).max() <= 1 + 1e-6
        assert biases[-1].std() == pytest.approx(3**-0.5, rel=0.2)
        assert np.abs(np.concatenate(biases)).max() <= 1 + 1e-6


def test_a_pooling_window_takes_the_upper_left_corner():
    """As the code released with FDG: 6 x 6 of 8 x 8 pixels."""
    x = normal(2, 8, 8, 4)
    head, whole = (Head(4, 3, window=window, rngs=nnx.Rngs(0), dtype=jnp.float32) for window in (6, 0))
    kernel = np.asarray(head.linear.kernel[...])
    np.testing.assert_allclose(head(x), np.asarray(x)[:, :6, :6].mean((1, 2)) @ kernel, atol=1e-6)
    np.testing.assert_allclose(whole(x), np.asarray(x).mean((1, 2)) @ kernel, atol=1e-6)
    by_option = models.resnet_cifar(8, width=4, pool_window=2, in_shape=(8, 8, 1), rngs=nnx.Rngs(0))
    assert by_option[-1].window == 2
    assert models.resnet_cifar(8, width=4, in_shape=(8, 8, 1), rngs=nnx.Rngs(0))[-1].window == 0


@pytest.mark.parametrize("window", [-1, 3])
def test_a_window_larger_than_the_map_is_refused(window):
    with pytest.raises(ValueError, match=rf"pool_window must lie in 1..2, for the last map is 2 x 3; got {window}"):
        models.resnet_cifar(8, pool_window=window, in_shape=(8, 9, 1), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("name", "depth", "message"),
    [
        ("resnet_cifar", 21, r"6n \+ 2 layers, n >= 1; got depth=21; did you mean 20\?"),
        ("resnet_cifar", 19, r"6n \+ 2 layers, n >= 1; got depth=19; did you mean 20\?"),
        ("resnet_cifar", 2, r"6n \+ 2 layers, n >= 1; got depth=2; did you mean 8\?"),
        ("resnet_cifar", -5, r"6n \+ 2 layers, n >= 1; got depth=-5; did you mean 8\?"),
        ("wrn", 30, r"6n \+ 4 layers, n >= 1; got depth=30; did you mean 28\?"),
        ("wrn", 4, r"6n \+ 4 layers, n >= 1; got depth=4; did you mean 10\?"),
        ("resnet", 20, r"one of 18, 34, 50, 101 layers; got depth=20; did you mean 18\?"),
        ("resnet", 152, r"one of 18, 34, 50, 101 layers; got depth=152; did you mean 101\?"),
        ("mlp", 0, "at least one hidden layer; got depth=0"),
    ],
)
def test_a_depth_that_does_not_exist_is_refused(name, depth, message):
    with pytest.raises(ValueError, match=message):
        models.MODELS[name](depth, rngs=nnx.Rngs(0))


SIZE = {"depth": 8, "width": 2, "num_classes": 3, "in_shape": (8, 8, 1), "dtype": "float32"}


def test_models_by_name():
    by_name = models.build("resnet_cifar", seed=5, **SIZE)
    direct = models.resnet_cifar(rngs=nnx.Rngs(5), **SIZE)
    x = jnp.ones((2, 8, 8, 1))
    np.testing.assert_array_equal(outputs(by_name, x), outputs(direct, x))
    with pytest.raises(ValueError, match="unknown model 'resnet_cfar'; did you mean 'resnet_cifar'"):
        models.build("resnet_cfar", seed=0, **SIZE)


def test_options_by_name():
    assert models.build("resnet", seed=0, stem="imagenet", **{**SIZE, "depth": 18})[0].large
    assert models.build("resnet_cifar", seed=0, pool_window=2, **SIZE)[-1].window == 2
    for name, option, owner, default in (
        ("wrn", {"stem": "imagenet"}, "resnet", "'cifar'"),
        ("resnet", {"pool_window": 6}, "resnet_cifar", "0"),
    ):
        (key,) = option
        with pytest.raises(ValueError, match=rf"{key} is an option of {owner}, not of {name}: leave it at {default}"):
            models.build(name, seed=0, **SIZE, **option)
    with pytest.raises(ValueError, match="unknown stem 'imagnet'; did you mean 'imagenet'"):
        models.build("resnet", seed=0, stem="imagnet", **{**SIZE, "depth": 18})
    with pytest.raises(ValueError, match=r"unknown init 'xavier'; .*\(he, torch\)"):
        models.build("resnet_cifar", seed=0, init="xavier", **SIZE)
