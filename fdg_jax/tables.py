"""The tables of the report: the papers' cells with ours beside, times, runs by method, every run."""

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import groupby
from typing import TypeVar

from fdg_jax import page
from fdg_jax.by_name import own_default
from fdg_jax.jobs import SCALES, TIMED_EPOCHS, name_of
from fdg_jax.methods import POLICY
from fdg_jax.published import TABLES, Cell, Key, cells, to_run, to_time
from fdg_jax.results import Run
from fdg_jax.tally import METHODS, NETWORKS, Group, Place, Task, by_place, of_cell, task_of

# A head that ends in a space stands over numbers.
CELLS = ("Method", "beta ", "K ", "Ours, % ", "Least to greatest ", "Seeds ", "Paper, % ", "Seconds ", "Hardware")
TIMES = ("Method", "K ", "Ours, % of BP ", "Paper, % of BP ", "Ours, s an epoch ", "Paper, s an epoch ", "Hardware")
METHOD = ("Method", "Epochs ", "Error, % ", "Least to greatest ", "Seeds ", "Seconds ", "Images/s ", "Hardware")
RUNS = ("Folder", "Seed ", "Epochs ", "Error, % ", "Seconds ", "Hardware")
CELLS_NOTE = (
    "Ours is the median over seeds, from the files of the runs; seconds are those of a whole run, the median. The "
    "paper's figures are its authors'; * is what they reran with their recipe, + what they cite, r what only their "
    "repository prints. The line beneath makes the runs anew, in a folder of their own."
)
UNKNOWN = "the command is not known"
ANSWERS = {
    "stash": "with the weights that its forward saw",
    "current": "with activations of its forward and weights of today",
    "recompute": "with weights of today, on what its forward got",
}
TIMES_NOTE = (
    "Of the training alone, without compilation and evaluation, the median over seeds and betas; in percent where BP "
    "ran on devices of the same kind. The paper's percents are of Tesla K80; its seconds, which the repository prints, "
    f"are of hardware that it does not name. Where no error is published, ours are of runs of {TIMED_EPOCHS} epochs."
)

P = TypeVar("P", Key, Place)


def of_cells(table: str, runs: Sequence[Run], scale: str | None) -> str:
    """A table of the papers with the runs that were made for it at a scale; a cell without any says so."""
    ours = {key: of_cell(runs, key, scale) for key in to_run(table)}
    groups = [
        (network, [_cell(key, runs) for key in own for runs in _by_policy(ours[key])])
        for network, own in _networks(ours)
    ]
    title = f"Top-1 test error after the last epoch{_not_the_task(scale)}"
    note = " ".join(filter(None, (CELLS_NOTE, _answers([run for own in ours.values() for run in own]))))
    return page.table(title, CELLS, groups) + page.paragraph(note, "dim")


def _not_the_task(scale: str | None) -> str:
    return "" if scale == "full" else f". SCALE {(scale or 'unknown').upper()}: OURS ARE NOT OF THE PAPERS' TASK"


def _networks(places: Iterable[P]) -> Iterator[tuple[str, list[P]]]:
    """The places of every network: by K, BP first and FDG last, its beta falling; else as in the papers."""
    for network, own in groupby(places, key=lambda place: place.network):
        rows = sorted(own, key=lambda row: (row.num_stages, row.method == "fdg", -(getattr(row, "beta", None) or 0)))
        yield NETWORKS.get(network, network), rows


def _answers(runs: Iterable[Run]) -> str:
    """Which weights answered what came late, by the settings of the runs."""
    used = sorted({policy for run in runs if (policy := _policy(run))})
    ours = ", or ".join(f"{ANSWERS.get(policy, 'otherwise')} (policy {policy})" for policy in used)
    theirs = f"in the code that the authors released, {ANSWERS['current']} (as in experiments/as_released.py)"
    return f"A gradient that comes late is answered {ours}; {theirs}." if used else ""


def _policy(run: Run) -> str | None:
    """None of a method that leaves no choice."""
    policy = run.setting("method.policy") if run.setting("method.name") in POLICY else None
    return policy and str(policy)


