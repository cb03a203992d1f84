"""K programs on K devices: the host walks the schedule and dispatches, and never waits for a result.

In a tick every message of the tick before moves in one `jax.device_put`, and every stage with something to do gets one
jitted call. JAX queues both, and the devices work through their queues side by side. The one wait here bounds how far
the host runs ahead.

What a tick costs the host is the number of arrays that enter and leave its calls, and the Python around them
(`python -m benchmarks.dispatch`). So what a row of the schedule asks for is found out once.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fdg_jax import schedule as schedules
from fdg_jax.backward import Memo
from fdg_jax.data.source import Feed
from fdg_jax.engine.base import (
    COTANGENTS,
    INPUTS,
    NO_FAULT,
    TARGETS,
    Metrics,
    Observer,
    Plan,
    PyTree,
    StageState,
    State,
    Synthesis,
    split,
)
from fdg_jax.engine.worker import MEMO, Arrival, Departure, Pattern, Worker, pattern, updates_first
from fdg_jax.schedule import BACKWARD, FORWARD, Op, Visit
from fdg_jax.stage import Layer

RUN_AHEAD = 8  # batches: an XLA:CPU device takes 32 computations before it blocks the host; a GPU's queue holds memory
MESSAGES = (INPUTS, TARGETS, COTANGENTS)  # as `Arrival` has them


class Mpmd:
    """The engine for K devices.

    Args:
        plan: of the run.
        devices: of every stage; several stages may share one.
    """

    def __init__(self, plan: Plan, devices: Sequence[jax.Device]):
        self.plan, self.devices = plan, tuple(devices)
        self.workers: dict[int, Worker] = {}
        self.programs: dict[tuple[int, Pattern], Program] = {}
        self._rows: dict[tuple[int, int], list[Call]] = {}
        together = [k for k, (one, other) in enumerate(pairwise(self.devices)) if one == other]
        self.unmoved = {*((INPUTS, k + 1) for k in together), *((COTANGENTS, k) for k in together)}
        self._evaluations = [jax.jit(partial(self._evaluate, k)) for k in range(len(self.devices))]
        self._running: deque[jax.Array] = deque()
        self.observer: Observer | None = None

    def at(self, state: State) -> "Mpmd":
        return self

    def init(self, params: list[PyTree], state: list[PyTree], key: jax.Array, first_batch: int = 0) -> State:
        stages = []
        for k, (stage, device) in enumerate(zip(self.plan.stages, self.devices, strict=True)):
            layers = slice(stage.start, stage.start + len(stage.layers))
            own: tuple[list[PyTree], ...] = stage.stack(params[layers]), stage.stack(state[layers])
            if head := self.plan.head(k):
                own = tuple([*trees, added] for trees, added in zip(own, _added(head, self.plan, k, key), strict=True))
            counts = np.array([first_batch, first_batch, 0, NO_FAULT], np.uint32)
            own_params, own_state, own_key, counts = jax.device_put((*own, key, counts), device)
            opt_state = jax.device_put(jax.jit(self.plan.optimizers[k].init)(own_params), device)
            accumulated = jax.device_put(_no_gradients(own_params), device) if self.plan.schedule.group > 1 else ()
            previous = (own_params,) * self.plan.num_previous(k)
            synthesis = jax.device_put(_synthesis(self.plan, k, key), device)
            optional = accumulated, previous, synthesis
            stages.append(StageState(own_params, own_state, opt_state, own_key, counts, {}, *optional))
            if k not in self.plan.with_loss:  # the others are traced when the shapes of the targets are known
                self.workers[k] = Worker(self.plan, k, stages[k])
        return State(fed=first_batch, origin=first_batch, stages=tuple(stages), inbox={}, outbox={}, memos={})

    def expect(self, state: State, targets: PyTree) -> None:
        for k in range(len(self.devices)):
            if k not in self.workers:
                self.workers[k] = Worker(self.plan, k, state.stages[k], targets)

    def step(self, state: State, inputs: PyTree, targets: PyTree) -> tuple[State, list[Metrics]]:
        pieces = [split(_own_copy(tree), self.plan.method.micro_batches) for tree in (inputs, targets)]
        walk = self.walk(self._with_totals(state, pieces[1][0]))
        fed = state.fed
        for fed, (x, y) in enumerate(zip(*pieces, strict=True), state.fed + 1):
            walk.outbox[INPUTS, 0, fed - 1] = x
            walk.outbox.update({(TARGETS, k, fed - 1): y for k in self.plan.with_targets})
            walk.ticks(fed - 1 - state.origin, fed - state.origin)
        return walk.state(fed, state.origin), walk.metrics

    def _with_totals(self, state: State, targets: PyTree) -> State:
        """The last stage is traced here, when the first batch brings the shapes of the targets, and gets its sums."""
        last, own = self.plan.last, state.stages[-1]
        self.expect(state, targets)
        if own.totals:
            return state
        zeros = {name: np.zeros((), np.float32) for name in self.workers[last].total_names}
        own = own._replace(totals=jax.device_put(zeros, self.devices[last]))
        return replace(state, stages=(*state.stages[:-1], own))

    def run(self, state: State, feed: Feed, num_batches: int) -> tuple[State, Metrics | None]:
        left = []
        for _ in range(num_batches):
            state, metrics = self.step(state, *feed.batch(state.fed // self.plan.method.micro_batches))
            left += metrics
        return state, jax.tree.map(lambda *values: jnp.stack(values), *left) if left else None

    def drain(self, state: State) -> tuple[State, list[Metrics]]:
        walk = self.walk(state)
        walk.ticks(state.fed - state.origin, None)
        if self.plan.method.vertical_sync:  # the next batches begin anew, with one version on all stages
            walk.stages = [own._replace(previous=(own.params,) * len(own.previous)) for own in walk.stages]
        return walk.state(fed=state.fed, origin=state.fed), walk.metrics

    def walk(self, state: State) -> "Walk":
        """What goes through the ticks of a step from this state on."""
        return Walk(self, state)

    def predict(self, state: State, inputs: PyTree) -> PyTree:
        inputs = _own_copy(inputs)
        for own, device, evaluate in zip(state.stages, self.devices, self._evaluations, strict=True):
            inputs = evaluate(own.params, own.state, jax.device_put(inputs, device))
        return inputs

    def observe(self, observer: Observer | None) -> None:
        self.observer = observer

    def tick_of_answer(self, k: int, batch: int) -> int:
        return schedules.tick_of(self.plan.schedule, k, Op(BACKWARD, batch))

    def _evaluate(self, k: int, params: list, state: list, inputs: PyTree) -> PyTree:
        stage, groups = self.plan.stages[k], len(self.plan.stages[k].groups)  # without a head
        outputs, _ = stage.apply(params[:groups], state[:groups], inputs, jax.random.key(0), train=False)
        return outputs

    def row(self, tick: int, num_batches: int) -> tuple[int, list["Call"]]:
        """A number of batches that are answered, and the calls of a tick, in which batches are counted from there.

        Rows of the schedule that lie whole periods apart differ by that number alone: each is read once.
        """
        schedule = self.plan.schedule
        past = max(0, (tick - schedule.span) // schedule.period + 1)  # groups that are through
        key = tick - past * schedule.period, num_batches - past * schedule.group
        if key not in self._rows:
            visits = enumerate(schedules.row(schedule, *key))
            self._rows[key] = [self._call(k, visit) for k, visit in visits if visit]
        return past * schedule.group, self._rows[key]

    def _call(self, k: int, visit: Visit) -> "Call":
        batches = _batches(visit)
        return Call(self._program(k, pattern(visit)), batches, tuple(self.plan.takes_older(k, i) for i in batches))

    def _program(self, k: int, pattern: Pattern) -> "Program":
        if (k, pattern) not in self.programs:
            self.programs[k, pattern] = Program(self.workers[k], k, pattern)
        return self.programs[k, pattern]

    def bound_run_ahead(self, loss: jax.Array) -> None:
        """Waits until all but the last RUN_AHEAD batches have left the last stage."""
        self._running.append(loss)
        if len(self._running) > RUN_AHEAD:
            jax.block_until_ready(self._running.popleft())


class Program:
    """The compiled visit of stage k and a pattern, and what the host must know to call it."""

    def __init__(self, worker: Worker, k: int, pattern: Pattern):
        self.k, self.worker, self.pattern, self.updates_first = k, worker, pattern, updates_first(pattern)
        kinds = ["".join(kind for kind, m in pattern if m == n) for n in _batches(pattern)]  # e.g. ["BU", "F"]
        self.receives = [worker.receives(each) for each in kinds]
        changes = worker.changes(pattern)
        self.ages = "previous" in changes  # which the host sees to, for what a program returns is a copy
        self.changed = tuple(field for field in changes if field != "previous")
        # What memos refer to lives on in them, old weights under stash above all: it is replaced, the rest overwritten.
        # So do the counts, four numbers that every visit makes: an observer may wait for them.
        lasting = {"counts", *(source.tree for source in worker.trace.held)}
        lasting |= {"params"} if self.ages else set()
        self.donated = tuple(field for field in self.changed if field not in lasting)
        self.read = tuple(field for field in worker.reads(pattern) if field not in self.donated)

        def run(donated: list, spent: list, read: list, rest: list[tuple]):
            fields = dict(zip((*self.donated, *self.read), (*donated, *read), strict=True))
            arrivals = [
                Arrival(inputs, targets, cotangents, None if held is None else Memo(saved, held))
                for saved, (inputs, targets, cotangents, held) in zip(spent, rest, strict=True)
            ]
            own, departures = worker.visit(pattern, StageState._make(map(fields.get, StageState._fields)), arrivals)
            return [getattr(own, field) for field in self.changed], departures

        # Donating a memo's arrays pays where those of a new memo, of the same shapes, can take their place.
        makes_memo = any(FORWARD in each and BACKWARD not in each for each in kinds)
        self.compiled = jax.jit(run, donate_argnums=(0, 1) if makes_memo else (0,))

    def __call__(self, own: StageState, arrivals: list[Arrival]) -> tuple[StageState, list[Departure]]:
        """The stage's new state, and what leaves."""
        donated, read = [getattr(own, field) for field in self.donated], [getattr(own, field) for field in self.read]
        spent = [memo.saved if memo else [] for *_, memo in arrivals]
        rest = [(*messages, memo.held if memo else None) for *messages, memo in arrivals]
        changed, departures = self.compiled(donated, spent, read, rest)
        previous = (own.params, *own.previous[:-1]) if self.ages else own.previous
        return own._replace(**dict(zip(self.changed, changed, strict=True)), previous=previous), departures


