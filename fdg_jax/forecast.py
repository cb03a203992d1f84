"""What the arrays on every stage's device come to in the steady state, before anything runs.

The schedule is walked through as `engine.mpmd` does it, with names and sizes in the place of arrays. Arrays of one name
are one array: a memo refers to the weights, inputs and outputs of its forward and copies none. What a call donates is
overwritten; all else that was there when a step began is there until it ends, for the caller holds the state before.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from fdg_jax import schedule as schedules
from fdg_jax.engine.base import Plan, StageState
from fdg_jax.engine.worker import Worker, updates_first
from fdg_jax.schedule import BACKWARD, FORWARD, SYNTHESIS, UPDATE, Op, Visit

Name = tuple[str, int]  # of arrays that come and go together: their kind, and a number of a batch or of a version


@dataclass(frozen=True)
class Forecast:
    """Bytes of the arrays alive on a stage's device in the steady state.

    `total` is what the stage holds after one tick and before the next, where that is most. During a visit there is
    more, at most `peak`: what arrives and what is made, until what it replaces is let go. XLA's scratch inside a
    program (gradients, activations on their way) is no array and in neither; `benchmarks.memory` reads it off the
    compiled programs. Nor are targets, counters and metrics. The figures are those of the engine `mpmd`, and of `fused`
    between its calls: during one it holds memos, and old weights under stash, about twice.
    """

    weights: int
    optimizer: int  # and gradients that are accumulated
    old_weights: int  # which forwards still use, or memos under stash; today's not counted
    memos: int  # activations of all memos in flight
    num_memos: int
    messages: int  # on their way or waiting, but for activations that a memo holds too; buffers count as full
    visit: int  # what a visit adds

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.old_weights + self.memos + self.messages

    @property
    def peak(self) -> int:
        return self.total + self.visit


def forecasts(plan: Plan, states: Sequence[StageState], workers: dict[int, Worker]) -> list[Forecast]:
    """One a stage. A stage without a worker, whose targets are not known yet, is taken to keep no memo.

    Args:
        plan: of the run.
        states: of the stages, at the beginning; shapes alone matter.
        workers: traced so far.
    """
    schedule, micro = plan.schedule, plan.method.micro_batches
    devices = [_Device(plan, k, own, workers.get(k)) for k, own in enumerate(states)]
    # Every period does the same when the first group has left, and the weights of the beginning are in no memo when
    # those have left that came meanwhile.
    groups = 2 * -(-schedule.span // schedule.period) + 1
    begins = {schedules.tick_of(schedule, 0, Op(FORWARD, i)) for i in range(0, (groups + 1) * schedule.group, micro)}
    for tick in range((groups + 1) * schedule.period):
        visits = list(zip(devices, schedules.row(schedule, tick), strict=True))
        for device, visit in visits:
            device.receive(visit, step_begins=tick in begins)
        alive = [device.visit(visit) for device, visit in visits]
        for device, visit in visits:
            device.send(visit, devices)
        if tick >= groups * schedule.period:
            for device, names in zip(devices, alive, strict=True):
                device.measure(names)
    return [device.forecast() for device in devices]


class _Device:
    """What is alive on the device of stage k, by name."""

    def __init__(self, plan: Plan, k: int, own: StageState, worker: Worker | None):
        self.plan, self.k = plan, k
        held = list(zip(worker.trace.held, worker.trace.held_shapes, strict=True)) if worker else []
        self.kept = {source.tree for source, _ in held}  # by a memo, beside what the forward makes for it
        old = num_bytes([shape for source, shape in held if source.tree == "params"])
        inputs, outputs = num_bytes(plan.shapes[k]), num_bytes(plan.shapes[k + 1]) if k < plan.last else 0
        self.sizes = {
            "used weights": old,  # of those, what a memo keeps
            "other weights": num_bytes(own.params) - old,
            "predicted": old,
            "state": num_bytes(own.state),
            "inputs": inputs,
            "outputs": outputs,
            "cotangents": outputs,
            "sent back": inputs,
            "saved": num_bytes(worker.trace.saved) if worker else 0,
        }
        self.fixed = num_bytes(own.synthesis[:2]), num_bytes((own.opt_state, own.accumulated, own.synthesis[2:]))
        self.buffered = plan.method.reuse.size * inputs if plan.method.reuse and k else 0
        self.predicts = any(each.predicts for each in plan.method.corrections)
        self.versions, self.moved = [0] * (1 + plan.num_previous(k)), 0  # of weights, the newest first; of state
        self.memos: dict[int, set[Name]] = {}
        self.inbox: set[Name] = set()
        self.outbox: set[Name] = set()
        self.coming: set[Name] = set()
        self.before: set[Name] = set()
        self.most = self.peak = 0
        self.fullest: tuple[set[Name], list[set[Name]], int, int]

    def now(self) -> set[Name]:
        """Between two visits."""
        own = {(part, v) for v in self.versions for part in ("used weights", "other weights")}
        return own.union({("state", self.moved)}, self.inbox, self.outbox, *self.memos.values())

    def receive(self, visit: Visit, step_begins: bool) -> None:
        """What was sent in the tick before, and batches for stage 0, arrive."""
        if step_begins:
            self.before = self.now()
        if self.k == 0:
            self.coming |= {("inputs", i) for kind, i in visit if kind == FORWARD}
        self.inbox, self.outbox, self.coming = self.inbox | self.coming, set(), set()

    def visit(self, visit: Visit) -> set[Name]:
        """Does it; what is alive when results are there and nothing has been let go."""
        alive = self.before | self.now()
        kinds, kept = [kind for kind, _ in visit], self.kept_of(visit)
        ends = SYNTHESIS if self.plan.schedule.synthesises(self.k) else BACKWARD
        spent: set[Name] = set().union(*(self.memos.pop(i, set()) for kind, i in visit if kind == ends))
        if kept:  # whose arrays take the place of those of the memos answered
            overwritten = {name for name in spent if name[0] == "saved"}
            alive, self.before = alive - overwritten, self.before - overwritten
        read = {(FORWARD, "inputs"), (BACKWARD, "cotangents"), (SYNTHESIS, "cotangents")}
        self.inbox -= {(name, i) for kind, i in visit for reader, name in read if kind == reader}
        before, state = self.versions, self.moved
        if UPDATE in kinds:
            self.versions = [self.versions[0] + ("params" in self.kept or len(before) > 1), *before[:-1]]
        if FORWARD in kinds:
            self.moved += "state" in self.kept
        for i in kept:
            versions = self.versions if updates_first(visit) else before
            self.memos[i] = self.memo(i, versions[-1 if self.plan.takes_older(self.k, i) else 0], state)
        return alive | self.now() | self.made(visit)

    def kept_of(self, visit: Visit) -> list[int]:
        """Batches of which a memo outlasts the visit."""
        answered = {i for kind, i in visit if kind == BACKWARD and not self.plan.synthesiser(self.k)}
        return [i for kind, i in visit if kind == FORWARD and i not in answered]

    def memo(self, i: int, version: int, state: int) -> set[Name]:
        """What the memo of a batch refers to."""
        if self.plan.synthesiser(self.k):
            return {("outputs", i)}
        weights = ("predicted", i) if self.predicts else ("used weights", version)
        names = {"params": weights, "inputs": ("inputs", i), "outputs": ("outputs", i), "state": ("state", state)}
        return {("saved", i), *(names[tree] for tree in self.kept)}

    def made(self, visit: Visit) -> set[Name]:
        """The messages that a visit makes."""
        back = self.k > 0 and self.plan.schedule.sends_back
        sent = {FORWARD: "outputs", **({BACKWARD: "sent back"} if back else {})}
        return {(sent[kind], i) for kind, i in visit if kind in sent}

    def send(self, visit: Visit, devices: Sequence["_Device"]) -> None:
        self.outbox = self.made(visit)
        for name, i in self.outbox:
            if name == "outputs" and self.k < self.plan.last:
                devices[self.k + 1].coming.add(("inputs", i))
            elif name == "sent back":
                devices[self.k - 1].coming.add(("cotangents", i))

    def measure(self, alive: set[Name]) -> None:
        """Takes the largest of what is alive during a visit, and after it."""
        now, rest = self.now(), sum(self.fixed)
        if self.bytes(now) + rest > self.most:
            self.most = self.bytes(now) + rest
            self.fullest = now, list(self.memos.values()), self.versions[0], self.moved
        self.peak = max(self.peak, self.bytes(alive) + rest)

    def forecast(self) -> Forecast:
        now, memos, version, moved = self.fullest
        todays = {("used weights", version), ("other weights", version), ("state", moved)}
        old = {name for name in now if name[0] in ("used weights", "other weights", "predicted")} - todays
        held = set().union(*memos) - todays - old
        return Forecast(
            weights=self.bytes(todays) + self.fixed[0],
            optimizer=self.fixed[1],
            old_weights=self.bytes(old),
            memos=self.bytes(held),
            num_memos=len(memos),
            messages=self.bytes(now - todays - old - held) + self.buffered,
            visit=self.peak - self.most,
        )

    def bytes(self, names: Iterable[Name]) -> int:
        return sum(self.sizes[name[0]] for name in names)


def num_bytes(tree: Any) -> int:
    """Bytes of the arrays, or shapes, of a pytree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
