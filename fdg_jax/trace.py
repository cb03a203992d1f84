"""Timelines, planned and measured: where the time of every device goes, as figures, as a trace file and as a picture.

The file is in the JSON format of Chrome's traces, which https://ui.perfetto.dev and chrome://tracing open: a process
for the plan and one for what was measured, a thread a device, a slice a visit, a flow a message.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from fdg_jax.plots import FAINT, INK, NAMES, bare, colour, draw_legend, fill, ink_on, new_figure
from fdg_jax.schedule import UPDATE, Op, Visit
from fdg_jax.timeline import Box, Message

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST = 32  # visits a device in a picture; a file has all
HEIGHT = 0.62  # of a lane's boxes; the rest is for arrows
BAND = {UPDATE: 0.25}  # height of an operation in its visit's box, relative to others
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

    @property
    def reads(self) -> dict[tuple[int, Op], list[Message]]:
        """The messages by their reader and the operation in which it reads them."""
        found = defaultdict(list)
        for message in self.messages:
            found[message.reader, message.op].append(message)
        return found

    def arrows(self) -> Iterator[tuple[Message, Box, Box]]:
        """Messages from one box to another, and the two."""
        makes = {(box.stage, op): box for box in self.boxes for op in box.ops}
        for message in self.messages:
            if message.sender is None:
                continue
            kind = "F" if message.op.kind == "F" else "B"
            sender = makes.get((message.sender, Op(kind, message.op.batch)))
            if sender and (reader := makes.get((message.reader, message.op))):
                yield message, sender, reader


class Shares(NamedTuple):
    """Where the time of a device goes, in percent of its window. The four add up to 100.

    The window of a device lasts from the end of the visit before its first box (`Timeline.since`) to the end of its
    last. A moment of it is

    - compute, if one of its visits is at work;
    - transfer, if none is, and something that its next visit reads is on its way, sent and not arrived.

    The rest it idles. Of that

    - imbalance is what there is to lose by its stages' being lighter than those of the device that computes most: the
      latter's share of compute minus its own, at most the rest. It would idle so long if nobody waited for anybody, and
      other cuts are the cure;
    - waiting is what remains: for messages that others have not sent yet, as the schedule has it, and for the host.
    """

    compute: float
    transfer: float
    waiting: float
    imbalance: float


def shares(timeline: Timeline) -> dict[int, Shares]:
    """Of every device that has boxes."""
    reads, found = timeline.reads, {}
    for device, boxes in timeline.lanes.items():
        begin = free = (timeline.since or {}).get(device, boxes[0].start)
        compute = transfer = 0.0
        for box in boxes:
            messages = [message for op in box.ops for message in reads.get((box.stage, op), ())]
            transfer += _covered(messages, free, box.start)
            compute += box.end - box.start
            free = box.end
        whole = (free - begin) or 1.0
        found[device] = 100 * compute / whole, 100 * transfer / whole
    most = max((compute for compute, _ in found.values()), default=0.0)
    return {device: _split(compute, transfer, most) for device, (compute, transfer) in found.items()}


def _split(compute: float, transfer: float, most: float) -> Shares:
    rest = max(0.0, 100 - compute - transfer)
    imbalance = min(rest, most - compute)
    return Shares(compute, transfer, rest - imbalance, imbalance)


def _covered(messages: Sequence[Message], start: float, end: float) -> float:
    """Seconds between start and end in which at least one of the messages is on its way."""
    covered = 0.0
    for message in sorted(messages, key=lambda each: each.sent):
        begin, stop = max(start, message.sent), min(end, message.arrived)
        if stop > begin:
            covered, start = covered + stop - begin, stop
    return covered


def chrome_trace(timelines: Sequence[Timeline]) -> dict[str, Any]:
    """The timelines as one trace, ready for `json.dump`; a process each."""
    events: list[dict[str, Any]] = []
    for pid, timeline in enumerate(timelines):
        events += _lanes(pid, timeline)
        events += [_slice(pid, box) for box in timeline.boxes]
        for message, sender, reader in timeline.arrows():
            events += _flow(pid, len(events), message, sender, reader)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _lanes(pid: int, timeline: Timeline) -> Iterator[dict[str, Any]]:
    def name(what: str, tid: int, **args: Any) -> dict[str, Any]:
        return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": args}

    yield name("process_name", 0, name=timeline.name)
    yield name("process_sort_index", 0, sort_index=pid)
    for device, share in shares(timeline).items():
        stages = sorted({box.stage for box in timeline.lanes[device]})
        yield name("thread_name", device, name=f"device {device}")
        yield name("thread_sort_index", device, sort_index=device)
        about = {"stages": stages, "percent": share._asdict()}
        yield {"ph": "I", "s": "t", "name": "shares", "pid": pid, "tid": device, "ts": 0.0, "args": about}


def _slice(pid: int, box: Box) -> dict[str, Any]:
    about = {"stage": box.stage, "tick": box.tick, "batches": sorted({op.batch for op in box.ops})}
    times = {"ts": US * box.start, "dur": US * (box.end - box.start)}
    return {"ph": "X", "name": title(box.ops), "cat": "visit", "pid": pid, "tid": box.device, **times, "args": about}


def _flow(pid: int, number: int, message: Message, sender: Box, reader: Box) -> list[dict[str, Any]]:
    """An arrow from the sender's slice to the reader's: its ends must lie within them, hence not at the very end."""
    name = "activations" if message.op.kind == "F" else "error gradient"
    about = {"batch": message.op.batch, "sent_us": US * message.sent, "arrived_us": US * message.arrived}
    both = {"name": name, "cat": "message", "id": number, "pid": pid, "args": about}
    leaves = sender.end - (sender.end - sender.start) / 1024
    return [
        {**both, "ph": "s", "tid": sender.device, "ts": US * leaves},
        {**both, "ph": "f", "bp": "e", "tid": reader.device, "ts": US * reader.start},
    ]


def title(visit: Visit) -> str:
    """`B3 U F5`."""
    return " ".join(map(str, visit))


def draw(timelines: Sequence[Timeline]) -> "Figure":
    """The timelines one above the other, on one scale, their first MOST visits a device; arrows are messages."""
    lanes = [lane for timeline in timelines for lane in timeline.lanes.values()]
    end = max(lane[:MOST][-1].end for lane in lanes)
    visits = min(MOST, max(map(len, lanes)))
    width = min(24.0, max(9.0, 2.4 + 0.62 * visits))
    height = sum(0.75 + 0.78 * len(timeline.lanes) for timeline in timelines)
    figure = new_figure(width, 0.65 + height)
    ratios = [0.75 + 0.78 * len(timeline.lanes) for timeline in timelines]
    panels = figure.subplots(len(timelines), sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    for axes, timeline in zip(panels, timelines, strict=True):
        _draw_panel(axes, timeline, end, points=72 * (width - 2.4) / end if end else 0.0)
    panels[-1].set_xlabel("ms")
    kinds = {op.kind for timeline in timelines for box in timeline.boxes for op in box.ops}
    draw_legend(figure, [kind for kind in NAMES if kind in kinds])
    return figure


def _draw_panel(axes: "Axes", timeline: Timeline, end: float, points: float) -> None:
    """One timeline until `end`; `points` of the page a second."""
    lanes, parts = timeline.lanes, shares(timeline)
    for lane, (device, boxes) in enumerate(lanes.items()):
        axes.broken_barh([(0, 1e3 * end)], (lane - HEIGHT / 2, HEIGHT), facecolors=FAINT, zorder=0)
        for box in boxes:
            if box.start < end:
                _draw_visit(axes, lane, box, points * (box.end - box.start))
        text = "\n".join(f"{share:.0f} % {name}" for name, share in parts[device]._asdict().items())
        axes.text(1.005, lane, text, transform=axes.get_yaxis_transform(), va="center", fontsize=7, color=INK)
    places = {device: lane for lane, device in enumerate(lanes)}
    for message, sender, reader in timeline.arrows():
        if sender.device != reader.device and reader.start < end:
            _draw_arrow(axes, message, places[sender.device], places[reader.device])
    axes.set(xlim=(0, 1e3 * end), ylim=(len(lanes) - 0.5, -0.5))
    last = max(box.end for box in timeline.boxes)
    axes.set_title(f"{timeline.name}, {1e3 * last:,.1f} ms", loc="left", fontsize=11, color=INK)
    axes.set_yticks(range(len(lanes)), [f"device {device}" for device in lanes])
    bare(axes)


def _draw_visit(axes: "Axes", lane: int, box: Box, points: float) -> None:
    """A band an operation, in the order in which they run; how a visit's time is divided among them nobody knows."""
    whole, top = sum(BAND.get(op.kind, 1.0) for op in box.ops), lane - HEIGHT / 2
    start, length = 1e3 * box.start, 1e3 * (box.end - box.start)
    for op in box.ops:
        height, face, text = HEIGHT * BAND.get(op.kind, 1.0) / whole, fill(op.kind, op.batch), str(op)
        axes.broken_barh([(start, length)], (top, height), facecolors=face, edgecolors="none", zorder=1)
        size = min(9.0, points / (0.75 * len(text)))
        if op.kind != UPDATE and size >= 4:
            _write(axes, (start + length / 2, top + height / 2), text, size, ink_on(face))
        top += height
    place = [(start, length)], (lane - HEIGHT / 2, HEIGHT)
    axes.broken_barh(*place, facecolors="none", edgecolors="white", linewidth=0.9, zorder=2)


def _write(axes: "Axes", place: tuple[float, float], text: str, size: float, ink: str) -> None:
    axes.text(*place, text, ha="center", va="center_baseline", fontsize=size, color=ink, clip_on=True, zorder=3)


def _draw_arrow(axes: "Axes", message: Message, sender: int, reader: int) -> None:
    side = HEIGHT / 2 if reader > sender else -HEIGHT / 2
    begin, end = (1e3 * message.sent, sender + side), (1e3 * message.arrived, reader - side)
    look = {"arrowstyle": "-|>", "mutation_scale": 8, "shrinkA": 0, "shrinkB": 0, "linewidth": 1.0}
    axes.annotate(
        "", end, begin, arrowprops={**look, "color": colour(message.op.batch)}, zorder=4, annotation_clip=True
    )
