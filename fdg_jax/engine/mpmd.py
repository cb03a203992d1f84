"""K programs on K devices: the host walks the schedule and dispatches, and never waits for a result.

In a tick every message of the tick before moves in one `jax.device_put`, and every stage with something to do gets one
jitted call. JAX queues both, and the devices work through their queues side by side. The one wait here bounds how far
the host runs ahead.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import numpy as np

from fdg_jax import schedule as schedules
from fdg_jax.backward import Memo
from fdg_jax.engine.base import COTANGENTS, INPUTS, NO_FAULT, TARGETS, Metrics, Plan, PyTree, StageState, State
from fdg_jax.engine.worker import Arrival, Departure, Pattern, Worker, pattern
from fdg_jax.schedule import BACKWARD, FORWARD, UPDATE, Op, Visit

RUN_AHEAD = 8  # batches: an XLA:CPU device takes 32 computations before it blocks the host; a GPU's queue holds memory


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
        self._evaluations = [jax.jit(partial(self._evaluate, k)) for k in range(len(self.devices))]
        self._running: deque[jax.Array] = deque()

    def init(self, params: list[PyTree], state: list[PyTree], key: jax.Array, first_batch: int = 0) -> State:
        stages = []
        for k, (stage, device) in enumerate(zip(self.plan.stages, self.devices, strict=True)):
            layers = slice(stage.start, stage.start + len(stage.layers))
            own = stage.stack(params[layers]), stage.stack(state[layers])
            counts = np.array([first_batch, first_batch, 0, NO_FAULT], np.uint32)
            own_params, own_state, own_key, counts = jax.device_put((*own, key, counts), device)
            opt_state = jax.device_put(jax.jit(self.plan.optimizer.init)(own_params), device)
            stages.append(StageState(own_params, own_state, opt_state, own_key, counts, totals={}))
            if k < self.plan.last:  # the last stage is traced when the shapes of the targets are known
                self.workers[k] = Worker(self.plan, k, stages[k])
        return State(fed=first_batch, origin=first_batch, stages=tuple(stages), inbox={}, outbox={}, memos={})

    def expect(self, state: State, targets: PyTree) -> None:
        if self.plan.last not in self.workers:
            self.workers[self.plan.last] = Worker(self.plan, self.plan.last, state.stages[-1], targets)

    def step(self, state: State, inputs: PyTree, targets: PyTree) -> tuple[State, Metrics | None]:
        period, fed = self.plan.schedule.period, state.fed - state.origin
        walk = _Walk(self, self._with_totals(state, targets))
        walk.outbox[INPUTS, 0, state.fed] = _own_copy(inputs)
        walk.outbox[TARGETS, self.plan.last, state.fed] = _own_copy(targets)
        for tick in range(fed * period, (fed + 1) * period):
            walk.tick(tick, fed + 1)
        return walk.state(fed=state.fed + 1, origin=state.origin), walk.metrics[-1] if walk.metrics else None

    def _with_totals(self, state: State, targets: PyTree) -> State:
        """The last stage is traced here, when the first batch brings the shapes of the targets, and gets its sums."""
        last, own = self.plan.last, state.stages[-1]
        self.expect(state, targets)
        if own.totals:
            return state
        zeros = {name: np.zeros((), np.float32) for name in self.workers[last].total_names}
        own = own._replace(totals=jax.device_put(zeros, self.devices[last]))
        return replace(state, stages=(*state.stages[:-1], own))

    def drain(self, state: State) -> tuple[State, list[Metrics]]:
        schedule, fed = self.plan.schedule, state.fed - state.origin
        walk = _Walk(self, state)
        for tick in range(fed * schedule.period, schedules.num_ticks(schedule, fed)):
            walk.tick(tick, fed)
        return walk.state(fed=state.fed, origin=state.fed), walk.metrics

    def predict(self, state: State, inputs: PyTree) -> PyTree:
        inputs = _own_copy(inputs)
        for own, device, evaluate in zip(state.stages, self.devices, self._evaluations, strict=True):
            inputs = evaluate(own.params, own.state, jax.device_put(inputs, device))
        return inputs

    def _evaluate(self, k: int, params: list, state: list, inputs: PyTree) -> PyTree:
        outputs, _ = self.plan.stages[k].apply(params, state, inputs, jax.random.key(0), train=False)
        return outputs

    def program(self, k: int, pattern: Pattern) -> "Program":
        if (k, pattern) not in self.programs:
            self.programs[k, pattern] = Program(self.workers[k], pattern)
        return self.programs[k, pattern]

    def bound_run_ahead(self, loss: jax.Array) -> None:
        """Waits until all but the last RUN_AHEAD batches have left the last stage."""
        self._running.append(loss)
        if len(self._running) > RUN_AHEAD:
            jax.block_until_ready(self._running.popleft())


class Program:
    """The compiled visit of one stage and pattern, and what the host must know to call it."""

    def __init__(self, worker: Worker, pattern: Pattern):
        kinds = [kind for kind, _ in pattern]
        self.updates_first = UPDATE in kinds[: kinds.index(FORWARD)] if FORWARD in kinds else False
        changed = worker.changes(pattern)
        # Old weights live on in memos under stash, old module state may: these are replaced, the rest is overwritten.
        lasting = {"state"} if worker.todays_weights else {"state", "params"}
        self.donated = tuple(field for field in changed if field not in lasting)
        needed = ("params", "state", "key") if FORWARD in kinds else ("params",)
        self.read = tuple(field for field in needed if field not in self.donated)

        def run(donated: dict, spent: list, read: dict, arrivals: list[Arrival]):
            own = StageState._make(donated.get(field, read.get(field)) for field in StageState._fields)
            arrivals = [
                arrival._replace(memo=Memo(saved, arrival.memo.held)) if arrival.memo else arrival
                for saved, arrival in zip(spent, arrivals, strict=True)
            ]
            own, departures = worker.visit(pattern, own, arrivals)
            return {field: getattr(own, field) for field in changed}, departures

        # Donating a memo's arrays pays where those of a new memo, of the same shapes, can take their place.
        makes_memo = any(kind == FORWARD and (BACKWARD, n) not in pattern for kind, n in pattern)
        self.compiled = jax.jit(run, donate_argnums=(0, 1) if makes_memo else (0,))

    def __call__(self, own: StageState, arrivals: list[Arrival]) -> tuple[dict, list[Departure]]:
        """The changed fields of the stage's state, and what leaves."""
        donated = {field: getattr(own, field) for field in self.donated}
        read = {field: getattr(own, field) for field in self.read}
        spent = [arrival.memo.saved if arrival.memo else [] for arrival in arrivals]
        kept = [a._replace(memo=Memo([], a.memo.held)) if a.memo else a for a in arrivals]
        return self.compiled(donated, spent, read, kept)


