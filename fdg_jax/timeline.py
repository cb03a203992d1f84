"""How long a schedule takes, before anything runs: its visits planned on devices and links, in seconds.

The semantics are those of `engine.mpmd` with a host whose own time is nothing. A device does its visits in the order
of the schedule; a visit is one program, which starts when its device is free and all that it reads has arrived, and
whose messages leave together when it ends. The host goes `run_ahead` losses ahead of the last stage, and then waits. No
tick waits for the one before, unless a `barrier` is asked for, as in code that joins all stages after every tick; it
makes the forward lock of `schedule.ddg` a real one.

Assumed of links: there is one from every device to every other, each way for itself. It moves one message at a time,
in the order in which they are sent, for bytes / bandwidth seconds, and the message arrives `latency` later. Transfers
take nothing from the devices, and what stays on a device is there at once.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

from fdg_jax.schedule import BACKWARD, FORWARD, SYNTHESIS, UPDATE, Op, Schedule, Visit, num_ticks, unroll

RUN_AHEAD = 8  # losses, as in `engine.mpmd`
GROUPS = 60  # over which the steady state is measured, after as many; whole for patterns of 2 to 6 groups


@dataclass(frozen=True)
class StageCost:
    """What one batch, or micro-batch where the schedule has them, costs on a stage.

    Attributes:
        forward, backward, update, synthesis: seconds.
        activations: bytes of the message to the next stage.
        cotangents: bytes of the message to the stage before.
    """

    forward: float
    backward: float
    update: float = 0.0
    activations: float = 0.0
    cotangents: float = 0.0
    synthesis: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a finite number that is not negative; got {value!r}")

    def seconds(self, visit: Visit) -> float:
        """Of a visit, which does its operations one after the other."""
        each = {FORWARD: self.forward, BACKWARD: self.backward, UPDATE: self.update, SYNTHESIS: self.synthesis}
        return sum(each[op.kind] for op in visit)


@dataclass(frozen=True)
class Link:
    """Between two devices: seconds from the end of a transfer to its arrival, and bytes a second."""

    latency: float = 0.0
    bandwidth: float = math.inf

    def __post_init__(self) -> None:
        if not 0 <= self.latency < math.inf:
            raise ValueError(f"latency must be a finite number that is not negative; got {self.latency!r}")
        if not self.bandwidth > 0:
            raise ValueError(f"bandwidth must be positive; got {self.bandwidth!r}")


FREE = Link()


class Box(NamedTuple):
    """A planned visit: stage and device by number, start and end in seconds."""

    stage: int
    device: int
    tick: int
    ops: Visit
    start: float
    end: float


class Message(NamedTuple):
    """A transfer between the devices of two stages: seconds at which it begins and arrives, and what reads it.

    The sender is None where a batch comes from the host, which is not planned.
    """

    sender: int | None
    reader: int
    op: Op
    sent: float
    arrived: float


@dataclass(frozen=True)
class Steady:
    """What a schedule comes to once the pipeline is full.

    Attributes:
        batch_seconds: from one batch to the next; of a micro-batch where the schedule has them.
        busy: share of the time in which a device works, of every device.
        in_flight: the most batches that have begun and are not answered by all stages, at any time.
        speed_up: over one device that does all the stages' work in sequence.
        boxes: of all visits from the beginning.
    """

    batch_seconds: float
    busy: tuple[float, ...]
    in_flight: int
    speed_up: float
    boxes: tuple[Box, ...]

    @property
    def idle(self) -> tuple[float, ...]:
        """Share of the time in which a device waits, of every device."""
        return tuple(1 - share for share in self.busy)


def plan(
    schedule: Schedule,
    costs: Sequence[StageCost],
    num_batches: int | None = None,
    link: Link = FREE,
    devices: Sequence[int] | None = None,
    run_ahead: int = RUN_AHEAD,
    barrier: bool = False,
    messages: list[Message] | None = None,
) -> Iterator[Box]:
    """The visits for `num_batches` batches (for ever when None), filling and draining included, in schedule order.

    Args:
        schedule: of K stages.
        costs: of every stage.
        num_batches: counted as `schedule.row` counts them.
        link: between any two devices.
        devices: 0, 1, ... of every stage; one each by default.
        run_ahead: how many losses the host may be ahead of the last stage.
        barrier: no visit starts before those of the tick before have ended.
        messages: to which those between devices are added as they are sent.

    Raises:
        ValueError: costs or devices are not one a stage, devices are not numbered from 0, or run_ahead is below 1.
    """
    devices = _check_devices(schedule, costs, devices)
    if run_ahead < 1:
        raise ValueError(f"the host must be let ahead by at least one loss; got run_ahead={run_ahead}")
    planner = _Planner(schedule, costs, link, devices, run_ahead, [] if messages is None else messages)
    return planner.boxes(unroll(schedule, num_batches), barrier)


def _check_devices(schedule: Schedule, costs: Sequence[StageCost], devices: Sequence[int] | None) -> tuple[int, ...]:
    devices = tuple(range(schedule.num_stages) if devices is None else devices)
    for name, values in (("costs", costs), ("devices", devices)):
        if len(values) != schedule.num_stages:
            raise ValueError(f"{name} must be one for each of the {schedule.num_stages} stages; got {len(values)}")
    if set(devices) != set(range(len(set(devices)))):
        raise ValueError(f"devices must be numbered 0, 1, ... without a gap; got {devices}")
    return devices


class _Planner:
    """When devices and links are free, and when messages arrive."""

    def __init__(
        self,
        schedule: Schedule,
        costs: Sequence[StageCost],
        link: Link,
        devices: Sequence[int],
        run_ahead: int,
        messages: list[Message],
    ):
        self.messages = messages
        self.schedule, self.costs, self.link, self.devices = schedule, costs, link, devices
        self.run_ahead, self.last = run_ahead, schedule.num_stages - 1
        self.device_free: dict[int, float] = defaultdict(float)
        self.link_free: dict[tuple[int, int], float] = defaultdict(float)
        self.arrivals: dict[tuple[int, Op], float] = {}  # of what stage k needs for an operation
        self.losses: list[float] = []
        self.host = 0.0  # when the next visit is dispatched

    def boxes(self, rows: Iterable[Sequence[Visit]], barrier: bool) -> Iterator[Box]:
        for tick, stages in enumerate(rows):
            if barrier:
                self.host = max(self.device_free.values(), default=0.0)
            for k, visit in enumerate(stages):
                if visit:
                    yield self.box(k, tick, visit)

    def box(self, k: int, tick: int, visit: Visit) -> Box:
        device = self.devices[k]
        ready = [self.arrivals.pop((k, op)) for op in visit if self.reads(k, op)]
        start = max(self.device_free[device], self.host, *ready)
        self.device_free[device] = end = start + self.costs[k].seconds(visit)
        for op in visit:
            if op.kind == FORWARD and k < self.last:
                self.send(k, k + 1, op, end, self.costs[k].activations)
            elif op.kind == FORWARD:
                self.await_loss(end)
            elif op.kind == BACKWARD and k > 0 and self.schedule.sends_back:
                wanted = Op(SYNTHESIS, op.batch) if self.schedule.local else op
                self.send(k, k - 1, wanted, end, self.costs[k].cotangents)
        return Box(k, device, tick, visit, start, end)

    def reads(self, k: int, op: Op) -> bool:
        """Whether an operation waits for a message of another stage."""
        if op.kind == FORWARD:
            return k > 0
        return op.kind == SYNTHESIS or (op.kind == BACKWARD and k < self.last and not self.schedule.local)

    def send(self, k: int, reader: int, op: Op, sent: float, size: float) -> None:
        link = self.devices[k], self.devices[reader]
        if link[0] == link[1]:
            self.arrivals[reader, op] = sent
        else:
            begins = max(sent, self.link_free[link])
            self.link_free[link] = begins + size / self.link.bandwidth
            self.arrivals[reader, op] = arrived = self.link_free[link] + self.link.latency
            self.messages.append(Message(k, reader, op, begins, arrived))

    def await_loss(self, end: float) -> None:
        self.losses.append(end)
        if len(self.losses) > self.run_ahead:
            self.host = max(self.host, self.losses.pop(0))


def steady(
    schedule: Schedule,
    costs: Sequence[StageCost],
    link: Link = FREE,
    devices: Sequence[int] | None = None,
    run_ahead: int = RUN_AHEAD,
    barrier: bool = False,
) -> Steady:
    """The steady state, measured over GROUPS groups when the pipeline has been full for as many.

    Args and raises: as for `plan`.
    """
    full = -(-schedule.span // schedule.period) + GROUPS
    num_groups = full + GROUPS
    ticks = num_ticks(schedule, num_groups * schedule.group)
    planned = plan(schedule, costs, None, link, devices, run_ahead, barrier)
    boxes = tuple(takewhile(lambda box: box.tick < ticks, planned))
    ends = {(box.stage, op.batch): box.end for box in boxes for op in box.ops if op.kind == UPDATE}
    first, last = (number * schedule.group - 1 for number in (full, num_groups))
    group_seconds = max(ends[k, last] - ends[k, first] for k in range(schedule.num_stages)) / GROUPS
    work = [
        schedule.group * (cost.forward + cost.backward) + cost.update + cost.synthesis * schedule.synthesises(k)
        for k, cost in enumerate(costs)
    ]
    placed = _check_devices(schedule, costs, devices)
    loads = [sum(w for w, d in zip(work, placed, strict=True) if d == device) for device in range(len(set(placed)))]
    return Steady(
        batch_seconds=group_seconds / schedule.group,
        busy=tuple(min(1.0, load / group_seconds) if group_seconds else 0.0 for load in loads),
        in_flight=peak_in_flight(boxes),
        speed_up=sum(work) / group_seconds if group_seconds else 1.0,
        boxes=boxes,
    )


def peak_in_flight(boxes: Iterable[Box]) -> int:
    """The most batches at any time that have begun their first forward and not ended their last backward."""
    begins: dict[int, float] = {}
    ends: dict[int, float] = {}
    for box in boxes:
        for op in box.ops:
            if op.kind == FORWARD:
                begins.setdefault(op.batch, box.start)
            elif op.kind == BACKWARD:
                ends[op.batch] = max(box.end, ends.get(op.batch, 0.0))
    changes = [(time, 1) for time in begins.values()] + [(time, -1) for time in ends.values()]
    now = peak = 0
    for _, change in sorted(changes):  # of two at once, the one that leaves comes first
        now += change
        peak = max(peak, now)
    return peak
