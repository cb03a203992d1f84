"""What probes found, as tags of a `metrics.jsonl` and as a picture; `probe` says what each number is."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fdg_jax.plots import INK, colour, new_figure
from fdg_jax.probe import Figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = {
    "delay": r"delay $\tau$, updates",
    "distance": r"distance $\Vert\theta_t - \theta_{t-\tau}\Vert\ /\ \Vert\theta_t\Vert$",
    "cosine": r"cosine of $g$ and the fresh gradient",
    "gradient_norm": r"norm $\Vert g\Vert$ of the delayed gradient, shrunk",
    "factor": r"factor $\beta^{K-1-k}$",
}


def tagged(figures: Sequence[Figures]) -> dict[str, float]:
    """`{"staleness/stage0/delay": 3, ..}`, as a metric writer takes them."""
    return {
        f"staleness/stage{k}/{name}": float(value)
        for k, own in enumerate(figures)
        for name, value in own._asdict().items()
    }


def probed(lines: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those lines of a `metrics.jsonl` that are of a probe."""
    return [line for line in lines if any(tag.startswith("staleness/") for tag in line)]


def draw(lines: Iterable[Mapping[str, Any]]) -> "Figure":
    """A panel for every quantity, a line for every stage, over the steps of the probes.

    Args:
        lines: of a `metrics.jsonl`; those without a probe are passed over.

    Raises:
        ValueError: no line has a probe.
    """
    lines = probed(lines)
    if not lines:
        raise ValueError("there are no probes to draw: train with --config.probe_every_steps=100")
    stages = sorted({int(tag.split("/")[1][len("stage") :]) for tag in lines[-1] if tag.startswith("staleness/")})
    figure = new_figure(10, 8)
    panels = list(figure.subplots(3, 2, sharex=True).flat)
    for axes, (name, title) in zip(panels, PANELS.items(), strict=False):
        for k in stages:
            _line(axes, k, lines, f"staleness/stage{k}/{name}")
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        _scale(axes, name)
    for axes in panels[3:5]:
        axes.set_xlabel("step", color=INK)
        axes.tick_params(labelbottom=True)
    handles, labels = panels[0].get_legend_handles_labels()
    panels[5].axis("off")
    columns = -(-len(stages) // 8)
    panels[5].legend(handles, labels, loc="center", ncols=columns, frameon=False, fontsize=10)
    return figure


def _line(axes: "Axes", k: int, lines: Sequence[Mapping[str, Any]], tag: str) -> None:
    """Where a number is null, or missing, the line has a gap."""
    values = [np.nan if line.get(tag) is None else line[tag] for line in lines]
    style = ("-", "--", ":")[k // 7 % 3]  # colours repeat after seven
    marker = "o" if len(lines) < 60 else ""
    steps = [line["step"] for line in lines]
    axes.plot(steps, values, style, marker=marker, markersize=3.5, linewidth=1.4, color=colour(k), label=f"stage {k}")


def _scale(axes: "Axes", name: str) -> None:
    """Where a quantity has a natural end, the axis has it too."""
    from matplotlib.ticker import MaxNLocator

    low, high = axes.dataLim.intervaly
    if name == "delay":
        axes.set_ylim(-0.08 * max(1, high), 1.08 * max(1, high))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    elif name == "cosine":
        axes.set_ylim(top=1 + 0.05 * (1 - min(low, 0.9)))
    elif name == "gradient_norm":
        axes.set_yscale("log" if low > 0 else "linear")
    else:
        axes.set_ylim(-0.04 * (high or 1), 1.06 * (high or 1))
    axes.grid(color="#E3E6EA", linewidth=0.7)
    axes.tick_params(labelsize=9, colors=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
