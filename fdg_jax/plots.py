"""Pictures as files, and the one of a schedule: lanes of stages, boxes of operations, a colour for every batch.

matplotlib is imported when something is drawn and not before, and never through pyplot: figures need no display, and
nothing is kept behind the caller's back. A file holds neither date nor path: the same picture is the same bytes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fdg_jax.schedule import BACKWARD, FORWARD, SYNTHESIS, UPDATE, Schedule, Visit, row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which those who see two primaries only tell apart; neighbours differ in brightness too.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
INK, FAINT = "#1F2328", "#F1F2F4"  # of text and updates; of the lanes, where a stage waits
TINT = {FORWARD: 0.62, BACKWARD: 0.0, SYNTHESIS: 0.35, UPDATE: 0.0}  # how much white is mixed into a batch's colour
WIDTH = {FORWARD: 1.0, BACKWARD: 1.0, SYNTHESIS: 1.0, UPDATE: 0.22}  # of a box beside others in its tick
GAP = 0.03  # on both sides of a visit, of a tick
NAMES = {FORWARD: "forward", BACKWARD: "backward", UPDATE: "update", SYNTHESIS: "synthesis"}
HATCH = "...."  # of a synthesis
SUFFIXES = (".png", ".svg")
DPI = 160


class Drawn(NamedTuple):
    """A box on a lane: from `start` for `length`, in ticks or seconds."""

    kind: str
    batch: int
    start: float
    length: float


def colour(batch_number: int) -> str:
    """Of a batch, as #rrggbb; they repeat after seven."""
    return PALETTE[batch_number % len(PALETTE)]


def tinted(colour: str, white: float) -> str:
    """The colour with that share of white in it."""
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(part + (255 - part) * white):02X}" for part in parts)


def fill(kind: str, batch_number: int) -> str:
    """Of a box: forward pale, backward full, both in the batch's colour; updates dark."""
    return INK if kind == UPDATE else tinted(colour(batch_number), TINT[kind])


def ink_on(background: str) -> str:
    """Black or white, whichever is read better on a colour."""
    return max(("#000000", "#FFFFFF"), key=lambda ink: contrast(ink, background))


def contrast(colour: str, other: str) -> float:
    """From 1 to 21, by W3C's WCAG 2, which asks for 4.5 of text: (L1 + 0.05) / (L2 + 0.05), the lighter one above."""
    low, high = sorted((_luminance(colour), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of so many inches, which arranges what is put into it."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def save(figure: "Figure", path: Path | str) -> Path:
    """Writes PNG or SVG, by the file's suffix; makes its folder where it is missing.

    Raises:
        ValueError: another suffix.
    """
    import matplotlib

    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"a picture is written as {' or '.join(SUFFIXES)}; got {path.name!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    nothing = {"Software": None} if suffix == ".png" else {"Date": None, "Creator": None}
    with matplotlib.rc_context({"svg.hashsalt": "fdg_jax", "svg.fonttype": "path"}):  # ids that are not random
        figure.savefig(path, format=suffix[1:], dpi=DPI, metadata=nothing)
    return path


def draw_schedule(schedule: Schedule, ticks: int | None = None, title: str | None = None) -> "Figure":
    """The schedule's picture: a lane a stage, a box an operation with its batch's number; a visit fills its tick.

    Args:
        schedule: of K stages.
        ticks: as many from tick 0 on; by default until the steady state has shown itself.
        title: instead of the schedule's name.
    """
    ticks = usual_ticks(schedule) if ticks is None else ticks
    if ticks < 1:
        raise ValueError(f"a picture needs at least one tick; got ticks={ticks}")
    stages = schedule.num_stages
    width = min(20.0, max(6.5, 1.2 + (0.5 if ticks < 24 else 0.4) * ticks))
    figure = new_figure(width, 1.45 + 0.4 * stages)
    axes = figure.add_subplot()
    points = 72 * (width - 1.2) / ticks  # of a tick
    for k in range(stages):
        draw_lane(axes, k, 0, ticks)
        visits = [row(schedule, tick)[k] for tick in range(ticks)]
        for box in (box for tick, visit in enumerate(visits) for box in _boxes(tick, visit)):
            draw_box(axes, k, box, size=min(9.0, 0.7 * points * box.length))
    facts = [title or schedule.name, f"K = {stages}"] + ([f"M = {schedule.group}"] if schedule.group > 1 else [])
    axes.set_title(", ".join(facts), loc="left", fontsize=11, color=INK)
    axes.set(xlim=(0, ticks), ylim=(stages - 0.4, -0.6), xlabel="tick")
    step = next(step for step in (1, 2, 5, 10, 20, 50, 10**6) if step * points > 13)
    axes.set_xticks([tick + 0.5 for tick in range(0, ticks, step)], [str(tick) for tick in range(0, ticks, step)])
    axes.set_yticks(range(stages), [f"stage {k}" for k in range(stages)])
    bare(axes)
    used = {slot.kind for slots in schedule.stages for slot in slots}
    draw_legend(figure, [kind for kind in NAMES if kind in used])
    return figure


def usual_ticks(schedule: Schedule) -> int:
    """Until the first group is answered, and as many again as show what follows; what is legible of that."""
    return min(72, max(8, schedule.span + max(4, min(schedule.period, schedule.span // 2))))


def _boxes(tick: int, visit: Visit) -> Iterator[Drawn]:
    whole, start = sum(WIDTH[op.kind] for op in visit), tick + GAP
    for op in visit:
        length = (1 - 2 * GAP) * WIDTH[op.kind] / whole
        yield Drawn(op.kind, op.batch, start, length)
        start += length


def draw_lane(axes: "Axes", lane: int, start: float, length: float) -> None:
    """The ground of a lane, which shows where it waits."""
    axes.broken_barh([(start, length)], (lane - 0.4, 0.8), facecolors=FAINT, zorder=0)


def draw_box(axes: "Axes", lane: int, box: Drawn, size: float) -> None:
    """A box with its batch's number in letters of `size` points; updates, and boxes too small for one, have none."""
    face = fill(box.kind, box.batch)
    axes.broken_barh(
        [(box.start, box.length)],
        (lane - 0.4, 0.8),
        facecolors=face,
        edgecolors="white",
        linewidth=0.7,
        hatch=HATCH if box.kind == SYNTHESIS else None,
        zorder=1,
    )
    if box.kind != UPDATE and size >= 3:
        ground = {"facecolor": face, "edgecolor": "none", "pad": 0.6} if box.kind == SYNTHESIS else None
        middle, ink = box.start + box.length / 2, ink_on(face)
        text = axes.text(middle, lane, str(box.batch), ha="center", va="center_baseline", color=ink, zorder=2)
        text.set(fontsize=size, bbox=ground)


def draw_legend(figure: "Figure", kinds: list[str]) -> None:
    """What pale, full, hatched and dark mean, below the axes."""
    from matplotlib.patches import Patch

    def patch(kind: str) -> Patch:
        hatch = HATCH if kind == SYNTHESIS else None
        return Patch(facecolor=fill(kind, 0), edgecolor="white", hatch=hatch, label=NAMES[kind])

    handles = [*map(patch, kinds), Patch(facecolor=FAINT, edgecolor="#D0D3D8", label="waits")]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)


def bare(axes: "Axes") -> None:
    """No frame, no tick marks, dark letters."""
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, labelsize=9, colors=INK)
    axes.xaxis.label.set_color(INK)
