"""What several tests share: tolerances, tiny networks, ways to run a pipeline."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fdg_jax import Pipeline, State, methods, models, optim, softmax_cross_entropy
from fdg_jax.data import Feed

PyTree = Any


def assert_trees_close(actual: PyTree, expected: PyTree, tolerance: float = 1e-6) -> None:
    """Equal structure, and each leaf within `tolerance` times its largest expected value; 0 asks for the bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        where = jax.tree_util.keystr(path)
        assert a.shape == b.shape, where
        assert a.dtype == b.dtype, where
        if tolerance == 0:
            np.testing.assert_array_equal(a, b, err_msg=where)
        else:
            a, b = a.astype(np.float64), b.astype(np.float64)
            np.testing.assert_allclose(
                a, b, rtol=0, atol=tolerance * max(np.abs(b).max(initial=0), 1e-30), err_msg=where
            )


def host(tree: PyTree) -> PyTree:
    """A copy on the host that no donation can touch."""
    return jax.tree.map(lambda leaf: np.array(leaf, copy=True), tree)


def in_float64(layers: list) -> list:
    """The same NNX layers with float64 parameters and statistics; build them with dtype float64, under x64."""
    for layer in layers:
        if isinstance(layer, nnx.Module):
            nnx.update(layer, jax.tree.map(lambda leaf: leaf.astype(np.float64), nnx.state(layer)))
    return layers


def tiny_mlp(depth: int = 3, **kwargs: Any) -> list:
    """`depth` + 1 layers on (N, 6), three classes."""
    return models.mlp(depth, rngs=nnx.Rngs(1), width=5, num_classes=3, in_shape=(6,), **kwargs)[1:]


def tiny_batches(num: int = 8, shape: tuple[int, ...] = (6,), size: int = 4) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    labels = [rng.integers(0, 3, size).astype(np.int32) for _ in range(num)]
    return [(rng.normal(size=(size, *shape)).astype(np.float32), y) for y in labels]


def feed_of(batches: list) -> Feed:
    """The batches on the device, over and over."""
    data = tuple(jnp.asarray(np.stack(each)) for each in zip(*batches, strict=True))
    return Feed(data, lambda data, i: jax.tree.map(lambda leaf: leaf[i % len(leaf)], data))


def make_pipeline(layers: list | None = None, **kwargs: Any) -> Pipeline:
    """A pipeline with defaults for what a test does not care about."""
    defaults: dict[str, Any] = {
        "loss": softmax_cross_entropy,
        "optimizer": optim.sgd(0.05, 0.9, 1e-2),
        "method": methods.fdg(0.5),
        "num_stages": None if isinstance(kwargs.get("cuts"), tuple) else 3,
    }
    return Pipeline(tiny_mlp() if layers is None else layers, **{**defaults, **kwargs})


def run(pipe: Pipeline, batches: list, drain: bool = True) -> tuple[State, list[float]]:
    """The state after all batches, and the losses in order."""
    state, losses = pipe.init(jax.random.key(0), batches[0][0]), []
    for batch in batches:
        state, metrics = pipe.step(state, batch)
        losses += [] if metrics is None else [metrics]
    if drain:
        state, drained = pipe.drain(state)
        losses += drained
    return state, [float(metrics["loss"]) for metrics in losses]
