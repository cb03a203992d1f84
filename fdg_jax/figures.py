"""Figures of finished and unfinished runs: learning curves, the bars of beta, curves over K.

Each shows runs of one task; a `Picture` says in words what it shows, for those who cannot see it.
"""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from fdg_jax.plots import FAINT, INK, PALETTE, colour, ink_on, new_figure
from fdg_jax.tally import Group, Spread

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES = {"test_error": "test error, %", "train_loss": "training loss, nats"}
STYLES = ("-", "--", ":", "-.")  # of the first curves, which have colours of their own, the next as many, ..
SURPASSES, FALLS_SHORT = "#D55E00", "#56B4E9"  # bars below BP's line, and above it; in the palette of `plots`
MARKED = 12  # points of a curve up to which each is marked
MEDIANS = (
    "Lines are medians over the finished seeds, or over all where none is finished, at epochs that each of them has; "
    "bands reach from the least to the greatest."
)


class Picture(NamedTuple):
    """A figure with its words.

    Attributes:
        name: of its file, without the suffix.
        figure: of matplotlib.
        alt: what is seen, with numbers.
        caption: what it is, and how to read it.
    """

    name: str
    figure: "Figure"
    alt: str
    caption: str


def learning_curves(name: str, title: str, groups: Sequence[Group]) -> Picture | None:
    """Test error and training loss against epochs, a line a group; None where nothing has been measured."""
    shown = [group for group in groups if any(group.curve(curve) for curve in CURVES)]
    if not shown:
        return None
    figure = new_figure(9.5, 3.6 + 0.2 * (len(shown) // 3))
    for axes, (curve, label) in zip(figure.subplots(1, 2), CURVES.items(), strict=True):
        for number, group in enumerate(shown):
            _draw_curve(axes, group, curve, number)
        _finish(axes, "epoch", label, _heights(shown, curve))
    _legend(figure, shown)
    _title(figure, title)
    caption = f"Learning curves, {title}. {MEDIANS}"
    return Picture(name, figure, f"Test error and training loss against epochs, {title}: {_ends(shown)}.", caption)


def stage_curves(name: str, title: str, groups: Sequence[Group]) -> Picture:
    """As Figure 4b-c: test error and training loss for every K, and what an epoch takes, BP being K = 1."""
    figure = new_figure(11.5, 3.7)
    error, loss, time = figure.subplots(1, 3, width_ratios=(3, 3, 2))
    for axes, (curve, label) in zip((error, loss), CURVES.items(), strict=True):
        for number, group in enumerate(groups):
            _draw_curve(axes, group, curve, number)
        _finish(axes, "epoch", label, _heights(groups, curve))
    seconds = [group.median_of("seconds_per_epoch") or 0.0 for group in groups]
    faces = [_colour(group, number) for number, group in enumerate(groups)]
    bars = time.bar(range(len(groups)), seconds, color=faces, width=0.7)
    time.bar_label(
        bars, [f"{value:.3g}" if value else "not\nmeasured" for value in seconds], padding=2, fontsize=8, color=INK
    )
    time.set_xticks(range(len(groups)), [f"K = {group.num_stages}" for group in groups])
    _finish(time, "", "seconds an epoch", seconds)
    _legend(figure, groups)
    _title(figure, title)
    times = ", ".join(f"K = {g.num_stages} {s:.3g} s" for g, s in zip(groups, seconds, strict=True) if s)
    alt = f"Curves for each number of stages, {title}: {_ends(groups)}. Seconds an epoch: {times or 'not measured'}."
    machines = " / ".join(dict.fromkeys(machine for group in groups for machine in group.hardware))
    return Picture(name, figure, alt, f"More stages, {title}. {MEDIANS} Seconds are of training alone, on {machines}.")


class Bar(NamedTuple):
    """Of the figure of betas: our error and the published one, each None where there is none; and why ours is not."""

    beta: float
    error: Spread | None
    published: float | None
    missing: str


def beta_bars(name: str, title: str, bars: Sequence[Bar], bp: Spread | None, bp_published: float | None) -> Picture:
    """As Figure 4a: the test error for every beta, least to greatest as a whisker, with BP's as a line."""
    figure = new_figure(max(5.5, 1.5 + 0.9 * len(bars)), 3.9)
    axes = figure.subplots()
    for place, bar in enumerate(bars):
        _draw_bar(axes, place, bar, bp)
    _draw_bp(axes, bp, bp_published)
    points = [(place, bar.published) for place, bar in enumerate(bars) if bar.published is not None]
    if points:
        axes.plot(*zip(*points, strict=True), "D", markersize=6, color="white", mec=INK, label="FDG, paper", zorder=4)
    axes.set_xticks(range(len(bars)), [f"{bar.beta:g}" for bar in bars])
    axes.set_xlim(-0.6, len(bars) - 0.4)
    heights = [height for bar in bars for height in (*(bar.error or ()), bar.published) if height is not None]
    _finish(axes, "beta", CURVES["test_error"], [*heights, *(bp or ()), bp_published or 0.0])
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9, labelcolor=INK)
    _title(figure, title)
    found = [f"{bar.error.median:.2f} %" if bar.error else bar.missing for bar in bars]
    words = ", ".join(f"beta {bar.beta:g} {result}" for bar, result in zip(bars, found, strict=True))
    caption = f"Gradient shrinking, {title}. Bars are medians, whiskers reach from the least to the greatest seed."
    alt = f"Test errors for values of beta, {title}: {words}; BP {f'{bp.median:.2f} %' if bp else 'not run'}."
    return Picture(name, figure, alt, f"{caption} Orange surpasses BP." if bp else caption)


def _draw_bp(axes: "Axes", bp: Spread | None, published: float | None) -> None:
    if bp:
        axes.axhline(bp.median, color=INK, linewidth=1.4, label=f"BP, {bp.median:.2f} %", zorder=3)
        axes.axhspan(bp.least, bp.greatest, color=INK, alpha=0.12, linewidth=0, zorder=0.5)
    if published is not None:
        axes.axhline(published, color=INK, linewidth=1, linestyle=":", label=f"BP, paper, {published:.2f} %")


def _draw_curve(axes: "Axes", group: Group, name: str, number: int) -> None:
    curve = group.curve(name)
    epochs, medians = [epoch for epoch, _ in curve], [spread.median for _, spread in curve]
    face, style = _colour(group, number), STYLES[number // len(PALETTE) % len(STYLES)]
    marker, width = ("o", 1.6) if len(curve) <= MARKED else ("", 1.2)
    label = _plain(group.label)
    axes.plot(epochs, medians, style, color=face, linewidth=width, marker=marker, markersize=3.5, label=label)
    if any(spread.least < spread.greatest for _, spread in curve):
        least, greatest = [spread.least for _, spread in curve], [spread.greatest for _, spread in curve]
        axes.fill_between(epochs, least, greatest, color=face, alpha=0.15, linewidth=0)


def _heights(groups: Sequence[Group], name: str) -> list[float]:
    """Everything that is drawn of a curve, bands too."""
    return [value for group in groups for _, spread in group.curve(name) for value in spread]


def _colour(group: Group, number: int) -> str:
    """BP is dark, whatever stands beside it."""
    return INK if group.method == "bp" else colour(number)


def _draw_bar(axes: "Axes", place: int, bar: Bar, bp: Spread | None) -> None:
    """With its number at the foot, on a ground of its own, for BP's lines cross bars at any height."""
    text, ink, face, turned = bar.missing, "#59636E", "white", 90
    if bar.error is not None:
        median, least, greatest = bar.error
        face, turned = SURPASSES if bp and median < bp.median else FALLS_SHORT, 0
        whisker = ([median - least], [greatest - median]) if least < greatest else None
        axes.bar(place, median, width=0.62, color=face, yerr=whisker, ecolor=INK, capsize=4, zorder=2)
        text, ink = f"{median:.2f}", ink_on(face)
    label = axes.annotate(text, (place, 0), (0, 6), textcoords="offset points", ha="center", va="bottom", zorder=5)
    label.set(rotation=turned, fontsize=9.5, color=ink, bbox={"facecolor": face, "edgecolor": "none", "pad": 1.5})


def _finish(axes: "Axes", below: str, beside: str, values: Sequence[float]) -> None:
    """Labels, a quiet frame, and a scale: from 0, or of powers of ten where losses span more than 30 times."""
    from matplotlib.ticker import MaxNLocator

    smallest, largest = min(values, default=0.0), max(values, default=0.0)
    if beside == CURVES["train_loss"] and 0 < 30 * smallest < largest:
        axes.set_yscale("log")
    elif smallest >= 0 and largest > 0:
        axes.set_ylim(0, 1.12 * largest)
    if below == "epoch":
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.set_xlabel(below, color=INK)
    axes.set_ylabel(_plain(beside), color=INK)
    axes.grid(axis="y", color=FAINT, linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, labelsize=9, colors=INK)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color("#C8CCD2")


def _legend(figure: "Figure", groups: Sequence[Group]) -> None:
    handles: dict[str, Artist] = {}
    for axes in figure.axes:
        found, labels = axes.get_legend_handles_labels()
        handles = dict(zip(labels, found, strict=True)) | handles
    columns = 3 if max(len(group.label) for group in groups) < 40 else 2
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=min(columns, len(handles)),
        frameon=False,
        fontsize=9,
        labelcolor=INK,
    )


def _title(figure: "Figure", title: str) -> None:
    wrapped = textwrap.fill(title, int(13 * figure.get_figwidth()))
    figure.suptitle(_plain(wrapped), x=0.012, ha="left", fontsize=11, color=INK)


def _ends(groups: Sequence[Group]) -> str:
    ends = [(group, group.curve("test_error")) for group in groups]
    words = [
        f"{group.label} {'ends at' if group.finished else 'is so far at'} {curve[-1][1].median:.2f} %"
        for group, curve in ends
        if curve
    ]
    return "; ".join(words) or "no error yet"


def _plain(text: str) -> str:
    """Not to be read as a formula."""
    return text.replace("$", r"\$")
