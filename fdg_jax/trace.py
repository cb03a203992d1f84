"""Timelines, planned and measured: where the time of every device goes, as figures and as a trace file.

The file is in the JSON format of Chrome's traces, which https://ui.perfetto.dev and chrome://tracing open: a process
for the plan and one for what was measured, a thread a device, a slice a visit, a flow a message. A thread of the host
has a slice for what it made and sent in a step.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

from fdg_jax.schedule import Op, Visit
from fdg_jax.timeline import Box, Message

US = 1e6  # microseconds, of which traces are made


@dataclass(frozen=True)
class Timeline:
    """Visits of a window, in the order in which they were dispatched, and the messages that moved in it.

    Attributes:
        name: "planned" or "measured".
        boxes: with times in seconds.
        messages: those that the boxes read, and that other boxes sent, or the host.
        since: when the last visit before the window ended, by device; where none is known, its first box begins then.
    """

    name: str
    boxes: tuple[Box, ...]
    messages: tuple[Message, ...] = ()
    since: Mapping[int, float] | None = None

    @property
    def lanes(self) -> dict[int, list[Box]]:
        """The boxes of every device in order."""
        lanes = defaultdict(list)
        for box in self.boxes:
            lanes[box.device].append(box)
        return dict(sorted(lanes.items()))

    def shifted(self) -> "Timeline":
        """The same with 0 at the start of the first box."""
        zero = min((box.start for box in self.boxes), default=0.0)
        boxes = tuple(box._replace(start=box.start - zero, end=box.end - zero) for box in self.boxes)
        messages = (m._replace(sent=m.sent - zero, arrived=m.arrived - zero) for m in self.messages)
        since = {device: seconds - zero for device, seconds in (self.since or {}).items()}
        return replace(self, boxes=boxes, messages=tuple(messages), since=since)

    def stages(self, device: int) -> list[int]:
        """That have boxes on a device."""
        return sorted({box.stage for box in self.boxes if box.device == device})

    @property
    def reads(self) -> dict[tuple[int, Op], list[Message]]:
        """The messages by their reader and the operation in which it reads them."""
        found = defaultdict(list)
        for message in self.messages:
            found[message.reader, message.op].append(message)
        return found

    def arrows(self) -> Iterator[tuple[Message, Box | None, Box]]:
        """Messages, the box that each comes from, or None for the host, and the box that reads it."""
        makes = {(box.stage, op): box for box in self.boxes for op in box.ops}
        for message in self.messages:
            kind = "F" if message.op.kind == "F" else "B"
            sender = None if message.sender is None else makes.get((message.sender, Op(kind, message.op.batch)))
            reader = makes.get((message.reader, message.op))
            if reader and (sender or message.sender is None):
                yield message, sender, reader


class Shares(NamedTuple):
    """Where the time of a device goes, in percent of its window. The five add up to 100.

    The window of a device lasts from the end of the visit before its first box (`Timeline.since`) to the end of its
    last. A moment of it is

    - compute, if one of its visits is at work;
    - transfer, if none is, and something that its next visit reads is on its way from another device;
    - input, if none is, and what its next visit reads is a batch that the host is making or sending.

    The rest it waits. Of what is neither compute nor transfer

    - imbalance comes first: what there is to lose by its stages' being lighter than those of the device that computes
      most, the latter's share of compute minus its own. It would idle so long if nobody waited for anybody, also for
      the host, and other cuts are the cure;
    - input is at most what that leaves, and
    - waiting what remains: for messages that others have not sent yet, as the schedule has it or because they wait
      themselves.
    """

    compute: float
    transfer: float
    input: float
    waiting: float
    imbalance: float


def shares(timeline: Timeline) -> dict[int, Shares]:
    """Of every device that has boxes."""
    reads, found = timeline.reads, dict[int, tuple[float, float, float]]()
    for device, boxes in timeline.lanes.items():
        begin = free = (timeline.since or {}).get(device, boxes[0].start)
        compute = transfer = supply = 0.0
        for box in boxes:
            messages = [message for op in box.ops for message in reads.get((box.stage, op), ())]
            moved = _covered([m for m in messages if m.sender is not None], free, box.start)
            supply += _covered(messages, free, box.start) - moved
            transfer += moved
            compute += box.end - box.start
            free = box.end
        whole = (free - begin) or 1.0
        found[device] = 100 * compute / whole, 100 * transfer / whole, 100 * supply / whole
    most = max((compute for compute, *_ in found.values()), default=0.0)
    return {device: _split(*parts, most) for device, parts in found.items()}


def _split(compute: float, transfer: float, supply: float, most: float) -> Shares:
    idle = max(0.0, 100 - compute - transfer)
    imbalance = min(idle, most - compute)
    supply = min(supply, idle - imbalance)
    return Shares(compute, transfer, supply, idle - imbalance - supply, imbalance)


def _covered(messages: Sequence[Message], start: float, end: float) -> float:
    """Seconds between start and end in which at least one of the messages is on its way."""
    covered = 0.0
    for message in sorted(messages, key=lambda each: each.sent):
        begin, stop = max(start, message.sent), min(end, message.arrived)
        if stop > begin:
            covered, start = covered + stop - begin, stop
    return covered


def table(timelines: Sequence[Timeline]) -> str:
    """A line a device of every timeline, with its `Shares`."""
    lines = [f"{'':10}device  stages  " + "".join(f"{name:>11}" for name in Shares._fields)]
    for timeline in timelines:
        for device, parts in shares(timeline).items():
            stages = ",".join(map(str, timeline.stages(device)))
            lines.append(f"{timeline.name:10}{device:<8}{stages:8}" + "".join(f"{part:11.1f}" for part in parts))
    return "\n".join(lines)


def by_device(timeline: Timeline) -> list[dict[str, Any]]:
    """The same for machines: of every device its stages and `Shares`."""
    return [
        {"device": device, "stages": timeline.stages(device), **parts._asdict()}
        for device, parts in shares(timeline).items()
    ]


def chrome_trace(timelines: Sequence[Timeline]) -> dict[str, Any]:
    """The timelines as one trace, ready for `json.dump`; a process each."""
    events: list[dict[str, Any]] = []
    for pid, timeline in enumerate(timelines):
        host = max(timeline.lanes, default=-1) + 1  # its thread comes after those of devices
        events += _lanes(pid, timeline)
        events += [_slice(pid, box) for box in timeline.boxes]
        events += _deliveries(pid, host, timeline.messages)
        for message, sender, reader in timeline.arrows():
            events += _flow(pid, host, len(events), message, sender, reader)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _named(what: str, pid: int, tid: int, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": args}


def _lanes(pid: int, timeline: Timeline) -> Iterator[dict[str, Any]]:
    yield _named("process_name", pid, 0, name=timeline.name)
    yield _named("process_sort_index", pid, 0, sort_index=pid)
    for device, share in shares(timeline).items():
        yield _named("thread_name", pid, device, name=f"device {device}")
        yield _named("thread_sort_index", pid, device, sort_index=device)
        about = {"stages": timeline.stages(device), "percent": share._asdict()}
        yield {"ph": "I", "s": "t", "name": "shares", "pid": pid, "tid": device, "ts": 0.0, "args": about}


def _slice(pid: int, box: Box) -> dict[str, Any]:
    about = {"stage": box.stage, "tick": box.tick, "batches": sorted({op.batch for op in box.ops})}
    times = {"ts": US * box.start, "dur": US * (box.end - box.start)}
    return {"ph": "X", "name": title(box.ops), "cat": "visit", "pid": pid, "tid": box.device, **times, "args": about}


def _deliveries(pid: int, tid: int, messages: Sequence[Message]) -> Iterator[dict[str, Any]]:
    """What the host turned to at one time is a slice; it may turn to the next before that arrives."""
    groups = defaultdict(list)
    for message in messages:
        if message.sender is None:
            groups[message.sent].append(message)
    if groups:
        yield _named("thread_name", pid, tid, name="host")
        yield _named("thread_sort_index", pid, tid, sort_index=tid)
    for start, following in pairwise([*sorted(groups), math.inf]):
        end = min(following, max(message.arrived for message in groups[start]))
        batches = sorted({message.op.batch for message in groups[start]})
        name, times = f"batch {', '.join(map(str, batches))}", {"ts": US * start, "dur": US * (end - start)}
        about = {"batches": batches}
        yield {"ph": "X", "name": name, "cat": "input", "pid": pid, "tid": tid, **times, "args": about}


def _flow(pid: int, host: int, number: int, message: Message, sender: Box | None, reader: Box) -> list[dict[str, Any]]:
    """An arrow from the sender's slice to the reader's: its ends must lie within them, hence not at the very end."""
    name = "batch" if sender is None else "activations" if message.op.kind == "F" else "error gradient"
    about = {"batch": message.op.batch, "sent_us": US * message.sent, "arrived_us": US * message.arrived}
    both = {"name": name, "cat": "message", "id": number, "pid": pid, "args": about}
    leaves = message.sent if sender is None else sender.end - (sender.end - sender.start) / 1024
    return [
        {**both, "ph": "s", "tid": host if sender is None else sender.device, "ts": US * leaves},
        {**both, "ph": "f", "bp": "e", "tid": reader.device, "ts": US * reader.start},
    ]


def title(visit: Visit) -> str:
    """`B3 U F5`."""
    return " ".join(map(str, visit))
