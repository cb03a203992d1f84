"""What runs came to, on one page beside the papers' figures: `python -m fdg_jax.report WORKDIR...`.

Nothing on it is typed in: our numbers come from the folders of the runs, the papers' from `published.json`.
"""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from fdg_jax import comparisons, page, staleness, tables
from fdg_jax.commands import Parser, complain
from fdg_jax.figures import Picture, learning_curves
from fdg_jax.plots import save
from fdg_jax.published import TABLES, TITLES, cells
from fdg_jax.results import Run, find
from fdg_jax.sealed import replace_text
from fdg_jax.tally import Group, Task, by_task, task_of

OWN_PICTURES = {  # that a run may have drawn itself
    "trace.png": "When each device did what, planned and measured",
    "staleness.png": "Delay, distance, gradient and cosine of every stage",
}
DRAWN = re.compile(r"(curves_\d+|betas_\d+_K\d+(_\d+)?|stages_\d+_beta[\de.+-]+(_\d+)?|staleness_\d+)\.png")
PNG = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"  # with which every such file begins, and ends if it is whole


def write(runs: Sequence[Run], out: Path) -> Path:
    """Draws the figures into a folder and writes the page beside them.

    Args:
        runs: from `results.find`, at least one.
        out: made where it is missing; files of an earlier report are replaced, its pictures removed.

    Returns:
        The page.

    Raises:
        OSError: it cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    for old in [path for path in out.iterdir() if DRAWN.fullmatch(path.name) and path.is_file()]:
        old.unlink()
    tasks = by_task(runs)
    sections = [section for table in TABLES for section in _published(table, runs)]
    curves = (learning_curves(f"curves_{n}", task.title, own) for n, (task, own) in enumerate(tasks.items()))
    learning = _separated(tasks) + _drawn(curves, out, "Nothing was measured yet.")
    sections += [("Learning curves, as Figure 3", learning)] if tasks else []
    compared = [picture for n, (task, own) in enumerate(tasks.items()) for picture in comparisons.draw(n, task, own)]
    if compared:
        sections.append(("Shrinking factors and stages, as Figure 4", _mixed(tasks) + _drawn(compared, out)))
    if inside := _drawn(_staleness(runs), out) + _own_pictures(runs):
        sections.append(("Inside single runs", inside))
    sections += [("Runs by method", tables.by_method(tasks))] if tasks else []
    sections.append(("Every run", tables.every_run(runs)))
    path = out / "index.html"
    replace_text(path, page.page("What the runs came to", _summary(runs), sections))
    return path


def _summary(runs: Sequence[Run]) -> str:
    """How many there are, and what nobody should overlook."""
    unfinished = sum(not run.finished for run in runs)
    parts = [page.paragraph(f"{_count(len(runs), 'run')}, {unfinished or 'none'} of them unfinished.", "dim")]
    if not any(run.cell for run in runs):
        hint = "None was made for a cell of the papers' tables: python -m fdg_jax.reproduce makes such runs."
        parts.append(page.paragraph(hint, "dim"))
    for scale in sorted({run.scale or "unknown" for run in runs if run.cell and run.scale != "full"}):
        parts.append(_loud(scale, [run for run in runs if run.cell and (run.scale or "unknown") == scale]))
    if noted := notes(runs):
        parts.append(page.warning("What is missing in these runs", page.listing(noted)))
    return "\n".join(parts)


def notes(runs: Iterable[Run]) -> list[str]:
    """What is missing in runs, each with its folder."""
    return [f"{run.workdir}: {note}" for run in runs for note in run.notes]


def _loud(scale: str, runs: Sequence[Run]) -> str:
    """What runs of less than the papers' task are."""
    trained, timed = [run for run in runs if not run.timed], [run for run in runs if run.timed]
    lines = [
        f"{_described(trained)} stand in for cells of the papers' tables. Their errors say that everything runs, not "
        "whether the papers' figures are met."
    ] * bool(trained) + [f"{_described(timed)} for the time alone."] * bool(timed)
    return page.warning(f"Scale {scale}: this is not the papers' task", "".join(map(page.paragraph, lines)))


def _described(runs: Sequence[Run]) -> str:
    """How many there are, of how many epochs, of which network on which images."""
    ran = sorted({task_of(run).ran for run in runs})
    epochs = " or ".join(sorted({str(run.setting("epochs", "?")) for run in runs}))
    epochs += " epoch" if epochs == "1" else " epochs"
    return f"{_count(len(runs), 'run')} of {epochs} ({'; '.join(ran)})"