class Call(NamedTuple):
    """A visit of a tick."""

    program: Program
    batches: tuple[int, ...]
    older: tuple[bool, ...]  # whether a forward of the batch is one on older weights


def _batches(visit: Visit | Pattern) -> tuple[int, ...]:
    return tuple(dict.fromkeys(batch for _, batch in visit))


def _added(layer: Layer, plan: Plan, k: int, key: jax.Array) -> tuple[PyTree, PyTree]:
    """Parameters and state of what is added to a stage."""
    return layer.init(jax.random.fold_in(key, k), plan.shapes[k + 1])


def _synthesis(plan: Plan, k: int, key: jax.Array) -> Synthesis | tuple:
    """What the synthesiser of a stage owns, where there is one."""
    synthesiser = plan.synthesiser(k)
    if synthesiser is None:
        return ()
    layer, optimizer = synthesiser
    params, state = _added(layer, plan, k, key)
    return Synthesis(params, state, jax.jit(optimizer.init)(params))


def _no_gradients(params: PyTree) -> PyTree:
    """None accumulated yet."""
    return {"number": np.zeros((), np.float32), "gradients": jax.tree.map(jnp.zeros_like, params)}


def _own_copy(tree: PyTree) -> PyTree:
    """Host arrays copied: on a CPU device JAX may use their memory as it is, and memos outlive the caller's buffer."""
    return jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else np.array(leaf), tree)


