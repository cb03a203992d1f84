"""The picture of timelines: lanes of devices, boxes of visits, arrows of messages, and the percentages beside them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fdg_jax.plots import FAINT, INK, NAMES, bare, colour, draw_legend, fill, ink_on, new_figure
from fdg_jax.schedule import UPDATE
from fdg_jax.timeline import Box, Message
from fdg_jax.trace import Timeline, shares

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST = 16  # visits a device in a picture, so that they can be read; a file has all
LETTERS = 5.5, 9.0  # points, of a box's label: smaller ones are left out
NARROWEST = 0.8  # points, of a box: shorter visits are drawn as wide, to be seen
EDGED = 2.5  # points, from which on a box has a white edge: it would hide a narrower one
ROOM = 2.4  # inches beside the lanes
HEIGHT = 0.62  # of a lane's boxes; the rest is for arrows
BAND = {UPDATE: 0.25}  # height of an operation in its visit's box, relative to others


def draw(timelines: Sequence[Timeline]) -> "Figure":
    """The timelines one above the other, on one scale, until a device has done MOST visits; arrows are messages."""
    lanes = [lane for timeline in timelines for lane in timeline.lanes.values()]
    full = [lane[MOST - 1].end for lane in lanes if len(lane) > MOST]
    end = min(full, default=max(lane[-1].end for lane in lanes))
    width = max(9.0, ROOM + 0.62 * min(MOST, max(map(len, lanes))))
    heights = [0.75 + 0.78 * len(timeline.lanes) for timeline in timelines]
    figure = new_figure(width, 0.65 + sum(heights))
    panels = figure.subplots(len(timelines), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, timeline in zip(panels, timelines, strict=True):
        _draw_panel(axes, timeline, end, points=72 * (width - ROOM) / end if end else 0.0)
    panels[-1].set_xlabel("ms")
    kinds = {op.kind for timeline in timelines for box in timeline.boxes for op in box.ops}
    draw_legend(figure, [kind for kind in NAMES if kind in kinds])
    return figure


def _length(timeline: Timeline, end: float) -> str:
    """How long it is, and how much of it is shown."""
    last = max(box.end for box in timeline.boxes)
    shown = "" if last <= end else f"the first {1e3 * end:,.1f} of "
    return f"{shown}{1e3 * last:,.1f} ms"


def _draw_panel(axes: "Axes", timeline: Timeline, end: float, points: float) -> None:
    """One timeline until `end`; `points` of the page a second."""
    lanes, parts = timeline.lanes, shares(timeline)
    for lane, (device, boxes) in enumerate(lanes.items()):
        shared = len(timeline.stages(device)) > 1
        axes.broken_barh([(0, 1e3 * end)], (lane - HEIGHT / 2, HEIGHT), facecolors=FAINT, zorder=0)
        for box in boxes:
            if box.start < end:
                _draw_visit(axes, lane, box, points, f"{box.stage}: " if shared else "")
        text = "\n".join(f"{share:.0f} % {name}" for name, share in parts[device]._asdict().items())
        axes.text(1.005, lane, text, transform=axes.get_yaxis_transform(), va="center", fontsize=7, color=INK)
    places = {device: lane for lane, device in enumerate(lanes)}
    for message, sender, reader in timeline.arrows():
        if sender and sender.device != reader.device and reader.start < end:
            _draw_arrow(axes, message, places[sender.device], places[reader.device])
    axes.set(xlim=(0, 1e3 * end), ylim=(len(lanes) - 0.5, -0.5))
    axes.set_title(f"{timeline.name}, {_length(timeline, end)}", loc="left", fontsize=11, color=INK)
    axes.set_yticks(range(len(lanes)), [f"device {device}" for device in lanes])
    bare(axes)


def _draw_visit(axes: "Axes", lane: int, box: Box, points: float, stage: str) -> None:
    """A band an operation, in the order in which they run; how a visit's time is divided among them nobody knows.

    The first label begins with `stage`; `points` of the page a second.
    """
    whole, top = sum(BAND.get(op.kind, 1.0) for op in box.ops), lane - HEIGHT / 2
    wide = max(NARROWEST, points * (box.end - box.start))
    above = 1.0 if wide >= EDGED else 2.5  # than the next visit and its edge, which would hide a narrow one
    start, length = 1e3 * box.start, 1e3 * wide / points if points else 0.0
    labels = {op: str(op) for op in box.ops if op.kind != UPDATE}
    labels |= {op: stage + label for op, label in list(labels.items())[:1]}
    size = min(LETTERS[1], wide / (0.65 * max(map(len, labels.values()), default=1)))
    for op in box.ops:
        height, face = HEIGHT * BAND.get(op.kind, 1.0) / whole, fill(op.kind, op.batch)
        axes.broken_barh([(start, length)], (top, height), facecolors=face, edgecolors="none", zorder=above)
        if op in labels and size >= LETTERS[0]:
            _write(axes, (start + length / 2, top + height / 2), labels[op], size, ink_on(face))
        top += height
    if wide >= EDGED:
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
