"""Cuts by measurement: seconds that each layer takes on the device at hand, and the slowest stage as fast as can be."""

import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdg_jax.backward import Trace
from fdg_jax.checks import batched_shapes
from fdg_jax.engine.base import PyTree
from fdg_jax.partition import even_cuts
from fdg_jax.stage import Layer, as_layers, describe, init_layers


@dataclass(frozen=True)
class Balance:
    """Measured cuts.

    Attributes:
        cuts: the number of the first layer of every stage but the first.
        layer_seconds: forward and backward of a batch, of every layer.
    """

    cuts: tuple[int, ...]
    layer_seconds: tuple[float, ...]

    @property
    def stage_seconds(self) -> list[float]:
        """Sums over the layers of each stage."""
        bounds = (0, *self.cuts, len(self.layer_seconds))
        return [sum(self.layer_seconds[i:j]) for i, j in pairwise(bounds)]

    def __str__(self) -> str:
        stages = ", ".join(f"{1e3 * seconds:.1f}" for seconds in self.stage_seconds)
        return f"cuts {self.cuts} balanced by measurement: {stages} ms a stage for forward and backward of a batch"


def balanced_cuts(
    layers: Sequence[Any], example_inputs: PyTree, num_stages: int, device: jax.Device | None = None, rounds: int = 5
) -> Balance:
    """The cuts that make the slowest stage as fast as can be, exactly, for the times that `layer_seconds` measures.

    Args:
        layers, example_inputs: as for `Pipeline`.
        num_stages: K.
        device: where to measure; JAX's default device by default.
        rounds: as for `layer_seconds`.

    Raises:
        ValueError: there are fewer layers than stages, or a layer fails on its inputs.
    """
    even_cuts([1] * len(layers), num_stages)  # refuses too many stages before anything is measured
    seconds = layer_seconds(layers, example_inputs, device, rounds)
    return Balance(even_cuts(seconds, num_stages), tuple(seconds))


def layer_seconds(
    layers: Sequence[Any], example_inputs: PyTree, device: jax.Device | None = None, rounds: int = 5
) -> list[float]:
    """Seconds for forward and backward of a batch, of every layer: the median of some rounds over all of them.

    Equal layers on equal inputs are measured once. A round calls every layer in turn, so that what disturbs the
    machine disturbs them alike.
    """
    made = as_layers(layers)
    params, state, shapes = init_layers(made, jax.random.key(0), batched_shapes("example_inputs", example_inputs))
    kinds: list[Hashable] = [
        (layer.signature or number, describe((params[number], state[number], shapes[number])))
        for number, layer in enumerate(made)
    ]
    calls = {
        kind: _call(made[number], params[number], state[number], shapes[number], number == 0, device)
        for kind, number in {kind: kinds.index(kind) for kind in kinds}.items()
    }
    times: dict[Hashable, list[float]] = {kind: [] for kind in calls}
    for _ in range(rounds):
        for kind, call in calls.items():
            start = time.perf_counter()
            call()
            times[kind].append(time.perf_counter() - start)
    return [median(times[kind]) for kind in kinds]


def _call(layer: Layer, params: PyTree, state: PyTree, shapes: PyTree, is_first: bool, device: jax.Device | None):
    """A function that runs the layer forward and backward and waits; compiled and warmed up."""

    def apply(params, inputs, state, key):
        return layer.apply(params, state, inputs, key, True)

    rng = np.random.default_rng(0)
    inputs = jax.tree.map(lambda shape: rng.normal(size=shape.shape).astype(shape.dtype), shapes)
    args = jax.device_put((params, inputs, state, jax.random.key(0)), device)
    trace = Trace(apply, *args, differentiate_inputs=not is_first)

    @jax.jit
    def run(params, inputs, state, key):
        outputs, _, saved = trace.forward(params, inputs, state, key)
        cotangents = [leaf for leaf in jax.tree.leaves(outputs) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
        return outputs, trace.backward(params, trace.memo(saved, params, inputs, state, outputs), cotangents)

    def call():
        jax.block_until_ready(run(*args))

    call()
    return call
