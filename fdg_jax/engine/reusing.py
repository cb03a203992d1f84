"""Stages of different speed that wait for nobody: `mpmd` where a stage may train on a message again, or never.

Who trains on what in a tick is not the schedule's to say but `reuse.Reuse`'s. A message bears, in the place of a
batch's number, the tick in which it was sent, and stays in the reader's inbox until its buffer has overwritten it.
Targets travel with the outputs, from stage to stage: no other stage knows which batch a stage is at.
"""

from collections.abc import Sequence

import jax

from fdg_jax.engine.base import INPUTS, TARGETS, Metrics, Plan, PyTree, State
from fdg_jax.engine.mpmd import Mpmd, Walk, _own_copy
from fdg_jax.engine.worker import Arrival
from fdg_jax.reuse import Entry, Reuse
from fdg_jax.schedule import BACKWARD, FORWARD, UPDATE, Op

KINDS = (FORWARD, BACKWARD, UPDATE)
VISIT = tuple((kind, 0) for kind in KINDS)


class Reusing(Mpmd):
    """The engine of a method with `reuse`.

    A step is as many ticks as stage 0 takes for a batch, and its metrics are those of the visits of the last stage in
    them, none or several. What a stage counts, for dropout, faults and the learning rate, are its visits. Not every
    batch is answered by every stage, nor once: `drain` lets the stages train, each in its turn, on what they have
    not used yet, and leaves the buffers empty.

    Args:
        plan, devices: as for `Mpmd`.
    """

    def __init__(self, plan: Plan, devices: Sequence[jax.Device]):
        super().__init__(plan, devices)
        assert plan.method.reuse
        self._period, self._start = plan.method.reuse.period, plan.method.reuse.start(len(plan.stages))
        self._reached = self._start

    def step(self, state: State, inputs: PyTree, targets: PyTree) -> tuple[State, list[Metrics]]:
        inputs, targets = _own_copy((inputs, targets))
        walk = _Walk(self, self._with_totals(state, targets), self._before(state))
        walk.outbox |= {(INPUTS, 0, walk.reuse.tick): inputs, (TARGETS, 0, walk.reuse.tick): targets}
        for _ in range(self._period):
            walk.advance()
        self._reached = walk.reuse
        return walk.state(state.fed + 1, state.origin), walk.metrics

    def drain(self, state: State) -> tuple[State, list[Metrics]]:
        walk = _Walk(self, state, self._before(state))
        while walk.reuse.unused:
            walk.advance(feeds=False)
        walk.inbox.clear()
        return walk.state(fed=state.fed, origin=state.fed), walk.metrics

    def tick_of_answer(self, k: int, batch: int) -> int:
        """Of the visit of stage k with this number."""
        reuse, visits = self._start, 0
        while visits <= batch:
            reuse, uses = reuse.step()
            visits += uses[k] is not None
        return reuse.tick - 1

    def _before(self, state: State) -> Reuse:
        """What lies between the stages, for a state whose buffers were last empty at `state.origin`."""
        tick = (state.fed - state.origin) * self._period
        reuse = self._reached if self._reached.tick <= tick else self._start
        while reuse.tick < tick:
            reuse, _ = reuse.step()
        return reuse


class _Walk(Walk):
    """A few ticks, in each of which all stages take what `reuse` gives them."""

    def __init__(self, engine: Reusing, state: State, reuse: Reuse):
        super().__init__(engine, state)
        self.reuse = reuse

    def advance(self, feeds: bool = True) -> None:
        """One tick."""
        tick = self.reuse.tick
        if self.engine.observer:
            self.engine.observer.begin(tick)
        self._deliver()
        self.reuse, uses = self.reuse.step(feeds)
        for k, use in enumerate(uses):
            if use:
                self._train(k, tick, use)
        kept = frozenset(), *self.reuse.resident  # stage 0 has no buffer
        self.inbox = {key: message for key, message in self.inbox.items() if key[2] in kept[key[1]]}
        if busy := [k for k, use in enumerate(uses) if use]:
            self.engine.bound_run_ahead(self.stages[busy[-1]].counts)

    def _train(self, k: int, tick: int, use: Entry) -> None:
        program = self.engine._program(k, VISIT)
        inputs, targets = self.inbox[INPUTS, k, use.sent], self.inbox[TARGETS, k, use.sent]
        self.stages[k], (departure,) = program(self.stages[k], [Arrival(inputs, targets)])
        if self.engine.observer:
            self.engine.observer.visit(k, tuple(Op(kind, use.sent) for kind in KINDS), self.stages[k].counts)
        if k < self.last:
            self.outbox |= {(INPUTS, k + 1, tick): departure.outputs, (TARGETS, k + 1, tick): targets}
        if departure.metrics is not None:
            self.metrics.append(departure.metrics)