class Walk:
    """A few ticks of the schedule: a state taken apart, worked on, and put together again."""

    def __init__(self, engine: Mpmd, state: State):
        self.engine, self.last, self.origin = engine, engine.plan.last, state.origin
        self.stages = list(state.stages)
        self.inbox, self.outbox, self.memos = dict(state.inbox), dict(state.outbox), dict(state.memos)
        self.metrics: list[Metrics] = []

    def state(self, fed: int, origin: int) -> State:
        return State(fed, origin, tuple(self.stages), self.inbox, self.outbox, self.memos)

    def ticks(self, fed: int, num_batches: int | None) -> None:
        """From the tick in which number `fed` enters: until the next one does, or to the end of `fed` (None)."""
        schedule = self.engine.plan.schedule
        first = schedules.tick_of(schedule, 0, Op(FORWARD, fed))
        if num_batches is None:
            end, num_batches = schedules.num_ticks(schedule, fed), fed
        else:
            end = schedules.tick_of(schedule, 0, Op(FORWARD, num_batches))
        for tick in range(first, end):
            self.tick(tick, num_batches)

    def tick(self, tick: int, num_batches: int) -> None:
        if self.engine.observer:
            self.engine.observer.begin(tick)
        self._deliver()
        answered, calls = self.engine.row(tick, num_batches)
        for program, batches, older in calls:
            self._visit(program, [self.origin + answered + batch for batch in batches], older)

    def _deliver(self) -> None:
        """The messages of the last tick reach their readers; between stages that share a device none moves."""
        sent, self.outbox = self.outbox, {}
        if moving := [key for key in sent if key[:2] not in self.engine.unmoved]:
            readers = [self.engine.devices[reader] for _, reader, _ in moving]
            moved = dict(zip(moving, jax.device_put([sent[key] for key in moving], readers), strict=True))
            sent.update(moved)
            if self.engine.observer:
                self.engine.observer.deliver(moved)
        self.inbox.update(sent)

    def _visit(self, program: Program, numbers: list[int], older: tuple[bool, ...]) -> None:
        k, before = program.k, self.stages[program.k]
        arrivals = [self._receive(k, number, kinds) for number, kinds in zip(numbers, program.receives, strict=True)]
        self.stages[k], departures = program(before, arrivals)
        if self.engine.observer:
            visit = tuple(Op(kind, numbers[n]) for kind, n in program.pattern)
            self.engine.observer.visit(k, visit, self.stages[k].counts)
        own = self.stages[k] if program.updates_first else before
        for number, old, arrival, departure in zip(numbers, older, arrivals, departures, strict=True):
            outputs, _, cotangents, _, metrics = departure
            if memo := program.worker.memo(arrival, departure, own, old, before.state):
                self.memos[k, number] = memo
            if outputs is not None and k < self.last:
                self.outbox[INPUTS, k + 1, number] = outputs
            if cotangents is not None and k > 0:
                self.outbox[COTANGENTS, k - 1, number] = cotangents
            if metrics is not None:
                self.metrics.append(metrics)
                self.engine.bound_run_ahead(metrics["loss"])

    def _receive(self, k: int, number: int, kinds: list[str]) -> Arrival:
        """Takes from the inbox and the memos what the operations on a batch read."""
        memo = self.memos.pop((k, number)) if MEMO in kinds else None
        inputs, targets, cotangents = (
            self.inbox.pop((kind, k, number)) if kind in kinds else None for kind in MESSAGES
        )
        return Arrival(inputs, targets, cotangents, memo)
