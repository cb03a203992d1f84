"""Runs the cells of a published table that are not run yet, one after another, and writes the report:

    python -m fdg_jax.reproduce table4 --scale smoke

A run is a process of `python -m fdg_jax.main` with a file of `experiments/`, since devices are made before JAX starts.
Exit status: 0 done, 1 a run failed, 2 the command or what a run is given is wrong, 130 or 143 stopped by a signal.
"""

import argparse
import math
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path

from fdg_jax.commands import Parser, complain
from fdg_jax.jobs import SCALES, Job, Runner, data_keys, make_jobs, name_of, run_process
from fdg_jax.lock import locked
from fdg_jax.methods import PRESETS
from fdg_jax.names import check_name
from fdg_jax.published import TABLES, cells, to_run, to_time
from fdg_jax.report import notes, write
from fdg_jax.results import find, read
from fdg_jax.summary import summary

HELP = """\
Scales:
  smoke  does everything run? The smallest network of each family on the digits that come with the package, 12 epochs,
         one seed. Its errors say nothing about the papers'. Below 10 minutes and 100 MB on two cores.
  short  the papers' networks on CIFAR, 24 epochs instead of 300, the rate dropping in proportion, three seeds.
  full   the files of experiments/, which are the papers' recipe: 300 epochs, three seeds.

Of a place whose time alone is published (WRN-28-10 in table4), two epochs are run, of seed 0.

A late gradient is answered with the weights of its forward, as the papers' theory has it (policy stash). Their released
code takes those of today: for that, add --config.method.policy=current and another --workdir to a command that
--dry_run prints; such a run fills no table.

Time: short and full want an accelerator; the progress lines estimate what is left, --only and --seeds choose a part.
The authors report 30 s an epoch for ResNet-56 and 219 s for WRN-28-10 with backpropagation, on hardware they do not
name: at scale full 2.5 and 18 hours a run, at short about a twelfth of it.

Disk: while a run is going on, its checkpoints hold the batches in flight too (two of 0.3 GB for ResNet-20 in two
stages, of 2.2 GB for ResNet-56 in four); those of a finished run are removed, its weights (4 bytes a parameter) and
metrics stay.

A run lies in WORKDIR/<table>/<cell>/seed<s>, beside its log.txt. Ctrl-C saves the one that is at work; the same command
goes on with it and skips what is finished. A cell that two tables share is run once. When all are done, the medians
are printed and the report is written to WORKDIR/report."""


def run_all(jobs: Sequence[Job], runner: Runner, received: list[int]) -> dict[Job, str]:
    """Runs what is not finished, until a signal is received; why runs failed, of those that did.

    Raises:
        ValueError: a run refuses what it is given.
        OSError: what must be written cannot be.
    """
    began, failed, done = time.monotonic(), {}, []
    order = list(dict.fromkeys(job.key for job in jobs))
    waiting = [job for job in jobs if not job.finished]
    for job in jobs:
        if job.finished:
            job.tidy()
            if not (job.folder / "cell.json").exists():  # its command was run by hand
                job.begin()
            done.append((job.key.network, (read(job.folder).seconds or 0.0) / job.epochs))
    runs = f"{len(jobs)} run{'' if len(jobs) == 1 else 's'}"
    print(f"{len(done)} of {runs} finished already" if done else runs, flush=True)
    for number, job in enumerate(waiting):
        start = time.monotonic()
        left = time_left(done, [(each.key.network, each.epochs) for each in waiting[number:]])
        clock = f"{_hours(start - began)} so far, {'no estimate yet' if left is None else f'about {_hours(left)} left'}"
        print(f"cell {1 + order.index(job.key)} of {len(order)}  {job}  ({clock})", flush=True)
        job.begin()
        reason = runner(job, received)
        if received and not job.finished:
            print(f"stopped in {job.folder}: the same command goes on from there")
            break
        if reason is not None:
            failed[job] = reason
            print(f"    failed: {reason}", flush=True)
        else:
            job.tidy()
            took = time.monotonic() - start
            done.append((job.key.network, took / job.epochs))
            print(f"    {_outcome(job)} after {_hours(took)}", flush=True)
        if received:
            break
    return failed


def time_left(done: Sequence[tuple[str, float]], waiting: Sequence[tuple[str, int]]) -> float | None:
    """Seconds that runs will take, by those of the same network, or by all where there are none.

    Args:
        done: network and seconds an epoch.
        waiting: network and epochs.
    """
    if not done:
        return None
    own = {network: [seconds for each, seconds in done if each == network] for network, _ in waiting}
    return sum(epochs * statistics.mean(own[network] or [s for _, s in done]) for network, epochs in waiting)


