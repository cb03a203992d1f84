"""Two engines one after the other: a method with its delays for so many batches, then backpropagation.

Both work on the same stages and the same state, which goes from one to the other when the pipeline has been drained.
"""

from collections.abc import Sequence
from dataclasses import replace

import jax
import optax

from fdg_jax import schedule as schedules
from fdg_jax.data.source import Feed
from fdg_jax.engine.base import Engine, Metrics, Observer, Plan, PyTree, State, join


def synchronous(plan: Plan, optimizers: Sequence[optax.GradientTransformation]) -> Plan:
    """The plan of the time after the switch, exact: nothing shrinks error gradients or predicts weights.

    An update answers as many batches, or micro-batches, as before: where that is one, `one_f_one_b` is `bp`.

    Args:
        plan: of the time before.
        optimizers: of every stage, with states as before.
    """
    method = replace(plan.method, beta=1.0, vertical_sync=False, corrections=())
    schedule = schedules.one_f_one_b(plan.schedule.num_stages, plan.schedule.group)
    return replace(plan, schedule=schedule, method=method, optimizers=tuple(optimizers))


class Switching:
    """The engine `before` for the batches 0 .. after - 1, and `then` for the others.

    Args:
        before, then: of the two plans, on the same devices.
        after: in what the schedule counts, batches or micro-batches.
    """

    def __init__(self, before: Engine, then: Engine, after: int):
        self.plan, self.workers = before.plan, before.workers
        self._before, self._then, self._after = before, then, after

    def at(self, state: State) -> Engine:
        return self._before if state.fed < self._after else self._then

    def init(self, params: list[PyTree], state: list[PyTree], key: jax.Array, first_batch: int = 0) -> State:
        fresh = self._before.init(params, state, key, first_batch)
        return fresh if fresh.fed < self._after else _without_delay(fresh)

    def expect(self, state: State, targets: PyTree) -> None:
        self.at(state).expect(state, targets)

    def step(self, state: State, inputs: PyTree, targets: PyTree) -> tuple[State, list[Metrics]]:
        if state.fed >= self._after:
            return self._then.step(state, inputs, targets)
        state, metrics = self._before.step(state, inputs, targets)
        state, drained = self._switched(state)
        return state, metrics + drained

    def run(self, state: State, feed: Feed, num_batches: int) -> tuple[State, Metrics | None]:
        delayed = min(num_batches, max(0, self._after - state.fed) // self.plan.method.micro_batches)
        parts: list[Metrics | None] = []
        if delayed:
            state, metrics = self._before.run(state, feed, delayed)
            state, drained = self._switched(state)
            parts = [metrics, *(jax.tree.map(lambda leaf: leaf[None], each) for each in drained)]
        if num_batches > delayed:
            state, metrics = self._then.run(state, feed, num_batches - delayed)
            parts.append(metrics)
        return state, join(parts)

    def _switched(self, state: State) -> tuple[State, list[Metrics]]:
        """Once the last batch before the switch has entered: the state drained, and metrics of what was in flight."""
        if state.fed < self._after:
            return state, []
        state, drained = self._before.drain(state)
        return _without_delay(state), drained

    def drain(self, state: State) -> tuple[State, list[Metrics]]:
        return self.at(state).drain(state)

    def predict(self, state: State, inputs: PyTree) -> PyTree:
        return self._before.predict(state, inputs)

    def observe(self, observer: Observer | None) -> None:
        self._before.observe(observer)
        self._then.observe(observer)

    def tick_of_answer(self, k: int, batch: int) -> int:
        if batch < self._after:
            return self._before.tick_of_answer(k, batch)
        drained = schedules.num_ticks(self.plan.schedule, self._after)
        return drained + self._then.tick_of_answer(k, batch - self._after)


def _without_delay(state: State) -> State:
    """Without the old weights that forwards used."""
    return replace(state, stages=tuple(own._replace(previous=()) for own in state.stages))