def _own_copy(tree: PyTree) -> PyTree:
    """Host arrays copied: on a CPU device JAX may use their memory as it is, and memos outlive the caller's buffer."""
    return jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else np.array(leaf), tree)


class _Walk:
    """A few ticks of the schedule: a state taken apart, worked on, and put together again."""

    def __init__(self, engine: Mpmd, state: State):
        self.engine, self.last, self.origin = engine, engine.plan.last, state.origin
        self.stages = list(state.stages)
        self.inbox, self.outbox, self.memos = dict(state.inbox), dict(state.outbox), dict(state.memos)
        self.metrics: list[Metrics] = []

    def state(self, fed: int, origin: int) -> State:
        return State(fed, origin, tuple(self.stages), self.inbox, self.outbox, self.memos)

    def tick(self, tick: int, num_batches: int) -> None:
        sent, self.outbox = self.outbox, {}
        if sent:
            readers = [self.engine.devices[reader] for _, reader, _ in sent]
            self.inbox.update(zip(sent, jax.device_put(list(sent.values()), readers), strict=True))
        for k, visit in enumerate(schedules.row(self.engine.plan.schedule, tick, num_batches)):
            if visit:
                self._visit(k, visit)

    def _visit(self, k: int, visit: Visit) -> None:
        batches = list(dict.fromkeys(op.batch for op in visit))
        arrivals = [self._receive(k, batch, visit) for batch in batches]
        own = self.stages[k]
        program = self.engine.program(k, pattern(visit))
        changed, departures = program(own, arrivals)
        self.stages[k] = own._replace(**changed)
        weights = self.stages[k].params if program.updates_first else own.params
        for batch, arrival, departure in zip(batches, arrivals, departures, strict=True):
            number = self.origin + batch
            if departure.saved is not None:
                trace = self.engine.workers[k].trace
                self.memos[k, number] = trace.memo(
                    departure.saved, weights, arrival.inputs, own.state, departure.outputs
                )
            if departure.outputs is not None:
                self.outbox[INPUTS, k + 1, number] = departure.outputs
            if departure.cotangents is not None and k > 0:
                self.outbox[COTANGENTS, k - 1, number] = departure.cotangents
            if departure.metrics is not None:
                self.metrics.append(departure.metrics)
                self.engine.bound_run_ahead(departure.metrics["loss"])

    def _receive(self, k: int, batch: int, visit: Visit) -> Arrival:
        """Takes from the inbox and the memos what the visit reads of a batch."""
        forward, backward = Op(FORWARD, batch) in visit, Op(BACKWARD, batch) in visit
        number = self.origin + batch
        return Arrival(
            inputs=self.inbox.pop((INPUTS, k, number)) if forward else None,
            targets=self.inbox.pop((TARGETS, k, number)) if forward and k == self.last else None,
            cotangents=self.inbox.pop((COTANGENTS, k, number)) if backward and k < self.last else None,
            memo=self.memos.pop((k, number)) if backward and not forward else None,
        )
