"""A table of the papers as text: the medians of its runs beside the papers' figures."""

from collections.abc import Sequence

from fdg_jax.jobs import name_of
from fdg_jax.methods import PRESETS
from fdg_jax.overview import columns
from fdg_jax.published import TITLES, cells, to_run, to_time
from fdg_jax.results import Run
from fdg_jax.tally import Group, Place, by_place, of_cell


def summary(table: str, runs: Sequence[Run], scale: str) -> str:
    """A line a cell: median, least and greatest test error of its finished runs, and the papers'; then times."""
    lines: list[tuple[str, ...]] = [("cell", "seeds", "median", "least - greatest", "papers")]
    for key in to_run(table):
        published = [cell for cell in cells(table) if cell.key == key and cell.error is not None]
        papers = ", ".join(f"{cell.error:.2f} ({cell.reported_by}, {cell.source})" for cell in published)
        lines.append((name_of(key), *_ours(of_cell(runs, key, scale)), papers))
    text = f"{TITLES[table]}{_task(scale)}: test error after the last epoch, %\n{columns(lines)}"
    return f"{text}\n\n{_times(table, runs, scale)}" if to_time(table) else text


def _ours(runs: Sequence[Run]) -> tuple[str, str, str]:
    """Seeds, median and spread, of those that are finished."""
    if not runs:
        return "0", "not run", ""
    group = Group("", tuple(runs))
    if group.error is None:
        return group.seeds, "not finished", ""
    return group.seeds, f"{group.error.median:.2f}", f"{group.error.least:.2f} - {group.error.greatest:.2f}"


def _times(table: str, runs: Sequence[Run], scale: str) -> str:
    """A line a place that is run for its time alone."""
    groups, lines = by_place(runs, scale), [("cell", "ours", "papers")]
    for key in [key for key in to_time(table) if key.method in PRESETS]:
        group = groups.get(Place(key.network, key.dataset, key.method, key.num_stages))
        seconds = group.median_of("seconds_per_epoch") if group else None
        missing = "not measured" if group else "not run"
        papers = ", ".join(f"{cell.seconds_per_epoch:g}" for cell in cells(table) if cell.key == key)
        lines.append((name_of(key), missing if seconds is None else f"{seconds:.3g}", papers))
    return f"seconds an epoch, of training alone{_task(scale)}\n{columns(lines)}"


def _task(scale: str) -> str:
    return f" (scale {scale})" if scale == "full" else f" (scale {scale}, not the papers' task)"