def _by_policy(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs apart that answer with other weights; one list, empty, where there are none."""
    return [[run for run in runs if _policy(run) == policy] for policy in dict.fromkeys(map(_policy, runs))] or [[]]


def _unusual(runs: Iterable[Run]) -> set[str]:
    """Policies that are not the method's own, which `reproduce` takes."""
    own = {(policy, own_default(run.setting("method.name"), "policy", "")) for run in runs if (policy := _policy(run))}
    return {policy for policy, default in own if policy != default}


def _commands(runs: Iterable[Run]) -> str:
    """What makes these runs of cells anew, a line a cell."""
    made: dict[tuple, list[Run]] = {}
    for run in runs:
        made.setdefault((run.cell, task_of(run).path), []).append(run)
    return "".join(page.command(_again(own)) for own in made.values())


@cache
def _known() -> frozenset[Key]:
    return frozenset(key for table in TABLES for key in (*to_run(table), *to_time(table)))


def _again(runs: Sequence[Run]) -> str:
    """The command for all runs of a cell; that of the first where `reproduce` has no such cell."""
    key, scale, data = runs[0].cell, runs[0].scale, task_of(runs[0]).path
    seeds = {run.setting("seed") for run in runs}
    if key is None or key not in _known() or scale not in SCALES or None in seeds or _unusual(runs):
        return runs[0].command or UNKNOWN
    words = ["python", "-m", "fdg_jax.reproduce", key.table, f"--scale={scale}", f"--only={name_of(key)}"]
    words += [f"--seeds={','.join(map(str, sorted(seeds)))}", f"--workdir=runs/again_{scale}"]
    return shlex.join([*words, f"--data={data}"] if data else words)


def _cell(key: Key, runs: Sequence[Run]) -> str:
    method = ", policy ".join([METHODS.get(key.method, key.method), *sorted(_unusual(runs))])
    head = [page.cell(method), page.number(key.beta, 1), page.number(key.num_stages, 0)]
    paper = page.cell(_paper(cell for cell in cells(key.table) if cell.key == key), "number")
    if not runs:
        return page.row([*head, page.cell("not run", "none number"), *["<td></td>"] * 2, paper, *["<td></td>"] * 2])
    group = Group("", tuple(runs))
    return page.row(
        [
            *head,
            *_error(group),
            page.cell(group.seeds, "number"),
            paper,
            page.number(group.median_of("seconds"), 0),
            page.cell("; ".join(group.hardware)),
        ],
        _commands(runs),
        len(CELLS),
    )


def _error(group: Group) -> list[str]:
    """Median and spread, or how far it went."""
    if group.error is None:
        epochs = max(run.epochs for run in group.runs)
        return [
            page.cell("not finished", "none number"),
            page.cell(f"{epochs:g} epoch{'' if epochs == 1 else 's'}", "none number"),
        ]
    spread = f"{group.error.least:.2f} to {group.error.greatest:.2f}"
    return [page.number(group.error.median, kind="number ours"), page.cell(spread, "number")]


def _paper(published: Iterable[Cell]) -> str:
    """Like "6.19*, 6.97+": equal figures of both sources once."""
    marks: dict[str, str] = {}
    for cell in published:
        if cell.error is not None:
            mark = {"rerun": "*", "cited": "+"}.get(cell.reported_by or "", "")
            marks.setdefault(f"{cell.error:.2f}{mark}", "" if cell.source == "preprint" else " r")
    return ", ".join(figure + source for figure, source in marks.items()) or "not printed"


def of_times(table: str, runs: Sequence[Run], scale: str | None) -> str:
    """What an epoch takes, ours beside the papers', for every method and K of which a time is published."""
    published: dict[Place, list[Cell]] = {}
    for cell in cells(table):
        if cell.is_time:
            published.setdefault(Place(cell.network, cell.dataset, cell.method, cell.num_stages), []).append(cell)
    groups = by_place(runs, scale)
    bodies = [
        (network, [_time(place, published[place], groups) for place in own]) for network, own in _networks(published)
    ]
    return page.table(f"Time{_not_the_task(scale)}", TIMES, bodies) + page.paragraph(TIMES_NOTE, "dim")


def _time(place: Place, published: Sequence[Cell], ours: Mapping[Place, Group]) -> str:
    _, _, method, num_stages = place
    group, bp = ours.get(place), ours.get(place._replace(method="bp", num_stages=1))
    seconds, base = (own.median_of("seconds_per_epoch") if own else None for own in (group, bp))
    comparable = group and bp and None not in group.device_kinds and group.device_kinds == bp.device_kinds
    share = 100 * seconds / base if seconds and base and comparable else None
    missing = "not measured" if group else "not a method here" if method == "data_parallel" else "not run"
    unmeasured = group and bp and not (seconds and base)
    return page.row(
        [
            page.cell(METHODS.get(method, method)),
            page.number(num_stages, 0),
            page.cell("not measured", "none number") if unmeasured else page.number(share, 1, "number ours"),
            page.number(next((cell.percent_of_bp for cell in published if cell.percent_of_bp), None)),
            page.number(seconds) if seconds else page.cell(missing, "none number"),
            page.number(next((cell.seconds_per_epoch for cell in published if cell.seconds_per_epoch), None), 1),
            page.cell("; ".join(group.hardware) if group else ""),
        ],
        _commands(group.runs) if group else "",
        len(TIMES),
    )


def by_method(tasks: Mapping[Task, Sequence[Group]]) -> str:
    """A row a group of seeds, under their network and data."""
    bodies = [(task.title, [_method(group) for group in groups]) for task, groups in tasks.items()]
    return page.table("Runs that differ in their seed alone, put together", METHOD, bodies)


def _method(group: Group) -> str:
    epochs = max(run.epochs for run in group.runs)
    return page.row(
        [
            page.cell(group.label),
            page.cell(f"{epochs:g}", "number"),
            *_error(group),
            page.cell(group.seeds, "number"),
            page.number(group.median_of("seconds"), 1),
            page.number(group.median_of("images_per_second"), 0),
            page.cell("; ".join(group.hardware)),
        ]
    )


def every_run(runs: Sequence[Run]) -> str:
    """A row a folder, with its own command beneath, and what it ran with."""
    return page.table("Every run, by folder", RUNS, [("", [_run(run) for run in runs])])


def _outcome(run: Run) -> str:
    if not run.finished:
        return page.cell("not finished", "none number")
    return page.cell("for its time", "none number") if run.timed else page.number(run.error)


def _run(run: Run) -> str:
    asked = run.setting("epochs")
    versions = run.starts[-1].get("versions") if run.starts else None
    shown = ", ".join(f"{name} {version}" for name, version in versions.items()) if isinstance(versions, dict) else ""
    again = f", {len(run.starts)} starts" if len(run.starts) > 1 else ""
    return page.row(
        [
            page.cell(run.workdir),
            page.cell(run.setting("seed", "?"), "number"),
            page.cell(f"{run.epochs:g}" + ("" if run.finished else f" of {asked}"), "number"),
            _outcome(run),
            page.number(run.seconds, 1),
            page.cell((run.hardware or "unknown") + again),
        ],
        page.folded("command and versions", page.command(run.command or UNKNOWN) + page.paragraph(shown or "unknown")),
        len(RUNS),
    )
