"""All K stages in one program on one device: a call runs many ticks, and the host sends it two numbers.

While the pipeline fills and drains the host walks the schedule, as in `mpmd`. In the steady state every period of the
schedule does the same to what is in flight, one batch further on. `run` does that in a loop on the device, which makes
its batches itself and keeps its memory from tick to tick: what several batches wait in (memos, targets) are rings, in
which a new batch takes the place of the one just answered. Between two calls the state is what it is in `mpmd`; during
a call the device holds it about twice, as rings and as what goes in and comes out.

On a CPU device, where XLA runs the gradients of other convolutions than `layers.Conv` many times slower in a loop, a
network that has some gets a call a period instead, with the same program for a body.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fdg_jax import schedule as schedules
from fdg_jax.backward import Memo
from fdg_jax.data.source import Feed
from fdg_jax.engine.base import COTANGENTS, INPUTS, TARGETS, Metrics, Observer, PyTree, StageState, State, join, split
from fdg_jax.engine.mpmd import Mpmd
from fdg_jax.engine.worker import MEMO, Arrival, pattern, updates_first
from fdg_jax.schedule import FORWARD, UPDATE, Op, Visit
from fdg_jax.stacking import fast_in_loops
from fdg_jax.stage import Stage

log = logging.getLogger(__name__)
CAPACITY = 256  # batches a call at most, for each of which it keeps the metrics


class Queue(NamedTuple):
    """What waits for a stage between two periods: a value a batch, of batches that follow one another."""

    kind: str  # of a message, or MEMO
    stage: int
    oldest: int  # number of the oldest batch, counted from the one that comes next
    boxes: tuple[str, ...]  # the fields of `State` in which the values are, oldest batch first

    @property
    def size(self) -> int:
        return len(self.boxes)


class Fused(Mpmd):
    """The engine for one device; all `devices` are the same."""

    def observe(self, observer: Observer | None) -> None:
        if observer:
            raise ValueError("the engine fused runs all stages in one program, and has no visits to see; mpmd has them")

    def run(self, state: State, feed: Feed, num_batches: int) -> tuple[State, Metrics | None]:
        feed = self._nearby(feed)
        filling = min(num_batches, self._until_steady(state))
        periods, rest = divmod(num_batches - filling, self._batches_a_period)
        state, metrics = super().run(state, feed, filling)
        parts: list[Metrics | None] = [metrics]
        capacity = CAPACITY if periods and self._loops_well(state) else 1
        for start in range(0, periods, capacity):
            state, metrics = self._advance(state, feed, min(capacity, periods - start))
            parts.append(metrics)
        state, metrics = super().run(state, feed, rest)
        return state, join([*parts, metrics])

    @property
    def _batches_a_period(self) -> int:
        return self.plan.schedule.group // self.plan.method.micro_batches

    def _until_steady(self, state: State) -> int:
        """Batches until every period does the same, and one begins."""
        group, entered = self.plan.schedule.group, state.fed - state.origin
        begins = max(self._steady_from, -(-entered // group)) * group
        return (begins - entered) // self.plan.method.micro_batches

    @cached_property
    def _steady_from(self) -> int:
        """Periods after which all do the same: the first group has left the pipeline, every stage has updated.

        Some optimizers' states are of other dtypes after the first update, and a loop wants them as they stay.
        """
        return -(-(self.plan.schedule.span - 1) // self.plan.schedule.period) + 1

    def _loops_well(self, state: State) -> bool:
        """Whether a loop costs what its body costs: on a CPU device where no convolution has JAX's own gradient."""
        if self._is_fast is None:
            self._is_fast = self.devices[0].platform != "cpu" or all(
                fast_in_loops(partial(stage.apply, train=True), *_own_layers(stage, own), inputs, own.key)
                for stage, own, inputs in zip(self.plan.stages, state.stages, self.plan.shapes, strict=True)
            )
            if not self._is_fast:
                log.info("convolutions of other layers than fdg_jax.layers: no loop on this CPU, a call a period")
        return self._is_fast

    def _nearby(self, feed: Feed) -> Feed:
        """The feed with its data on the device, moved once."""
        if self._moved is None or self._moved[0] is not feed.data:
            self._moved = feed.data, jax.device_put(feed.data, self.devices[0])
        return Feed(self._moved[1], feed.at)

    _moved: tuple[PyTree, PyTree] | None = None
    _is_fast: bool | None = None
    _running_call: jax.Array | None = None

    def _advance(self, state: State, feed: Feed, num_periods: int) -> tuple[State, Metrics]:
        """Feeds the batches of so many periods to a pipeline in its steady state, in one call."""
        micro = self.plan.method.micro_batches
        targets = jax.eval_shape(lambda data, i: split(feed.at(data, i)[1], micro)[0], feed.data, jnp.uint32(0))
        state = self._with_totals(state, targets)
        queues = _queues(state)
        call = self._loop if self._loops_well(state) else self._single
        stages, values, metrics = call(queues, feed, state, np.uint32(state.fed // micro), num_periods)
        previous, self._running_call = self._running_call, metrics["loss"]
        jax.block_until_ready(previous)  # while the device works on one call, one more waits, and holds memory
        fed = state.fed + num_periods * self.plan.schedule.group
        boxes: dict[str, dict] = {"inbox": {}, "outbox": {}, "memos": {}}
        for queue, each in zip(queues, values, strict=True):
            for j, (box, value) in enumerate(zip(queue.boxes, each, strict=True)):
                boxes[box][_key(queue, fed + queue.oldest + j)] = value
        state = self._sharing_weights(State(fed, state.origin, tuple(stages), **boxes))
        return state, {name: each[:num_periods].reshape(-1) for name, each in metrics.items()}

    def _loop(self, queues: tuple[Queue, ...], feed: Feed, state: State, first: np.uint32, num_periods: int):
        """The stages, what is in the queues, and the metrics after a loop on the device."""
        donated, kept = _parted(state.stages, _waiting(state, queues), queues, self._overwritten)
        return self._periods_program(queues, feed.at, donated, kept, feed.data, first, np.int32(num_periods))

    def _single(self, queues: tuple[Queue, ...], feed: Feed, state: State, first: np.uint32, _: int):
        """The same after one period without a loop, which sees only what leaves the queues."""
        values, group = _waiting(state, queues), self.plan.schedule.group
        donated, kept = _parted(state.stages, [each[:group] for each in values], queues, self._overwritten)
        stages, newest, metrics = self._period_program(queues, feed.at, donated, kept, feed.data, first)
        return stages, [(old + new)[-len(old) :] for old, new in zip(values, newest, strict=True)], metrics

    @cached_property
    def _overwritten(self) -> tuple[str, ...]:
        """Fields of a stage's state to which no memo refers, so that their memory may be used again."""
        todays_weights = all(worker.todays_weights for worker in self.workers.values())
        keeps = not todays_weights or any(map(self.plan.num_previous, range(len(self.devices))))
        return ("opt_state", "counts", "totals", "accumulated", "synthesis", *([] if keeps else ["params"]))

    @cached_property
    def _periods_program(self) -> Callable:
        return jax.jit(self._periods, static_argnums=(0, 1), donate_argnums=2)

    @cached_property
    def _period_program(self) -> Callable:
        return jax.jit(self._period, static_argnums=(0, 1), donate_argnums=2)

    def _period(self, queues, at, donated, kept, data, first):
        """One period of the steady state, in which batch `first` enters, and perhaps some after it."""
        stages, values = _joined(donated, kept)
        waiting = {(queue.kind, queue.stage): each for queue, each in zip(queues, values, strict=True)}
        oldest = {(queue.kind, queue.stage): queue.oldest for queue in queues}
        walk = _Period(self, stages, lambda kind, k, offset: waiting[kind, k][offset - oldest[kind, k]])
        walk.go(at, data, first)
        reported = jax.tree.map(lambda *one: jnp.stack(one)[None], *walk.metrics)
        return walk.stages, [walk.entered(queue) for queue in queues], reported

    def _periods(self, queues, at, donated, kept, data, first, count):
        """`count` periods of the steady state, in which the batches `first`, `first` + 1, .. enter."""
        group, micro = self.plan.schedule.group, self.plan.method.micro_batches
        places = {(queue.kind, queue.stage): place for place, queue in enumerate(queues)}
        stages, values = _joined(donated, kept)
        rings, newest = [_ring(each) for each in values], [each[-group:] for each in values]
        reported = {name: jnp.zeros((CAPACITY, group), jnp.float32) for name in stages[-1].totals if name != "batches"}

        def filed(n, rings, newest):
            """What the period before has left is written only now: before its end the ring was still being read."""
            return [_written(*each, n * group) for each in zip(queues, rings, newest, strict=True)]

        def period(n, carry):
            stages, rings, newest, reported = carry
            rings = filed(n, rings, newest)

            def waiting(kind, k, offset):
                place = places[kind, k]
                return _read(queues[place], rings[place], n * group + offset)

            walk = _Period(self, stages, waiting)
            walk.go(at, data, first + (n * (group // micro)).astype(jnp.uint32))
            newest = [walk.entered(queue) for queue in queues]
            reported = jax.tree.map(lambda all_, *one: all_.at[n].set(jnp.stack(one)), reported, *walk.metrics)
            return walk.stages, rings, newest, reported

        stages, rings, newest, reported = lax.fori_loop(0, count, period, (stages, rings, newest, reported))
        rings = filed(count, rings, newest)
        return (
            stages,
            [
                [_read(queue, ring, count * group + queue.oldest + j) for j in range(queue.size)]
                for queue, ring in zip(queues, rings, strict=True)
            ],
            reported,
        )

    def _sharing_weights(self, state: State) -> State:
        """The newest memos refer to today's weights again, where no update has come since their forward."""
        memos = dict(state.memos)
        if self.plan.schedule.double_buffered or any(each.predicts for each in self.plan.method.corrections):
            return state  # forwards use others
        for k, number in memos:
            if self._is_of_today(k, number - state.fed):
                leaves = jax.tree.leaves(state.stages[k].params)
                pairs = zip(self.workers[k].trace.held, memos[k, number].held, strict=True)
                held = [leaves[source.leaf] if source.tree == "params" else leaf for source, leaf in pairs]
                memos[k, number] = memos[k, number]._replace(held=held)
        return replace(state, memos=memos)

    def _is_of_today(self, k: int, offset: int) -> bool:
        """Whether stage k updates nothing between the forward of the batch `offset` after the next and that one."""
        schedule, periods = self.plan.schedule, 2 * self._steady_from
        forward = Op(FORWARD, periods * schedule.group + offset)
        ticks = range(schedules.tick_of(schedule, k, forward), periods * schedule.period)
        ops = [op for tick in ticks for op in schedules.row(schedule, tick)[k]]
        return all(op.kind != UPDATE for op in ops[ops.index(forward) :]) and not self.plan.num_previous(k)


class _Period:
    """One period of the steady state under trace; what travels is numbered from what comes next."""

    def __init__(self, engine: Fused, stages: list[StageState], waiting: Callable[[str, int, int], PyTree]):
        self.plan, self.workers, self.stages, self.waiting = engine.plan, engine.workers, stages, waiting
        self.first_tick = engine._steady_from * self.plan.schedule.period
        self.base = engine._steady_from * self.plan.schedule.group
        self.new: dict[tuple[str, int, int], PyTree] = {}
        self.metrics: list[Metrics] = []

    def go(self, at: Callable, data: PyTree, first: jax.Array) -> None:
        """Walks through the period in which the batches from `first` on enter."""
        micro = self.plan.method.micro_batches
        batches = [at(data, first + jnp.uint32(j)) for j in range(self.plan.schedule.group // micro)]
        pairs = [pair for batch in batches for pair in zip(*(split(x, micro) for x in batch), strict=True)]
        for offset, (inputs, targets) in enumerate(pairs):
            self.new[INPUTS, 0, offset] = inputs
            self.new.update({(TARGETS, k, offset): targets for k in self.plan.with_targets})
        for tick in range(self.first_tick, self.first_tick + self.plan.schedule.period):
            for k, visit in enumerate(schedules.row(self.plan.schedule, tick)):
                if visit:
                    self._visit(k, visit)

    def _visit(self, k: int, visit: Visit) -> None:
        batches = list(dict.fromkeys(op.batch for op in visit))
        arrivals = [self._receive(k, batch, visit) for batch in batches]
        worker, before = self.workers[k], self.stages[k]
        own, departures = worker.visit(pattern(visit), before, arrivals)
        self.stages[k] = own
        forwarding = own if updates_first(visit) else before
        for batch, arrival, departure in zip(batches, arrivals, departures, strict=True):
            offset = batch - self.base
            if memo := worker.memo(arrival, departure, forwarding, self.plan.takes_older(k, batch), before.state):
                self.new[MEMO, k, offset] = memo
            if departure.outputs is not None and k < self.plan.last:
                self.new[INPUTS, k + 1, offset] = departure.outputs
            if departure.cotangents is not None and k > 0:
                self.new[COTANGENTS, k - 1, offset] = departure.cotangents
            self.metrics += [departure.metrics] if departure.metrics else []

    def _receive(self, k: int, batch: int, visit: Visit) -> Arrival:
        kinds = [op.kind for op in visit if op.batch == batch]
        wanted = self.workers[k].receives(kinds)
        return Arrival(**{kind: self._take(kind, k, batch - self.base) for kind in wanted})

    def _take(self, kind: str, k: int, offset: int) -> PyTree:
        if (kind, k, offset) in self.new:
            return self.new.pop((kind, k, offset))
        return self.waiting(kind, k, offset)

    def entered(self, queue: Queue) -> list[PyTree]:
        """What is new in a queue at the end, the oldest first."""
        end = queue.oldest + queue.size + self.plan.schedule.group
        num = min(self.plan.schedule.group, queue.size)
        return [self.new[queue.kind, queue.stage, offset] for offset in range(end - num, end)]


def _own_layers(stage: Stage, own: StageState) -> tuple[list, list]:
    """Parameters and state of a stage without its head, whose layers are ours and fast."""
    return own.params[: len(stage.groups)], own.state[: len(stage.groups)]


def _queues(state: State) -> tuple[Queue, ...]:
    """What is in flight between two periods."""
    found: dict[tuple[str, int], dict[int, str]] = defaultdict(dict)
    for box in ("inbox", "outbox"):
        for kind, k, number in getattr(state, box):
            found[kind, k][number - state.fed] = box
    for k, number in state.memos:
        found[MEMO, k][number - state.fed] = "memos"
    queues = []
    for (kind, k), boxes in sorted(found.items()):
        assert max(boxes) - min(boxes) == len(boxes) - 1, f"batches {sorted(boxes)} do not follow one another"
        queues.append(Queue(kind, k, min(boxes), tuple(boxes[offset] for offset in sorted(boxes))))
    return tuple(queues)


def _waiting(state: State, queues: tuple[Queue, ...]) -> list[list[PyTree]]:
    """The values of the queues, the oldest first."""
    return [
        [getattr(state, box)[_key(queue, state.fed + queue.oldest + j)] for j, box in enumerate(queue.boxes)]
        for queue in queues
    ]


def _parted(stages: Sequence[StageState], values: list, queues: tuple[Queue, ...], overwritten: tuple[str, ...]):
    """The stages and the values of the queues: what may be overwritten, and what something else may refer to."""
    memos = [queue.kind == MEMO for queue in queues]
    fields = [{field: getattr(own, field) for field in overwritten} for own in stages]
    rest = [{field: getattr(own, field) for field in own._fields if field not in overwritten} for own in stages]
    saved = [[v.saved for v in each] if memo else [] for each, memo in zip(values, memos, strict=True)]
    others = [[v.held for v in each] if memo else each for each, memo in zip(values, memos, strict=True)]
    return (fields, saved), (rest, others)


def _joined(donated: PyTree, kept: PyTree) -> tuple[list[StageState], list[list[PyTree]]]:
    """The inverse of `_parted`."""
    (fields, saved), (rest, others) = donated, kept
    stages = [StageState(**a, **b) for a, b in zip(fields, rest, strict=True)]
    return stages, [list(map(Memo, s, o)) if s else o for s, o in zip(saved, others, strict=True)]


def _key(queue: Queue, number: int) -> tuple:
    return (queue.stage, number) if queue.kind == MEMO else (queue.kind, queue.stage, number)


def _ring(values: list[PyTree]) -> PyTree:
    """The values with a new leading axis, the oldest first; one alone as it is."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *values) if len(values) > 1 else values[0]


def _written(queue: Queue, ring: PyTree, newest: list[PyTree], n: jax.Array) -> PyTree:
    """The ring after `n` have entered, the newest in the places of those that were the oldest before."""
    if queue.size == 1:
        return newest[-1]
    for j, value in enumerate(reversed(newest)):
        put = partial(lax.dynamic_update_index_in_dim, index=(n + queue.size - 1 - j) % queue.size, axis=0)
        ring = jax.tree.map(lambda leaf, new, put=put: put(leaf, new), ring, value)
    return ring


def _read(queue: Queue, ring: PyTree, offset: jax.Array) -> PyTree:
    """The value of a batch in a ring, counted from the one that came next when the ring was made."""
    if queue.size == 1:
        return ring
    place = (offset - queue.oldest) % queue.size
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, place, keepdims=False), ring)
