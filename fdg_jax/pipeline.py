"""The library's front: a network cut into stages, a method and an engine, behind a few functions of a state."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fdg_jax import schedule as schedules
from fdg_jax.engine.base import Engine, Loss, Metrics, Plan, PyTree, State
from fdg_jax.engine.mpmd import Mpmd
from fdg_jax.methods import Method
from fdg_jax.names import check_name
from fdg_jax.overview import Forecast, forecast, overview
from fdg_jax.partition import assign_devices, resolve_cuts
from fdg_jax.stacking import optimizer_allows
from fdg_jax.stage import Stage, as_layers, describe, group_layers, init_layers

log = logging.getLogger(__name__)
ENGINES = {"mpmd": Mpmd}


class Pipeline:
    """A network cut over K stages and trained by a method of choice. What training changes is in the `State`, not here.

    Args:
        layers: Flax NNX modules, Linen modules and callables, in order; an array or a pytree of arrays passes from one
            to the next. NNX modules bring their parameters, which are copied and never changed in place.
        loss: `(outputs, targets) -> scalar`, or a scalar and a dict of scalars to report with it.
        optimizer: any optax transformation. Each stage has a state of its own, so that a learning rate schedule follows
            the stage's own updates; what couples parameters, like clipping by the global norm, couples a stage's.
        method: from `fdg_jax.methods`.
        num_stages: K. May be left out where `cuts` are numbers.
        cuts: the number of the first layer of every stage but the first; or "layers", as many layers for every stage as
            for any other; or "parameters", the largest stage as small as can be.
        engine: "mpmd", one program a stage and device.
        devices: `jax.devices()` by default; with fewer than K, stages share them in order.
        stack: whether runs of equal layers are stacked and scanned, where that is exact and costs no time.

    Raises:
        ValueError, TypeError: for an argument that is none of these.
    """

    def __init__(
        self,
        layers: Sequence[Any],
        *,
        loss: Loss,
        optimizer: optax.GradientTransformation,
        method: Method,
        num_stages: int | None = None,
        cuts: Sequence[int] | str = "layers",
        engine: str = "mpmd",
        devices: Sequence[jax.Device] | None = None,
        stack: bool = True,
    ):
        check_name("engine", engine, ENGINES)
        self.layers = as_layers(layers)
        if not self.layers:
            raise ValueError("a pipeline needs at least one layer; layers is empty")
        if devices is not None and not len(devices):
            raise ValueError("devices is empty; leave it out for all that JAX finds")
        self.cuts = resolve_cuts(cuts, num_stages, [layer.num_params for layer in self.layers])
        self.num_stages = len(self.cuts) + 1
        self.schedule = method.schedule(self.num_stages)
        schedules.validate(self.schedule)
        self.loss, self.optimizer, self.method = loss, optimizer, method
        self.devices = assign_devices(tuple(jax.devices() if devices is None else devices), self.num_stages)
        self._engine_type, self._stack = ENGINES[engine], stack
        self._bounds = (0, *self.cuts, len(self.layers))
        # Known after `init`, and the targets after the first batch: what is compiled depends on it.
        self._engine: Engine | None = None
        self._forecasts: list[Forecast] = []
        self._inputs: PyTree = None
        self._targets: PyTree = None

    def init(
        self,
        key: jax.Array,
        example_inputs: PyTree,
        params: Sequence[PyTree] | None = None,
        module_state: Sequence[PyTree] | None = None,
    ) -> State:
        """The state before the first batch.

        Args:
            key: of `jax.random`, of any implementation; seeds dropout, and the parameters of layers that bring none.
            example_inputs: inputs of a batch, or `jax.ShapeDtypeStruct`s; shapes and dtypes alone matter.
            params, module_state: to start from instead, as `params` and `module_state` of any pipeline of the same
                layers give them; copied.

        Raises:
            ValueError, TypeError: a layer fails on what it is given, or returns something else than arrays; the policy
                is "current" and a parameter cannot be refreshed.
        """
        key_params, key_run = jax.random.split(_typed_key(key))
        own_params, own_state, shapes = init_layers(self.layers, key_params, _shapes(example_inputs))
        start_params = own_params if params is None else self._fitting("params", params, own_params)
        start_state = own_state if module_state is None else self._fitting("module_state", module_state, own_state)
        plan = Plan(
            stages=self._stages(own_params, own_state, shapes),
            shapes=tuple(shapes[start] for start in self._bounds[:-1]),
            schedule=self.schedule,
            method=self.method,
            loss=self.loss,
            optimizer=self.optimizer,
        )
        engine = self._engine_type(plan, self.devices)
        state = engine.init(start_params, start_state, key_run)
        self._engine, self._inputs, self._targets = engine, shapes[0], None
        self._forecasts = [forecast(self.schedule, k, own, engine.workers.get(k)) for k, own in enumerate(state.stages)]
        return state

    def _fitting(self, name: str, given: Sequence[PyTree], own: Sequence[PyTree]) -> list[PyTree]:
        """Copies of the given trees, one a layer, where each is like the layer's own."""
        if len(given) != len(own):
            raise ValueError(f"{name} has {len(given)} entries, the network {len(own)} layers")
        for number, (layer, a, b) in enumerate(zip(self.layers, given, own, strict=True)):
            if _shapes(a) != _shapes(b):
                raise ValueError(
                    f"{name} of layer {number} ({layer.name}) do not fit: {describe(a)} given, {describe(b)} wanted"
                )
        return jax.tree.map(np.array, list(given))

    def _stages(self, params: list[PyTree], state: list[PyTree], shapes: list[PyTree]) -> tuple[Stage, ...]:
        def make(groups):
            return tuple(
                Stage(self.layers[i:j], i, g) for (i, j), g in zip(pairwise(self._bounds), groups, strict=True)
            )

        single = make([(1,) * (j - i) for i, j in pairwise(self._bounds)])
        if not self._stack:
            return single
        platform = self.devices[0].platform
        stages = make(
            [
                group_layers(self.layers[i:j], params[i:j], state[i:j], shapes[i : j + 1], platform)
                for i, j in pairwise(self._bounds)
            ]
        )
        runs = [run for stage in stages for run in stage.runs]
        if runs and not optimizer_allows(self.optimizer, params[runs[0] : runs[0] + 2]):
            log.info("the optimizer tells stacked parameters from single ones: equal layers stay unstacked")
            return single
        return stages

    def step(self, state: State, batch: tuple[PyTree, PyTree]) -> tuple[State, Metrics | None]:
        """Feeds one batch and lets every stage work for one period of the schedule. Does not wait for the result.

        Args:
            state: no longer usable afterwards; what is overwritten in place is deleted.
            batch: (inputs, targets), arrays or pytrees of arrays of equal length; every batch of the first one's shape.

        Returns:
            The new state, and the metrics of the batch that left the last stage, () float32 arrays on its device:
            "loss" and what the loss function reports. None while the pipeline fills.

        Raises:
            ValueError: the batch does not fit, or the loss is not a scalar.
        """
        engine = self._started()
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ValueError(f"a batch is a pair (inputs, targets); got {type(batch).__name__}")
        self._check_batch(*batch)
        with _live(state):
            return engine.step(state, *batch)

    def drain(self, state: State) -> tuple[State, list[Metrics]]:
        """Answers everything still in flight: the new state, and metrics of the batches that left the last stage.

        Training may go on afterwards; the pipeline then fills anew.
        """
        with _live(state):
            return self._started().drain(state)

    def predict(self, state: State, inputs: PyTree) -> PyTree:
        """Outputs of the whole network in evaluation form, on the weights of the moment; disturbs nothing.

        Args:
            state: at any moment, in flight or drained.
            inputs: of any batch size; each new one compiles.
        """
        engine, given, wanted = self._started(), _shapes(inputs), self._inputs
        if _without_batch(given) != _without_batch(wanted):
            raise ValueError(f"inputs are {describe(given)}; but for the batch size they must be {describe(wanted)}")
        with _live(state):
            return engine.predict(state, inputs)

    def params(self, state: State) -> list[PyTree]:
        """The parameters on the host, one tree a layer, whatever K and the cuts are. Waits for them."""
        with _live(state):
            return self._per_layer([own.params for own in state.stages])

    def module_state(self, state: State) -> list[PyTree]:
        """What modules keep beside parameters (BatchNorm's statistics), on the host, one tree a layer. Waits for it."""
        with _live(state):
            return self._per_layer([own.state for own in state.stages])

    def _per_layer(self, per_stage: list[list[PyTree]]) -> list[PyTree]:
        stages = self._started().plan.stages
        # Copied, since a view of a device's memory would be overwritten when the next step donates it.
        host = jax.tree.map(lambda leaf: np.array(leaf, copy=True), jax.device_get(per_stage))
        return [tree for stage, trees in zip(stages, host, strict=True) for tree in stage.unstack(trees)]

    def read_metrics(self, state: State) -> tuple[State, dict[str, float]]:
        """Means over the batches that left the last stage since the last reading, and their number as "batches".

        Waits for them: call it at the cadence of the log, not in every step.
        """
        own = state.stages[-1]
        with _live(state):
            totals = {name: float(total) for name, total in jax.device_get(own.totals).items()}
        batches = totals.pop("batches", 0.0)
        zeros = {name: np.zeros((), np.float32) for name in own.totals}
        own = own._replace(totals=jax.device_put(zeros, own.batch.device))
        means = {name: total / batches for name, total in totals.items()} if batches else {}
        return replace(state, stages=(*state.stages[:-1], own)), {**means, "batches": batches}

    def show(self, ticks: int = 8) -> str:
        """The schedule's picture for a few ticks, then a line a stage: layers, delay, staleness, device, memory.

        Memory, and the parameters of layers that bring none, are known after `init`.
        """
        return overview(
            self.method, self.schedule, self.layers, self._bounds, self.devices, self._forecasts or None, ticks
        )

    def _check_batch(self, inputs: PyTree, targets: PyTree) -> None:
        shapes = _shapes(inputs), _shapes(targets)
        if shapes == (self._inputs, self._targets):
            return
        leaves = jax.tree.leaves(shapes)
        if not all(leaf.shape for leaf in leaves):
            raise ValueError("a batch must hold arrays of a leading batch dimension; make arrays of lists of numbers")
        if len({leaf.shape[0] for leaf in leaves}) != 1:
            raise ValueError(f"inputs {describe(shapes[0])} and targets {describe(shapes[1])} must be of equal length")
        for name, given, first in zip(("inputs", "targets"), shapes, (self._inputs, self._targets), strict=True):
            if first is not None and given != first:
                raise ValueError(
                    f"the batch's {name} are {describe(given)}; every batch must be like the first, {describe(first)}: "
                    "drop or pad an incomplete last batch"
                )
        self._targets = shapes[1]

    def _started(self) -> Engine:
        if self._engine is None:
            raise ValueError("the pipeline is not initialised: call state = pipe.init(key, example_inputs) first")
        return self._engine


@contextmanager
def _live(state: State) -> Iterator[None]:
    """One clear line about a state that an earlier call overwrote in place, where JAX speaks of a deleted array."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if not any(leaf.is_deleted() for leaf in jax.tree.leaves(state.stages)):
            raise
        raise ValueError(
            "this state was overwritten in place by an earlier step or drain: go on from the state that it returned"
        ) from error


def _typed_key(key: jax.Array) -> jax.Array:
    """The key as `jax.random.key` makes it; `jax.random.PRNGKey` still makes raw ones."""
    try:
        key = key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)
        jax.random.split(key)
    except (AttributeError, TypeError, ValueError):
        raise ValueError(
            f"key must be a single key of jax.random, such as jax.random.key(0); got {key!r:.60}"
        ) from None
    return key


def _shapes(tree: PyTree) -> PyTree:
    """Shapes and dtypes as JAX will see them; the leaves must be arrays."""

    def shape(leaf):
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise TypeError(f"a batch must hold arrays; got {leaf!r:.40} of type {type(leaf).__name__}")
        return jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype))

    return jax.tree.map(shape, tree)


def _without_batch(shapes: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: (leaf.shape[1:], leaf.dtype), shapes)
