"""What really happens, measured without a profiler: an observer of the engine notes what ends and arrives when.

The host must not wait, so threads do: one for the visits of every device, one for the transfers from each device to
each other, every one of which waits for its arrays in the order in which they were dispatched. What a device does not
tell is when a visit begins. It does one at a time and in order, so that a visit begins when the one before it has
ended, all that it reads has arrived, and the host has dispatched it, whatever comes last.

Where the loop pauses, to log or to evaluate, the clock is stopped: what it shows is cut out of the timeline.
"""

import math
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple

import jax

from fdg_jax.engine.base import COTANGENTS, INPUTS
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
    dispatched: float
    arrival: Moment


class Recorder:
    """An `engine.base.Observer` that makes a timeline. Times are its clock's.

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
        self._pauses: list[tuple[float, float]] = []  # from when to when, in order
        self._first = self._tick = 0
        self._fresh: float | None = None  # the end of the last pause before the mark
        self._now = clock()

    def begin(self, tick: int) -> None:
        self._tick, self._now = tick, self._clock()

    def deliver(self, messages: dict[tuple[str, int, int], Any]) -> None:
        for (kind, reader, batch), array in messages.items():
            sender, op = self._ends(kind, reader, batch)
            lane = -1 if sender is None else self.devices[sender], self.devices[reader]
            self._events.append(_Delivery(sender, reader, op, self._now, self._moment(lane, array)))
        self._now = self._clock()

    def visit(self, k: int, visit: Visit, ready: jax.Array) -> None:
        lane = self.devices[k], self.devices[k]
        self._events.append(_Visit(k, self._tick, visit, self._now, self._moment(lane, ready)))
        self._now = self._clock()

    def mark(self) -> None:
        """The window begins: what was seen before tells only since when devices are free."""
        self._first = len(self._events)
        self._fresh = self._pauses[-1][1] if self._pauses else None

    def pause(self) -> None:
        """From now on devices have nothing to do, since the loop is at something else than training."""
        self._pauses.append((self._clock(), math.inf))

    def resume(self) -> None:
        """The loop trains again."""
        self._pauses[-1] = self._pauses[-1][0], self._clock()

    def stop(self) -> Timeline:
        """Waits for all that was dispatched: the timeline since the mark without pauses, 0 its first box's start.

        Raises:
            RuntimeError: a computation failed.
        """
        self.abandon()
        for waiter in self._waiters.values():
            waiter.join()
        if errors := [waiter.error for waiter in self._waiters.values() if waiter.error]:
            raise RuntimeError(f"the timeline was not measured: {errors[0]}") from errors[0]
        return self._timeline()

    def abandon(self) -> None:
        """Lets the threads end, without waiting for them."""
        for waiter in self._waiters.values():
            waiter.queue.put(None)

    def _ends(self, kind: str, reader: int, batch: int) -> tuple[int | None, Op]:
        """The stage that sent a message, and the operation that reads it."""
        if kind == COTANGENTS:
            return reader + 1, Op(SYNTHESIS if self._schedule.local else BACKWARD, batch)
        return (reader - 1 if kind == INPUTS and reader > 0 else None), Op(FORWARD, batch)

    def _moment(self, lane: tuple[int, int], array: Any) -> Moment:
        if lane not in self._waiters:
            self._waiters[lane] = _Waiter(self._clock, self._wait)
        moment = Moment()
        self._waiters[lane].queue.put((array, moment))
        return moment

    def _trained(self, seconds: float) -> float:
        """What a clock would show that is stopped in pauses; a thread may note an end a little into one."""
        return seconds - sum(max(0.0, min(seconds, end) - begin) for begin, end in self._pauses)

    def _timeline(self) -> Timeline:
        free: dict[int, float] = {}  # since when, by device
        sent: dict[int, float] = {}  # by stage, what it sends next
        arrived: dict[tuple[int, Op], float] = {}
        boxes: list[Box] = []
        messages: list[Message] = []
        since: dict[int, float] = {}
        for number, event in enumerate(self._events):
            if number == self._first:
                fresh = -math.inf if self._fresh is None else self._trained(self._fresh)
                since = {device: max(end, fresh) for device, end in free.items()}
            if isinstance(event, _Delivery):
                message = self._message(event, sent)
                arrived[event.reader, event.op] = max(message.arrived, arrived.get((event.reader, event.op), 0.0))
                messages += [message] if number >= self._first else []
            else:
                device, end = self.devices[event.stage], self._trained(event.end.seconds)
                reads = [arrived.pop((event.stage, op)) for op in event.ops if (event.stage, op) in arrived]
                start = min(end, max(free.get(device, 0.0), self._trained(event.dispatched), *reads))
                free[device] = sent[event.stage] = end
                boxes += [Box(event.stage, device, event.tick, event.ops, start, end)] if number >= self._first else []
        return Timeline("measured", tuple(boxes), tuple(messages), since).shifted()

    def _message(self, event: _Delivery, sent: dict[int, float]) -> Message:
        """A transfer begins when it is dispatched and what it moves is there; threads may note both in either order."""
        dispatched, arrived = self._trained(event.dispatched), self._trained(event.arrival.seconds)
        there = dispatched if event.sender is None else sent.get(event.sender, 0.0)
        return Message(event.sender, event.reader, event.op, min(arrived, max(there, dispatched)), arrived)


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
