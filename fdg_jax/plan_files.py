"""What a plan leaves on disk: the schedule in ticks, as pictures; its timeline in seconds, as a picture and a trace."""

import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

from fdg_jax import plots, trace_picture
from fdg_jax.config import ConfigError
from fdg_jax.estimates import RunPlan
from fdg_jax.expected import SETTLED, planned
from fdg_jax.schedule import row
from fdg_jax.sealed import replace_text
from fdg_jax.timeline import Box
from fdg_jax.trace import Timeline, chrome_trace, table


def check_writable(folder: Path) -> None:
    """Before anything is planned; makes nothing.

    Raises:
        ConfigError: no files can be written there.
    """
    place = next(each for each in (folder, *folder.absolute().parents) if os.path.lexists(each))
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise _unwritable(folder, error) from None


def draw(plan: RunPlan, folder: Path) -> str:
    """The schedule in ticks, and what it comes to in seconds, as files; what to say of them, and where the time goes.

    Raises:
        ConfigError: they cannot be written.
    """
    timelines = [window(plan)]
    try:
        figure = plots.draw_schedule(plan.schedule, title=str(plan.method))
        paths = [plots.save(figure, folder / f"schedule{suffix}") for suffix in plots.SUFFIXES]
        paths.append(plots.save(trace_picture.draw(timelines), folder / "timeline.png"))
        replace_text(folder / "trace.json", json.dumps(chrome_trace(timelines)) + "\n")
    except OSError as error:
        raise _unwritable(folder, error) from None
    written = "\n".join(f"written: {path}" for path in (*paths, folder / "trace.json"))
    return f"\nwhere the time of every device goes, in percent:\n{table(timelines)}\n\n{written}"


def _unwritable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"cannot write to --out={folder}: {error.strerror or error}; choose another")


def window(plan: RunPlan) -> Timeline:
    """What the run comes to in seconds once its pipeline is full: whole periods, as many as a picture shows."""
    schedule = plan.schedule
    begin = schedule.span + SETTLED * schedule.period
    rows = [row(schedule, begin + tick) for tick in range(schedule.period)]
    lanes = [[k for k, own in enumerate(plan.devices) if own == device] for device in set(plan.devices)]
    most = max(sum(bool(visits[k]) for visits in rows for k in lane) for lane in lanes)
    stage, visit = next((k, visit) for k, visit in enumerate(rows[0]) if visit)
    costs = [replace(cost, activations=0.0, cotangents=0.0) for cost in plan.costs]  # transfers take no time
    first = Box(stage, plan.devices[stage], begin, visit, 0.0, 0.0)
    return planned(schedule, costs, plan.devices, first, max(1, trace_picture.MOST // most) * schedule.period)
