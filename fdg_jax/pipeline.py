"""The library's front: a network cut into stages, a method and an engine, behind a few functions of a state."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import numpy as np
import optax

from fdg_jax import agreement, corrections
from fdg_jax import schedule as schedules
from fdg_jax import snapshot as snapshots
from fdg_jax.backward import resolve_remat
from fdg_jax.checks import (
    array_shapes,
    batch_shapes,
    batch_signature,
    batched_shapes,
    check_ingredients,
    typed_key,
    using,
    without_batch,
)
from fdg_jax.data.source import Feed
from fdg_jax.engine.base import NO_FAULT, Added, Engine, Fault, FirstFault, Loss, Metrics, Observer, Plan, PyTree, State
from fdg_jax.engine.fused import Fused
from fdg_jax.engine.mpmd import Mpmd
from fdg_jax.engine.reusing import Reusing
from fdg_jax.engine.switching import Switching, synchronous
from fdg_jax.forecast import Forecast, forecasts
from fdg_jax.local import make_heads, make_synthesisers
from fdg_jax.methods import Method
from fdg_jax.names import check_name
from fdg_jax.overview import overview
from fdg_jax.partition import assign_devices, resolve_cuts
from fdg_jax.snapshot import Snapshot
from fdg_jax.stacking import optimizer_allows
from fdg_jax.stage import Stage, as_layers, describe, group_layers, init_layers

log = logging.getLogger(__name__)
ENGINES = {"mpmd": Mpmd, "fused": Fused}
BEYOND_LAYERS = 2**31  # a number that no layer has, so that heads do not depend on how many there are


def choose_engine(engine: str, devices: Sequence[jax.Device], method: Method | None = None) -> str:
    """The engine that "auto" stands for: "fused" where there is one accelerator and nothing else.

    Raises:
        ValueError: the method is one for "mpmd" alone, and another is wanted.
    """
    if method and method.reuse:
        if engine == "fused":
            raise ValueError(f"engine='fused' cannot use batches again as {method} does; use engine='mpmd'")
        return "mpmd"
    if engine != "auto":
        return engine
    return "fused" if len(set(devices)) == 1 and devices[0].platform != "cpu" else "mpmd"


def stage_optimizers(
    method: Method, schedule: schedules.Schedule, optimizer: optax.GradientTransformation
) -> tuple[optax.GradientTransformation, ...]:
    """The optimizer of every stage, with the corrections of its delay.

    Raises:
        ValueError: a correction cannot serve this optimizer or policy, or gradients are shrunk whose scale is ignored.
    """
    if method.corrections and schedule.local:
        names = ", ".join(corrections.named(type(each)) for each in method.corrections)
        raise ValueError(
            f"{names} corrects or ends a delay, and {method.name} has none; leave it out, or go on from its weights "
            "with another method: init(key, example_inputs, params=...), config.init_from"
        )
    corrections.check(method.corrections, optimizer, method.policy, schedule.num_stages)
    if any(each.predicts for each in method.corrections) and (schedule.double_buffered or method.vertical_sync):
        raise ValueError(
            f"a prediction sets the weights of a forward, and {method.name} takes older ones there; "
            "use pipedream without vertical_sync, or fdg"
        )
    if 0 < method.beta < 1 and schedule.num_stages > 1:
        corrections.check_scale(corrections.base_optimizer(method.corrections, optimizer, schedule.num_stages))
    taus = enumerate(method.staleness(schedule))
    correct = corrections.correct_optimizer
    return tuple(correct(method.corrections, optimizer, tau, k, schedule.num_stages) for k, tau in taus)


def split_shapes(shapes: PyTree, num: int) -> PyTree:
    """Of one of `num` micro-batches of a batch of these shapes.

    Raises:
        ValueError: the batch cannot be split evenly.
    """

    def part(leaf):
        if leaf.shape[0] % num:
            raise ValueError(f"a batch of {leaf.shape[0]} does not make {num} equal micro-batches; choose a divisor")
        return jax.ShapeDtypeStruct((leaf.shape[0] // num, *leaf.shape[1:]), leaf.dtype)

    return jax.tree.map(part, shapes)


def _mean(left: list[Metrics]) -> Metrics | None:
    """The metrics of what left the last stage; the mean where that were several micro-batches."""
    if len(left) < 2:
        return left[0] if left else None
    return jax.tree.map(lambda *values: sum(values) / len(values), *left)


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
        engine: "mpmd", a program a stage, on as many devices; "fused", one program for all of them on the first device;
            "auto", the latter where there is one accelerator and no more.
        devices: `jax.devices()` by default; with fewer than K, stages share them in order.
        stack: whether runs of equal layers are stacked and scanned, where that is exact and costs no time.
        remat: what a memo keeps of a forward, and the backward need not compute again: "none", all that it reads;
            "convs", outputs of convolutions and matrix products; "full", every layer's input. One word for all stages
            or one a stage, as "full,none". Values stay the same; for policy "stash" alone.
        skip_nonfinite: whether a batch whose loss is not finite moves no weights. Its answer carries NaN to every
            stage, and each keeps its parameters and its optimizer state, number of updates included, as they were.
            Where the loss is finite and a gradient overflows in stage k, stages k, k-1, .., 0 keep theirs; the later
            ones have moved already. Module state moves with the forward: a stage keeps all of its own where the new one
            is not finite. The means of `read_metrics` leave out batches whose loss is not finite.

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
        engine: str = "auto",
        devices: Sequence[jax.Device] | None = None,
        stack: bool = True,
        remat: str | Sequence[str] = "none",
        skip_nonfinite: bool = False,
    ):
        check_name("engine", engine, {*ENGINES, "auto"})
        check_ingredients(layers, loss, optimizer, method, devices)
        self.layers = as_layers(layers)
        self.cuts = resolve_cuts(cuts, num_stages, [layer.num_params for layer in self.layers])
        self.num_stages = len(self.cuts) + 1
        self.schedule = method.schedule(self.num_stages)
        schedules.validate(self.schedule)
        if method.reuse:
            method.reuse.start(self.num_stages)
        self.remat = resolve_remat(remat, self.num_stages, method.policy)
        self.optimizers = stage_optimizers(method, self.schedule, optimizer)
        self.loss, self.optimizer, self.method = loss, optimizer, method
        devices = tuple(jax.devices() if devices is None else devices)
        self.engine = choose_engine(engine, devices, method)
        self.devices = assign_devices(devices[:1] if self.engine == "fused" else devices, self.num_stages)
        self._engine_type = Reusing if method.reuse else ENGINES[self.engine]
        self._stack, self._skip_nonfinite = stack, skip_nonfinite
        self._rehearsing = False
        self._bounds = (0, *self.cuts, len(self.layers))
        # Known after `init`, and the targets after the first batch: what is compiled depends on it.
        self._engine: Engine | None = None
        self._forecasts: list[Forecast] = []
        self._inputs: PyTree = None
        self._targets: PyTree = None
        self._checked: tuple | None = None  # of the last batch that was looked at

    def init(
        self,
        key: jax.Array,
        example_inputs: PyTree,
        params: Sequence[PyTree] | None = None,
        module_state: Sequence[PyTree] | None = None,
        first_batch: int = 0,
    ) -> State:
        """The state before the first batch.

        Args:
            key: of `jax.random`, of any implementation; seeds dropout, and the parameters of layers that bring none.
            example_inputs: inputs of a batch, or `jax.ShapeDtypeStruct`s; shapes and dtypes alone matter.
            params, module_state: to start from instead, as `params` and `module_state` of any pipeline of the same
                layers give them; copied.
            first_batch: number of the first batch to come, of which dropout is a function, for a run that begins with
                the weights of another after so many batches.

        Raises:
            ValueError, TypeError: a layer fails on what it is given, or returns something else than arrays; the policy
                is "current" and a parameter cannot be refreshed.
        """
        shapes_in = batched_shapes("example_inputs", example_inputs)
        key_params, key_run = jax.random.split(typed_key(key))
        micro = split_shapes(shapes_in, self.method.micro_batches)
        own_params, own_state, shapes = init_layers(self.layers, key_params, micro)
        start_params = own_params if params is None else self._fitting("params", params, own_params)
        start_state = own_state if module_state is None else self._fitting("module_state", module_state, own_state)
        plan = Plan(
            stages=self._stages(own_params, own_state, shapes),
            shapes=tuple(shapes[start] for start in self._bounds[:-1]),
            schedule=self.schedule,
            method=self.method,
            loss=self.loss,
            optimizers=self.optimizers,
            added=self._added(shapes, jax.random.fold_in(key_params, BEYOND_LAYERS)),
            skip_nonfinite=self._skip_nonfinite,
        )
        engine = self._make_engine(plan)
        state = engine.init(start_params, start_state, key_run, first_batch * self.method.micro_batches)
        self._engine, self._inputs, self._targets, self._checked = engine, shapes_in, None, None
        self._forecasts = forecasts(plan, state.stages, engine.workers)
        return state

    def rehearse(self, example_inputs: PyTree, example_targets: PyTree) -> Engine:
        """What `init` and the first batch would make, as shapes: an engine to look at, in which nothing can be run.

        `forecasts` and `show` then tell what they do after `init`, and of the last stage's memos too. No array of the
        network's is made; the layers may hold shapes, as `models.abstract` makes them. The optimizer is taken to allow
        stacked parameters, as those of `config.optim` do, without a trial.

        Args:
            example_inputs, example_targets: of a batch, arrays or `jax.ShapeDtypeStruct`s.

        Raises:
            ValueError, TypeError: as `init`, and where the loss is not a scalar.
        """
        targets = split_shapes(batched_shapes("example_targets", example_targets), self.method.micro_batches)

        def trace() -> None:
            state, engine = self.init(jax.random.key(0), example_inputs), self._started()
            engine.expect(state, targets)
            self._forecasts = forecasts(engine.plan, state.stages, engine.workers)

        self._rehearsing = True
        try:
            jax.eval_shape(trace)
        finally:
            self._rehearsing = False
        return self._started()

    def _added(self, shapes: list[PyTree], key: jax.Array) -> tuple[Added | None, ...]:
        """What the method adds to the stages, all but the last."""
        head, synthesiser, between = self.method.head, self.method.synthesiser, [shapes[cut] for cut in self.cuts]
        if not between or not (head or synthesiser):
            return (None,) * self.num_stages
        classes = jax.tree.leaves(shapes[-1])[0].shape[-1]
        if synthesiser is None:
            return *map(Added, make_heads(str(head), between, classes, key)), None
        read = classes if synthesiser.context else None
        layers = make_synthesisers(synthesiser.kind, between, read, key, width=synthesiser.width)
        return *(Added(layer, optax.adam(synthesiser.learning_rate), synthesiser.context) for layer in layers), None

    def _make_engine(self, plan: Plan) -> Engine:
        engine, after = self._engine_type(plan, self.devices), self.method.switch_after
        if after is None:
            return engine
        taus = enumerate(self.method.staleness(self.schedule))
        correct = partial(corrections.synchronous_optimizer, self.method.corrections, self.optimizer)
        exact = synchronous(plan, [correct(tau, k, self.num_stages) for k, tau in taus])
        return Switching(engine, self._engine_type(exact, self.devices), after * self.method.micro_batches)

    def _fitting(self, name: str, given: Sequence[PyTree], own: Sequence[PyTree]) -> list[PyTree]:
        """Copies of the given trees, one a layer, where each is like the layer's own."""
        if len(given) != len(own):
            raise ValueError(f"{name} has {len(given)} entries, the network {len(own)} layers")
        for number, (layer, a, b) in enumerate(zip(self.layers, given, own, strict=True)):
            if array_shapes(name, a) != array_shapes(name, b):
                raise ValueError(
                    f"{name} of layer {number} ({layer.name}) do not fit: {describe(a)} given, {describe(b)} wanted"
                )
        return jax.tree.map(np.array, list(given))

    def _stages(self, params: list[PyTree], state: list[PyTree], shapes: list[PyTree]) -> tuple[Stage, ...]:
        def make(groups):
            return tuple(
                Stage(self.layers[i:j], i, group, remat)
                for (i, j), group, remat in zip(pairwise(self._bounds), groups, self.remat, strict=True)
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
        optimizer = corrections.base_optimizer(self.method.corrections, self.optimizer, self.num_stages)
        pairs = [params[run : run + 2] for stage in stages for run in stage.runs]
        distinct = {(jax.tree.structure(pair), describe(pair)): pair for pair in pairs}
        if distinct and not self._rehearsing and not optimizer_allows(optimizer, list(distinct.values())):
            log.info("the optimizer tells stacked parameters from single ones: equal layers stay unstacked")
            return single
        return stages

    def step(self, state: State, batch: tuple[PyTree, PyTree]) -> tuple[State, Metrics | None]:
        """Feeds one batch and lets every stage work for one period of the schedule. Does not wait for the result.

        Args:
            state: no longer usable afterwards; what is overwritten in place is deleted.
            batch: (inputs, targets), arrays or pytrees of arrays of equal length; every batch of the first one's shape.
                NumPy arrays are copied; a JAX array is read as it is until the batch is answered.

        Returns:
            The new state, and the metrics of the batch that left the last stage, () float32 arrays on its device:
            "loss" and what the loss function reports. None while the pipeline fills. Where the method switches to
            synchronous the pipeline is drained, and they are means over all that left it.

        Raises:
            ValueError: the batch does not fit, or the loss is not a scalar.
        """
        engine = self._started()
        signature = batch_signature(batch)
        known = signature is not None and signature == self._checked
        targets = self._targets if known else batch_shapes(batch, self._inputs, self._targets)[1]
        with using(state, self.num_stages):
            state, left = engine.step(state, *batch)
        self._targets, self._checked = targets, signature
        return state, _mean(left)

    def run(self, state: State, feed: Feed, num_batches: int) -> tuple[State, Metrics | None]:
        """As so many calls of `step`, with batches state.fed, state.fed + 1, .. of the feed.

        The fused engine runs them in loops on the device of 256 batches at most, where each batch is made as well. It
        does so once the pipeline is full. On a CPU device a network with other convolutions than those of
        `fdg_jax.layers` gets a call a period of the schedule instead, since XLA:CPU runs their gradients up to 80 times
        slower in a loop. The engine waits for the call before the last; an interrupt meanwhile costs the state, so ask
        for so many batches at a time as you can bear to lose.

        Args:
            state: no longer usable afterwards.
            feed: of `ArraySource.feed`, or `Feed(data, at)`; every batch of the first one's shape.
            num_batches: 0 or more.

        Returns:
            The new state, and the metrics of the batches that left the last stage, (n,) arrays in their order; None
            where none has. Where the method splits batches, each micro-batch has its own.

        Raises:
            ValueError: the batches do not fit, or the loss is not a scalar.
        """
        engine = self._started()
        if not isinstance(feed, Feed):
            raise TypeError(f"feed must be a `Feed`, as source.feed(seed, batch_size) gives it; got {feed!r:.60}")
        shapes = jax.eval_shape(feed.at, feed.data, jax.ShapeDtypeStruct((), np.uint32))
        _, targets = batch_shapes(shapes, self._inputs, self._targets)
        if num_batches < 0:
            raise ValueError(f"num_batches must be 0 or more; got {num_batches}")
        with using(state, self.num_stages):
            result = engine.run(state, feed, num_batches)
        self._targets = targets if num_batches else self._targets
        return result

    def drain(self, state: State) -> tuple[State, list[Metrics]]:
        """Answers everything still in flight: the new state, and metrics of the batches that left the last stage.

        Where the method splits batches, each micro-batch has its own.
        Training may go on afterwards; the pipeline then fills anew.
        """
        with using(state, self.num_stages):
            return self._started().drain(state)

    def predict(self, state: State, inputs: PyTree) -> PyTree:
        """Outputs of the whole network in evaluation form, on the weights of the moment; disturbs nothing.

        Args:
            state: at any moment, in flight or drained.
            inputs: of any batch size; each new one compiles.
        """
        engine, given, wanted = self._started(), batched_shapes("inputs", inputs), self._inputs
        if without_batch(given) != without_batch(wanted):
            raise ValueError(f"inputs are {describe(given)}; but for the batch size they must be {describe(wanted)}")
        with using(state, self.num_stages):
            return engine.predict(state, inputs)

    def params(self, state: State) -> list[PyTree]:
        """The parameters on the host, one tree a layer, whatever K and the cuts are. Waits for them."""
        with using(state, self.num_stages):
            return self._per_layer([own.params for own in state.stages])

    def module_state(self, state: State) -> list[PyTree]:
        """What modules keep beside parameters (BatchNorm's statistics), on the host, one tree a layer. Waits for it."""
        with using(state, self.num_stages):
            return self._per_layer([own.state for own in state.stages])

    def _per_layer(self, per_stage: list[list[PyTree]]) -> list[PyTree]:
        stages = self._started().plan.stages
        # Copied, since a view of a device's memory would be overwritten when the next step donates it.
        host = jax.tree.map(lambda leaf: np.array(leaf, copy=True), jax.device_get(per_stage))
        own = [trees[: len(stage.groups)] for stage, trees in zip(stages, host, strict=True)]  # without heads
        return [tree for stage, trees in zip(stages, own, strict=True) for tree in stage.unstack(trees)]

    def snapshot(self, state: State) -> Snapshot:
        """All of the state, batches in flight included, copied without waiting: training may go on at once.

        The copies take as much memory on the devices as what they copy, until they are let go. Where an accelerator has
        no such room they are made on the host, which waits for them.
        """
        with using(state, self.num_stages):
            snapshot = snapshots.take(state)
        targets = agreement.shapes_as_json(self._targets)
        return Snapshot(snapshot.arrays, {**snapshot.record, **self._identity(), "targets": targets})

    def restore(self, state: State, snapshot: Snapshot, example_targets: PyTree = None) -> State:
        """The state of a snapshot, on this pipeline's devices, from which training goes on with the same bits.

        Args:
            state: from `init`; given up.
            snapshot: with its arrays on the host, as `checkpoint.read_checkpoint` gives it.
            example_targets: targets of a batch, or shapes; needed where they are a tree and not one array.

        Raises:
            Mismatch: it is of another network, method or cuts, or its memos are of another version of JAX.
        """
        engine = self._started()
        agreement.compare_runs(snapshot.record, self._identity())
        given = None if example_targets is None else batched_shapes("example_targets", example_targets)
        whole = agreement.targets_of(snapshot.record, given)
        targets = None if whole is None else split_shapes(whole, self.method.micro_batches)
        with using(state, self.num_stages):
            found = snapshots.put(snapshot, state, self.devices, engine.plan.shapes, targets)
            if targets is not None:
                engine.expect(found, targets)
        workers = engine.at(found).workers
        if totals := found.stages[-1].totals:
            reported = {name: np.zeros((), np.float32) for name in workers[self.num_stages - 1].total_names}
            agreement.compare_totals(totals, reported)
        for (k, batch), memo in found.memos.items():
            agreement.compare_memos(f"the memo of batch {batch} on stage {k}", memo, workers[k].memo_shapes(targets))
        self._targets, self._checked = whole, None
        return found

    def _identity(self) -> dict[str, Any]:
        """What a snapshot must agree with, as JSON."""
        schedule = self.schedule
        stages = [
            [[slot.kind, slot.offset, *([slot.micro] if schedule.group > 1 else [])] for slot in slots]
            for slots in schedule.stages
        ]
        pipeline = {
            "layers": [layer.name for layer in self.layers],
            "num_stages": self.num_stages,
            "cuts": list(self.cuts),
            "method": str(self.method),
            "schedule": {"name": schedule.name, "period": schedule.period, "stages": stages},
            "groups": [list(stage.groups) for stage in self._started().plan.stages],
            "remat": list(self.remat),
        }
        return {"pipeline": pipeline, "versions": agreement.versions()}

    def read_metrics(self, state: State) -> tuple[State, dict[str, float]]:
        """Means over the batches that left the last stage since the last reading, and their number as "batches".

        Waits for them: call it at the cadence of the log, not in every step.
        """
        own = state.stages[-1]
        with using(state, self.num_stages):
            totals = {name: float(total) for name, total in jax.device_get(own.totals).items()}
        batches = totals.pop("batches", 0.0)
        zeros = {name: np.zeros((), np.float32) for name in own.totals}
        own = own._replace(totals=jax.device_put(zeros, own.counts.device))
        means = {name: total / batches for name, total in totals.items()} if batches else {}
        return replace(state, stages=(*state.stages[:-1], own)), {**means, "batches": batches}

    def faults(self, state: State) -> list[Fault]:
        """What went wrong since the start, one entry a stage: batches answered with numbers that were not finite.

        Every stage watches, with `skip_nonfinite` and without. Receiving what is not finite is a fault: what is lost
        on one stage is counted on those before it as well, in later ticks.

        Waits for the devices: call it at the cadence of the log, not in every step.
        """
        with using(state, self.num_stages):
            counts = jax.device_get([own.counts for own in state.stages])
        return [Fault(int(count), None if first == NO_FAULT else int(first)) for _, _, count, first in counts]

    def forget_faults(self, state: State) -> State:
        """The state as if nothing had gone wrong so far; waits for the devices."""
        with using(state, self.num_stages):
            counts = [np.array(own.counts) for own in state.stages]
        fresh = [np.array([*count[:2], 0, NO_FAULT], np.uint32) for count in counts]
        placed = jax.device_put(fresh, [own.counts.device for own in state.stages])
        stages = (own._replace(counts=count) for own, count in zip(state.stages, placed, strict=True))
        return replace(state, stages=tuple(stages))

    def first_fault(self, state: State) -> FirstFault | None:
        """Where numbers first were not finite: the earliest tick, of stages that share it the last. None if nowhere.

        Waits for the devices, as `faults` does.
        """
        micro = self.method.micro_batches
        met = [(k, fault.first_batch) for k, fault in enumerate(self.faults(state)) if fault.first_batch is not None]
        places = [FirstFault(k, i // micro, self._started().tick_of_answer(k, i)) for k, i in met]
        return min(places, key=lambda place: (place.tick, -place.stage), default=None)

    def observe(self, observer: Observer | None) -> None:
        """Tells an observer of every visit from now on, as `recorder.Recorder`; None ends it. Steps stay as they are.

        Raises:
            ValueError: the engine is fused, which has no visits.
        """
        self._started().observe(observer)

    def show(self, ticks: int = 8) -> str:
        """The schedule's picture for a few ticks, then a line a stage: layers, delay, staleness, device, memory.

        Memory, and the parameters of layers that bring none, are known after `init`.
        """
        return overview(
            self.method,
            self.schedule,
            self.layers,
            self._bounds,
            self.devices,
            self._forecasts or None,
            self.extra_params if self._engine else None,
            ticks,
        )

    @property
    def forecasts(self) -> tuple[Forecast, ...]:
        """The memory of every stage, as `show` tells it; empty before `init`."""
        return tuple(self._forecasts)

    @property
    def extra_params(self) -> tuple[int, ...]:
        """Parameters of what the method adds to every stage and `params` leaves out; known after `init`."""
        return tuple(added.layer.num_params or 0 if added else 0 for added in self._started().plan.added)

    @property
    def ticks_per_batch(self) -> int:
        """How many ticks a batch brings on."""
        if self.method.reuse:
            return self.method.reuse.period
        return self.schedule.period * self.method.micro_batches // self.schedule.group

    def _started(self) -> Engine:
        if self._engine is None:
            raise ValueError("the pipeline is not initialised: call state = pipe.init(key, example_inputs) first")
        return self._engine
