"""The networks and data of the benchmarks, and the training step that our engines have to beat.

The rival is what a Flax user writes by hand: `nnx.split` once, then one jitted call a batch that makes the batch out of
the resident data, merges, differentiates, updates, and takes its whole state over in place. Of the same network twice:
with the layers of `fdg_jax.layers`, so that nothing but the engine differs, and with Flax's own.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from fdg_jax import data, models
from fdg_jax.data import ArraySource, Feed
from fdg_jax.layers import BatchNorm, Conv, Linear

# Model, depth, width; the last two are for tests.
NETWORKS = {
    "resnet20": ("resnet_cifar", 20, 16),
    "resnet56": ("resnet_cifar", 56, 16),
    "resnet110": ("resnet_cifar", 110, 16),
    "wrn16_4": ("wrn", 16, 4),
    "wrn28_10": ("wrn", 28, 10),
    "resnet8": ("resnet_cifar", 8, 4),
    "wrn10_1": ("wrn", 10, 1),
}
BETA = 0.5
SIDE = 32  # pixels


def build(network: str, dtype: str = "float32", side: int = SIDE) -> Sequence[Callable]:
    """The layers of a network for 10 classes of images (side, side, 3)."""
    name, depth, width = NETWORKS[network]
    return models.build(
        name, seed=0, depth=depth, width=width, num_classes=10, in_shape=(side, side, 3), dtype=dtype, init="he"
    )


def published_cuts(network: str, num_stages: int) -> tuple[int, ...]:
    """The cuts of the released code; none where it has none for this network."""
    try:
        return models.published_cuts(*NETWORKS[network], num_stages)
    except ValueError:
        return ()


def random_source(num_images: int, side: int = SIDE) -> ArraySource:
    """Images of random pixels, and labels."""
    images = np.random.default_rng(0).integers(0, 256, (num_images, side, side, 3), np.uint8)
    labels = np.arange(num_images) % 10
    own = {"train_images": images, "train_labels": labels, "test_images": images[:10], "test_labels": labels[:10]}
    return data.arrays(own, name="random")


def optimizer() -> optax.GradientTransformation:
    """Of every side."""
    return optax.sgd(0.01, momentum=0.9)


class Network(nnx.Module):
    """Layers one after another."""

    def __init__(self, layers: Sequence[Callable]):
        self.layers = nnx.List(layers)

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return x


class Plain:
    """A hand-written training loop."""

    def __init__(self, layers: Sequence[Callable], feed: Feed):
        graph, *parts = nnx.split(Network(layers), nnx.Param, ...)
        self.params, self.stats = jax.tree.map(lambda leaf: leaf.copy(), parts)
        self.optimizer, self.feed, self.next = optimizer(), feed, 0
        self.opt_state = self.optimizer.init(self.params)

        @partial(jax.jit, donate_argnums=(0, 1, 2))
        def step(params, stats, opt_state, data, i):
            images, labels = feed.at(data, i)

            def loss_of(params):
                model = nnx.merge(graph, params, stats, copy=True)
                loss = optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()
                return loss, nnx.state(model, nnx.Not(nnx.Param))

            (loss, stats), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
            updates, opt_state = self.optimizer.update(gradients, opt_state, params)
            return optax.apply_updates(params, updates), stats, opt_state, loss

        self._step = step

    def run(self, num_batches: int) -> list[jax.Array]:
        """Trains on so many batches; their losses. Does not wait."""
        losses = []
        for _ in range(num_batches):
            args = self.params, self.stats, self.opt_state, self.feed.data, np.uint32(self.next)
            self.params, self.stats, self.opt_state, loss = self._step(*args)
            self.next += 1
            losses.append(loss)
        return losses


def of_flax(module: Any) -> Any:
    """The module, changed in place, with Flax's own convolutions, normalisation and linear layers; float32."""
    rngs = nnx.Rngs(0)
    if isinstance(module, Conv):
        *size, channels_in, channels = module.kernel.shape
        made: Any = nnx.Conv(
            channels_in,
            channels,
            size,
            strides=module.strides,
            padding=module.padding,
            use_bias=False,
            rngs=rngs,
        )
    elif isinstance(module, BatchNorm):
        made = nnx.BatchNorm(module.scale.size, momentum=module.momentum, epsilon=module.epsilon, rngs=rngs)
    elif isinstance(module, Linear):
        made = nnx.Linear(*module.kernel.shape, rngs=rngs)
    else:
        for name, child in list(vars(module).items()):
            if isinstance(child, nnx.Module):
                setattr(module, name, of_flax(child))
        return module
    nnx.update(made, nnx.state(module))
    return made
