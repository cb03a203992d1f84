"""What really happens, measured without a profiler: an observer of the engine notes what ends and arrives when.

The host must not wait, so threads do: one for the visits of every device, one for the transfers from each device to
each other, every one of which waits for its arrays in the order in which they were dispatched. What a device does not
tell is when a visit begins. It does one at a time and in order, so that a visit begins when the one before it has
ended, all that it reads has arrived, and the host has dispatched it, whatever comes last.

A thread that has to wait for its turn notes late, and none notes early. So the earliest note that says it counts: what
a visit reads had arrived when it ended, what it sends was made when that arrived, and a device ends visits in order.

Where the loop logs, evaluates or compiles, the clock is stopped: what it shows is cut out of the timeline.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple

import jax

from fdg_jax.engine.base import COTANGENTS, INPUTS
from fdg_jax.pauses import Pause, Pauses, cut, without
from fdg_jax.schedule import BACKWARD, FORWARD, SYNTHESIS, Op, Schedule, Visit
from fdg_jax.timeline import Box, Message
from fdg_jax.trace import Timeline


class Moment:
    """When an array was there: `seconds`, known once the thread that waits for it has ended."""

    seconds = 0.0


class _Visit(NamedTuple):
    stage: int
    tick: int
    ops: Visit
    dispatched: float
    end: Moment


class _Delivery(NamedTuple):
    sender: int | None
    reader: int
    op: Op
    begun: float  # when the host turned to it: to send it, or to make a batch
    dispatched: float
    end: Moment


class Recorder:
    """An `engine.base.Observer` that makes a timeline. Times are its clock's.

    Attributes:
        pauses: which it is told of.
        seconds, left_out: of the window without pauses, and these, once it is stopped.

    Args:
        devices: of every stage.
        schedule: of the run.
        clock: seconds.
        wait: returns when an array, or all of a tree, is there.
    """

    def __init__(
        self,
        devices: Sequence[jax.Device],
        schedule: Schedule,
        clock: Callable[[], float] = time.perf_counter,
        wait: Callable[[Any], object] = jax.block_until_ready,
    ):
        order = list(dict.fromkeys(devices))
        self.devices = tuple(map(order.index, devices))  # numbers, as in `timeline.plan`
        self._schedule, self._clock, self._wait = schedule, clock, wait
        self._waiters: dict[tuple[int, int], _Waiter] = {}  # from device to device
        self._events: list[_Visit | _Delivery] = []
        self.pauses, self.left_out, self.seconds = Pauses(clock), list[Pause](), 0.0
        self._first = self._first_pause = self._tick = 0
        self._marked = self._now = clock()
        self._asked: float | None = None  # when the host turned to the batch that comes next

    def begin(self, tick: int) -> None:
        self._tick, self._now = tick, self._clock()

    def fetch(self) -> None:
        """The loop turns to its next step, which begins with making a batch."""
        self.pauses.begin_turn()
        self._asked = self._clock()

    def deliver(self, messages: dict[tuple[str, int, int], Any]) -> None:
        now, asked = self._dispatched(), self._now if self._asked is None else self._asked
        for (kind, reader, batch), array in messages.items():
            sender, op = self._ends(kind, reader, batch)
            lane, begun = (-1, asked) if sender is None else (self.devices[sender], now)
            moment = self._moment((lane, self.devices[reader]), array)
            self._events.append(_Delivery(sender, reader, op, begun, now, moment))
            self._asked = None if sender is None else self._asked
        self._now = self._clock()

    def visit(self, k: int, visit: Visit, ready: jax.Array) -> None:
        lane = self.devices[k], self.devices[k]
        self._events.append(_Visit(k, self._tick, visit, self._dispatched(), self._moment(lane, ready)))
        self._now = self._clock()

    def _dispatched(self) -> float:
        """When the host had nothing else to do than dispatch what it now tells of, which it may have had to compile."""
        self.pauses.go_on()
        return max(self._now, self.pauses.over)

    def mark(self) -> None:
        """The window begins: what was seen before tells only since when devices are free."""
        self._first, self._first_pause = len(self._events), len(self.pauses.found)
        self._marked = self._clock()

    def stop(self) -> Timeline:
        """Waits for all that was dispatched: the timeline since the mark without pauses, 0 its first box's start.

        Raises:
            RuntimeError: a computation failed.
        """
        now = self._clock()
        self.abandon()
        for waiter in self._waiters.values():
            waiter.join()
        if errors := [waiter.error for waiter in self._waiters.values() if waiter.error]:
            raise RuntimeError(f"the timeline was not measured: {errors[0]}") from errors[0]
        ends = self._ended()
        work = [(event.dispatched, end) for event, end in zip(self._events, ends, strict=True)]
        pauses = cut(self.pauses.found, work)
        inside = pauses[self._first_pause :]
        self.left_out = [pause for pause in inside if pause.compiles or pause.turn < self.pauses.turn]
        self.seconds = without(pauses, now) - without(pauses, self._marked)
        return self._timeline(ends, pauses)

    def abandon(self) -> None:
        """Lets the threads end, without waiting for them, and hears of no more pauses."""
        self.pauses.close()
        for waiter in self._waiters.values():
            waiter.queue.put(None)

    def _ends(self, kind: str, reader: int, batch: int) -> tuple[int | None, Op]:
        """The stage that sent a message, and the operation that reads it."""
        if kind == COTANGENTS:
            return reader + 1, Op(SYNTHESIS if self._schedule.local else BACKWARD, batch)
        return (reader - 1 if kind == INPUTS and reader > 0 else None), Op(FORWARD, batch)

    def _moment(self, lane: tuple[int, int], array: Any) -> Moment:
        moment = Moment()
        if _is_there(array):  # as batches from the host's memory mostly are: waking a thread would cost 50 us
            moment.seconds = self._clock()
            return moment
        if lane not in self._waiters:
            self._waiters[lane] = _Waiter(self._clock, self._wait)
        self._waiters[lane].queue.put((array, moment))
        return moment

    def _ended(self) -> list[float]:
        """When every event was over, at the latest; -inf for an arrival that was noted after its reader's end."""
        freed: dict[int, float] = defaultdict(lambda: math.inf)  # the end of a device's next visit
        needed: dict[int, float] = {}  # by stage, the arrival of what its visit sent
        read: dict[tuple[int, Op], float] = {}  # the end of the visit that reads it
        ends = []
        for event in reversed(self._events):
            noted = event.end.seconds
            if isinstance(event, _Visit):
                device = self.devices[event.stage]
                end = freed[device] = min(noted, freed[device], needed.pop(event.stage, math.inf))
                read |= {(event.stage, op): end for op in event.ops}
                ends.append(end)
            else:
                limit = read.get((event.reader, event.op), math.inf)
                if event.sender is not None:
                    needed[event.sender] = min(noted, limit, needed.get(event.sender, math.inf))
                ends.append(noted if noted < limit else -math.inf)
        return ends[::-1]

    def _timeline(self, ends: Sequence[float], pauses: Sequence[Pause]) -> Timeline:
        free: dict[int, float] = {}  # since when, by device
        sent: dict[int | None, float] = {}  # by stage, what it sends next
        arrived: dict[tuple[int, Op], float] = {}
        boxes: list[Box] = []
        messages: list[Message] = []
        since: dict[int, float] = {}
        fresh = max((pause.end for pause in pauses[: self._first_pause]), default=-math.inf)
        for number, (event, end) in enumerate(zip(self._events, (without(pauses, each) for each in ends), strict=True)):
            if number == self._first:
                since = {device: max(seconds, without(pauses, fresh)) for device, seconds in free.items()}
            if isinstance(event, _Delivery):
                begins = max(without(pauses, event.begun), sent.get(event.sender, -math.inf))
                message = Message(event.sender, event.reader, event.op, begins, max(begins, end))
                arrived[event.reader, event.op] = max(message.arrived, arrived.get((event.reader, event.op), -math.inf))
                messages += [message] if number >= self._first else []
            else:
                device, dispatched = self.devices[event.stage], without(pauses, event.dispatched)
                reads = [arrived.pop((event.stage, op)) for op in event.ops if (event.stage, op) in arrived]
                start = max(free.get(device, -math.inf), dispatched, *reads)
                free[device] = sent[event.stage] = end
                boxes += [Box(event.stage, device, event.tick, event.ops, start, end)] if number >= self._first else []
        return Timeline("measured", tuple(boxes), tuple(messages), since).shifted()


def _is_there(tree: Any) -> bool:
    return all(isinstance(leaf, jax.Array) and leaf.is_ready() for leaf in jax.tree.leaves(tree))  # type: ignore[attr-defined]


class _Waiter:
    """A thread that waits for arrays in order, and notes the moments."""

    def __init__(self, clock: Callable[[], float], wait: Callable[[Any], object]):
        self.queue: SimpleQueue = SimpleQueue()
        self.error: Exception | None = None
        self._clock, self._wait = clock, wait
        self._thread = Thread(target=self._run, daemon=True)  # so that a process that must end does not wait for it
        self._thread.start()

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        for array, moment in iter(self.queue.get, None):
            try:
                self._wait(array)
            except Exception as error:
                self.error = self.error or error
            del array  # or it would live on until the next one comes
            moment.seconds = self._clock()