def _published(table: str, runs: Sequence[Run]) -> Iterator[tuple[str, str]]:
    """A section for every scale at which runs were made for a table."""
    for scale in dict.fromkeys(run.scale for run in runs if run.cell and run.cell.table == table):
        body = tables.of_cells(table, runs, scale)
        times = tables.of_times(table, runs, scale) if any(cell.is_time for cell in cells(table)) else ""
        yield TITLES[table] + ("" if scale == "full" else f" (scale {scale or 'unknown'})"), body + times


def _separated(tasks: Mapping[Task, object]) -> str:
    """Says that runs of different tasks are never in one pair of axes."""
    text = f"The runs are of {len(tasks)} tasks, a network on a set of images each: every task has axes of its own."
    if len({task.ran for task in tasks}) < len(tasks):
        text += " Some ran the same network on the same images, in place of different ones of the papers."
    return page.paragraph(text) if len(tasks) > 1 else ""


def _mixed(tasks: Mapping[Task, Sequence[Group]]) -> str:
    """Says that runs with other settings have figures of their own."""
    text = "Runs that differ in more than beta or K have figures of their own, and BP stands only beside runs like it."
    return page.paragraph(text) if any(map(comparisons.differ, tasks.values())) else ""


def _staleness(runs: Iterable[Run]) -> Iterator[Picture]:
    """Of runs that have measured it, and have not drawn it themselves."""
    for number, run in enumerate(runs):
        if staleness.probed(run.lines) and not (run.workdir / "staleness.png").is_file():
            text = f"{OWN_PICTURES['staleness.png']}, {run.workdir}"
            yield Picture(f"staleness_{number}", staleness.draw(run.lines), f"{text}: a line a stage.", text)


def _drawn(pictures: Iterable[Picture | None], out: Path, otherwise: str = "") -> str:
    """The pictures in the page, each a file beside it too."""
    shown = []
    for picture in filter(None, pictures):
        path = save(picture.figure, out / f"{picture.name}.png")
        shown.append(page.image(path.read_bytes(), picture.alt, picture.caption))
    return "\n".join(shown) or (page.paragraph(otherwise) if otherwise else "")


def _own_pictures(runs: Iterable[Run]) -> str:
    """What runs have drawn themselves; a file that is no PNG, or not a whole one, is left out."""
    shown = []
    for run in runs:
        for name, caption in OWN_PICTURES.items():
            with suppress(OSError):
                data, title = (run.workdir / name).read_bytes(), f"{caption}, {run.workdir}"
                if data.startswith(PNG[0]) and data.endswith(PNG[1]):
                    shown.append(page.image(data, f"{title}. Drawn by the run itself.", title))
    return "\n".join(shown)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def default_out(workdirs: Sequence[str]) -> Path:
    """`report` in the folder that holds the runs: the first that is named, or the one above where that is a run."""
    first = Path(workdirs[0])
    runs = find([first])
    above = first.parent if first.name not in ("", "..") else first.resolve().parent
    return (above if runs[0].workdir == first else first) / "report"


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the report that the command line asks for; the exit status: 0, or 2 where what is named cannot be used."""
    parser = Parser(
        prog="python -m fdg_jax.report",
        description="Learning curves, tables and comparisons of runs on one HTML page, with the papers' figures.",
    )
    about = "a run's folder, or one above runs; runs/ by default"
    parser.add_argument("workdirs", nargs="*", default=["runs"], metavar="WORKDIR", help=about)
    parser.add_argument("--out", help="folder for index.html and its PNGs; by default report/ where the runs are")
    given = parser.parse_args(argv)
    try:
        runs = find(given.workdirs)
        out = Path(given.out) if given.out else default_out(given.workdirs)
        path = write(runs, out)
    except ValueError as error:
        return complain(error, 2)
    except OSError as error:
        where = error.filename or given.out
        return complain(f"cannot write to --out={where}: {error.strerror}; choose another folder", 2)
    except KeyboardInterrupt:
        return complain("stopped; the report is not complete", 130)
    for note in notes(runs):
        print(note)
    print(f"{path}: {_count(len(runs), 'run')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