def _outcome(job: Job) -> str:
    run = read(job.folder)
    if job.timed:
        return f"{math.nan if run.seconds_per_epoch is None else run.seconds_per_epoch:.3g} s an epoch"
    return f"test error {math.nan if run.error is None else run.error:.2f} %"


def _hours(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m fdg_jax.reproduce",
        description="Runs the cells of a published table that are not run yet, and writes the report.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("table", help=", ".join(TABLES))
    parser.add_argument("--scale", default="smoke", help=f"{', '.join(SCALES)}; smoke by default")
    parser.add_argument("--seeds", help="as 0,1,2, which is the default; 0 at scale smoke")
    parser.add_argument("--workdir", metavar="WORKDIR", type=Path, help="runs/reproduce_<scale> by default")
    parser.add_argument(
        "--data", metavar="PATH", help="a folder of images or an .npz file; by default TFDS fetches CIFAR"
    )
    parser.add_argument("--only", metavar="TEXT", default="", help="the cell of this name, or all with it in theirs")
    parser.add_argument("--dry_run", action="store_true", help="print the commands of the runs that are missing")
    return parser


def main(arguments: Sequence[str] | None = None, runner: Runner = run_process) -> int:
    """Does what the command line asks; the exit status."""
    try:
        asked = _parser().parse_args(arguments)
        check_name("table", asked.table, TABLES)
        check_name("scale", asked.scale, SCALES)
        workdir = asked.workdir or Path("runs") / f"reproduce_{asked.scale}"
        data = data_keys(asked.data, asked.scale, to_run(asked.table)[0].dataset)
        seeds = _seeds(asked.seeds or SCALES[asked.scale].seeds)
        jobs = _chosen(make_jobs(asked.table, asked.scale, seeds, workdir, data), asked.only)
        _check_scale(workdir, asked.scale)
        if asked.dry_run:
            print(*[job.typed + "\n" for job in jobs if not job.finished], sep="", end="")
            return 0
        with _held(workdir / asked.table):
            return _carry_out(asked.table, asked.scale, workdir, jobs, runner)
    except ValueError as error:
        return complain(error, 2)
    except OSError as error:
        return complain(f"{error.filename or 'a file'} cannot be written: {error.strerror}", 1)
    except KeyboardInterrupt:
        return complain("stopped; the same command goes on", 130)


def _carry_out(table: str, scale: str, workdir: Path, jobs: Sequence[Job], runner: Runner) -> int:
    without = dict.fromkeys(f"{c.network} {c.method} K{c.num_stages}" for c in cells(table) if c.method not in PRESETS)
    if without:
        print(f"not run, since there is no such method here: {', '.join(without)}")
    with _signals() as received:
        failed = run_all(jobs, runner, received)
    if received:
        return 128 + received[0]
    if any((job.folder / "metrics.jsonl").exists() for job in jobs):
        runs = find([workdir])
        places = {key[1:] for key in (*to_run(table), *to_time(table))}  # of which another table may have the runs
        noted = notes(run for run in runs if run.cell and run.cell[1:] in places)
        print("", summary(table, runs, scale), "", *noted, sep="\n")
        print(f"report: {write(runs, workdir / 'report')}")
    for job, reason in failed.items():
        complain(f"{job} failed: {reason}", 1)
    return int(bool(failed))


def _seeds(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words) or len(set(words)) < len(words):
        raise ValueError(f"--seeds must be whole numbers, each once, as 0,1,2; got {text!r}")
    return [int(word) for word in words]


def _chosen(jobs: Sequence[Job], only: str) -> list[Job]:
    exact = [job for job in jobs if only in (job.folder.parent.name, name_of(job.key))]
    chosen = exact or [job for job in jobs if only in job.folder.parent.name]
    if not chosen:
        names = ", ".join(dict.fromkeys(job.folder.parent.name for job in jobs))
        raise ValueError(f"--only={only} is in the name of no cell ({names})")
    return chosen


def _check_scale(workdir: Path, scale: str) -> None:
    for path in sorted(workdir.glob("*/*/*/cell.json")):
        other = read(path.parent).scale
        if other is not None and other != scale:
            raise ValueError(f"{workdir} holds runs of scale {other}, not {scale}: choose another --workdir")


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """The folder, made where it is not there, and locked against another such command."""
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder))
        except OSError as error:
            raise ValueError(f"cannot write to --workdir={folder.parent}: {error.strerror}; choose another") from error
        yield


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM, for the run at work to be told."""
    received: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, lambda each, _: received.append(each)) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
